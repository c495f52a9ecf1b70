"""All n-grams of a text, counted with one sort.

The counts live in a trie of flat arrays. Level n holds the distinct n-grams in sorted order; the id of an
n-gram is its place there, and its key is (id of its first n - 1 tokens) * vocab_size + its last token. So any
order and any vocabulary fit 64 bits, a lookup is one binary search, and what followed a context is one slice.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Ints: TypeAlias = npt.NDArray[np.int64]


class Counts(NamedTuple):
    """The distinct n-grams of one order, sorted, with how often and in how many ways each occurred."""

    keys: Ints  # (ngrams,) ascending: id of the first n - 1 tokens * vocab_size + last token
    times: Ints  # (ngrams,) occurrences in the text
    befores: Ints  # (ngrams,) distinct tokens seen right before it; the start of the text counts as one more


def count_ngrams(tokens: Ints, order: int, vocab_size: int) -> list[Counts]:
    """Count the n-grams of one text for n = 1 .. `order`, (tokens,) -> one `Counts` an order.

    One sort does it: with the windows of `order` tokens that start at each place in dictionary order, equal
    n-grams are neighbors for every n at once. Beyond its end the text goes on with a token `vocab_size`, so
    that the last windows are whole; n-grams that hold it are not counted.

    Raises ValueError if the keys would not fit 64 bits.

    >>> [c.times.tolist() for c in count_ngrams(np.array([0, 1, 0, 1, 2]), order=2, vocab_size=3)]
    [[2, 2, 1], [2, 1, 1]]
    """
    if len(tokens) * (vocab_size + 1) >= 2**63:
        raise ValueError(f"{len(tokens):,} tokens of a vocabulary of {vocab_size:,} do not fit 64-bit keys")
    padded = np.concatenate([tokens, np.full(order, vocab_size)])
    starts = _sorted_windows(padded, order, vocab_size + 1)
    padded = padded.astype(np.min_scalar_type(vocab_size))  # small tokens stay in the processor's cache
    is_new, is_whole = np.zeros(len(tokens), bool), np.ones(len(tokens), bool)
    is_new[0] = True
    ids = np.zeros(len(tokens), np.int64)  # of each window's first n tokens
    id_at = np.zeros(len(tokens) + 1, np.int64)  # the same by place in the text
    levels: list[Counts] = []
    for n in range(order):
        last = padded[starts + n]
        is_new[1:] |= last[1:] != last[:-1]
        is_whole &= last < vocab_size
        heads = np.flatnonzero(is_new & is_whole)
        if levels:  # each new n-gram is one more token seen before the n - 1 tokens that it ends with
            befores = np.bincount(id_at[starts[heads] + 1], minlength=len(levels[-1].keys))
            befores[id_at[0]] += 1
            levels[-1] = levels[-1]._replace(befores=befores)
        times = np.add.reduceat(is_whole, heads, dtype=np.int64)
        levels.append(Counts(ids[heads] * vocab_size + last[heads], times, times))
        ids = np.cumsum(is_new & is_whole) - 1
        id_at[starts] = ids
    return levels


def _sorted_windows(padded: Ints, order: int, base: int) -> Ints:
    """The places 0 .. len(padded) - order - 1 in the dictionary order of the `order` tokens from there on."""
    places = len(padded) - order
    digits = max(d for d in range(1, 64) if base**d <= 2**63)  # so many tokens go into one sort key
    keys = []
    for start in range(0, order, digits):
        key = np.zeros(places, np.int64)
        for n in range(start, min(start + digits, order)):
            key = key * base + padded[n : n + places]
        keys.append(key)
    return np.argsort(keys[0]) if len(keys) == 1 else np.lexsort(keys[::-1])
