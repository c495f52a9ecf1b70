"""The checkpoint that a run goes on from, bit for bit; with another number of processes, within rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lmtutorial.batches import Batch
from lmtutorial.checkpoint import load_checkpoint, save_checkpoint
from lmtutorial.devices import random_state, set_random_state
from lmtutorial.models.cache import Cache, LanguageModel
from lmtutorial.runs import History, Progress, Resumable, diverged
from lmtutorial.sharding import local_part
from lmtutorial.update import Updater


def save_run(run: Progress, out: Path, update: Updater, batches: Iterable[Batch]) -> None:
    """Write `last.safetensors`: all that going on bit for bit needs. All processes call it.

    Raises FloatingPointError, and leaves the old file, if a loss or a weight is not finite.
    """
    processes = update.processes
    weights_are_finite = all(bool(local_part(p).isfinite().all()) for p in update.parameters)
    for what, fine in (("a weight", weights_are_finite), ("the loss", bool(run.nats.isfinite()))):
        if processes.total(not fine):
            raise diverged(run, f"{what} is no longer finite", out)
    own = {  # what each process has for itself
        "nats": run.nats.item(),
        "cache": None if run.cache is None else _map(lambda tensor: tensor.detach().cpu(), vars(run.cache)),
        "random": random_state(update.device),
    }
    run.saved_step = run.step
    state = {
        **{name: value for name, value in vars(run).items() if name not in ("history", "cache", "nats")},
        "history": asdict(run.history),
        "batches": batches.state_dict() if isinstance(batches, Resumable) else None,
        "average": update.average and update.average.weights,
        "scaler": update.scaler.state_dict(),
        "processes": processes.collect(own),
    }
    save_checkpoint(out / "last.safetensors", model=update.model, optimizer=update.optimizer, state=state)


def restore_run(run: Progress, path: Path, update: Updater, batches: Iterable[Batch]) -> None:
    """Stand where `save_run` was called.

    Raises ValueError for a file that does not fit, or `batches` that cannot say where they are.
    """
    if not isinstance(batches, Resumable):
        raise ValueError(
            f"a {type(batches).__name__} of batches cannot be resumed; give StreamBatches or WindowBatches"
        )
    state = load_checkpoint(path, model=update.model, optimizer=update.optimizer)
    if "processes" not in state:
        raise ValueError(f"{path} does not say where its run stood; resume from a last.safetensors")
    for name in vars(run).keys() - {"nats", "gradient_norm", "cache", "history"}:
        setattr(run, name, state[name])
    run.gradient_norm.copy_(state["gradient_norm"])
    run.history = History(**{**state["history"], "stopped": ""})
    batches.load_state_dict(state["batches"])
    if update.average:
        update.average.load(state["average"] or dict(update.model.named_parameters()))
    if update.scaler.is_enabled() and state["scaler"]:
        update.scaler.load_state_dict(state["scaler"])
    _restore_own(run, state["processes"], update)


def _restore_own(run: Progress, saved: list[dict[str, Any]], update: Updater) -> None:
    """Share what the processes that saved had for themselves among those that are there now."""
    rank, size = update.processes.rank, update.processes.size
    run.nats.fill_(sum(own["nats"] for own in saved[rank::size]))
    if rank < len(saved):  # those beyond keep the start of their own random numbers
        set_random_state(saved[rank]["random"], update.device)
    if saved[0]["cache"] is not None:
        run.cache = _my_rows([own["cache"] for own in saved], update)


def _my_rows(caches: list[dict[str, Any]], update: Updater) -> Cache:
    """A cache of this process's rows: row r of all is row r // n of the r % n-th of `caches`, which are n."""
    model = cast(LanguageModel, update.model)
    rows = update.processes.rows(sum(len(cache["lengths"]) for cache in caches))

    def join(one: Tensor, two: Tensor, *parts: Tensor) -> Tensor:
        (axis,) = (axis for axis in range(one.dim()) if one.shape[axis] != two.shape[axis])  # of the rows
        mine = [parts[row % len(parts)].narrow(axis, row // len(parts), 1) for row in rows]
        return torch.cat(mine, axis).to(update.device)

    one, two = (vars(model.new_cache(count, None)) for count in (1, 2))
    cache = model.new_cache(len(rows), None)
    vars(cache).update(_map(join, one, two, *caches))
    return cache


def _map(function: Callable[..., Tensor], *trees: Any) -> Any:
    """The function of the tensors at each place of trees of one form."""
    tree = trees[0]
    if isinstance(tree, Tensor):
        return function(*trees)
    if isinstance(tree, dict):
        return {key: _map(function, *(other[key] for other in trees)) for key in tree}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_map(function, *places) for places in zip(*trees, strict=True))
    return tree
