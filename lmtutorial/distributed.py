"""Several processes that train one model, as `torchrun` starts them; with one process, nothing happens.

Each process computes the gradient of its rows of every batch; the sum over all rows, divided by the number of
all target tokens, is the same as one process would have computed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lmtutorial.batches import Batch


@dataclass(frozen=True)
class Processes:
    """Which of how many processes this is.

    >>> Processes.current()
    Processes(rank=0, size=1)
    """

    rank: int = 0
    size: int = 1

    @staticmethod
    def current() -> Processes:
        """The processes of the group that is open, see `process_group`; else this one alone."""
        if dist.is_available() and dist.is_initialized():
            return Processes(dist.get_rank(), dist.get_world_size())
        return Processes()

    def share(self, batch: Batch) -> Batch:
        """This process's rows of a batch: every `size`-th.

        Raises ValueError for a batch with fewer rows than processes.

        >>> rows = torch.arange(4)[:, None]
        >>> Processes(rank=1, size=2).share(Batch(rows, rows)).inputs.flatten()
        tensor([1, 3])
        """
        if len(batch.inputs) < self.size:
            raise ValueError(f"a batch of {len(batch.inputs)} rows cannot be shared by {self.size} processes")
        rows = slice(self.rank, None, self.size)
        return Batch(batch.inputs[rows], batch.targets[rows], batch.continues)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model whose backward pass averages gradients over all processes; alone, the model itself."""
        if self.size == 1:
            return model
        return DistributedDataParallel(model, broadcast_buffers=False)

    def local(self, wrapped: nn.Module) -> AbstractContextManager[None]:
        """Inside, gradients stay in this process: for all but the last batch that an update adds up."""
        if isinstance(wrapped, DistributedDataParallel):
            return wrapped.no_sync()
        return contextlib.nullcontext()

    def agree(self, value: float, stop: bool = False) -> tuple[float, bool]:
        """What all processes go by: the value of process 0, and whether any of them wants to stop."""
        if self.size == 1:
            return value, stop
        both = torch.tensor([value if self.rank == 0 else 0.0, float(stop)], dtype=torch.float64)
        dist.all_reduce(both)  # on the CPU: no device needs to be waited for
        return both[0].item(), bool(both[1])

    def total(self, value: float) -> float:
        """The sum of a value over all processes; all get the same."""
        if self.size == 1:
            return value
        summed = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(summed)
        return summed.item()


@contextlib.contextmanager
def process_group() -> Iterator[Processes]:
    """Inside, the processes that `torchrun` started are one group; alone, nothing happens.

    Gloo carries what is on CPUs, NCCL what is on GPUs, where process i of a machine takes GPU i.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield Processes()
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend)
    try:
        yield Processes.current()
    finally:
        dist.destroy_process_group()
