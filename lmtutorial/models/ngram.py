"""Interpolated Kneser-Ney: the best n-gram model, and the baseline of every neural model after it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lmtutorial.batches import Tokens
from lmtutorial.models.cache import Cache
from lmtutorial.models.ngram_counts import Counts, Ints, count_ngrams
from lmtutorial.models.ngram_discounts import Floats, Level, estimate_discounts, fit_discounts, weigh
from lmtutorial.models.token_cache import TokenCache

Smoothing: TypeAlias = Literal["kneser-ney", "absolute", "none"]


class NGram:
    """Interpolated Kneser-Ney with three discounts an order; a `LanguageModel` on the CPU, not a module.

    With c(hw) the count of token w after context h (occurrences at the highest order; below it, the number of
    distinct tokens seen before hw), and h' the context h without its first token,

        p(w | h) = max(c(hw) - D(c(hw)), 0) / c(h) + backoff(h) * p(w | h'),

    where backoff(h) is what the discounts took from h. Below one token stands the uniform distribution over
    `vocab_size`, so no token has probability 0. A context never seen passes on to h' whole, and so does one
    that the text is too short to fill.

    Two plainer models come from the same counts. `smoothing="absolute"` discounts occurrences at every order,
    the same formula without Kneser and Ney's idea. `"none"` discounts nothing: relative frequencies after the
    longest context seen, which give probability 0 to whatever did not follow it.

    Sources: Kneser & Ney, "Improved backing-off for m-gram language modeling", ICASSP 1995; Chen & Goodman,
    "An empirical study of smoothing techniques for language modeling", Computer Speech & Language 13, 1999.

    >>> model = NGram.train([0, 1, 0, 1, 0, 2], order=2, vocab_size=3)
    >>> model(torch.tensor([[0]])).exp()
    tensor([[[0.2083, 0.4792, 0.3125]]])
    >>> model.score([0, 1]).round(4)  # -ln p(0), -ln p(1 | 0)
    array([0.8755, 0.7357])
    """

    context = None  # it reads sequences of any length
    device = torch.device("cpu")

    def __init__(
        self, vocab_size: int, counts: Sequence[Counts], smoothing: Smoothing, discounts: Floats | None = None
    ) -> None:
        """Build a model from counts; `NGram.train` makes it from text."""
        _check_smoothing(smoothing)
        self.vocab_size, self._counts, self.smoothing = vocab_size, tuple(counts), smoothing
        used = [c.befores if smoothing == "kneser-ney" else c.times for c in counts[:-1]] + [counts[-1].times]
        if smoothing == "none":
            discounts = np.zeros((self.order, 3))
        elif discounts is None:
            discounts = np.array([estimate_discounts(c) for c in used])
        discounts = np.asarray(discounts, np.float64)
        if discounts.shape != (self.order, 3) or not ((discounts >= 0) & (discounts <= [1, 2, 3])).all():
            raise ValueError(
                f"discounts must be ({self.order}, 3) numbers, from 0 to 1, 2 and 3 in the three columns, "
                f"got {discounts.tolist()}"
            )
        self.discounts = discounts
        contexts = [1] + [len(c.keys) for c in counts[:-1]]
        self._levels = [
            weigh(c.keys, use, many, vocab_size, discount)
            for c, use, many, discount in zip(counts, used, contexts, discounts, strict=True)
        ]
        unigrams = self._levels[0]
        self._unigrams = np.full(vocab_size, unigrams.backoff[0] / vocab_size)
        self._unigrams[unigrams.last] += unigrams.weight[:-1]

    @classmethod
    def train(
        cls,
        tokens: Tokens,
        order: int,
        vocab_size: int,
        *,
        smoothing: Smoothing = "kneser-ney",
        held_out: float = 0.0,
    ) -> NGram:
        """Count the n-grams of `tokens` up to `order` tokens long, and smooth them.

        `tokens` is one text (ids 0 .. vocab_size - 1). With `held_out`, a share such as 0.1, the discounts
        are fitted to that last part of the text, having counted the rest; then all of it is counted. With 0
        they are the estimates of Chen & Goodman.

        Raises ValueError for an order < 1, a text shorter than `order`, an id outside the vocabulary.
        """
        _check_smoothing(smoothing)
        if not 0 <= held_out < 1 or (held_out and smoothing == "none"):
            raise ValueError(f"held_out must be from 0 to below 1, 0 without smoothing, got {held_out}")
        if order < 1:
            raise ValueError(f"order must be at least 1, got {order}")
        array = _check_tokens(np.asarray(tokens), vocab_size, 1)
        if len(array) < order:
            raise ValueError(f"order {order} needs a text of at least {order} tokens, got {len(array)}")
        discounts = None
        if held_out:
            cut = round(len(array) * (1 - held_out))
            part = cls.train(array[:cut], order, vocab_size, smoothing=smoothing)
            discounts = part.fit_discounts(array[cut:])
        return cls(vocab_size, count_ngrams(array, order, vocab_size), smoothing, discounts)

    @property
    def order(self) -> int:
        """The longest n-gram it counts: it predicts a token from the `order - 1` tokens before it."""
        return len(self._counts)

    def counts(self, order: int, *, befores: bool = False) -> tuple[Ints, Ints]:
        """All distinct n-grams of one order, sorted, (ngrams, order), and how often each occurred, (ngrams,).

        With `befores`, the number of distinct tokens seen right before each (the start of the text is one
        more): what Kneser-Ney counts below the highest order, which has none itself.

        >>> ngrams, times = NGram.train([0, 1, 0, 1, 2], order=2, vocab_size=3).counts(2)
        >>> ngrams.tolist(), times.tolist()
        ([[0, 1], [1, 0], [1, 2]], [2, 1, 1])
        """
        highest = self.order - befores
        if not 1 <= order <= highest:
            raise ValueError(f"this model has such counts for orders 1 to {highest}, got {order}")
        columns, ids = [], np.arange(len(self._counts[order - 1].keys))
        for counts in self._counts[order - 1 :: -1]:
            ids, last = np.divmod(counts.keys[ids], self.vocab_size)
            columns.append(last)
        counts = self._counts[order - 1]
        return np.stack(columns[::-1], 1), (counts.befores if befores else counts.times).copy()

    def score(self, tokens: Tokens) -> Floats:
        """-ln p of each token of one text given those before it, (len(tokens),), in nats.

        The first tokens are predicted from the context there is. Equals gathering from the rows that calling
        the model returns, but looks up only the tokens that came: about 1,000,000 tokens a second.
        """
        text = _check_tokens(np.asarray(tokens), self.vocab_size, 1)
        probs = np.full(len(text), 1 / self.vocab_size)
        for level, context, ngram in self._matches(text):
            probs = level.backoff[context] * probs + level.weight[ngram]
        with np.errstate(divide="ignore"):  # without smoothing, -ln 0 = inf is the answer
            return np.asarray(-np.log(probs))

    def __call__(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Logits, here log-probabilities, of each next token: (batch, time) int64 -> (batch, time, vocab)."""
        return self.predict(tokens, cache)[0]

    def predict(self, tokens: Tensor, cache: Cache | None = None) -> tuple[Tensor, Tensor]:
        """The log-probabilities of each next token, and how many tokens before it were seen in training.

        tokens (batch, time) int64 -> (batch, time, vocab), and (batch, time) int64 from 0 to `order - 1`: the
        length of the longest end of the text so far that the training text has, too.

        >>> NGram.train([0, 1, 0, 1, 0, 2], order=3, vocab_size=3).predict(torch.tensor([[0, 1, 1]]))[1]
        tensor([[1, 2, 1]])
        """
        history = _check_tokens(tokens.numpy(), self.vocab_size, 2)
        if cache is not None:
            if not isinstance(cache, TokenCache):
                raise TypeError(
                    f"an NGram reads on from a cache of its own new_cache, got {type(cache).__name__}"
                )
            history = cache.extend(history)
        time = tokens.shape[1]
        ids = [i[:, i.shape[1] - time :] for i in self._ids(history, self.order - 1)]
        rows = self._rows([i.reshape(-1) for i in ids])
        with np.errstate(divide="ignore"):
            logits = torch.from_numpy(np.log(rows, out=rows)).view(*tokens.shape, self.vocab_size)
        matched = (np.stack(ids) >= 0).sum(0) - 1  # the empty context is always seen
        return logits, torch.from_numpy(matched)

    def new_cache(self, batch: int, max_len: int | None) -> TokenCache:
        """An empty cache, see `LanguageModel.new_cache`; an endless one keeps the last `order - 1` tokens."""
        return TokenCache(batch, max_len, self.order - 1)

    def fit_discounts(self, held_out: Tokens) -> Floats:
        """The discounts, (order, 3), with which these counts make `held_out` most probable."""
        text = _check_tokens(np.asarray(held_out), self.vocab_size, 1)
        if not len(text):
            raise ValueError("there is no held-out token to fit the discounts to")
        return fit_discounts(self.vocab_size, self._matches(text))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write counts, discounts and smoothing to `path`, a NumPy .npz file whatever its name."""
        names = [f"{field}_{n}" for n in range(1, self.order + 1) for field in Counts._fields]
        arrays: dict[str, Any] = dict(zip(names, (a for counts in self._counts for a in counts), strict=True))
        with open(path, "wb") as file:
            np.savez(
                file, vocab_size=self.vocab_size, smoothing=self.smoothing, discounts=self.discounts, **arrays
            )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> NGram:
        """Read a model that `save` wrote; nothing is unpickled."""
        with np.load(path, allow_pickle=False) as file:
            orders = range(1, len(file["discounts"]) + 1)
            counts = [Counts(*(file[f"{field}_{n}"] for field in Counts._fields)) for n in orders]
            return cls(int(file["vocab_size"]), counts, str(file["smoothing"]), file["discounts"])  # type: ignore[arg-type]

    def _ids(self, history: Ints, longest: int) -> list[Ints]:
        """Ids, (batch, time) each, of the 0, 1 .. `longest` tokens ending at each place; -1 if never seen."""
        ids = [np.zeros_like(history)]
        for n, counts in enumerate(self._counts[:longest]):
            prefix = ids[0] if n == 0 else _shift(ids[-1])
            key = prefix * self.vocab_size + history  # negative, so never found, if the prefix is -1
            place = np.minimum(np.searchsorted(counts.keys, key), len(counts.keys) - 1)
            ids.append(np.where(counts.keys[place] == key, place, -1))
        return ids

    def _matches(self, text: Ints) -> Iterator[tuple[Level, Ints, Ints]]:
        """Level by level, for each token of a text: the ids of its context and of the n-gram it ends."""
        ids = self._ids(text[None], self.order)
        for n, level in enumerate(self._levels):
            yield level, (ids[0] if n == 0 else _shift(ids[n]))[0], ids[n + 1][0]

    def _rows(self, contexts: list[Ints]) -> npt.NDArray[np.float32]:
        """Next-token probabilities, (rows, vocab), after contexts of 0 .. order - 1 tokens, (rows,) ids each.

        The recursion unrolled: what a level adds is scaled by the backoffs of all longer contexts, so the
        whole row is written once, for the unigrams, and each longer context touches only what followed it.
        """
        scale = np.ones(len(contexts[0]))
        scales = []
        for level, context in zip(self._levels[:0:-1], contexts[:0:-1], strict=True):
            scales.append(scale)
            scale = scale * level.backoff[context]
        probs = np.multiply.outer(scale.astype(np.float32), self._unigrams.astype(np.float32))
        flat = probs.reshape(-1)
        for level, context, scale in zip(self._levels[1:], contexts[1:], scales[::-1], strict=True):
            seen = np.flatnonzero(context >= 0)
            start = level.first[context[seen]]
            many = level.first[context[seen] + 1] - start
            ngram = np.arange(many.sum()) + np.repeat(start - (np.cumsum(many) - many), many)
            row = np.repeat(seen, many)
            flat[row * self.vocab_size + level.last[ngram]] += scale[row] * level.weight[ngram]
        return probs


def _shift(ids: Ints) -> Ints:
    """One place to the right, -1 coming in."""
    return np.concatenate([np.full_like(ids[:, :1], -1), ids[:, :-1]], 1)


def _check_smoothing(smoothing: str) -> None:
    if smoothing not in get_args(Smoothing):
        raise ValueError(f"smoothing must be one of {get_args(Smoothing)}, got {smoothing!r}")


def _check_tokens(tokens: npt.NDArray[np.generic], vocab_size: int, axes: int) -> Ints:
    if tokens.ndim != axes or (tokens.size and tokens.dtype.kind not in "iu"):
        raise ValueError(f"tokens must be {axes}-D integers, got shape {tokens.shape} of {tokens.dtype}")
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab_size:
        raise ValueError(f"token ids must be 0 to {vocab_size - 1}, got {tokens.min()} to {tokens.max()}")
    return tokens.astype(np.int64, copy=False)
