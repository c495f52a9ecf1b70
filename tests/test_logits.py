"""Every filter equals Hugging Face's; drawing follows the distribution that was asked for."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from lmtutorial.decode.logits import Filters, draw, keep_min_p, keep_top_k, keep_top_p, to_probs

shares = st.floats(0, 1) | st.sampled_from([0.5, 0.9, 0.95])
filters = st.builds(
    Filters,
    temperature=st.just(1.0) | st.floats(0.05, 5),
    top_k=st.none() | st.integers(1, 300),
    top_p=st.none() | shares,
    min_p=st.none() | shares,
    typical_p=st.none() | shares.filter(lambda share: share > 0),
    repetition_penalty=st.just(1.0) | st.floats(0.2, 5),
)


def random_logits(rows, vocab, scale, seed, ties=False):
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale
    return logits.round() if ties else logits


def random_seen(shape, seed):
    texts = torch.randint(shape[1], (shape[0], 5), generator=torch.Generator().manual_seed(seed))
    return texts, torch.zeros(shape, dtype=torch.bool).scatter_(1, texts, True)


def hugging_face(options):
    """The processors that `generate` builds for these options, in its order."""
    chain = LogitsProcessorList()
    if options.repetition_penalty != 1:
        chain.append(RepetitionPenaltyLogitsProcessor(float(options.repetition_penalty)))
    if options.temperature != 1:
        chain.append(TemperatureLogitsWarper(float(options.temperature)))
    if options.top_k is not None:
        chain.append(TopKLogitsWarper(options.top_k))
    if options.top_p is not None and options.top_p < 1:
        chain.append(TopPLogitsWarper(options.top_p))
    if options.min_p is not None:
        chain.append(MinPLogitsWarper(options.min_p))
    if options.typical_p is not None and options.typical_p < 1:
        chain.append(TypicalLogitsWarper(options.typical_p))
    return chain


@settings(max_examples=500)
@given(filters, st.integers(1, 3), st.integers(2, 200), st.floats(0.1, 10), st.integers(0, 10**6))
def test_filters_equal_hugging_faces_on_the_same_logits(options, rows, vocab, scale, seed):
    logits = random_logits(rows, vocab, scale, seed)
    texts, seen = random_seen(logits.shape, seed)
    theirs = hugging_face(options)(texts, logits)
    ours = options.filtered(logits, seen)
    assert torch.equal(ours.isneginf(), theirs.isneginf())
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(options.probs(logits, seen), theirs.softmax(-1), rtol=0, atol=1e-6)


@given(st.integers(2, 60), st.integers(0, 10**6), shares, st.integers(1, 60))
def test_tokens_that_tie_stay_or_go_together(vocab, seed, share, k):
    logits = random_logits(4, vocab, 1.5, seed, ties=True)
    for kept in (keep_top_k(logits, k), keep_top_p(logits, share), keep_min_p(logits, share)):
        least = kept.masked_fill(kept.isneginf(), math.inf).amin(-1, keepdim=True)
        assert torch.equal(kept, logits.masked_fill(logits < least, -math.inf))


@given(st.integers(2, 60), st.integers(0, 10**6), st.floats(0.01, 0.99))
def test_top_p_keeps_enough_and_no_more(vocab, seed, p):
    logits = random_logits(1, vocab, 2, seed)[0]
    probs = logits.double().softmax(-1)
    kept = ~keep_top_p(logits, p).isneginf()
    assume((probs.sort(descending=True).values.cumsum(0) - p).abs().min() > 1e-5)  # no question of rounding
    assert probs[kept].sum() >= p
    assert probs[kept].sum() - probs[kept].min() < p


@given(st.integers(1, 40), st.integers(0, 10**6), st.booleans(), shares)
def test_greedy_is_the_point_mass_on_the_first_largest_logit(vocab, seed, ties, share):
    logits = random_logits(3, vocab, 2, seed, ties)
    best = [row.index(max(row)) for row in logits.tolist()]
    for options in ({"temperature": 0}, {"top_k": 1}, {"temperature": 0, "top_k": 7, "top_p": share}):
        probs = to_probs(logits, **options)
        assert probs.tolist() == [[float(v == b) for v in range(vocab)] for b in best]
        assert Filters(**options).choose(logits, None).tolist() == best


def test_a_temperature_too_small_to_divide_by_is_the_limit_of_small_temperatures():
    logits = torch.tensor([3.0, -80.0, 5.0, 5.0])
    assert to_probs(logits, temperature=1e-300).tolist() == [0, 0, 0.5, 0.5]


@settings(max_examples=200)
@given(filters, st.integers(2, 60), st.integers(0, 10**6), st.floats(0, 1, exclude_max=True))
def test_choosing_is_drawing_from_the_distribution_and_never_what_was_dropped(options, vocab, seed, noise):
    logits = random_logits(3, vocab, 3, seed)
    _, seen = random_seen(logits.shape, seed)
    noise = torch.tensor([noise, 0.0, 1 - 2**-53], dtype=torch.float64)
    chosen = options.choose(logits, noise, seen)
    probs = options.probs(logits, seen)
    assert chosen.tolist() == draw(probs, noise).tolist()
    assert (probs.gather(1, chosen.unsqueeze(1)) > 0).all()


@given(st.lists(st.integers(0, 9), min_size=1, max_size=20).filter(any), st.integers(0, 10**6))
def test_drawing_inverts_the_cumulative_distribution(weights, seed):
    noise = torch.rand(50, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    tickets = [token for token, weight in enumerate(weights) for _ in range(weight)]
    expected = [tickets[int(u * len(tickets))] for u in noise.tolist()]
    assert draw(torch.tensor(weights).float().expand(50, -1), noise).tolist() == expected


def test_frequencies_follow_the_distribution():
    logits = random_logits(1, 40, 1, seed=0)
    options = {"temperature": 0.8, "top_k": 30, "top_p": 0.95}
    probs = to_probs(logits, **options)
    noise = torch.rand(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts = draw(probs.expand(len(noise), -1), noise).bincount(minlength=40)
    assert chi_squared(counts, probs[0]) > 1e-3
    assert chi_squared(counts, to_probs(logits, 0.83, top_k=30, top_p=0.95)[0]) < 1e-3  # it can tell


def chi_squared(counts, probs):
    """The probability of counts this far from `probs`, were these the distribution (Pearson, 1900)."""
    kept = probs > 0
    assert counts[~kept].sum() == 0
    expected = probs[kept].double() * counts.sum()
    statistic = ((counts[kept] - expected) ** 2 / expected).sum()
    return torch.special.gammaincc((kept.sum() - 1).double() / 2, statistic / 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0}, {"top_k": 5, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.9}]
)
def test_probabilities_are_float32_or_finer_whatever_the_logits(dtype, options):
    logits = random_logits(2, 30, 2, seed=0).to(dtype)
    probs = to_probs(logits, **options)
    assert probs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(probs, to_probs(logits.to(probs.dtype), **options))


@pytest.mark.parametrize(
    ("option", "error", "message"),
    [
        (
            {"temperature": -0.5},
            ValueError,
            r"temperature is -0.5; it must be 0 \(greedy\) or a finite number",
        ),
        ({"temperature": math.nan}, ValueError, "temperature is nan"),
        ({"temperature": math.inf}, ValueError, "temperature is inf"),
        ({"temperature": "0.7"}, TypeError, "temperature is '0.7'"),
        ({"temperature": None}, TypeError, "temperature is None"),
        ({"top_k": 0}, ValueError, "top_k is 0; it must be an integer of at least 1, or None"),
        ({"top_k": 2.5}, ValueError, "top_k is 2.5"),
        ({"top_k": True}, TypeError, "top_k is True"),
        ({"top_p": 1.01}, ValueError, "top_p is 1.01; it must be a number from 0 to 1, or None"),
        ({"min_p": -0.1}, ValueError, "min_p is -0.1"),
        ({"typical_p": 2}, ValueError, "typical_p is 2; it must be a number from 0 to 1, or None"),
        (
            {"repetition_penalty": 0},
            ValueError,
            "repetition_penalty is 0; it must be a finite number above 0",
        ),
        ({"repetition_penalty": 1.2}, ValueError, "repetition_penalty=1.2 needs `seen`"),
    ],
)
def test_an_option_out_of_range_is_quoted_with_what_is_allowed(option, error, message):
    with pytest.raises(error, match=message):
        to_probs(torch.zeros(3), **option)
