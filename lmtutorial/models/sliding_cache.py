"""Attention to the last `window` tokens: a cache that forgets the others, and the mask where there is none.

Sources: Beltagy, Peters and Cohan, "Longformer: The Long-Document Transformer", 2020; the rolling cache:
Jiang et al., "Mistral 7B", 2023, section 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lmtutorial.models.kv_cache import KVCache

SLACK = 32
"""How far before the beginning of its last forward a row can go back, in tokens."""


class SlidingKVCache(KVCache):
    """The keys and values that a window sees, in a ring: its memory grows with the window, not with the text.

    The token at position p goes to slot p mod (window + slack) of the ring, over one that no later token
    sees. The tokens of the last forward wait in front of the ring, and enter it when the next one begins,
    those that `truncate` has not taken back. So ragged prompts may be read at once, however long, and cut
    back; and behind them the `slack` lets a row go back further, as drafts ask for.

    keys and values are (layers, batch, kv heads, front + ring, size), where the front is as long as the last
    forward was, or up to SLACK.

    >>> cache = SlidingKVCache(2, 1, 1, 9999, 4, window=5, slack=3, like=torch.zeros(()))
    >>> cache.ring, cache.keys.shape
    (8, torch.Size([2, 1, 1, 8, 4]))
    """

    def __init__(
        self, layers: int, batch: int, kv_heads: int, max_len: int, size: int, *,
        window: int, slack: int = SLACK, like: Tensor,
    ) -> None:  # fmt: skip
        """For texts of at most `max_len` tokens, in the type and on the device of `like`."""
        if window < 1 or slack < 0:
            raise ValueError(f"a sliding cache needs window >= 1 and slack >= 0, got {window} and {slack}")
        super().__init__(layers, batch, kv_heads, min(max_len, window + slack), size, like=like)
        self.ring, self._max_len, self._window = self.keys.shape[3], max_len, window
        self.slack = slack
        self._time = 0  # how many tokens wait in front of the ring
        self._begins = torch.full_like(self.lengths, max_len)  # the position of the first of them, if any
        self._forgotten = torch.zeros_like(self.lengths)  # how many tokens of a row were overwritten

    @property
    def max_len(self) -> int:
        """How many tokens a row can read."""
        return self._max_len

    @property
    def front(self) -> int:
        """How many slots lie in front of the ring."""
        return self.keys.shape[3] - self.ring

    def make_room(self, time: int) -> Tensor:
        """The positions of the `time` tokens that come next, (batch, time); see `KVCache.make_room`."""
        used = min(self.ring, self.window(time) - time)  # slots of the ring that any row has reached
        self._settle()
        if not time <= self.front <= max(time, SLACK):
            grown = self.keys.new_zeros(2, *self.keys.shape[:3], time + self.ring, self.keys.shape[4])
            grown[0, ..., time:, :], grown[1, ..., time:, :] = self._rings()
            self.keys, self.values = grown
        self._time, self._begins = time, self.lengths
        arange, next_B1 = torch.arange(max(time, used), device=self.lengths.device), self.lengths[:, None]
        self._positions_BT = next_B1 + arange[:time]
        held_BS = next_B1 - 1 - (next_B1 - 1 - arange[:used]) % self.ring  # below 0: nothing yet
        position_B1S = torch.cat([self._positions_BT, held_BS], 1)[:, None]
        ahead_BTS = self._positions_BT[..., None] - position_B1S
        visible_BTS = (ahead_BTS >= 0) & (ahead_BTS < self._window) & (position_B1S >= 0)
        self._visible_B1TS = visible_BTS[:, None]
        return self._positions_BT

    def extend(self, layer: int, k_BHTD: Tensor, v_BHTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keep the keys and values of the new tokens; all there are, and which of them each token sees."""
        keys, values, visible = self.keys[layer], self.values[layer], self._visible_B1TS
        start, stop = self.front - self._time, self.front
        keys[:, :, start:stop], values[:, :, start:stop] = k_BHTD, v_BHTD
        stop = start + visible.shape[-1]
        return keys[:, :, start:stop], values[:, :, start:stop], visible

    def reorder(self, rows: Tensor) -> None:
        """Row b becomes what row `rows[b]` was."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        self.lengths, self._begins = self.lengths[rows], self._begins[rows]
        self._forgotten = self._forgotten[rows]

    def truncate(self, lengths: Tensor) -> None:
        """Forget what row b read after its first `lengths[b]` tokens.

        It is always possible to go back to 0, and to `slack` tokens before where any forward began. Raises
        ValueError, on a CPU, where what the next token would see is overwritten.
        """
        lengths = lengths.to(self.lengths)
        least_B = self._forgotten + self._window - 1
        gone_B = (lengths < least_B) & (self._forgotten > 0) & (lengths > 0)
        if gone_B.device.type == "cpu" and gone_B.any():
            row = int(gone_B.nonzero()[0])
            raise ValueError(
                f"row {row} cannot go back to {lengths[row]} tokens: its window of {self._window} has moved "
                f"on in a ring of {self.ring} slots, so that it must be at least {least_B[row]}, or 0"
            )
        self.lengths, self._forgotten = lengths, self._forgotten * (lengths > 0)

    def copy_out(self, row: int, start: int, stop: int) -> tuple[Tensor, Tensor] | None:  # type: ignore[override]
        """A copy of the keys and values of a row's tokens; None where some of them are overwritten."""
        if start < self._forgotten[row]:
            return None
        slots = self._slots(torch.arange(start, stop, device=self.lengths.device), self._begins[row])
        return self.keys[:, row][:, :, slots], self.values[:, row][:, :, slots]

    def copy_in(
        self, rows: Sequence[Sequence[tuple[Tensor, Tensor]]], to: Sequence[int] | None = None
    ) -> None:
        """Row b, or `to[b]`, becomes one that has read the pieces `rows[b]`, and keeps what it would keep."""
        to = range(len(rows)) if to is None else to
        lengths = [sum(keys.shape[2] for keys, _ in pieces) for pieces in rows]
        for row, pieces, length in zip(to, rows, lengths, strict=True):
            first = max(0, length - self.ring)
            slots = self.front + torch.arange(first, length, device=self.lengths.device) % self.ring
            for memory, parts in zip((self.keys, self.values), zip(*pieces, strict=True), strict=True):
                memory[:, row][:, :, slots] = torch.cat(parts, dim=2)[:, :, first:].to(memory.dtype)
        to_B, lengths_B = torch.tensor([list(to), lengths], device=self.lengths.device)
        self.lengths = self.lengths.index_copy(0, to_B, lengths_B)
        self._begins = self._begins.index_fill(0, to_B, self.max_len)
        self._forgotten = self._forgotten.index_copy(0, to_B, (lengths_B - self.ring).clamp(min=0))

    def _settle(self) -> None:
        """Into the ring goes what was read last and was not taken back, as much of it as the ring holds."""
        steps_N = torch.arange(min(self._time, self.ring), 0, -1, device=self.lengths.device)
        positions_BN = self.lengths[:, None] - steps_N
        from_BN = self._slots(positions_BN, self._begins[:, None])
        to_BN = self.front + positions_BN % self.ring
        rows_B1 = torch.arange(len(self.lengths), device=self.lengths.device)[:, None]
        for memory in (self.keys, self.values):
            memory[:, rows_B1, :, to_BN] = memory[:, rows_B1, :, from_BN]
        self._forgotten = self._forgotten.maximum(self.lengths - self.ring)

    def _slots(self, positions: Tensor, begins: Tensor) -> Tensor:
        """Where the tokens at `positions` lie: in front of the ring those from `begins` on, others in it."""
        in_front = self.front - self._time + positions - begins
        return torch.where(positions < begins, self.front + positions % self.ring, in_front)

    def _rings(self) -> tuple[Tensor, Tensor]:
        return self.keys[..., self.front :, :], self.values[..., self.front :, :]


class Band:
    """In the place of a cache where there is none: each token sees the last `window` of those given."""

    def __init__(self, window: int, time: int, device: torch.device) -> None:
        places_T = torch.arange(time, device=device)
        ahead_TT = places_T[:, None] - places_T
        self._visible_11TT = ((ahead_TT >= 0) & (ahead_TT < window))[None, None]

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The keys and values as they are, and which of them each token sees."""
        return k, v, self._visible_11TT
