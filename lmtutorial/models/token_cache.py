"""A cache that keeps tokens: all the state that a model with a short, fixed memory needs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Ints = npt.NDArray[np.int64]


class TokenCache:
    """The tokens read, row by row; a `Cache` for models that need nothing else."""

    def __init__(self, batch: int, max_len: int | None, context: int) -> None:
        """Room for `max_len` tokens a row, after `context` places before the text that hold -1, no token."""
        if batch < 1 or (max_len is not None and max_len < 0):
            raise ValueError(f"a cache needs batch >= 1 and max_len >= 0 or None, got {batch} and {max_len}")
        self.max_len, self._context = max_len, context
        self._tokens = np.full((batch, context + (max_len or 0)), -1, np.int64)
        self._lengths = torch.zeros(batch, dtype=torch.int64)

    @property
    def lengths(self) -> Tensor:
        """(batch,) int64: how many tokens of each row were read."""
        return self._lengths

    def extend(self, tokens: Ints) -> Ints:
        """Read on, (batch, time); returns them with the `context` tokens before, (batch, context + time)."""
        batch, time = tokens.shape
        if batch != len(self._tokens):
            raise ValueError(f"the cache has {len(self._tokens)} rows, the tokens {batch}")
        if self.max_len is None:
            window = np.concatenate([self._tokens, tokens], 1)
            self._tokens = window[:, time:]
        else:
            longest = int(self._lengths.max()) + time
            if longest > self.max_len:
                raise ValueError(f"the cache holds at most {self.max_len} tokens a row, {longest} are needed")
            rows, slots = (
                np.arange(batch)[:, None],
                self._lengths.numpy()[:, None] + np.arange(self._context + time),
            )
            self._tokens[rows, slots[:, self._context :]] = tokens
            window = self._tokens[rows, slots]
        self._lengths = self._lengths + time
        return window

    def reorder(self, rows: Tensor) -> None:
        """Row b becomes what row `rows[b]` was."""
        self._tokens, self._lengths = self._tokens[rows.numpy()], self._lengths[rows]

    def truncate(self, lengths: Tensor) -> None:
        """Forget what row b read after its first `lengths[b]` tokens."""
        if self.max_len is None:
            raise ValueError("an endless cache (max_len=None) cannot be truncated")
        if lengths.shape != self._lengths.shape or (lengths < 0).any() or (lengths > self._lengths).any():
            raise ValueError(f"cannot truncate lengths {self._lengths.tolist()} to {lengths.tolist()}")
        self._lengths = lengths.clone()

    def copy_out(self, row: int, start: int, stop: int) -> Ints:
        """A copy of a row's tokens, (tokens,)."""
        if self.max_len is None:
            raise ValueError("an endless cache (max_len=None) cannot be copied out of")
        return self._tokens[row, self._context + start : self._context + stop].copy()

    def copy_in(self, rows: Sequence[Sequence[Ints]], to: Sequence[int] | None = None) -> None:
        """Row b, or `to[b]`, becomes one that has read the pieces `rows[b]`."""
        self._lengths = self._lengths.clone()
        for row, pieces in zip(range(len(rows)) if to is None else to, rows, strict=True):
            tokens = np.concatenate(pieces)
            self._tokens[row, self._context : self._context + len(tokens)] = tokens
            self._lengths[row] = len(tokens)

    def detach(self) -> None:
        """Nothing to cut: counts have no gradients."""
