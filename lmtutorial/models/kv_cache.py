"""The Transformer's cache: the keys and values of the tokens read so far, in memory set aside once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FEW = 256
"""Up to so many rows it pays to look at each pair of them, before their slots are copied."""


class KVCache:
    """Keys and values of each layer, (layers, batch, kv heads, max_len, size); a `Cache`.

    Slot j of a row is visible to the query at position p exactly if j <= p. So going back is only setting
    `lengths`: what lies beyond is never seen, and is overwritten by the next tokens.
    """

    def __init__(
        self, layers: int, batch: int, kv_heads: int, max_len: int, size: int, *, like: Tensor
    ) -> None:
        """Room for `max_len` tokens a row, in the type and on the device of `like`."""
        if batch < 1 or max_len < 0:
            raise ValueError(f"a cache needs batch >= 1 and max_len >= 0, got {batch} and {max_len}")
        shape = (layers, batch, kv_heads, max_len, size)
        self.keys = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.values = torch.zeros_like(self.keys)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=like.device)
        self._alike: Tensor | None = None  # (batch, batch): before which slot two rows are copies, if known

    @property
    def max_len(self) -> int:
        """How many tokens a row can hold."""
        return self.keys.shape[3]

    def make_room(self, time: int) -> Tensor:
        """The positions of the `time` tokens that come next, (batch, time); for the layers to `extend` at.

        Raises ValueError, on a CPU, where they do not fit (elsewhere looking would wait for the device).
        """
        window = self.window(time)
        self._positions_BT = self.lengths[:, None] + torch.arange(time, device=self.lengths.device)
        slots = torch.arange(window, device=self.lengths.device)
        self._visible_B1TS = slots <= self._positions_BT[:, None, :, None]
        return self._positions_BT

    def window(self, time: int) -> int:
        """How many slots of a row `time` more tokens may look at; raises as `make_room` does."""
        if self.keys.device.type != "cpu":
            return self.max_len
        window = int(self.lengths.max()) + time  # slots that no row has reached need not be looked at
        if window > self.max_len:
            raise ValueError(f"the cache holds at most {self.max_len} tokens a row, {window} are needed")
        return window

    def extend(self, layer: int, k_BHTD: Tensor, v_BHTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keep the keys and values of the new tokens; all there are, and which of them each token sees."""
        keys, values, visible = self.keys[layer], self.values[layer], self._visible_B1TS
        index = self._positions_BT[:, None, :, None].expand_as(k_BHTD)
        keys.scatter_(2, index, k_BHTD.to(keys.dtype))
        values.scatter_(2, index, v_BHTD.to(values.dtype))
        window = visible.shape[-1]
        return keys[:, :, :window], values[:, :, :window], visible

    def advance(self) -> None:
        """The tokens of `make_room` are read."""
        self.lengths = self.lengths + self._positions_BT.shape[1]

    def reorder(self, rows: Tensor) -> None:
        """Row b becomes what row `rows[b]` was.

        A few rows on a CPU copy only slots that may differ: the beams of a prompt, copies of each other that
        have gone different ways since, share most of theirs.
        """
        lengths = self.lengths[rows]
        if self.keys.device.type == "cpu" and max(len(rows), len(self.lengths)) <= FEW:
            self._copy_what_differs(rows, lengths)
        else:
            self.keys, self.values, self._alike = self.keys[:, rows], self.values[:, rows], None
        self.lengths = lengths

    def _copy_what_differs(self, rows: Tensor, lengths: Tensor) -> None:
        before = self.keys, self.values
        alike = self._alike if self._alike is not None else torch.zeros(2 * self.lengths.shape).long()
        if len(rows) == len(self.lengths):
            starts = alike.gather(1, rows[:, None])[:, 0]  # before these slots row b is like row rows[b]
            starts = torch.where(rows == torch.arange(len(rows)), lengths, starts)
        else:
            starts = torch.zeros_like(rows)
            shape = (self.keys.shape[0], len(rows), *self.keys.shape[2:])
            self.keys, self.values = self.keys.new_zeros(shape), self.values.new_zeros(shape)
        spans = zip(rows.tolist(), starts.tolist(), lengths.tolist(), strict=True)
        moves = [(b, row, slice(start, end)) for b, (row, start, end) in enumerate(spans) if start < end]
        for old, new in zip(before, (self.keys, self.values), strict=True):
            pieces = [old[:, row, :, span].clone() for _, row, span in moves]  # before any is overwritten
            for (b, _, span), piece in zip(moves, pieces, strict=True):
                new[:, b, :, span] = piece
        self._alike = torch.where(rows[:, None] == rows, lengths, alike[rows][:, rows])

    def truncate(self, lengths: Tensor) -> None:
        """Forget what row b read after its first `lengths[b]` tokens."""
        self.lengths = lengths.to(self.lengths)
        if self._alike is not None:
            self._alike = self._alike.minimum(self.lengths).minimum(self.lengths[:, None])

    def copy_out(self, row: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """A copy of the keys and values of a row's tokens, (layers, kv heads, tokens, size) each."""
        return self.keys[:, row, :, start:stop].clone(), self.values[:, row, :, start:stop].clone()

    def copy_in(
        self, rows: Sequence[Sequence[tuple[Tensor, Tensor]]], to: Sequence[int] | None = None
    ) -> None:
        """Row b, or `to[b]`, becomes one that has read the pieces `rows[b]`."""
        to = range(len(rows)) if to is None else to
        lengths = [sum(keys.shape[2] for keys, _ in pieces) for pieces in rows]
        for row, pieces, length in zip(to, rows, lengths, strict=True):
            keys, values = zip(*pieces, strict=True)
            torch.cat(keys, dim=2, out=self.keys[:, row, :, :length])
            torch.cat(values, dim=2, out=self.values[:, row, :, :length])
        new = torch.tensor([list(to), lengths], dtype=torch.int64, device=self.lengths.device)
        self.lengths, self._alike = self.lengths.index_copy(0, *new), None

    def detach(self) -> None:
        """Cut the graph."""
        self.keys, self.values = self.keys.detach(), self.values.detach()
