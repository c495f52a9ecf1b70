"""The tree of a Monte-Carlo tree search over texts: what it keeps, how it descends, what it learns.

Nothing here calls a model; `lmtutorial.decode.mcts` does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from lmtutorial.decode.sampling import Generation

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

Rate = Callable[[list[int], list[int]], float]
"""What a text is worth: (prompt, new tokens) -> any finite number, the larger the better."""
Choose = Literal["best", "visits"]


class Candidates(NamedTuple):
    """The tokens that may follow a text, (candidates,) each, the likeliest first."""

    tokens: Ints
    priors: Floats
    """The probability of each in the search: under the model, filtered."""
    logprobs: Floats
    """The log-probability of each under the model itself, in nats."""

    def choose(self, noise: float | None) -> int:
        """The place of the likeliest, or with noise in [0, 1) of one drawn from the priors."""
        if noise is None:
            return 0
        cumulative = self.priors.cumsum()
        place = cumulative.searchsorted(noise * cumulative[-1], "right")
        return min(int(place), len(cumulative) - 1)  # noise that rounds up to 1 would pass the last


@dataclass(eq=False, slots=True)
class Node:
    """A text, and what the search knows of it and of how it goes on."""

    tokens: tuple[int, ...]
    """The new tokens so far, without the prompt."""
    length: int
    """How many tokens it has with its prompt."""
    prior: float
    """The probability of the last token in the search."""
    logprob: float
    """The log-probability of all of `tokens` under the model, in nats."""
    ended: bool
    """Whether no token may follow."""
    memory: tuple[Any, ...]
    """What the model's cache holds of the text, in pieces; of its last token only when it was read."""
    candidates: Candidates | None = None
    """None until the model has read the text."""
    children: dict[int, Node] = field(default_factory=dict)
    """By their place among the candidates; rollouts leave some that no simulation has visited."""
    visits: int = 0
    """How many simulations have come through here or ended here."""
    total: float = 0.0
    """The sum of the values that they brought."""
    pending: int = 0
    """How many more are on their way, and wait for their value."""
    opened: int = 0
    """How many children they have gone to: always the first, since of those never tried the likeliest is."""

    @property
    def mean(self) -> float:
        """The mean value of all simulations that came through here; NaN before the first."""
        return self.total / self.visits if self.visits else math.nan

    def branches(self) -> list[Node]:
        """The children that simulations have visited, the most visited first; for looking at a tree."""
        visited = [child for child in self.children.values() if child.visits]
        return sorted(visited, key=lambda child: -child.visits)


class Rated(NamedTuple):
    """A complete text that the search has met, and its reward."""

    generation: Generation
    reward: float


class Tree:
    """The search after one prompt."""

    def __init__(
        self, row: int, prompt: list[int], limit: int, ends: frozenset[int], reward: Rate, root: Node
    ) -> None:
        self.row, self.prompt = row, prompt
        self.root = root
        """The text as committed so far; what lies beside it is forgotten."""
        self.texts: dict[tuple[int, ...], Rated] = {}
        """Every complete text met, by its tokens: as many as the reward was asked for."""
        self.positions = len(prompt)
        """How many tokens the model has read for this tree, each once."""
        self.forwards = 1
        """In how many forwards it did."""
        self.low, self.high = math.inf, -math.inf
        self._limit, self._ends, self._reward = limit, ends, reward

    def child(self, node: Node, place: int) -> Node:
        """The text with one more token, made when first asked for."""
        if place not in node.children:
            assert node.candidates is not None
            token = int(node.candidates.tokens[place])
            node.children[place] = Node(
                (*node.tokens, token),
                node.length + 1,
                float(node.candidates.priors[place]),
                node.logprob + float(node.candidates.logprobs[place]),
                token in self._ends or len(node.tokens) + 1 == self._limit,
                node.memory,
            )
        return node.children[place]

    def descend(self, exploration: float) -> list[Node]:
        """From the root along the best scores to a text that was never visited, or that has ended."""
        path = [self.root]
        while (node := path[-1]).visits and not node.ended:
            place = self.best(node, exploration)
            node.opened = max(node.opened, place + 1)
            path.append(self.child(node, place))
        return path

    def best(self, node: Node, exploration: float) -> int:
        """The place of the child with the highest PUCT score, Q + exploration * P * sqrt(N) / (1 + n).

        N and n count the visits of node and child, P is the child's prior, and Q its mean value on a scale
        on which all values met in this tree lie from 0 to 1. A child never visited is taken to be as good as
        its node. A simulation on its way counts in N and n as one that will bring the lowest value (virtual
        loss), so that the next looks elsewhere.
        """
        assert node.candidates is not None
        scale = exploration * math.sqrt(node.visits + node.pending)
        best, highest = 0, -math.inf
        for place in range(node.opened):
            child = node.children[place]
            visits = child.visits + child.pending
            score = self._quality(child, visits) + scale * child.prior / (1 + visits)
            if score > highest:
                best, highest = place, score
        if node.opened < len(node.candidates.priors):
            score = self._quality(node, node.visits) + scale * float(node.candidates.priors[node.opened])
            if score > highest:
                best = node.opened
        return best

    def _quality(self, node: Node, visits: int) -> float:
        if self.high <= self.low:
            return 0.0
        return (node.total - self.low * node.visits) / ((self.high - self.low) * visits)

    def await_value(self, path: list[Node], more: int = 1) -> None:
        """A simulation is on its way along the path; `more=-1` where it has come back."""
        for node in path:
            node.pending += more

    def back_up(self, path: list[Node], value: float) -> None:
        """Let all texts of the path know what came of them."""
        self.low, self.high = min(self.low, value), max(self.high, value)
        for node in path:
            node.visits += 1
            node.total += value

    def rate(self, end: Node) -> float:
        """The reward of a complete text, asked for once."""
        if end.tokens not in self.texts:
            reward = checked("reward", self._reward, self.row, self.prompt, end.tokens)
            finished = bool(end.tokens) and end.tokens[-1] in self._ends
            generation = Generation(list(end.tokens), end.logprob, finished)
            self.texts[end.tokens] = Rated(generation, reward)
        return self.texts[end.tokens].reward

    def advance(self) -> None:
        """Commit the token visited most (ties: the better mean, then the larger prior); keep its subtree."""
        opened = [self.root.children[place] for place in range(self.root.opened)]
        likeliest = self.child(self.root, 0)
        self.root = max(opened, key=lambda child: (child.visits, child.mean), default=likeliest)

    def result(self, choose: Choose) -> Generation:
        """The committed text, or the complete text with the best reward (ties: the likelier one)."""
        self.rate(self.root)
        if choose == "visits":
            return self.texts[self.root.tokens].generation
        return max(self.texts.values(), key=lambda text: (text.reward, text.generation.logprob)).generation


def checked(name: str, rate: Rate, row: int, prompt: list[int], tokens: Sequence[int]) -> float:
    """What the caller's function gives for a text: a finite number, or an error that says for which."""
    given = rate(list(prompt), list(tokens))
    where = f"{name} gave {given!r} for prompt {row} and the new tokens {list(tokens)}"
    try:
        number = float(given)
    except (TypeError, ValueError):
        raise TypeError(f"{where}; it must be a number") from None
    if not math.isfinite(number):
        raise ValueError(f"{where}; it must be finite")
    return number


def check_function(name: str, given: object) -> None:
    """TypeError where it is none."""
    if not callable(given):
        raise TypeError(f"{name} is {given!r}; it must be a function")


def check_count(name: str, given: object) -> None:
    """TypeError or ValueError where it is not an integer of at least 1."""
    if not isinstance(given, Integral) or isinstance(given, bool):
        raise TypeError(f"{name} is {given!r}; it must be an integer of at least 1")
    if given < 1:
        raise ValueError(f"{name} is {given}; it must be at least 1")
