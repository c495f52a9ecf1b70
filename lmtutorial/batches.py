"""Tokens to (inputs, targets), in two orders: contiguous streams and shuffled windows.

A text of N tokens holds N - 1 targets: each token but the first, given all before it. Both orders show every
target exactly once an epoch, in batches of one shape, and can say where they are and resume there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

IGNORE = -100
"""The target where there is nothing to predict: padding at the end of a stream."""

Tokens = Sequence[int] | npt.NDArray[np.integer[Any]] | Tensor
Ids = npt.NDArray[np.int64]
Spans = tuple[Ids, Ids]


class Batch(NamedTuple):
    """One step's data: `inputs` and `targets`, both (batch, time) int64.

    `targets[b, t]` follows `inputs[b, t]` in the text, or is -100 where there is nothing to predict.
    `continues` is True where row b goes on where row b of the batch before ended, so that a model's cache is
    carried over; False where such streams begin; None where rows stand alone.
    """

    inputs: Tensor
    targets: Tensor
    continues: bool | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(self.inputs.to(device), self.targets.to(device), self.continues)


class _Batches(ABC):
    """What both orders share: the tokens, the shape, and a position that can be saved."""

    _continuous: bool

    def __init__(self, tokens: Tokens, batch: int, time: int, seed: int = 0) -> None:
        if batch < 1 or time < 1:
            raise ValueError(f"batch is {batch} and time is {time}; both must be at least 1")
        self.tokens = _as_array(tokens)
        self.batch, self.time, self.seed = batch, time, seed
        self.epoch = self.position = 0

    @abstractmethod
    def __len__(self) -> int:
        """Batches in an epoch."""

    @abstractmethod
    def _spans(self) -> Callable[[int], Spans]:
        """This epoch's order: from the number of a batch to where in the tokens its rows begin and end."""

    def __iter__(self) -> Iterator[Batch]:
        """The rest of this epoch, from where it stands; then the next epoch is up."""
        spans = self._spans()
        while self.position < len(self):
            begin_B, end_B = spans(self.position)
            self.position += 1  # before the yield, so that a state saved by the consumer counts this batch
            yield self._gather(begin_B, end_B, self.position > 1 if self._continuous else None)
        self.epoch, self.position = self.epoch + 1, 0

    def _gather(self, begin_B: Ids, end_B: Ids, continues: bool | None) -> Batch:
        index_BT = begin_B[:, None] + np.arange(self.time)
        there_BT = index_BT < end_B[:, None]
        index_BT = np.where(there_BT, index_BT, 0)
        inputs = self.tokens[index_BT].astype(np.int64)
        targets = np.where(there_BT, self.tokens[index_BT + 1].astype(np.int64), IGNORE)
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), continues)

    def state_dict(self) -> dict[str, int]:
        """Where the iteration stands: the epoch, the batch in it, and the seed of the order."""
        return {"epoch": self.epoch, "position": self.position, "seed": self.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Stand where `state_dict` was taken."""
        self.epoch, self.position, self.seed = state["epoch"], state["position"], state["seed"]


class StreamBatches(_Batches):
    """The text cut into `batch` contiguous streams, read side by side, `time` tokens at a time.

    For truncated backpropagation through time: row b of a batch continues row b of the one before.

    >>> for inputs, targets, continues in StreamBatches(range(9), batch=2, time=3):
    ...     print(inputs.tolist(), targets.tolist(), continues)
    [[0, 1, 2], [4, 5, 6]] [[1, 2, 3], [5, 6, 7]] False
    [[3, 0, 0], [7, 0, 0]] [[4, -100, -100], [8, -100, -100]] True
    """

    _continuous = True

    def __init__(self, tokens: Tokens, batch: int, time: int) -> None:
        super().__init__(tokens, batch, time)

    @property
    def _stream(self) -> int:
        """Targets in a stream (the last may be shorter)."""
        return -(-(len(self.tokens) - 1) // self.batch)

    def __len__(self) -> int:
        """Batches in an epoch."""
        return -(-self._stream // self.time)

    def _spans(self) -> Callable[[int], Spans]:
        stream_B = np.arange(self.batch) * self._stream
        end_B = np.minimum(stream_B + self._stream, len(self.tokens) - 1)
        return lambda position: (stream_B + position * self.time, end_B)


class WindowBatches(_Batches):
    """Windows of `time` tokens in an order drawn anew each epoch, from a grid shifted anew each epoch.

    For models that read a window at once. The seed and the epoch determine the order.

    >>> batches = WindowBatches(range(10), batch=2, time=4, seed=0)
    >>> sorted(t for batch in batches for t in batch.targets.flatten().tolist() if t >= 0)
    [1, 2, 3, 4, 5, 6, 7, 8, 9]
    """

    _continuous = False

    def __len__(self) -> int:
        """Batches in an epoch: enough for the windows of any shift."""
        windows = 1 - (-(len(self.tokens) - 1) // self.time)
        return -(-windows // self.batch)

    def _spans(self) -> Callable[[int], Spans]:
        rng = np.random.default_rng([self.seed, self.epoch])
        last = len(self.tokens) - 1
        shift = int(rng.integers(self.time))  # the first window holds the `shift` targets before the grid
        windows = 1 + max(0, -(-(last - shift) // self.time))
        order = np.full(len(self) * self.batch, -1)  # -1: a row without a target
        order[:windows] = rng.permutation(windows)

        def spans(position: int) -> Spans:
            window_B = order[position * self.batch : (position + 1) * self.batch]
            begin_B = (shift + (window_B - 1) * self.time).clip(min=0)
            end_B = (shift + window_B * self.time).clip(min=0, max=last)
            return np.where(window_B < 0, last, begin_B), end_B

        return spans


class SlidingWindows(_Batches):
    """Windows that overlap, to measure a model of limited context: each target once, after much of its text.

    A window of `time` tokens goes on `stride` tokens after the one before, and only its last `stride` targets
    count (of the first window, all). So each is predicted from at least `time - stride` tokens, where the
    text has as many before it. The smaller the stride, the fairer to the model and the slower.

    >>> for inputs, targets, _ in SlidingWindows(range(8), batch=1, time=4, stride=2):
    ...     print(inputs.tolist(), targets.tolist())
    [[0, 1, 2, 3]] [[1, 2, 3, 4]]
    [[2, 3, 4, 5]] [[-100, -100, 5, 6]]
    [[4, 5, 6, 0]] [[-100, -100, 7, -100]]
    """

    _continuous = False

    def __init__(self, tokens: Tokens, batch: int, time: int, stride: int | None = None) -> None:
        """`stride=None` is half of `time`."""
        super().__init__(tokens, batch, time)
        self.stride = max(1, time // 2) if stride is None else stride
        if not 1 <= self.stride <= time:
            raise ValueError(f"stride is {stride}; it must be from 1 to time, which is {time}")

    @property
    def _windows(self) -> int:
        return 1 + max(0, -(-(len(self.tokens) - 1 - self.time) // self.stride))

    def __len__(self) -> int:
        """Batches in an epoch."""
        return -(-self._windows // self.batch)

    def _spans(self) -> Callable[[int], Spans]:
        def spans(position: int) -> Spans:
            window_B = position * self.batch + np.arange(
                min(self.batch, self._windows - position * self.batch)
            )
            begin_B = window_B * self.stride
            return begin_B, np.minimum(begin_B + self.time, len(self.tokens) - 1)

        return spans

    def _gather(self, begin_B: Ids, end_B: Ids, continues: bool | None) -> Batch:
        batch = super()._gather(begin_B, end_B, continues)
        seen = self.time - self.stride
        batch.targets[torch.from_numpy(begin_B) > 0, :seen] = IGNORE  # counted by the window before
        return batch


def _as_array(tokens: Tokens) -> npt.NDArray[np.integer[Any]]:
    array = tokens.cpu().numpy() if isinstance(tokens, Tensor) else np.asanyarray(tokens)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise TypeError(
            f"tokens are {array.dtype} of shape {array.shape}; one row of integer token ids is needed"
        )
    if len(array) < 2:
        raise ValueError(f"a text of {len(array)} tokens holds nothing to predict; at least 2 are needed")
    return array


def save_tokens(path: str | Path, tokens: Tokens) -> Path:
    """Write token ids to a `.npy` file, in the smallest unsigned integers that hold them.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     print(load_tokens(save_tokens(f"{folder}/tokens.npy", [3, 1, 4])).tolist())
    [3, 1, 4]
    """
    array = _as_array(tokens)
    if array.min() < 0:
        raise ValueError(f"a token id is {array.min()}; ids are 0 or greater")
    path = Path(path)
    np.save(path, array.astype(np.min_scalar_type(array.max())), allow_pickle=False)
    return path


def load_tokens(path: str | Path) -> npt.NDArray[np.integer[Any]]:
    """The token ids in a `.npy` file, mapped into memory: the file may be larger than memory."""
    return np.load(path, mmap_mode="r", allow_pickle=False)  # type: ignore[no-any-return]
