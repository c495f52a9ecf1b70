"""Discounting: what smoothing takes from the counts of n-grams seen, to give it to those never seen."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lmtutorial.models.ngram_counts import Ints

Floats: TypeAlias = npt.NDArray[np.float64]


class Level(NamedTuple):
    """p(token | context) = weight[n-gram] + backoff[context] * p(token | context without its first token).

    `weight` and `backoff` end in one more entry, reached by index -1, for what was never seen: 0 and 1.
    """

    first: Ints  # (contexts + 1,): the n-grams of context j are first[j] .. first[j + 1] - 1
    last: Ints  # (ngrams,) last tokens
    counts: Ints  # (ngrams,) what was discounted
    weight: Floats  # (ngrams + 1,)
    backoff: Floats  # (contexts + 1,)


def estimate_discounts(counts: Ints) -> Floats:
    """What to take from counts of 1, 2, and 3 or more, (3,), from how many n-grams have counts of 1 to 4.

    D_i = i - (i + 1) * Y * n_{i+1} / n_i with Y = n_1 / (n_1 + 2 n_2), and never less than the one before, so
    that each is above 0. Where one of the four is missing (few n-grams, or none rare), 0.5, 1 and 1.5.
    Source: Chen & Goodman 1999 (see `NGram`), modified Kneser-Ney.

    >>> estimate_discounts(np.repeat([1, 2, 3, 4], [40, 20, 10, 6]))
    array([0.5 , 1.25, 1.8 ])
    """
    n = np.bincount(np.minimum(counts, 5), minlength=6)[1:5]
    if not n.all():
        return np.array([0.5, 1.0, 1.5])
    y = n[0] / (n[0] + 2 * n[1])
    i = np.arange(1, 4)
    return np.asarray(np.maximum.accumulate(i - (i + 1) * y * n[1:] / n[:-1]))


def weigh(keys: Ints, counts: Ints, contexts: int, vocab_size: int, discounts: Floats) -> Level:
    """Discount the counts of one order: n-grams (ngrams,) that follow `contexts` contexts -> `Level`."""
    context, last = np.divmod(keys, vocab_size)
    first = np.searchsorted(context, np.arange(contexts + 1))
    discount = discounts[np.minimum(counts, 3) - 1]
    total = np.bincount(context, counts, minlength=contexts + 1)
    reserve = np.bincount(context, discount, minlength=contexts + 1)
    backoff = np.divide(reserve, total, out=np.ones(contexts + 1), where=total > 0)
    weight = np.append((counts - discount) / total[context], 0.0)
    return Level(first, last, counts, weight, backoff)


def fit_discounts(vocab_size: int, matches: Iterable[tuple[Level, Ints, Ints]]) -> Floats:
    """The discounts, (order, 3), that make the tokens behind `matches` most probable.

    `matches` says, level by level from unigrams up, which context preceded each token of a held-out text and
    which n-gram the token completed there, (tokens,) ids each, -1 for one never seen. The probability of each
    token is linear in the discounts of one level; L-BFGS finds a maximum of the product. Of more than 100,000
    tokens it looks at every second, third ... one: so few numbers do not need more.
    """
    terms = []
    for level, context, ngram in matches:
        step = -(-len(ngram) // 100_000)
        terms.append(_linear_terms(level, context[::step], ngram[::step]))
    caps = torch.arange(1.0, 4.0, dtype=torch.float64)
    free = torch.zeros(len(terms), 3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([free], max_iter=15, line_search_fn="strong_wolfe")

    def discounts() -> Tensor:
        return (0.01 + 0.98 * free.sigmoid()) * caps  # never 0, so unseen tokens keep some probability

    def closure() -> Tensor:
        optimizer.zero_grad()
        probs = torch.full_like(terms[0].unseen, 1 / vocab_size)
        for term, discount in zip(terms, discounts(), strict=True):
            probs = (term.reserve @ discount + term.unseen) * probs + term.share - term.taken @ discount
        loss = -probs.log().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return np.asarray(discounts().detach().numpy())


class _Terms(NamedTuple):
    """Of each token: p = (reserve @ discounts + unseen) * p one level below + share - taken @ discounts."""

    reserve: Tensor  # (tokens, 3)
    unseen: Tensor  # (tokens,): 1 where the context was never seen
    share: Tensor  # (tokens,)
    taken: Tensor  # (tokens, 3)


def _linear_terms(level: Level, context: Ints, ngram: Ints) -> _Terms:
    contexts = len(level.first) - 1
    kind = np.minimum(level.counts, 3) - 1
    parent = np.repeat(np.arange(contexts), np.diff(level.first))
    kinds = np.bincount(parent * 3 + kind, minlength=3 * contexts + 3).reshape(-1, 3)  # how many of each
    totals = np.append(np.bincount(parent, level.counts, minlength=contexts), 0)
    unseen = (totals == 0).astype(np.float64)
    share = 1 / (totals + unseen)
    taken = np.eye(4, 3)[np.append(kind, 3)[ngram]] * share[context, None]  # row 3 of the matrix is all zeros
    terms = (
        kinds[context] * share[context, None],
        unseen[context],
        np.append(level.counts, 0)[ngram] * share[context],
        taken,
    )
    return _Terms(*map(torch.from_numpy, terms))
