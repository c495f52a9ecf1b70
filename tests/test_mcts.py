"""The search is PUCT to the letter, reads no text twice, and finds what enumeration finds."""

import math
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import torch
from cache_laws import check_copying
from history_model import HistoryModel, Rereading, TextCache
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sampling import VOCAB, ends, models, prompt, ragged, random_lstm

from lmtutorial.decode.best_of import best_of
from lmtutorial.decode.logits import to_probs
from lmtutorial.decode.mcts import mcts
from lmtutorial.decode.sampling import Generation, greedy, sample
from lmtutorial.models.lstm import LSTM, LSTMConfig
from lmtutorial.models.ngram import NGram
from lmtutorial.models.transformer import Transformer, TransformerConfig

law = settings(max_examples=60)
searches = st.fixed_dictionaries(
    {"simulations": st.integers(1, 20), "eos": ends, "seed": st.integers(0, 10**20)},
    optional={
        "batch": st.integers(1, 8),
        "exploration": st.sampled_from([0, 0.5, 2, 10]),
        "temperature": st.sampled_from([0, 0.5, 1, 3]),
        "top_k": st.integers(1, VOCAB),
        "rollout": st.sampled_from(["greedy", "sample"]),
        "choose": st.sampled_from(["best", "visits"]),
        "value": st.sampled_from([None, lambda prompt, tokens: scattered(prompt, tokens[::2])]),
    },
)


def scattered(prompt, tokens):
    """From 0 to 1, and nothing about the next text follows; a multiple of 1/64, so that sums are exact."""
    return hash((len(prompt), *tokens)) % 65 / 64


def tiny_models(vocab, seed):
    """A model of each kind, over few tokens."""
    torch.manual_seed(seed)
    transformer = Transformer(TransformerConfig(vocab, context=16, width=8, layers=1, heads=2)).eval()
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    lstm = LSTM(LSTMConfig(vocab, width=8)).eval()
    ngram = NGram.train(torch.randint(vocab, (60,)), order=2, vocab_size=vocab)
    return [transformer, lstm, ngram]


class Naive:
    """The same search with nothing shared or stored: recursive, uncached, one number at a time."""

    def __init__(self, model, prompt, limit, reward, ends, exploration, options):
        self.model, self.prompt, self.limit, self.reward, self.ends = model, prompt, limit, reward, ends
        self.exploration, self.options = exploration, options
        self.visits, self.totals, self.values = {}, {}, []

    def ended(self, text):
        return len(text) == self.limit or (text and text[-1] in self.ends)

    def priors(self, text):
        logits = self.model(torch.tensor([self.prompt + list(text)], device=self.model.device))[0, -1]
        return to_probs(logits.detach(), **self.options).double().tolist()

    def rollout(self, text):
        while not self.ended(text):
            text += (int(np.argmax(self.priors(text))),)
        return self.reward(self.prompt, list(text))

    def simulate(self, text):
        if self.ended(text) or text not in self.visits:
            value = self.rollout(text)
            self.values.append(value)
        else:
            value = self.simulate(self.best_child(text))
        self.visits[text] = self.visits.get(text, 0) + 1
        self.totals[text] = self.totals.get(text, 0) + value
        return value

    def best_child(self, text):
        priors, scores = self.priors(text), {}
        for token in sorted(range(len(priors)), key=lambda token: -priors[token]):
            if priors[token] > 0:
                child = (*text, token)
                known = child if child in self.visits else text
                mean = Fraction(self.totals[known]) / self.visits[known]
                low, high = (Fraction(bound(self.values)) for bound in (min, max))
                scaled = float((mean - low) / (high - low)) if high > low else 0.0
                visits = self.visits.get(child, 0)
                bonus = self.exploration * math.sqrt(self.visits[text]) * priors[token] / (1 + visits)
                scores[child] = scaled + bonus
        return max(scores, key=scores.get)

    def choose(self, text):
        priors = self.priors(text)

        def rank(token):
            child = (*text, token)
            visits = self.visits.get(child, 0)
            return visits, self.totals[child] / visits if visits else -math.inf, priors[token]

        return max((token for token in range(len(priors)) if priors[token]), key=rank)


def statistics(node):
    """Visits and mean values of all texts that go on from this one."""
    found = {}
    for child in node.branches():
        found[child.tokens] = child.visits, child.mean
        found |= statistics(child)
    return found


@law
@given(
    models,
    prompt,
    st.integers(1, 4),
    st.integers(1, 30),
    ends,
    st.sampled_from([0, 0.5, 2, 10]),
    st.fixed_dictionaries(
        {}, optional={"temperature": st.sampled_from([0.5, 3]), "top_k": st.integers(2, 5)}
    ),
)
def test_every_visit_is_the_one_of_a_naive_recursive_search(
    model, prompt, limit, simulations, eos, exploration, options
):
    wanted = frozenset() if eos is None else {eos} if isinstance(eos, int) else eos
    naive = Naive(model, prompt, limit, scattered, wanted, exploration, {"top_k": 50, **options})
    committed = ()

    def compare(tree):
        nonlocal committed
        for _ in range(simulations):
            naive.simulate(committed)
        expected = {
            text: (visits, naive.totals[text] / visits)
            for text, visits in naive.visits.items()
            if text[: len(committed)] == committed and text != committed
        }
        assert tree.root.tokens == committed
        assert statistics(tree.root) == expected
        committed += (naive.choose(committed),)

    [text] = mcts(
        model, [prompt], limit, reward=scattered, simulations=simulations, exploration=exploration, eos=eos,
        choose="visits", on_step=compare, **options,
    )  # fmt: skip
    assert text.tokens == list(committed)


class Recording(Rereading):
    """Notes every text whose next token the model is asked for."""

    def __init__(self, model):
        super().__init__(model)
        self.read, self.forwards = [], 0

    def __call__(self, tokens, cache):
        self.forwards += 1
        for text, new in zip(cache.texts, tokens.tolist(), strict=True):
            self.read += [(*text, *new[: i + 1]) for i in range(len(new))]
        return super().__call__(tokens, cache)

    def new_cache(self, batch, max_len):
        return TextCache(batch)


@law
@given(models, prompt, st.integers(0, 5), searches)
def test_no_text_is_read_or_rated_twice(model, prompt, limit, options):
    recording, rated, trees = Recording(model), [], []

    def reward(prompt, tokens):
        rated.append(tuple(tokens))
        return scattered(prompt, tokens)

    mcts(recording, [prompt], limit, reward=reward, on_step=trees.append, **options)
    assert len(set(recording.read)) == len(recording.read)
    assert len(set(rated)) == len(rated)
    for tree in trees[-1:]:
        assert tree.positions == len(recording.read)
        assert tree.forwards == recording.forwards
        assert list(tree.texts) == rated


@law
@given(models, prompt, st.integers(1, 5), searches)
def test_reading_on_from_pieces_of_cache_changes_nothing(model, prompt, limit, options):
    cached = mcts(model, [prompt], limit, reward=scattered, **options)
    uncached = mcts(Rereading(model), [prompt], limit, reward=scattered, **options)
    assert [g.tokens for g in cached] == [g.tokens for g in uncached]


@law
@given(ragged, st.integers(1, 4), st.booleans(), searches)
def test_a_search_does_not_depend_on_its_neighbors(prompts, limit, ties, options):
    model = HistoryModel(VOCAB, ties=ties)
    distinct = [list(p) for p in dict.fromkeys(map(tuple, prompts))]
    together = mcts(model, distinct, limit, reward=scattered, **options)
    assert together == [mcts(model, [p], limit, reward=scattered, **options)[0] for p in distinct]


@law
@given(ragged, st.integers(1, 5), searches)
def test_all_prompts_share_the_forwards_of_the_longest_search(prompts, limit, options):
    model, trees = HistoryModel(VOCAB), {}
    mcts(model, prompts, limit, reward=scattered, on_step=lambda t: trees.update({t.row: t}), **options)
    assert len(model.forwards) == max(tree.forwards for tree in trees.values())


@law
@given(models, prompt, st.integers(1, 5), searches)
def test_visits_add_up_and_nothing_stays_on_its_way(model, prompt, limit, options):
    kept = 0

    def check(tree):
        nonlocal kept
        assert tree.root.visits == kept + options["simulations"]
        add_up(tree.root)
        kept = tree.root.branches()[0].visits if tree.root.branches() else 0

    def add_up(node):
        assert node.pending == 0
        assert node.visits == 1 + sum(child.visits for child in node.branches()) or node.ended
        for child in node.branches():
            add_up(child)

    mcts(model, [prompt], limit, reward=scattered, on_step=check, **options)


@pytest.mark.parametrize("seed", range(24))
@pytest.mark.parametrize(
    ("choose", "simulations", "exploration"),
    [("best", 200, 4), ("visits", 2000, 1.5)],
    ids=["best", "visits"],
)
def test_with_enough_simulations_the_best_of_all_texts_is_found(seed, choose, simulations, exploration):
    vocab, limit, eos = 3, 3, [None, 0, 1, 2][seed % 4]
    draw = np.random.default_rng(seed)
    texts = {
        text[: text.index(eos) + 1] if eos in text else text for text in product(range(vocab), repeat=limit)
    }
    rewards = dict(zip(sorted(texts), draw.uniform(0, 0.5, len(texts)), strict=True))
    best = max(rewards, key=rewards.get)
    rewards[best] = 1.0  # visits follow means: they need not tell near-equals apart
    more = [{}, {"rollout": "sample"}, {"batch": 8}, {"value": lambda prompt, tokens: 0.5}][seed // 4 % 4]
    for model in tiny_models(vocab, seed):
        [text] = mcts(
            model, [[1]], limit, reward=lambda prompt, tokens: rewards[tuple(tokens)], choose=choose,
            simulations=simulations, exploration=exploration, temperature=3, eos=eos, seed=seed, **more,
        )  # fmt: skip
        assert tuple(text.tokens) == best


@law
@given(models, ragged, st.integers(0, 6), ends)
def test_one_simulation_is_greedy_decoding_at_its_price(model, prompts, limit, eos):
    rated = []

    def reward(prompt, tokens):
        rated.append(tokens)
        return scattered(prompt, tokens)

    plain = greedy(model, prompts, limit, eos=eos)
    for choose in ("best", "visits"):
        found = mcts(model, prompts, limit, reward=reward, simulations=1, choose=choose, eos=eos)
        assert [g.tokens for g in found] == [g.tokens for g in plain]
        assert [g.finished for g in found] == [g.finished for g in plain]
    assert len(rated) == (2 * len(prompts) if limit else 0)


@law
@given(models, ragged, st.integers(1, 5), searches, st.sampled_from([0, 0.5, -7]))
def test_without_preferences_the_committed_text_is_the_greedy_one(model, prompts, limit, options, same):
    options = {**options, "choose": "visits", "value": None, "exploration": 1, "batch": 1}
    found = mcts(model, prompts, limit, reward=lambda prompt, tokens: same, **options)
    assert [g.tokens for g in found] == [g.tokens for g in greedy(model, prompts, limit, eos=options["eos"])]


@law
@given(models, prompt, st.integers(1, 5), searches, st.sampled_from([(4, 0), (0.5, -3), (1024, 7)]))
def test_only_relative_rewards_matter(model, prompt, limit, options, scale):
    factor, shift = scale
    options["value"] = None
    stretched = mcts(model, [prompt], limit, reward=lambda p, t: factor * scattered(p, t) + shift, **options)
    assert stretched == mcts(model, [prompt], limit, reward=scattered, **options)


@law
@given(models, ragged, st.integers(1, 5), searches)
def test_the_best_text_met_is_returned_whole_and_with_its_logprob(model, prompts, limit, options):
    trees = {}
    options["choose"] = "best"
    found = mcts(
        model, prompts, limit, reward=scattered, on_step=lambda t: trees.update({t.row: t}), **options
    )
    eos = options["eos"]
    wanted = eos if isinstance(eos, set) else {eos}
    for row, (start, (tokens, logprob, finished)) in enumerate(zip(prompts, found, strict=True)):
        assert scattered(start, tokens) == max(text.reward for text in trees[row].texts.values())
        assert finished == (tokens[-1] in wanted)
        assert not wanted & set(tokens[:-1])
        assert finished or len(tokens) == limit
        logits = model(torch.tensor([start + tokens], device=model.device))[0].detach().double().cpu()
        new = logits.log_softmax(-1)[len(start) - 1 : -1].gather(1, torch.tensor(tokens).view(-1, 1))
        assert logprob == pytest.approx(float(new.sum()), rel=1e-5, abs=1e-5)


def test_a_seed_repeats_a_search_and_copies_of_a_prompt_draw_apart():
    def met(prompts, seed=None):
        trees = {}
        mcts(
            HistoryModel(VOCAB), prompts, 8, reward=scattered, rollout="sample", simulations=2, seed=seed,
            on_step=lambda tree: trees.update({tree.row: tree}),
        )  # fmt: skip
        return [list(tree.texts) for tree in trees.values()]

    first, second = met([[1], [1]], seed=1)
    assert first != second
    assert [first, second] == met([[1], [1]], seed=1)
    assert first == met([[1]], seed=1)[0] != met([[1]], seed=2)[0]
    torch.manual_seed(7)
    unseeded = met([[1]])
    torch.manual_seed(7)
    assert unseeded == met([[1]])


def test_waiting_leaves_share_forwards():
    forwards = {}
    for batch in (1, 8):
        model = HistoryModel(VOCAB)
        mcts(model, [[1]], 6, reward=scattered, simulations=64, exploration=5, batch=batch)
        forwards[batch] = len(model.forwards)
    assert forwards[8] < forwards[1] / 2


def test_a_wider_search_beats_sampling_at_the_same_number_of_rewards():
    def reward(prompt, tokens):
        return -sum(abs(a - b) for a, b in zip(tokens, [3, 1, 4, 1, 5, 9], strict=True))

    better = 0
    for seed in range(20):
        model, trees = HistoryModel(VOCAB, seed), []
        [searched] = mcts(model, [[1]], 6, reward=reward, simulations=40, on_step=trees.append)
        [sampled] = best_of(model, [[1]], 6, reward=reward, n=len(trees[-1].texts), seed=seed)
        better += reward([1], searched.tokens) > reward([1], sampled.tokens)
    assert better >= 15


@law
@given(models, ragged, st.integers(0, 6), st.integers(1, 5), ends, st.integers(0, 99))
def test_best_of_is_the_best_of_the_samples(model, prompts, limit, n, eos, seed):
    distinct = [list(p) for p in dict.fromkeys(map(tuple, prompts))]
    options = {"temperature": 1.5, "top_k": 8, "eos": eos, "seed": seed}
    found = best_of(model, distinct, limit, reward=scattered, n=n, **options)
    for start, text in zip(distinct, found, strict=True):
        samples = sample(model, [start] * n, limit, **options)
        best = max(samples, key=lambda g: scattered(start, g.tokens))
        assert (text.tokens, text.finished) == (best.tokens, best.finished)


@pytest.mark.parametrize("given", [math.nan, math.inf, "good", None, [0.5, 0.5]])
def test_a_reward_that_is_no_finite_number_is_quoted(given):
    error = ValueError if isinstance(given, float) else TypeError
    model = HistoryModel(VOCAB)
    for decode in (mcts, best_of):
        with pytest.raises(
            error, match=r"reward gave .* for prompt 0 and the new tokens \[\d, \d+\]"
        ) as caught:
            decode(model, [[1]], 2, reward=lambda prompt, tokens: given, seed=0)
        assert repr(given) in str(caught.value)
    with pytest.raises(error, match=r"value gave .* for prompt 0 and the new tokens \[\]"):
        mcts(model, [[1]], 2, reward=scattered, value=lambda prompt, tokens: given)


def test_rewards_may_be_numbers_of_any_kind_and_keep_what_they_are_given():
    model, kept = HistoryModel(VOCAB), []

    def greedy_reader(prompt, tokens):
        value = np.float32(len(set(tokens)))
        kept.append(tokens)
        prompt.clear()
        tokens.append(0)
        return torch.tensor(value)

    [text] = mcts(model, [[1]], 4, reward=greedy_reader)
    assert len(text.tokens) == 4
    assert {len(tokens) for tokens in kept} == {5}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"reward": 0.5}, TypeError, "reward is 0.5; it must be a function"),
        ({"value": "greedy"}, TypeError, "value is 'greedy'; it must be a function"),
        ({"on_step": 1}, TypeError, "on_step is 1; it must be a function"),
        ({"simulations": 0}, ValueError, "simulations is 0; it must be at least 1"),
        ({"simulations": 2.5}, TypeError, "simulations is 2.5; it must be an integer"),
        ({"batch": 0}, ValueError, "batch is 0; it must be at least 1"),
        ({"batch": True}, TypeError, "batch is True"),
        ({"exploration": -1}, ValueError, "exploration is -1; it must be finite and at least 0"),
        ({"exploration": math.nan}, ValueError, "exploration is nan"),
        ({"exploration": "much"}, TypeError, "exploration is 'much'"),
        ({"rollout": "random"}, ValueError, "rollout is 'random'; it must be 'greedy' or 'sample'"),
        ({"choose": "last"}, ValueError, "choose is 'last'; it must be 'best' or 'visits'"),
        ({"temperature": -1}, ValueError, "temperature is -1"),
        ({"top_k": 0}, ValueError, "top_k is 0"),
        ({"eos": 12}, ValueError, "eos is 12"),
        ({"seed": -1}, ValueError, "seed is -1"),
        ({"prompts": [[1], []]}, ValueError, "prompt 1 is empty"),
        ({"max_new_tokens": 20}, ValueError, "with max_new_tokens=20 that is 21, over the context of 16"),
    ],
)
def test_bad_input_is_refused_before_the_model_runs(options, error, message):
    model = HistoryModel(VOCAB, context=16)
    with pytest.raises(error, match=message):
        mcts(model, **{"prompts": [[1]], "max_new_tokens": 4, "reward": scattered, **options})
    assert model.forwards == []


def test_best_of_refuses_bad_input_before_the_model_runs():
    model = HistoryModel(VOCAB)
    for options, error in (({"n": 0}, ValueError), ({"n": 1.5}, TypeError), ({"reward": None}, TypeError)):
        with pytest.raises(error, match="it must be"):
            best_of(model, [[1]], 4, **{"reward": scattered, **options})
    assert model.forwards == []


def test_nothing_asked_for_is_nothing_done():
    model = HistoryModel(VOCAB)
    assert mcts(model, [], 5, reward=scattered) == best_of(model, [], 5, reward=scattered) == []
    assert mcts(model, [[1], [2]], 0, reward=scattered) == [Generation([], 0.0, False)] * 2
    assert model.forwards == []


def test_logits_that_are_nan_are_an_error_not_a_text():
    model = HistoryModel(VOCAB)
    model.table[:, 3] = torch.nan
    with pytest.raises(ValueError, match=r"the model's logits after the new tokens \[\] are NaN"):
        mcts(model, [[1]], 5, reward=scattered)


def test_a_model_in_training_mode_is_read_without_dropout_and_left_as_it_was():
    model = random_lstm(dropout=0.5)
    expected = mcts(model, [[1], [2, 3]], 4, reward=scattered)
    model.train()
    assert mcts(model, [[1], [2, 3]], 4, reward=scattered) == expected
    assert all(module.training for module in model.modules())


@law
@given(
    models,
    st.lists(st.integers(1, 8), min_size=1, max_size=4),
    st.integers(0, 99),
)
def test_a_row_of_cache_can_be_put_together_from_pieces_of_others(model, lengths, seed):
    check_copying(model, lengths, seed)
