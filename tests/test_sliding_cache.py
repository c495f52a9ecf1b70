"""A window's cache gives the logits of its mask, goes back, is reordered and copied, in bounded memory."""

from functools import partial

import pytest
import torch
from cache_laws import check_copying, check_copying_to, check_going_back, check_pieces
from hypothesis import given, settings
from hypothesis import strategies as st
from random_transformers import VOCAB, draw_tokens, random_transformer, tokens_of

from lmtutorial.decode.beam import beam_search
from lmtutorial.decode.guesses import PromptLookup
from lmtutorial.decode.logits import Filters
from lmtutorial.decode.mcts import mcts
from lmtutorial.decode.sampling import greedy, sample
from lmtutorial.decode.speculative import speculative
from lmtutorial.engine import Engine
from lmtutorial.models import transformer
from lmtutorial.models.kv_cache import KVCache
from lmtutorial.models.sliding_cache import SLACK, SlidingKVCache
from lmtutorial.request import Request

CONTEXT = 60
MODELS = {
    window: random_transformer(seed=window, context=CONTEXT, window=window, kv_heads=2, qk_norm=True).double()
    for window in (1, 2, 3, 7, 20)
}
models = st.sampled_from(list(MODELS.values()))
seeds = st.integers(0, 2**31)
prompts = st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=30), min_size=1, max_size=3)
law = settings(max_examples=25, deadline=None)


@pytest.fixture(params=[0, 5, SLACK], ids="slack {}".format, scope="module")
def slack(request):
    """What a model's caches have; beyond the going back that drafts ask for, nothing needs any."""
    patch = pytest.MonkeyPatch()
    patch.setattr(transformer, "SlidingKVCache", partial(SlidingKVCache, slack=request.param))
    yield request.param
    patch.undo()


any_slack = pytest.mark.usefixtures("slack")


class Uncached:
    """Texts, read anew each time: what a model with a window does without a cache."""

    def __init__(self, model, batch):
        self.model, self.rows = model, [[] for _ in range(batch)]

    def read(self, tokens):
        for row, new in zip(self.rows, tokens.tolist(), strict=True):
            row.extend(new)
        logits = [self.model(torch.tensor([row]))[0, -tokens.shape[1] :] for row in self.rows]
        return torch.stack(logits)


@any_slack
@law
@given(models, st.lists(st.integers(1, 25), min_size=1, max_size=6), seeds)
def test_reading_in_pieces_equals_reading_at_once(model, pieces, seed):
    pieces = [p for i, p in enumerate(pieces) if sum(pieces[: i + 1]) <= CONTEXT]
    check_pieces(model, draw_tokens(3, sum(pieces), seed), pieces, CONTEXT)


@pytest.mark.parametrize("seed", range(60))
def test_rows_read_go_back_and_change_places_as_texts_do(seed, slack):
    draw = torch.Generator().manual_seed(seed)

    def integers(low, high, *shape):
        return torch.randint(low, high, shape, generator=draw)

    model = list(MODELS.values())[seed % len(MODELS)]
    batch = int(integers(1, 5))
    cache, plain = model.new_cache(batch, CONTEXT), Uncached(model, batch)
    least = torch.zeros(batch, dtype=torch.int64)  # `slack` before the last beginning of a forward
    for _ in range(20):
        action = int(integers(0, 5))
        if action == 0:
            back = (torch.rand(batch, generator=draw) * (cache.lengths - least + 1)).long()
            lengths = (cache.lengths - back) * (integers(0, 9, batch) > 0)
            cache.truncate(lengths)
            plain.rows = [row[:length] for row, length in zip(plain.rows, lengths.tolist(), strict=True)]
            least = least * (lengths > 0)
        elif action == 1:
            batch = int(integers(1, 5))
            rows = integers(0, len(cache.lengths), batch)
            cache.reorder(rows)
            plain.rows, least = [list(plain.rows[row]) for row in rows.tolist()], least[rows]
        elif most := int(CONTEXT - cache.lengths.max()):
            tokens = integers(0, VOCAB, batch, int(integers(1, 1 + min(most, 30 if action == 2 else 2))))
            least = least.maximum(cache.lengths - slack)
            torch.testing.assert_close(model(tokens, cache), plain.read(tokens))
        assert cache.lengths.tolist() == [len(row) for row in plain.rows]


@any_slack
@law
@given(models, st.lists(st.integers(0, 6), min_size=1, max_size=4), seeds)
def test_after_truncation_and_reordering_rows_go_on(model, keep, seed):
    check_going_back(model, keep, seed)


@any_slack
@law
@given(models, st.lists(st.integers(1, 7), min_size=1, max_size=4), seeds)
def test_rows_put_together_from_copies_go_on(model, lengths, seed):
    check_copying(model, lengths, seed)
    check_copying_to(model, lengths, seed)


@any_slack
@law
@given(models, st.integers(1, 30), st.integers(1, 30), seeds)
def test_what_is_copied_is_what_was_read_or_nothing(model, time, more, seed):
    tokens = draw_tokens(2, time + more + 1, seed)
    cache = model.new_cache(2, CONTEXT)
    for piece in tokens[:, :-1].split([time, more], 1):
        model(piece, cache)
    length, known = time + more, max(0, time - cache.ring)
    for start in range(length):
        piece = cache.copy_out(1, start, length)
        assert (piece is None) == (start < known)
        if piece is not None and start <= length - model.window + 1:
            blank = cache.keys.new_zeros(2, 2, start, 4)
            other = model.new_cache(1, CONTEXT)
            other.copy_in([[(blank, blank), piece]])
            torch.testing.assert_close(model(tokens[1:, -1:], other), model(tokens[1:])[:, -1:])


def plain_greedy(model, prompt, steps):
    text = list(prompt)
    for _ in range(steps):
        text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
    return text[len(prompt) :]


@any_slack
@law
@given(models, prompts)
def test_greedy_equals_a_plain_loop_without_a_cache(model, prompts):
    wanted = [plain_greedy(model, prompt, 15) for prompt in prompts]
    assert tokens_of(greedy(model, prompts, 15)) == wanted


class Masked(torch.nn.Module):
    """The same model behind a cache that holds tokens only: every step reads the whole text."""

    def __init__(self, model):
        super().__init__()
        self.model, self.vocab_size, self.context, self.device = model, VOCAB, CONTEXT, model.device

    def new_cache(self, batch, max_len):
        return TextCache(batch)

    def forward(self, tokens, cache):
        cache.rows = [row + new for row, new in zip(cache.rows, tokens.tolist(), strict=True)]
        time = tokens.shape[1]
        return torch.stack([self.model(torch.tensor([row[:CONTEXT]]))[0, -time:] for row in cache.rows])


class TextCache:
    def __init__(self, batch):
        self.rows = [[] for _ in range(batch)]

    @property
    def lengths(self):
        return torch.tensor([len(row) for row in self.rows])

    def reorder(self, rows):
        self.rows = [self.rows[row] for row in rows.tolist()]

    def truncate(self, lengths):
        self.rows = [row[:length] for row, length in zip(self.rows, lengths.tolist(), strict=True)]

    def copy_out(self, row, start, stop):
        return self.rows[row][start:stop]

    def copy_in(self, rows):
        self.rows = [[token for piece in pieces for token in piece] for pieces in rows]


@any_slack
@settings(max_examples=6, deadline=None)
@given(models, prompts, seeds, st.integers(1, 4))
def test_every_decoder_writes_what_it_writes_without_a_cache(model, prompts, seed, width):
    def reward(prompt, text):  # no two texts alike: which of them mcts prefers hangs on no last digit
        return sum(token * (at + 1) ** 0.5 for at, token in enumerate(text)) % 5

    plain = Masked(model)
    for decode in (
        lambda m: tokens_of(sample(m, prompts, 10, seed=seed)),
        lambda m: [tokens_of(best) for best in beam_search(m, prompts, 8, width=width, n_best=width)],
        lambda m: tokens_of(mcts(m, prompts, 3, reward=reward, simulations=6)),
    ):
        assert decode(model) == decode(plain)


@settings(max_examples=20, deadline=None)
@given(models, models, prompts, st.integers(1, 5))
def test_speculative_with_windows_equals_greedy(model, draft, prompts, lookahead):
    wanted = tokens_of(greedy(model, prompts, 25))
    for drafter in (model, draft, PromptLookup()):
        assert tokens_of(speculative(model, drafter, prompts, 25, lookahead=lookahead)) == wanted


class Sudden:
    """Guesses one token at a time, and many once a text has `length` tokens: the hardest to take back."""

    vocab_size = None

    def __init__(self, length):
        self.length = length

    def new_text(self):
        return self

    def guess(self, text, count):
        return [0] * (count if len(text) >= self.length else 1)


@pytest.mark.parametrize("length", [3, 15, 20, 24, 25, 26, 30])
def test_a_model_with_a_window_takes_back_as_many_proposals_as_its_cache_can_and_no_more(length):
    model, other, prompt = MODELS[3], MODELS[20], [[1, 2], [3]]
    for target, draft in ((other, model), (model, Sudden(length)), (model, PromptLookup())):
        wanted = tokens_of(greedy(target, prompt, 58))
        assert tokens_of(speculative(target, draft, prompt, 58, lookahead=SLACK + 1)) == wanted
        with pytest.raises(ValueError, match=r"lookahead is 34; .* cannot take back more than 33 proposals"):
            speculative(target, draft, prompt, 58, lookahead=SLACK + 2)


@any_slack
@settings(max_examples=6, deadline=None)
@given(models, prompts, seeds)
def test_the_engine_writes_what_sample_writes(model, prompts, seed):
    engine = Engine(model, rows=2, keep=64, block=4)
    requests = [Request([*prompt], max_new_tokens=20, filters=Filters(), seed=seed) for prompt in prompts]
    for _ in range(2):  # the second time prefixes are known
        texts = engine.generate(requests)
        for prompt, text in zip(prompts, texts, strict=True):
            assert text.tokens == sample(model, [prompt], 20, seed=seed)[0].tokens
    longer = [prompt + text.tokens for prompt, text in zip(prompts, texts, strict=True)]
    requests = [Request(prompt, max_new_tokens=4, filters=Filters(), seed=seed) for prompt in longer]
    for prompt, text in zip(longer, engine.generate(requests), strict=True):
        assert text.tokens == sample(model, [prompt], 4, seed=seed)[0].tokens


def nbytes(cache):
    return cache.keys.nbytes + cache.values.nbytes


def test_memory_grows_with_the_window_not_with_the_text(slack):
    model, sizes = MODELS[7], set()
    for time in (7 + slack, 45, CONTEXT - 1):
        cache = model.new_cache(3, CONTEXT)
        model(draw_tokens(3, time, 0), cache)
        cache.truncate(cache.lengths - 1)
        for _ in range(2):
            model(draw_tokens(3, 1, 1), cache)
            cache.truncate(cache.lengths - 1)
        if time > SLACK:
            sizes.add(nbytes(cache))
    assert len(sizes) == 1
    c = model.config
    slots = 7 + slack + 1
    assert sizes == {2 * c.layers * 3 * c.kv_heads * c.head_size * slots * 8}


def test_a_window_as_long_as_the_text_needs_no_ring():
    assert type(MODELS[20].new_cache(1, 20)) is KVCache
    assert isinstance(MODELS[20].new_cache(1, 21), SlidingKVCache)


def test_going_back_too_far_is_refused_with_both_numbers():
    cache = SlidingKVCache(1, 2, 1, 99, 2, window=4, slack=3, like=torch.zeros(()))
    for _ in range(21):
        cache.make_room(1)
        cache.extend(0, torch.zeros(2, 1, 1, 2), torch.zeros(2, 1, 1, 2))
        cache.advance()
    with pytest.raises(
        ValueError, match=r"row 1 cannot go back to 15 tokens: its window of 4 .* at least 16"
    ):
        cache.truncate(torch.tensor([16, 15]))
    assert cache.lengths.tolist() == [21, 21]
    cache.truncate(torch.tensor([16, 0]))


@pytest.mark.parametrize(("window", "slack"), [(0, 1), (1, -1)])
def test_a_bad_size_is_refused_with_its_value(window, slack):
    with pytest.raises(ValueError, match=f"got {window} and {slack}"):
        SlidingKVCache(1, 1, 1, 9, 2, window=window, slack=slack, like=torch.zeros(()))


def test_more_tokens_than_there_is_room_for_are_refused():
    cache = MODELS[3].new_cache(1, 9)
    with pytest.raises(ValueError, match="at most 9 tokens a row, 10 are needed"):
        MODELS[3](draw_tokens(1, 10, 0), cache)


@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_gradients_come_from_window_less_one_tokens_back_for_each_layer(window, layers):
    model = random_transformer(window=window, layers=layers, tied=False).requires_grad_(True)
    model(torch.arange(10)[None])[0, -1].sum().backward()
    reached = model.embedding.weight.grad[:10].any(1)
    assert reached.tolist() == [9 - at <= layers * (window - 1) for at in range(10)]
