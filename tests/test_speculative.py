"""Speculative decoding writes what the model alone would have written, whatever the draft proposes."""

import itertools
import math

import pytest
import torch
from history_model import HistoryModel, StateCache
from hypothesis import given, settings
from hypothesis import strategies as st
from test_logits import chi_squared
from test_sampling import (
    MODELS,
    VOCAB,
    CountWaits,
    ends,
    ragged,
    random_lstm,
    random_ngram,
    texts,
)

from lmtutorial.decode import speculative as module
from lmtutorial.decode.drafts import Proposal
from lmtutorial.decode.guesses import FirstGuess, NGramTable, PromptLookup
from lmtutorial.decode.logits import Filters, draw, to_probs
from lmtutorial.decode.sampling import greedy
from lmtutorial.decode.speculative import Speculation, _verify, speculative, verify
from lmtutorial.models.lstm import LSTM, LSTMConfig
from lmtutorial.models.ngram import NGram
from lmtutorial.models.transformer import Transformer, TransformerConfig

GUESSERS = {
    "lookup": PromptLookup(),
    "table": NGramTable(random_ngram()),
    "lookup or table": FirstGuess(PromptLookup(4, 2), NGramTable(random_ngram(1))),
}
models = st.sampled_from(list(MODELS.values()))
drafts = st.sampled_from([*MODELS.values(), *GUESSERS.values()])
lookaheads = st.integers(1, 6)
options = st.fixed_dictionaries(
    {"seed": st.integers(0, 10**20), "temperature": st.sampled_from([0, 0.5, 1, 1.7]), "eos": ends},
    optional={
        "top_k": st.integers(1, VOCAB),
        "top_p": st.floats(0, 1),
        "min_p": st.floats(0, 0.5),
        "typical_p": st.floats(0, 1),
    },
)
few_tokens = st.lists(st.integers(0, 3), min_size=1, max_size=40)
law = settings(max_examples=60)


@settings(max_examples=200)
@given(models, drafts, ragged, st.integers(0, 12), lookaheads, ends)
def test_at_temperature_0_it_writes_the_greedy_text(model, draft, prompts, steps, lookahead, eos):
    plain = greedy(model, prompts, steps, eos=eos)
    ours = speculative(model, draft, prompts, steps, lookahead=lookahead, eos=eos)
    assert texts(ours) == texts(plain)
    assert [g.logprob for g in ours] == pytest.approx([g.logprob for g in plain], abs=1e-4)
    assert texts(speculative(model, draft, prompts, steps, temperature=1, top_k=1, eos=eos)) == texts(plain)


@law
@given(models, drafts, ragged, lookaheads, options, st.data())
def test_a_text_does_not_depend_on_its_neighbors(model, draft, prompts, lookahead, options, data):
    def write(prompts):
        return texts(speculative(model, draft, prompts, 9, lookahead=lookahead, **options))

    distinct = [list(p) for p in dict.fromkeys(map(tuple, prompts))]
    together = write(distinct)
    assert together == [write([prompt])[0] for prompt in distinct]
    order = data.draw(st.permutations(range(len(distinct))))
    assert write([distinct[i] for i in order]) == [together[i] for i in order]


@law
@given(models, ragged, st.integers(1, 12), lookaheads, options)
def test_a_model_that_drafts_for_itself_is_never_refused(model, prompts, steps, lookahead, options):
    report = Speculation()
    texts = speculative(model, model, prompts, steps, lookahead=lookahead, report=report, **options)
    assert report.accepted == report.proposed
    longest = max(len(text.tokens) for text in texts)
    assert report.calls == math.ceil(longest / (1 + min(lookahead, steps - 1)))


@law
@given(models, drafts, ragged, st.integers(0, 12), lookaheads, options)
def test_the_report_adds_up(model, draft, prompts, steps, lookahead, options):
    report = Speculation()
    found = speculative(model, draft, prompts, steps, lookahead=lookahead, report=report, **options)
    for text, proposed, accepted in zip(found, report.proposed, report.accepted, strict=True):
        assert all(0 <= kept <= many <= lookahead for kept, many in zip(accepted, proposed, strict=True))
        # each round adds one token more, unless the last one ends amid what was accepted
        assert len(text.tokens) in (
            [sum(accepted) + len(accepted)] + [sum(accepted) + len(accepted) - 1] * text.finished
        )
    assert report.calls == max((len(rounds) for rounds in report.proposed), default=0)
    assert report.calls + report.calls_saved == max((len(text.tokens) for text in found), default=0)


@law
@given(models, drafts, ragged, lookaheads, options)
def test_logprob_is_what_one_uncached_forward_gives_the_new_tokens(model, draft, prompts, lookahead, options):
    found = speculative(model, draft, prompts, 9, lookahead=lookahead, **options)
    for prompt, (tokens, logprob, _) in zip(prompts, found, strict=True):
        logits = model(torch.tensor([prompt + tokens], device=model.device))[0].detach().double().cpu()
        new = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(tokens).view(-1, 1))
        assert logprob == pytest.approx(float(new.sum()), rel=1e-5, abs=1e-5)


def brute_force_lookup(text, count, shortest, longest):
    """What followed the last earlier place of the longest end of `text`, as Python finds it."""
    text = list(text)
    for size in range(longest, shortest - 1, -1):
        for place in range(len(text) - 1, size - 1, -1):
            if size < len(text) and text[place - size : place] == text[-size:]:
                for i in range(count):
                    text.append(text[place + i])
                return text[len(text) - count :]
    return []


@law
@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=40),
    st.integers(0, 8),
    st.integers(1, 4),
    st.integers(0, 3),
    st.data(),
)
def test_prompt_lookup_equals_a_search_of_the_whole_text(text, count, shortest, more, data):
    lookup = PromptLookup(shortest + more, shortest).new_text()
    places = data.draw(st.sets(st.integers(1, len(text))))
    for end in sorted(places):
        assert lookup.guess(text[:end], count) == brute_force_lookup(
            text[:end], count, shortest, shortest + more
        )


@law
@given(
    st.lists(st.integers(0, 3), min_size=5, max_size=60),
    st.lists(st.integers(0, 4), min_size=1, max_size=6),
    st.integers(2, 5),
)
def test_a_table_guesses_what_followed_most_often(counted, text, order):
    table = NGramTable(NGram.train(counted, order, vocab_size=VOCAB))
    found, guessed = list(text), table.new_text().guess(text, 6)
    for _ in range(6):
        for size in range(min(order - 1, len(found)), 0, -1):
            after = [
                counted[i + size]
                for i in range(len(counted) - size)
                if counted[i : i + size] == found[-size:]
            ]
            if after:
                found.append(max(range(VOCAB), key=after.count))
                break
        else:
            break
    assert guessed == found[len(text) :]


def test_guessers_of_different_vocabularies_or_none_are_refused():
    tables = [NGramTable(NGram.train([0, 1] * 9, 2, size)) for size in (4, 5)]
    with pytest.raises(ValueError, match="of one vocabulary, not of"):
        FirstGuess(*tables)
    with pytest.raises(ValueError, match="there must be guessers"):
        FirstGuess()
    with pytest.raises(ValueError, match="shortest is 3 and longest 2"):
        PromptLookup(2, 3)
    with pytest.raises(ValueError, match="the order is 1; a table needs contexts"):
        NGramTable(NGram.train([0, 1] * 9, 1, 2))


# Distributions


def random_probs(vocab, seed, zeros):
    draw = torch.Generator().manual_seed(seed)
    probs = torch.rand(vocab, generator=draw, dtype=torch.float64) ** 3
    probs[torch.rand(vocab, generator=draw) < zeros] = 0
    probs[torch.randint(vocab, (), generator=draw)] += 0.1
    return probs / probs.sum()


@settings(max_examples=200)
@given(
    st.integers(2, 6), st.integers(0, 10**6), st.sampled_from([0, 0.5, 0.9]), st.sampled_from([0, 0.5, 0.9])
)
def test_a_verified_token_has_the_targets_distribution_whatever_the_drafts(vocab, seed, p_zeros, q_zeros):
    """Over a grid of all three numbers that decide, instead of random ones: so without chance."""
    p, q = random_probs(vocab, seed, p_zeros), random_probs(vocab, seed + 1, q_zeros)
    points = 16
    grid = (torch.arange(points) + 0.5) / points
    noise = torch.cartesian_prod(grid, grid, grid).double()
    rows = len(noise)
    proposal = Proposal(
        draw(q.expand(rows, -1), noise[:, 0])[:, None], torch.ones(rows).long(), q.expand(rows, 1, -1)
    )
    after = noise[:, None, 1:].expand(-1, 2, -1)
    accepted, chosen = verify(p.expand(rows, 2, -1), proposal, after)
    written = torch.where(accepted == 1, proposal.tokens[:, 0], chosen)
    shares = written.bincount(minlength=vocab) / rows
    torch.testing.assert_close(shares, p.float(), atol=3 / points, rtol=0)
    assert (shares[p == 0] == 0).all()


@law
@given(st.integers(1, 4), st.integers(0, 5), st.integers(0, 10**6))
def test_greedy_verification_is_that_of_two_point_masses(rows, width, seed):
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, width + 1, 3, generator=draw).round()
    tokens = torch.randint(3, (rows, width), generator=draw)
    certain = torch.nn.functional.one_hot(tokens, 3).float()
    counts = torch.randint(width + 1, (rows,), generator=draw)
    noise = torch.rand(rows, width + 1, 2, generator=draw)
    filters = Filters(temperature=0)
    for probs in (None, certain):
        proposal = Proposal(tokens, counts, probs)
        plain, ours = (
            verify(filters.probs(logits), proposal, noise),
            _verify(filters, logits, proposal, noise),
        )
        assert [x.tolist() for x in ours] == [x.tolist() for x in plain]


SMALL = 5


def small_transformer(seed, vocab=SMALL, context=16, **config):
    torch.manual_seed(seed)
    model = (
        Transformer(TransformerConfig(vocab, context, width=8, layers=1, heads=2, **config)).double().eval()
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.7)
    return model


def small_model(kind, seed):
    torch.manual_seed(seed)
    if kind == "lstm":
        model = LSTM(LSTMConfig(SMALL, width=8)).double().eval()
        with torch.no_grad():
            model.head.weight.mul_(5)
        return model
    text = torch.randint(SMALL, (60,), generator=torch.Generator().manual_seed(seed))
    if kind == "n-gram with zeros":
        return NGram.train(text, order=3, vocab_size=SMALL, smoothing="none")
    if kind == "n-gram":
        return NGram.train(text, order=2, vocab_size=SMALL)
    if kind == "transformer":
        return small_transformer(seed)
    return {
        "history": HistoryModel(SMALL, seed),
        "lookup": PromptLookup(),
        "table": NGramTable(small_model("n-gram", seed)),
    }[kind]


TARGETS = ["lstm", "transformer", "n-gram", "n-gram with zeros", "history"]
FILTERS = [
    {},
    {"top_k": 3, "temperature": 0.8},
    {"top_p": 0.8, "temperature": 1.3},
    {"min_p": 0.2},
    {"typical_p": 0.5},
]


def joint_distribution(model, prompt, steps, **filters):
    """The probability of each text of `steps` tokens, (vocab ** steps,), token by token without a cache."""
    joint = torch.ones(1, dtype=torch.float64)
    for step in range(steps):
        paths = (
            torch.tensor(list(itertools.product(range(SMALL), repeat=step))).long().view(SMALL**step, step)
        )
        read = torch.cat([torch.tensor(prompt).expand(len(paths), -1), paths], 1)
        joint = (joint[:, None] * to_probs(model(read)[:, -1].detach(), **filters).double()).flatten()
    return joint


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("draft", [*TARGETS, "lookup", "table"])
def test_sampled_texts_follow_the_models_joint_distribution(target, draft):
    number = TARGETS.index(target) * 7 + len(draft)
    model, other = small_model(target, number), small_model(draft, number + 100)
    filters = {"temperature": 1.0} | FILTERS[number % 4]
    copies, steps, prompt = 3000, 3, [1, 3, 2, 1, 3]
    report = Speculation()
    filters = {"temperature": 1.0} | FILTERS[number % 4]
    options = {"lookahead": 1 + number % 3, "seed": number, "report": report}
    found = speculative(model, other, [prompt] * copies, steps, **options, **filters)
    index = torch.tensor([g.tokens for g in found]) @ torch.tensor([SMALL**2, SMALL, 1])
    joint = joint_distribution(model, prompt, steps, **filters)
    counts = index.bincount(minlength=SMALL**steps)
    assert (counts[joint == 0] == 0).all()
    assert chi_squared(counts, joint) > 1e-3
    assert sum(map(sum, report.proposed)) > 0


# The window, waits, refusals


@law
@given(drafts, st.lists(st.integers(1, 12), min_size=1, max_size=4), lookaheads, st.sampled_from([0, 1.0]))
def test_nothing_is_read_beyond_a_context_that_is_just_filled(draft, sizes, lookahead, temperature):
    model = small_transformer(0, VOCAB, 20, position="learned", norm="layer", mlp="gelu")
    prompts = [[i % VOCAB for i in range(size)] for size in [12, *sizes]]
    found = speculative(model, draft, prompts, 8, lookahead=lookahead, temperature=temperature, seed=0)
    assert [len(text.tokens) for text in found] == [8] * len(prompts)
    tight = small_transformer(3, VOCAB, 20)
    plain = greedy(model, prompts, 8)
    assert texts(speculative(model, tight, prompts, 8, lookahead=lookahead)) == texts(plain)


@pytest.mark.parametrize("options", [{}, {"temperature": 1, "top_k": 5, "top_p": 0.9, "min_p": 0.01}])
def test_no_round_waits_for_the_device(monkeypatch, options):
    monkeypatch.setattr(module, "_patience", lambda device: 4)
    monkeypatch.setattr(
        StateCache, "truncate", lambda cache, lengths: setattr(cache, "lengths", lengths.clone())
    )
    model, report = HistoryModel(VOCAB, 1), Speculation()

    def waits(steps):
        with CountWaits() as count:
            speculative(model, HistoryModel(VOCAB, 2), [[1], [2, 3]], steps, seed=0, report=report, **options)
        return count.waits - report.calls // 4  # one question in 4 rounds: have all ended?

    assert waits(64) == waits(2)


def test_the_target_reads_all_proposals_of_all_texts_in_one_forward():
    model, report = HistoryModel(VOCAB, 1), Speculation()
    speculative(model, HistoryModel(VOCAB, 2), [[1], [2, 3, 4]], 30, lookahead=3, report=report)
    assert model.forwards == [(2, 3 + 3)] + [(2, 3 + 1)] * (report.calls - 1)


def test_without_a_guess_a_round_is_a_plain_step():
    model, report = HistoryModel(VOCAB, 1), Speculation()
    speculative(model, PromptLookup(longest=9, shortest=9), [[1, 2]], 8, report=report)
    assert model.forwards == [(1, 2)] + [(1, 1)] * 7
    assert report.calls_saved == 0
    assert math.isnan(report.acceptance_rate)


def test_looped_text_is_written_in_few_calls():
    model, report = NGram.train([0, 1, 2, 3] * 20, order=2, vocab_size=4), Speculation()
    [text] = speculative(model, PromptLookup(), [[0, 1, 2, 3, 0]], 50, lookahead=9, report=report)
    assert text.tokens == ([1, 2, 3, 0] * 13)[:50]
    assert (report.calls, report.calls_saved, report.acceptance_rate) == (5, 45, 1.0)


@pytest.mark.parametrize("temperature", [0, 1])
def test_nan_is_an_error_not_a_text(temperature):
    broken, model = HistoryModel(VOCAB), HistoryModel(VOCAB, 1)
    broken.table[:, 3] = torch.nan
    with pytest.raises(ValueError, match="the model's logits after prompt 0 and 0 new tokens are NaN"):
        speculative(broken, model, [[1], [2]], 5, temperature=temperature)
    with pytest.raises(ValueError, match="the logits of the draft are NaN"):
        speculative(model, broken, [[1], [2]], 5, temperature=temperature)


@pytest.mark.parametrize(
    ("draft", "options", "error", "message"),
    [
        (HistoryModel(13), {}, ValueError, "draft has a vocabulary of 13 tokens, the model one of 12"),
        (
            NGramTable(NGram.train([0, 1] * 9, 2, 40)),
            {},
            ValueError,
            "vocabulary of 40 tokens, the model one of 12",
        ),
        (
            HistoryModel(VOCAB, context=9),
            {},
            ValueError,
            "prompt 1 has 4 .* that is 10, over the draft's context of 9",
        ),
        (HistoryModel(VOCAB), {"lookahead": 0}, ValueError, "lookahead is 0; it must be at least 1"),
        (HistoryModel(VOCAB), {"lookahead": 1.5}, TypeError, "lookahead is 1.5; it must be an integer"),
        (HistoryModel(VOCAB), {"temperature": -1}, ValueError, "temperature is -1"),
        (HistoryModel(VOCAB), {"eos": 12}, ValueError, "eos is 12"),
        (HistoryModel(VOCAB), {"seed": -1}, ValueError, "seed is -1"),
        ("small", {}, TypeError, "draft is 'small'; it must be a language model or a Guesser"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_computed(draft, options, error, message):
    model = HistoryModel(VOCAB)
    with pytest.raises(error, match=message):
        speculative(model, draft, [[1], [1, 2, 3, 4]], 6, **options)
    assert model.forwards == []


def test_models_are_left_in_their_modes():
    model, draft = random_lstm(dropout=0.5).train(), random_lstm(1, dropout=0.5).train()
    evaluated = speculative(random_lstm(), random_lstm(1), [[1, 2]], 9, temperature=1, seed=0)
    assert speculative(model, draft, [[1, 2]], 9, temperature=1, seed=0) == evaluated
    assert all(m.training for m in [*model.modules(), *draft.modules()])
