"""Several processes that train one model, as `torchrun` starts them; with one process, nothing happens.

`torchrun --standalone --nproc-per-node=4 -m lmtutorial.cli train` starts four processes on one machine, one
for each GPU where there are GPUs; a script of your own, `script.py` in place of `-m lmtutorial.cli train`,
calls `train` inside `with process_group():`. On several machines start the same on each, with `--nnodes=2`,
`--rdzv-backend=c10d` and `--rdzv-endpoint=HOST:PORT` in place of `--standalone`; the folder of checkpoints
must be one that all see. With `TrainConfig(shard=True)`, `--shard`, the weights are spread:
`lmtutorial.sharding`.

Every process reads the same batches and computes the gradient of its rows of each; the sum over all rows,
divided by the number of all target tokens, is the same as one process would have computed. So a batch is that
of all processes together, and a checkpoint goes on with any number of processes.
"""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lmtutorial.batches import IGNORE, Batch
from lmtutorial.sharding import is_spread

PATIENCE = timedelta(minutes=10)
"""How long a process waits for one that does not answer; process 0 must have written a checkpoint by then."""

_SETTINGS = inspect.signature(DistributedDataParallel).parameters
_SYNC_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _SETTINGS else "broadcast_buffers"


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

    def rows(self, count: int) -> range:
        """Which of `count` rows this process takes: every `size`-th.

        Raises ValueError where some process would have none.

        >>> list(Processes(rank=1, size=2).rows(5))
        [1, 3]
        """
        if count < self.size:
            raise ValueError(f"a batch of {count} rows cannot be shared by {self.size} processes")
        return range(self.rank, count, self.size)

    def share(self, batch: Batch, *, spare: bool = False) -> Batch:
        """This process's rows of a batch.

        Of a batch with fewer rows than processes, which raises ValueError, those left over get with `spare` a
        row without a target: all compute alike, and nothing is counted twice.

        >>> rows = torch.arange(4)[:, None]
        >>> Processes(rank=1, size=2).share(Batch(rows, rows)).inputs.flatten()
        tensor([1, 3])
        """
        inputs, targets, continues = batch
        if spare and self.rank >= len(inputs):
            return Batch(inputs[:1], torch.full_like(targets[:1], IGNORE), continues)
        if not spare:
            self.rows(len(inputs))
        mine = slice(self.rank, None, self.size)
        return Batch(inputs[mine], targets[mine], continues)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model whose backward pass averages gradients over all processes.

        Alone that is the model itself; where its weights are spread over the processes, too.
        """
        if self.size == 1 or any(map(is_spread, model.parameters())):
            return model
        settings: dict[str, Any] = {_SYNC_BUFFERS: False}  # they are constants
        return DistributedDataParallel(model, gradient_as_bucket_view=True, **settings)

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

    def collect(self, own: Any) -> list[Any]:
        """What each process gives, in their order, for process 0; the others get an empty list."""
        if self.size == 1:
            return [own]
        everyones: list[Any] = [None] * self.size if self.rank == 0 else []
        dist.gather_object(own, everyones or None)
        return everyones


@contextlib.contextmanager
def process_group() -> Iterator[Processes]:
    """Inside, the processes that `torchrun` started are one group; alone, nothing happens.

    Gloo carries what is on CPUs, NCCL what is on GPUs. Process i of a machine takes its GPU i, which then is
    `torch.device("cuda")`. Raises ValueError for more processes than GPUs.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield Processes()
        return
    backend = "gloo"
    if torch.cuda.is_available():
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= gpus:
            raise ValueError(
                f"process {local} of this machine finds no GPU, there are {gpus}; start as many processes, "
                "or hide the GPUs (CUDA_VISIBLE_DEVICES=) to compute on CPUs"
            )
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=PATIENCE)
    yield Processes.current()
    dist.destroy_process_group()  # not after an error, when it might wait for others that are gone
