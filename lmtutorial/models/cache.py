"""The contract between language models and decoders: logits, and a cache that can go back.

Every model of this package, n-gram, LSTM or Transformer, is a `LanguageModel`, so each decoder is
written once. A cache is to a Transformer (keys and values) what the hidden state is to an LSTM.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Cache(Protocol):
    """What a model remembers of the tokens it has read, row by row.

    Only the model's own `forward` advances a cache; a decoder may reorder its rows and cut it back.
    """

    @property
    def lengths(self) -> Tensor:
        """(batch,) int64: how many tokens of each row the cache holds."""

    def reorder(self, rows: Tensor) -> None:
        """Row b becomes what row `rows[b]` was; `rows` (new batch,) int64 may repeat rows or drop them."""

    def truncate(self, lengths: Tensor) -> None:
        """Forget what row b read after its first `lengths[b]` tokens; `lengths` is (batch,) int64."""

    def copy_out(self, row: int, start: int, stop: int) -> Any:
        """A copy of what the tokens `start` to `stop - 1` of row `row` left, which `copy_in` can read.

        None where the cache keeps them no longer: see `lmtutorial.models.sliding_cache`.
        """

    def copy_in(self, rows: Sequence[Sequence[Any]], to: Sequence[int] | None = None) -> None:
        """Row b becomes one that has read the tokens of the pieces `rows[b]`, one piece after another.

        With `to` it is row `to[b]` that becomes so, and other rows stay. The pieces were copied out of caches
        of the same model, each at the place where it now stands.
        """

    def detach(self) -> None:
        """Cut the graph: what the cache holds no longer carries gradients to the steps that made it."""


class LanguageModel(Protocol):
    """A model of the next token, given all tokens before it."""

    @property
    def vocab_size(self) -> int:
        """The number of tokens it knows; ids are 0 .. vocab_size - 1."""

    @property
    def context(self) -> int | None:
        """The longest sequence it can read, in tokens; None where there is no limit."""

    @property
    def device(self) -> torch.device:
        """Where its logits are computed."""

    def __call__(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Logits of each next token: tokens (batch, time) int64 -> (batch, time, vocab_size).

        With a cache, `tokens` continue what the cache holds, and the cache then holds them too.
        """

    def new_cache(self, batch: int, max_len: int | None) -> Cache:
        """An empty cache for `batch` rows of at most `max_len` tokens.

        `max_len=None` asks for an endless stream, as truncated backpropagation through time reads it: the
        cache keeps only what the next step needs and cannot be truncated. A model with a limited context
        refuses it.
        """


def carried(model: LanguageModel, cache: Cache | None, rows: int, continues: bool | None) -> Cache | None:
    """The cache for the next batch of `rows` rows, cut from the graph: the one carried, a fresh one, or none.

    `continues` is the batch's own: True goes on with `cache`, False begins a stream, None stands alone.
    """
    if continues is None:
        return None
    if not continues or cache is None:
        return model.new_cache(rows, None)
    cache.detach()
    return cache
