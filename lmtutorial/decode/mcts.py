"""Monte Carlo tree search: texts that are likely under the model and good by a reward that you give.

The model proposes tokens, the reward judges texts, and the search spends its simulations where the two
together promise most. No text is read by the model twice: what it says of each is kept in the tree, with the
piece of cache from which to read on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Generator, Iterator
from dataclasses import dataclass
from numbers import Real
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from lmtutorial.decode.logits import Filters
from lmtutorial.decode.noise import check_seed, row_generators
from lmtutorial.decode.prompts import Prompts, check_eos, check_prompts, decoding, prefill
from lmtutorial.decode.sampling import Generation
from lmtutorial.decode.tree import (
    Candidates,
    Choose,
    Floats,
    Node,
    Rate,
    Tree,
    check_count,
    check_function,
    checked,
)
from lmtutorial.models.cache import LanguageModel

Rollout = Literal["greedy", "sample"]
Search = Iterator[list[Node]]
"""A search that runs until it needs the model, and yields the texts to be read."""


def mcts(
    model: LanguageModel,
    prompts: Prompts,
    max_new_tokens: int,
    *,
    reward: Rate,
    value: Rate | None = None,
    rollout: Rollout = "greedy",
    simulations: int = 64,
    exploration: float = 1.0,
    temperature: float = 1.0,
    top_k: int | None = 50,
    batch: int = 1,
    choose: Choose = "best",
    eos: int | Collection[int] | None = None,
    seed: int | None = None,
    on_step: Callable[[Tree], None] | None = None,
) -> list[Generation]:
    """Texts after each of the prompts for which `reward(prompt, new tokens)` is high.

    Before each token, `simulations` walk from the text so far down a tree of continuations, at each node to
    the token with the best PUCT score (`Tree.best`), whose prior is the model's distribution at
    `temperature`, cut to `top_k` tokens. Each walk adds one text. What it is worth goes back up to all that
    it is a continuation of: the reward if it has ended, by `eos` or `max_new_tokens`; otherwise
    `value(prompt, new tokens)`, on the reward's scale; without a `value`, the reward of its continuation to
    the end, greedy or sampled (`rollout`). Then the token visited most is committed, and its subtree kept.

    `choose="best"` returns the complete text with the best reward met on the way, "visits" the text of the
    committed tokens, which is the safer choice where a reward can be fooled. With one simulation and greedy
    rollouts both are the text of `greedy`; where all rewards are equal, "visits" is.

    Rewards may be any finite numbers: only their order and relative distances matter. They are asked for
    once a text, the model for one forward a text; `batch` walks of a prompt wait for the model together, and
    all prompts share its forwards. Each node keeps one token of cache. `on_step(tree)` is called with a
    prompt's tree before each of its tokens is committed: it counts positions and forwards, and holds
    `root.branches()` to draw. Randomness, which only sampled rollouts need, is as in `sample`.

    Raises what `sample` raises; ValueError or TypeError where a reward is not a finite number.
    Sources: Silver et al., "A general reinforcement learning algorithm that masters chess, shogi, and Go
    through self-play", Science 2018 (PUCT); Schrittwieser et al., "Mastering Atari, Go, chess and shogi by
    planning with a learned model", Nature 2020 (scaled values).

    >>> from lmtutorial.models.ngram import NGram
    >>> model = NGram.train([0, 1, 0, 1, 0, 2, 1, 2] * 9, order=2, vocab_size=3)
    >>> mcts(model, [[0]], 4, reward=lambda prompt, tokens: tokens.count(2))[0].tokens
    [2, 2, 2, 2]
    """
    filters = Filters(temperature, top_k)
    options = _Options(reward, value, rollout, simulations, exploration, batch, choose, on_step)
    ids = check_prompts(model, prompts, max_new_tokens)
    ends = check_eos(model, eos)
    generators = row_generators(ids, check_seed(seed))
    if not ids or not max_new_tokens:
        return [Generation([], 0.0, False) for _ in ids]
    with decoding(model):
        trees = _plant(model, ids, max_new_tokens, ends, filters, reward)
        searches = [
            _write(tree, options, rng, max_new_tokens) for tree, rng in zip(trees, generators, strict=True)
        ]
        _run(model, trees, searches, filters)
    return [tree.result(choose) for tree in trees]


@dataclass(frozen=True)
class _Options:
    reward: Rate
    value: Rate | None
    rollout: Rollout
    simulations: int
    exploration: float
    batch: int
    choose: Choose
    on_step: Callable[[Tree], None] | None

    def __post_init__(self) -> None:
        check_function("reward", self.reward)
        for name in ("value", "on_step"):
            if getattr(self, name) is not None:
                check_function(name, getattr(self, name))
        check_count("simulations", self.simulations)
        check_count("batch", self.batch)
        if not isinstance(self.exploration, Real) or isinstance(self.exploration, bool):
            raise TypeError(f"exploration is {self.exploration!r}; it must be a number of at least 0")
        if not 0 <= self.exploration < math.inf:
            raise ValueError(f"exploration is {self.exploration}; it must be finite and at least 0")
        for name, allowed in (("rollout", Rollout), ("choose", Choose)):
            if getattr(self, name) not in get_args(allowed):
                names = " or ".join(map(repr, get_args(allowed)))
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {names}")


def _write(tree: Tree, options: _Options, rng: np.random.Generator, limit: int) -> Search:
    """Search and commit, token by token, to the end."""
    while not tree.root.ended:
        yield from _simulate(tree, options, rng, limit)
        if options.on_step is not None:
            options.on_step(tree)
        tree.advance()


def _simulate(tree: Tree, options: _Options, rng: np.random.Generator, limit: int) -> Search:
    """All simulations before one token."""
    left = options.simulations
    while left:
        waiting: list[list[Node]] = []  # paths to texts whose value takes the model
        while len(waiting) < min(left, options.batch):
            path = tree.descend(options.exploration)
            if path[-1].ended:
                tree.back_up(path, tree.rate(path[-1]))
                left -= 1
            elif path[-1].pending:
                break  # all ways lead to where one waits: nothing to do until it is known
            else:
                tree.await_value(path)
                waiting.append(path)
        values = yield from _evaluate(tree, [path[-1] for path in waiting], options, rng, limit)
        for path, value in zip(waiting, values, strict=True):
            tree.await_value(path, -1)
            tree.back_up(path, value)
        left -= len(waiting)


def _evaluate(
    tree: Tree, leaves: list[Node], options: _Options, rng: np.random.Generator, limit: int
) -> Generator[list[Node], None, list[float]]:
    """What each of these texts is worth, none of which has ended; afterwards all have been read."""
    if options.value is None:
        noise_RN = rng.random((len(leaves), limit)) if options.rollout == "sample" else None
        ends = yield from _roll_out(tree, leaves, noise_RN)
        return [tree.rate(end) for end in ends]
    unread = [leaf for leaf in leaves if leaf.candidates is None]
    if unread:
        yield unread
    return [checked("value", options.value, tree.row, tree.prompt, leaf.tokens) for leaf in leaves]


def _roll_out(
    tree: Tree, leaves: list[Node], noise_RN: Floats | None
) -> Generator[list[Node], None, list[Node]]:
    """Go on from each text to the end, side by side; where the model has been before, without it."""
    tips = list(leaves)
    while True:
        for row, tip in enumerate(tips):
            while tip.candidates is not None:
                noise = None if noise_RN is None else noise_RN[row, len(tip.tokens)]
                tip = tree.child(tip, tip.candidates.choose(noise))
            tips[row] = tip
        unread = list(dict.fromkeys(tip for tip in tips if not tip.ended))
        if not unread:
            return tips
        yield unread


def _plant(
    model: LanguageModel,
    ids: list[list[int]],
    limit: int,
    ends: frozenset[int],
    filters: Filters,
    reward: Rate,
) -> list[Tree]:
    """A tree for each prompt, whose root has been read: one forward for all."""
    logits_BV, cache = prefill(model, ids, 0)
    roots = [
        Node((), len(prompt), 1.0, 0.0, False, (cache.copy_out(row, 0, len(prompt)),))
        for row, prompt in enumerate(ids)
    ]
    _learn(roots, logits_BV, filters)
    return [
        Tree(row, prompt, limit, ends, reward, root)
        for row, (prompt, root) in enumerate(zip(ids, roots, strict=True))
    ]


def _run(model: LanguageModel, trees: list[Tree], searches: list[Search], filters: Filters) -> None:
    """All searches to their ends; each forward reads what any of them waits for."""
    waiting = list(zip(trees, searches, strict=True))
    while waiting:
        asked = [(tree, search, next(search, None)) for tree, search in waiting]
        waiting = [(tree, search) for tree, search, nodes in asked if nodes is not None]
        for tree, _, nodes in asked:
            if nodes is not None:
                tree.forwards += 1
                tree.positions += len(nodes)
        unread = [node for _, _, nodes in asked for node in nodes or ()]
        if unread:
            _read(model, unread, filters)


def _read(model: LanguageModel, nodes: list[Node], filters: Filters) -> None:
    """One forward: the last token of each text, in a cache put together from what is kept of the others."""
    cache = model.new_cache(len(nodes), max(node.length for node in nodes))
    cache.copy_in([node.memory for node in nodes])
    tokens_B1 = torch.tensor([node.tokens[-1:] for node in nodes], device=model.device)
    logits_BV = model(tokens_B1, cache)[:, -1]
    for row, node in enumerate(nodes):
        node.memory = (*node.memory, cache.copy_out(row, node.length - 1, node.length))
    _learn(nodes, logits_BV, filters)


def _learn(nodes: list[Node], logits_BV: Tensor, filters: Filters) -> None:
    """Give each text its candidates."""
    precise = torch.promote_types(logits_BV.dtype, torch.float32)
    logprobs_BV = logits_BV.log_softmax(-1, dtype=precise).cpu().numpy()
    probs_BV = filters.probs(logits_BV).cpu().numpy()
    for node, probs_V, logprobs_V in zip(nodes, probs_BV, logprobs_BV, strict=True):
        if np.isnan(logprobs_V).any():
            raise ValueError(f"the model's logits after the new tokens {list(node.tokens)} are NaN")
        kept = np.flatnonzero(probs_V)
        kept = kept[np.argsort(-probs_V[kept], kind="stable")]  # of equals, the one of the lowest id
        node.candidates = Candidates(
            kept, probs_V[kept].astype(np.float64), logprobs_V[kept].astype(np.float64)
        )
