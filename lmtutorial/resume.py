"""The checkpoint that a run goes on from, bit for bit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lmtutorial.batches import Batch
from lmtutorial.checkpoint import load_checkpoint, save_checkpoint
from lmtutorial.devices import random_state, set_random_state
from lmtutorial.models.cache import LanguageModel
from lmtutorial.runs import History, Progress, Resumable, diverged
from lmtutorial.update import Updater


def save_run(run: Progress, out: Path, update: Updater, batches: Iterable[Batch]) -> None:
    """Write `last.safetensors`: all that going on bit for bit needs.

    Raises FloatingPointError, and leaves the old file, if a loss or a weight is not finite.
    """
    weights_are_finite = all(bool(p.isfinite().all()) for p in update.model.parameters())
    if not weights_are_finite or not run.nats.isfinite():
        what = "the loss" if weights_are_finite else "a weight"
        raise diverged(run, f"{what} is no longer finite", out)
    state = {
        **{name: value for name, value in vars(run).items() if name not in ("history", "cache")},
        "history": asdict(run.history),
        "cache": None if run.cache is None else vars(run.cache),
        "batches": batches.state_dict() if isinstance(batches, Resumable) else None,
        "average": update.average and update.average.weights,
        "scaler": update.scaler.state_dict(),
        "random": random_state(update.device),
    }
    if update.processes.rank == 0:
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
    if state.get("batches") is None:
        raise ValueError(f"{path} does not say where its run stood; resume from a last.safetensors")
    for name in vars(run).keys() - {"nats", "gradient_norm", "cache", "history"}:
        setattr(run, name, state[name])
    run.nats.copy_(state["nats"])
    run.gradient_norm.copy_(state["gradient_norm"])
    run.history = History(**{**state["history"], "stopped": ""})
    if state["cache"] is not None:
        run.cache = cast(LanguageModel, update.model).new_cache(len(state["cache"]["lengths"]), None)
        vars(run.cache).update(_to(update.device, state["cache"]))
    batches.load_state_dict(state["batches"])
    if update.average:
        update.average.load(state["average"] or dict(update.model.named_parameters()))
    if update.scaler.is_enabled() and state["scaler"]:
        update.scaler.load_state_dict(state["scaler"])
    set_random_state(state["random"], update.device)


def _to(device: torch.device, tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return tree.to(device)
    if isinstance(tree, dict):
        return {key: _to(device, value) for key, value in tree.items()}
    return type(tree)(_to(device, value) for value in tree) if isinstance(tree, (list, tuple)) else tree
