"""The Transformer's cache: the keys and values of the tokens read so far, in memory set aside once."""

from __future__ import annotations

import torch
from torch import Tensor


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

    @property
    def max_len(self) -> int:
        """How many tokens a row can hold."""
        return self.keys.shape[3]

    def make_room(self, time: int) -> Tensor:
        """The positions of the `time` tokens that come next, (batch, time); for the layers to `extend` at.

        Raises ValueError, on a CPU, where they do not fit (elsewhere looking would wait for the device).
        """
        window = self.max_len
        if self.keys.device.type == "cpu":
            window = int(self.lengths.max()) + time  # slots that no row has reached need not be looked at
            if window > self.max_len:
                raise ValueError(f"the cache holds at most {self.max_len} tokens a row, {window} are needed")
        self._positions_BT = self.lengths[:, None] + torch.arange(time, device=self.lengths.device)
        slots = torch.arange(window, device=self.lengths.device)
        self._visible_B1TS = slots <= self._positions_BT[:, None, :, None]
        return self._positions_BT

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
        """Row b becomes what row `rows[b]` was."""
        self.keys, self.values, self.lengths = self.keys[:, rows], self.values[:, rows], self.lengths[rows]

    def truncate(self, lengths: Tensor) -> None:
        """Forget what row b read after its first `lengths[b]` tokens."""
        self.lengths = lengths.to(self.lengths)

    def detach(self) -> None:
        """Cut the graph."""
        self.keys, self.values = self.keys.detach(), self.values.detach()
