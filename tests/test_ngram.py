"""Laws of the n-gram model: its rows are the textbook's, its fast paths agree, and it obeys the contract."""

import os
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtutorial.batches import StreamBatches
from lmtutorial.decode.sampling import greedy
from lmtutorial.metrics import evaluate
from lmtutorial.models.ngram import NGram
from lmtutorial.models.ngram_counts import count_ngrams
from lmtutorial.models.ngram_discounts import _linear_terms, estimate_discounts

SMOOTHINGS = ["kneser-ney", "absolute", "none"]
START = "start"


def textbook_counts(text, n):
    """Occurrences of each n-gram, and the set of what stood right before it, by dictionary."""
    times, befores = Counter(), defaultdict(set)
    for i in range(len(text) - n + 1):
        ngram = tuple(text[i : i + n])
        times[ngram] += 1
        befores[ngram].add(text[i - 1] if i else START)
    return times, {ngram: len(tokens) for ngram, tokens in befores.items()}


class Textbook:
    """The formula of Chen & Goodman 1999 for interpolated modified Kneser-Ney, read out word by word."""

    def __init__(self, text, order, vocab_size, smoothing, discounts):
        self.order, self.vocab_size, self.discounts = order, vocab_size, discounts
        self.counts = []
        for n in range(1, order + 1):
            times, befores = textbook_counts(text, n)
            self.counts.append(befores if smoothing == "kneser-ney" and n < order else times)

    def discount(self, n, count):
        return 0 if count == 0 else self.discounts[n - 1][min(count, 3) - 1]

    def prob(self, token, context):
        """p(token | context), the context a tuple of at most order - 1 tokens."""
        counts = [self.counts[len(context)].get((*context, v), 0) for v in range(self.vocab_size)]
        lower = self.prob(token, context[1:]) if context else 1 / self.vocab_size
        if not sum(counts):
            return lower
        n = len(context) + 1
        reserve = sum(self.discount(n, count) for count in counts)
        kept = counts[token] - self.discount(n, counts[token])
        return (kept + reserve * lower) / sum(counts)

    def row(self, history):
        context = tuple(history[max(0, len(history) - self.order + 1) :])
        return [self.prob(token, context) for token in range(self.vocab_size)]


@st.composite
def corpora(draw, max_vocab=6, max_order=5):
    """(text, order, vocab_size): some tokens of the vocabulary may never occur."""
    vocab_size = draw(st.integers(1, max_vocab))
    order = draw(st.integers(1, max_order))
    used = draw(st.integers(1, vocab_size))
    text = draw(st.lists(st.integers(0, used - 1), min_size=order, max_size=40))
    return text, order, vocab_size


def random_tokens(vocab_size, shape, seed):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def skewed_text(length, vocab_size, seed):
    """Random text with a Zipf-like vocabulary, in which each token leans on the one before it."""
    generator = np.random.default_rng(seed)
    fresh = (vocab_size * generator.random(length) ** 3).astype(int)
    after = generator.permutation(vocab_size)
    for i in range(1, length):
        if generator.random() < 0.6:
            fresh[i] = after[fresh[i - 1]]
    return fresh


@given(corpus=corpora(), smoothing=st.sampled_from(SMOOTHINGS), seed=st.integers(0, 2**31), data=st.data())
def test_rows_equal_the_textbook_formula_read_out_with_dictionaries(corpus, smoothing, seed, data):
    text, order, vocab_size = corpus
    model = NGram.train(text, order, vocab_size, smoothing=smoothing)
    if smoothing != "none":
        shares = st.lists(st.floats(0, 1), min_size=3 * order, max_size=3 * order)
        discounts = np.reshape(data.draw(shares), (order, 3)) * [1, 2, 3]
        model = NGram(vocab_size, count_ngrams(np.array(text), order, vocab_size), smoothing, discounts)
    plain = Textbook(text, order, vocab_size, smoothing, model.discounts)
    tokens = random_tokens(vocab_size, (2, 7), seed)
    expected = [[plain.row(row[: t + 1]) for t in range(7)] for row in tokens.tolist()]
    torch.testing.assert_close(
        model(tokens).exp(), torch.tensor(expected, dtype=torch.float32), rtol=1e-5, atol=1e-6
    )


@given(corpus=corpora(), smoothing=st.sampled_from(SMOOTHINGS[:2]), seed=st.integers(0, 2**31))
def test_rows_sum_to_one_and_leave_something_for_every_token(corpus, smoothing, seed):
    text, order, vocab_size = corpus
    probs = NGram.train(text, order, vocab_size, smoothing=smoothing)(
        random_tokens(vocab_size, (3, 6), seed)
    ).exp()
    torch.testing.assert_close(probs.sum(-1), torch.ones(3, 6))
    assert (probs > 0).all()


@pytest.mark.parametrize("vocab_size", [3, 500])
@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@pytest.mark.parametrize("order", [1, 2, 4])
def test_score_equals_gathering_from_the_rows(order, smoothing, vocab_size):
    text = skewed_text(2_000, vocab_size, seed=order)
    model = NGram.train(text[:1_500], order, vocab_size, smoothing=smoothing)
    new = torch.from_numpy(text[1_500:])
    rows = model(new[None, :-1])[0]
    gathered = -rows.gather(1, new[1:, None])[:, 0].double()
    score = model.score(new)
    np.testing.assert_allclose(score[1:], gathered.numpy(), rtol=1e-5, atol=1e-5)
    first = Textbook(text[:1_500].tolist(), order, vocab_size, smoothing, model.discounts).row([])[new[0]]
    np.testing.assert_allclose(score[0], -np.log(first))


def test_evaluate_carries_the_cache_so_that_it_equals_score():
    text = skewed_text(600, 12, seed=0)
    model = NGram.train(text[:400], 4, 12)
    result = evaluate(model, StreamBatches(text[400:], batch=1, time=7))
    assert result.tokens == 199
    assert result.nats == pytest.approx(model.score(text[400:])[1:].sum(), rel=1e-5)


@given(
    text=st.lists(st.integers(0, 3), min_size=1, max_size=60),
    order=st.integers(1, 9),
    spread=st.sampled_from([1, 3, 2**15, 2**30]),
)
def test_counts_equal_counting_in_a_dictionary_however_many_tokens_fit_one_sort_key(text, order, spread):
    order = min(order, len(text))
    text = [token * spread for token in text]
    model_counts = count_ngrams(np.array(text), order, 3 * spread + 1)
    ids = {(): 0}
    for n, counts in enumerate(model_counts, start=1):
        times, befores = textbook_counts(text, n)
        ngrams = sorted(times)
        keys = [ids[ngram[:-1]] * (3 * spread + 1) + ngram[-1] for ngram in ngrams]
        assert counts.keys.tolist() == keys
        assert counts.times.tolist() == [times[ngram] for ngram in ngrams]
        if n < order:
            assert counts.befores.tolist() == [befores[ngram] for ngram in ngrams]
        ids = {ngram: i for i, ngram in enumerate(ngrams)}


@given(corpus=corpora())
def test_a_reader_sees_every_ngram_with_its_counts(corpus):
    text, order, vocab_size = corpus
    model = NGram.train(text, order, vocab_size)
    for n in range(1, order + 1):
        times, befores = textbook_counts(text, n)
        ngrams, seen = model.counts(n)
        assert dict(zip(map(tuple, ngrams.tolist()), seen.tolist(), strict=True)) == times
        if n < order:
            ngrams, seen = model.counts(n, befores=True)
            assert dict(zip(map(tuple, ngrams.tolist()), seen.tolist(), strict=True)) == befores


@given(seed=st.integers(0, 2**31), order=st.integers(1, 5), data=st.data())
@settings(max_examples=50)
def test_cached_equals_uncached_on_ragged_rows_cut_back_and_reordered(seed, order, data):
    model = NGram.train(skewed_text(80, 5, seed), order, 5)
    cache, rows = model.new_cache(3, 40), [[], [], []]
    for step in range(5):
        time = data.draw(st.integers(1, 6))
        tokens = random_tokens(5, (len(rows), time), seed + step)
        rows = [row + more for row, more in zip(rows, tokens.tolist(), strict=True)]
        logits = model(tokens, cache)
        for row, got in zip(rows, logits, strict=True):
            torch.testing.assert_close(got, model(torch.tensor([row]))[0, -time:], rtol=0, atol=0)
        lengths = [data.draw(st.integers(max(0, len(row) - 4), len(row))) for row in rows]
        cache.truncate(torch.tensor(lengths))
        rows = [row[:length] for row, length in zip(rows, lengths, strict=True)]
        order_of_rows = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=4))
        cache.reorder(torch.tensor(order_of_rows))
        rows = [rows[b] for b in order_of_rows]
        cache.detach()
        assert cache.lengths.tolist() == [len(row) for row in rows]


@pytest.mark.parametrize("order", [1, 2, 5])
def test_an_endless_cache_reads_any_length_in_pieces_and_keeps_only_order_minus_one_tokens(order):
    model = NGram.train(skewed_text(300, 7, seed=0), order, 7)
    tokens = random_tokens(7, (2, 61), seed=1)
    cache = model.new_cache(2, None)
    pieces = [model(piece, cache) for piece in tokens.split([1, 2, 3, 20, 35], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(tokens), rtol=0, atol=0)
    assert cache.lengths.tolist() == [61, 61]
    assert cache._tokens.shape == (2, order - 1)
    with pytest.raises(ValueError, match="endless"):
        cache.truncate(torch.tensor([3, 3]))


def test_greedy_decoding_follows_the_most_likely_token_of_the_rows():
    model = NGram.train(skewed_text(500, 9, seed=3), 4, 9)
    prompts = [[1], [2, 3, 4, 5, 6], [8, 8]]
    for prompt, generation in zip(prompts, greedy(model, prompts, 12), strict=True):
        text = list(prompt)
        for _ in range(12):
            text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
        assert generation.tokens == text[len(prompt) :]
        score = model.score(text)[len(prompt) :].sum()
        assert generation.logprob == pytest.approx(-score, rel=1e-4)


@given(counts=st.lists(st.integers(1, 6), min_size=1, max_size=60))
def test_estimated_discounts_grow_with_the_count_and_stay_above_zero_and_below_it(counts):
    one, two, more = estimate_discounts(np.array(counts))
    assert 0 < one <= two <= more
    assert one < 1
    assert two < 2
    assert more < 3


@given(corpus=corpora(), seed=st.integers(0, 2**31))
def test_the_linear_form_in_which_discounts_are_fitted_is_the_score(corpus, seed):
    text, order, vocab_size = corpus
    discounts = np.random.default_rng(seed).uniform(0.05, 0.95, (order, 3)) * [1, 2, 3]
    model = NGram(vocab_size, count_ngrams(np.array(text), order, vocab_size), "kneser-ney", discounts)
    new = random_tokens(vocab_size, (20,), seed).numpy()
    probs = np.full(20, 1 / vocab_size)
    for match, row in zip(model._matches(new), torch.from_numpy(discounts), strict=True):
        term = _linear_terms(*match)
        reserve, taken = ((part @ row).numpy() for part in (term.reserve, term.taken))
        probs = (reserve + term.unseen.numpy()) * probs + term.share.numpy() - taken
    np.testing.assert_allclose(probs, np.exp(-model.score(new)), rtol=1e-9)


@pytest.mark.parametrize("seed", [0, 1])
def test_no_grid_of_discounts_beats_the_fitted_ones(seed):
    text = skewed_text(900, 8, seed)
    counts = count_ngrams(text[:600], 2, 8)

    def loss(discounts):
        return NGram(8, counts, "kneser-ney", discounts).score(text[600:]).mean()

    fitted = loss(NGram(8, counts, "kneser-ney").fit_discounts(text[600:]))
    grid = np.linspace(0.05, 0.95, 10)
    caps = np.arange(1, 4)
    assert fitted <= min(loss(np.array([low * caps, high * caps])) for low in grid for high in grid) + 1e-6
    assert fitted < loss(None)


def test_holding_out_a_part_fits_there_and_then_counts_everything():
    text = skewed_text(1_000, 8, seed=5)
    model = NGram.train(text, 3, 8, held_out=0.2)
    np.testing.assert_array_equal(model.discounts, NGram.train(text[:800], 3, 8).fit_discounts(text[800:]))
    np.testing.assert_array_equal(model.counts(3)[1], NGram.train(text, 3, 8).counts(3)[1])


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_load_after_save_is_the_same_model(tmp_path, smoothing):
    text = skewed_text(400, 11, seed=0)
    model = NGram.train(text, 3, 11, smoothing=smoothing, held_out=0.0 if smoothing == "none" else 0.1)
    model.save(tmp_path / "model.ngram")
    loaded = NGram.load(tmp_path / "model.ngram")
    assert (loaded.order, loaded.vocab_size, loaded.smoothing) == (3, 11, smoothing)
    tokens = random_tokens(11, (4, 20), seed=0)
    assert torch.equal(loaded(tokens), model(tokens))
    np.testing.assert_array_equal(loaded.score(tokens[0]), model.score(tokens[0]))
    for n in (1, 2):
        np.testing.assert_array_equal(loaded.counts(n, befores=True)[1], model.counts(n, befores=True)[1])


def test_lists_arrays_memory_maps_and_tensors_are_the_same_text(tmp_path):
    text = skewed_text(200, 5, seed=0)
    np.save(tmp_path / "text.npy", text.astype(np.uint16))
    mapped = np.load(tmp_path / "text.npy", mmap_mode="r")
    scores = [
        NGram.train(same, 3, 5).score(same) for same in (text, text.tolist(), torch.tensor(text), mapped)
    ]
    assert all((score == scores[0]).all() for score in scores)
    assert NGram.train(text, 3, 5).score([]).shape == (0,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0, 1], 0, 2), "order must be at least 1, got 0"),
        (([0, 1], 3, 2), "order 3 needs a text of at least 3 tokens, got 2"),
        (([0, 5], 1, 2), "token ids must be 0 to 1, got 0 to 5"),
        (([0, -1], 1, 2), "token ids must be 0 to 1, got -1 to 0"),
        (([0.5, 1.0], 1, 2), "tokens must be 1-D integers, got shape .2,. of float64"),
        (([[0], [1]], 1, 2), "tokens must be 1-D integers, got shape .2, 1."),
        (([0, 1], 1, 2**62), "do not fit 64-bit keys"),
    ],
)
def test_a_text_that_cannot_be_counted_is_refused_with_what_was_given(arguments, message):
    with pytest.raises(ValueError, match=message):
        NGram.train(*arguments)


def test_options_and_caches_that_do_not_fit_are_refused_with_what_was_given():
    with pytest.raises(ValueError, match="got 'laplace'"):
        NGram.train([0, 1], 1, 2, smoothing="laplace")
    for held_out, smoothing in [(1.0, "kneser-ney"), (-0.1, "kneser-ney"), (0.1, "none")]:
        with pytest.raises(ValueError, match=f"got {held_out}"):
            NGram.train([0, 1] * 9, 1, 2, smoothing=smoothing, held_out=held_out)
    model = NGram.train([0, 1, 1], 2, 2)
    with pytest.raises(ValueError, match=r"discounts must be \(2, 3\)"):
        NGram(2, count_ngrams(np.array([0, 1, 1]), 2, 2), "kneser-ney", np.full((2, 3), np.nan))
    with pytest.raises(ValueError, match="no held-out token"):
        model.fit_discounts([])
    with pytest.raises(ValueError, match="orders 1 to 1, got 2"):
        model.counts(2, befores=True)
    with pytest.raises(ValueError, match="tokens must be 2-D"):
        model(torch.tensor([0, 1]))
    with pytest.raises(TypeError, match="got object"):
        model(torch.tensor([[0]]), object())
    with pytest.raises(ValueError, match="got 0 and 3"):
        model.new_cache(0, 3)
    cache = model.new_cache(2, 3)
    with pytest.raises(ValueError, match="at most 3 tokens a row, 4 are needed"):
        model(torch.zeros(2, 4, dtype=torch.int64), cache)
    with pytest.raises(ValueError, match="has 2 rows, the tokens 1"):
        model(torch.zeros(1, 1, dtype=torch.int64), cache)
    assert cache.lengths.tolist() == [0, 0]  # nothing was read by the calls refused
    with pytest.raises(ValueError, match=r"cannot truncate lengths \[0, 0\] to \[1, 0\]"):
        cache.truncate(torch.tensor([1, 0]))


def test_order_seven_on_tiny_shakespeare_costs_at_most_1_53_nats_a_character():
    folder = os.environ.get("LMTUTORIAL_DATA")
    path = Path(folder or ".", "tinyshakespeare", "input.txt")
    if not folder or not path.exists():
        pytest.skip("set LMTUTORIAL_DATA to a folder that holds tinyshakespeare/input.txt")
    text = path.read_text(encoding="utf-8")
    vocabulary = {character: i for i, character in enumerate(sorted(set(text)))}
    tokens = np.array([vocabulary[character] for character in text])
    train, validation = np.split(tokens, [int(0.9 * len(tokens))])
    scores = [NGram.train(train, 7, 65, held_out=share).score(validation) for share in (0, 0.1)]
    assert len(scores[0]) == 111_540
    assert scores[0].mean() <= 1.53
    assert scores[1].mean() <= 1.50
