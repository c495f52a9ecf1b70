"""Drafts that guess: what followed before in the text itself, or most often in a text that was counted.

A guess has no probabilities: for `speculative` it is as good as certain, a point mass. It takes no forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


@runtime_checkable
class Guesser(Protocol):
    """A draft without probabilities."""

    @property
    def vocab_size(self) -> int | None:
        """The number of tokens that it may guess; None where it only repeats what it has read."""

    def new_text(self) -> GuessedText:
        """The guesses of one text."""


class GuessedText(Protocol):
    """A text that is guessed as it grows."""

    def guess(self, text: list[int], count: int) -> list[int]:
        """At most `count` tokens that may come next; `text` is all there is, and only grows between calls."""


class PromptLookup:
    """Guesses that the text goes on as it did before.

    The longest end of the text, `shortest` to `longest` tokens, that stands in it once more is looked up
    where it stood last, and what followed there is copied; a copy that reaches the end of the text goes on
    with itself, so that a loop is guessed whole. Without a match there is no guess. Good for texts that quote
    their prompts, and for loops. Source: Saxena, "Prompt lookup decoding", 2023 (there the first place, not
    the last).

    >>> PromptLookup().new_text().guess([1, 2, 3, 4, 9, 2, 3], 3)
    [4, 9, 2]
    >>> PromptLookup().new_text().guess([7, 1, 2, 1, 2], 5)
    [1, 2, 1, 2, 1]
    """

    vocab_size = None

    def __init__(self, longest: int = 3, shortest: int = 1) -> None:
        if not 1 <= shortest <= longest:
            raise ValueError(
                f"shortest is {shortest} and longest {longest}; allowed is 1 <= shortest <= longest"
            )
        self.longest, self.shortest = longest, shortest

    def new_text(self) -> GuessedText:
        """An index that is empty."""
        return _TextIndex(self.longest, self.shortest)


class _TextIndex:
    """Where the n-grams of a text last ended, but for those that end it."""

    def __init__(self, longest: int, shortest: int) -> None:
        self.sizes = range(shortest, longest + 1)
        self.ends: dict[tuple[int, ...], int] = {}
        self.indexed = 0

    def guess(self, text: list[int], count: int) -> list[int]:
        for end in range(self.indexed, len(text)):
            self.ends |= {tuple(text[end - size : end]): end for size in self.sizes if size <= end}
        self.indexed = len(text)
        for size in reversed(self.sizes):
            place = self.ends.get(tuple(text[-size:]))
            if place is not None:
                return [text[place + i % (len(text) - place)] for i in range(count)]
        return []


class Counted(Protocol):
    """What has counted the n-grams of a text, as `lmtutorial.models.ngram.NGram` has."""

    @property
    def vocab_size(self) -> int:
        """The number of tokens it knows."""

    @property
    def order(self) -> int:
        """The longest n-gram it has counted."""

    def counts(self, order: int) -> tuple[Ints, Ints]:
        """All distinct n-grams of one order, sorted, (ngrams, order), and how often each came, (ngrams,)."""


class NGramTable:
    """Guesses what came most often, in a text that was counted, after the longest end that is found there.

    That is the greedy text of an `NGram` without smoothing, from a table with one token for each context: a
    guess is a few binary searches instead of a distribution. Of equally frequent tokens it takes the first.

    The table is a trie of the contexts read backward, in flat arrays: key (id of the last n - 1 tokens) *
    vocab_size + the token before them.

    >>> from lmtutorial.models.ngram import NGram
    >>> table = NGramTable(NGram.train([0, 1, 2, 0, 1, 3, 0, 1, 3], order=3, vocab_size=4))
    >>> table.guess([2, 0], 4)  # 1 followed, then 3 after 0 1, ...
    [1, 3, 0, 1]
    """

    def __init__(self, source: Counted) -> None:
        if source.order < 2:
            raise ValueError(f"the order is {source.order}; a table needs contexts: an order of at least 2")
        self.vocab_size, self.longest = source.vocab_size, source.order - 1
        self._levels: list[tuple[Ints, Ints]] = []
        for size in range(1, source.order):
            contexts, tokens = _most_frequent(*source.counts(size + 1))
            keys = self._ids(contexts[:, 1:]) * self.vocab_size + contexts[:, 0]
            order = np.argsort(keys)
            self._levels.append((keys[order], tokens[order]))

    def _ids(self, contexts: Ints) -> Ints:
        """The ids, (contexts,), of contexts (contexts, size) that are all in the table."""
        ids = np.zeros(len(contexts), np.int64)
        for (keys, _), column in zip(self._levels, contexts.T[::-1], strict=True):
            ids = np.searchsorted(keys, ids * self.vocab_size + column)
        return ids

    def new_text(self) -> GuessedText:
        """The table itself: it keeps nothing of a text."""
        return self

    def guess(self, text: list[int], count: int) -> list[int]:
        """The next `count` tokens; fewer where nothing ever followed the last one."""
        return list(islice(self._follow(text[-self.longest :]), count))

    def _follow(self, text: list[int]) -> Iterator[int]:
        while True:
            context, token = 0, -1
            for (keys, tokens), before in zip(self._levels, reversed(text), strict=False):
                key = context * self.vocab_size + before
                context = int(keys.searchsorted(key))
                if context == len(keys) or keys[context] != key:
                    break
                token = int(tokens[context])
            if token < 0:
                return
            yield token
            text = [*text, token]


def _most_frequent(ngrams: Ints, times: Ints) -> tuple[Ints, Ints]:
    """The contexts of sorted n-grams, (contexts, order - 1), and what came most often after each."""
    contexts, tokens = ngrams[:, :-1], ngrams[:, -1]
    is_new = np.concatenate([[True], (contexts[1:] != contexts[:-1]).any(1)])
    order = np.lexsort([-times, np.cumsum(is_new)])  # stable: of equals, the smallest token comes first
    best = order[is_new]  # sorting leaves each context its stretch
    return contexts[best], tokens[best]


class FirstGuess:
    """Guesses what the first of several guessers guesses that has a guess.

    >>> FirstGuess(PromptLookup(longest=5, shortest=2), PromptLookup(1)).new_text().guess([1, 2, 1], 2)
    [2, 1]
    """

    def __init__(self, *guessers: Guesser) -> None:
        sizes = {guesser.vocab_size for guesser in guessers} - {None}
        if not guessers or len(sizes) > 1:
            raise ValueError(f"there must be guessers, of one vocabulary, not of {sorted(map(str, sizes))}")
        self.guessers, self.vocab_size = guessers, next(iter(sizes), None)

    def new_text(self) -> GuessedText:
        """The text as each of them sees it."""
        return _FirstGuess([guesser.new_text() for guesser in self.guessers])


class _FirstGuess:
    def __init__(self, texts: Sequence[GuessedText]) -> None:
        self.texts = texts

    def guess(self, text: list[int], count: int) -> list[int]:
        return next((found for one in self.texts if (found := one.guess(text, count))), [])
