"""What a machine can do at most, what a decode step asks of it, and how close a decoder comes: the roofline.

A step takes at least as long as reading its bytes, and at least as long as its multiplications. Source:
Williams, Waterman and Patterson, "Roofline: an insightful visual performance model for multicore
architectures", Communications of the ACM 52(4), 2009.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from lmtutorial.models.transformer import Transformer
from lmtutorial.quantize import QuantizedLinear

Name = TypeVar("Name")

LARGE = 256 * 2**20
"""Bytes that are read to measure how fast memory is read: more than caches hold."""


def in_turns(runs: Mapping[Name, Callable[[], object]], turns: int = 5) -> dict[Name, float]:
    """Median seconds of each of `runs`, called one after the other, `turns` times, after one to warm up.

    What else goes on in a machine changes from second to second: in turns it meets all of them alike. Raises
    ValueError for less than one turn.

    >>> list(in_turns({"nothing": lambda: None}, turns=1))
    ['nothing']
    """
    if turns < 1:
        raise ValueError(f"turns is {turns}; it must be at least 1")
    seconds: dict[Name, list[float]] = {name: [] for name in runs}
    for turn in range(turns + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn > 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


@dataclass(frozen=True)
class Limits:
    """What a machine does at most.

    >>> Limits(bytes_a_second=20e9, flops_a_second=200e9).balance
    10.0
    """

    bytes_a_second: float
    """Read from memory."""
    flops_a_second: float
    """Multiplications and additions of float32, or of the type measured."""

    @property
    def balance(self) -> float:
        """Operations for each byte at which reading and calculating take equally long."""
        return self.flops_a_second / self.bytes_a_second

    def seconds(self, work: Work) -> float:
        """The least time that `work` can take: the roofline."""
        return max(work.bytes / self.bytes_a_second, work.flops / self.flops_a_second)


@dataclass(frozen=True)
class Work:
    """What a computation asks for."""

    bytes: float
    """To be read from memory."""
    flops: float
    """Multiplications and additions, each counted as one."""

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.flops / self.bytes


def measure_limits(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Limits:
    """The limits of this machine, now: by adding up a large tensor, and by multiplying large matrices.

    They are medians of what PyTorch reaches with the threads that it has: what is possible is a little more.
    """
    large = torch.ones(LARGE // 4, device=device)
    square = torch.randn(1024, 1024, device=device).to(dtype)
    seconds = in_turns({"read": large.sum, "multiply": lambda: square @ square}, turns=7)
    return Limits(large.nbytes / seconds["read"], 2 * 1024**3 / seconds["multiply"])


def decode_work(model: Transformer, length: int, batch: int = 1, time: int = 1) -> Work:
    """What one step asks for: `time` new tokens in each of `batch` rows, after `length` in the cache.

    Read are each matrix once, however many rows there are, and each row's own keys and values. Left out is
    what is small beside them while rows and `time` are few: norms, biases, embeddings of the tokens read,
    activations. Attention is counted without the half that causality saves within the new tokens.

    >>> from lmtutorial.models.transformer import TransformerConfig
    >>> work = decode_work(Transformer(TransformerConfig.gpt2()), length=0)
    >>> f"{work.bytes / 1e6:.0f} MB, {work.intensity:.2f} operations a byte"
    '494 MB, 0.50 operations a byte'
    """
    c, element = model.config, model.embedding.weight.element_size()
    matrices = [m for m in model.modules() if isinstance(m, nn.Linear | QuantizedLinear)]
    slots = min(length, model.window - 1) + time
    cache_bytes = 2 * c.layers * batch * c.shared_heads * c.head_size * slots * element
    attention = 4 * c.layers * batch * time * c.width * slots  # scores, and the mean of the values
    weights = sum(map(_weights, matrices))
    return Work(sum(map(_nbytes, matrices)) + cache_bytes, 2 * weights * batch * time + attention)


@dataclass(frozen=True)
class Rung:
    """A row of the table that compares ways to decode: how fast, by what reading, and whether it is exact."""

    name: str
    seconds: float
    """For each token that was written, of all texts together."""
    bytes: float
    """Read for each token."""
    same: str
    """Whether the tokens are those of the plain loop."""


def rungs_table(rungs: Sequence[Rung], limits: Limits) -> str:
    """The rungs as a Markdown table.

    >>> print(rungs_table([Rung("plain", 0.01, 1e8, "yes")], Limits(2e10, 1e12)))
    | rung  | tokens/s | ms a token | MB a token | of the read limit | same tokens |
    | :---- | -------: | ---------: | ---------: | ----------------: | :---------- |
    | plain |      100 |       10.0 |      100.0 |               50% | yes         |
    """
    wide = max(len("rung"), *(len(rung.name) for rung in rungs))
    lines = [
        f"| {'rung':{wide}} | tokens/s | ms a token | MB a token | of the read limit | same tokens |",
        f"| :{'-' * (wide - 1)} | -------: | ---------: | ---------: | ----------------: | :---------- |",
    ]
    for rung in rungs:
        share = rung.bytes / rung.seconds / limits.bytes_a_second
        lines.append(
            f"| {rung.name:{wide}} | {1 / rung.seconds:8.0f} | {1e3 * rung.seconds:10.1f} "
            f"| {rung.bytes / 1e6:10.1f} | {share:17.0%} | {rung.same:11} |"
        )
    return "\n".join(lines)


def _weights(matrix: nn.Module) -> int:
    if isinstance(matrix, QuantizedLinear):
        return matrix.integers.numel() * (2 if matrix.scheme.bits == 4 else 1)
    assert isinstance(matrix, nn.Linear)
    return matrix.weight.numel()


def _nbytes(matrix: nn.Module) -> int:
    if isinstance(matrix, QuantizedLinear):
        return matrix.integers.nbytes + matrix.scale.nbytes
    assert isinstance(matrix, nn.Linear)
    return matrix.weight.nbytes
