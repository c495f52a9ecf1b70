"""What a training run leaves behind: its history, its log, and the checkpoint that it can go on from."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from lmtutorial.batches import Batch
from lmtutorial.checkpoint import load_checkpoint, save_checkpoint
from lmtutorial.devices import random_state, set_random_state
from lmtutorial.models.cache import Cache, LanguageModel


@runtime_checkable
class Resumable(Protocol):
    """Batches that can say where they are."""

    def state_dict(self) -> dict[str, int]:
        """Where the iteration stands."""

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Stand where `state_dict` was taken."""


@dataclass
class History:
    """What happened, a row at each log or look at the validation text; losses in nats per token.

    `train_loss` is the mean over the target tokens since the row before. `validation_loss` is None in rows
    without a look. `best_step` and `best_loss` are those of the best look.
    """

    step: list[int] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    validation_loss: list[float | None] = field(default_factory=list)
    learning_rate: list[float] = field(default_factory=list)
    tokens_per_second: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    best_step: int | None = None
    best_loss: float | None = None
    stopped: str = ""
    """Why the run ended: "steps", "time", "patience" (early stopping) or "interrupted"."""

    def rows(self) -> list[dict[str, Any]]:
        """The same, as one dictionary a row.

        >>> History([10], [2.5], [None], [0.001], [900.0], [3.1]).rows()[0]["train_loss"]
        2.5
        """
        columns = {name: column for name, column in vars(self).items() if isinstance(column, list)}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def add(self, row: dict[str, Any]) -> None:
        """Append a row, and keep track of the best look."""
        for name, value in row.items():
            getattr(self, name).append(value)
        loss = row["validation_loss"]
        if loss is not None and (self.best_loss is None or loss < self.best_loss):
            self.best_step, self.best_loss = row["step"], loss

    def looks_since_best(self) -> int:
        """How many looks at the validation text came after the best one."""
        looks = zip(self.step, self.validation_loss, strict=True)
        return sum(loss is not None and step > (self.best_step or 0) for step, loss in looks)


@dataclass
class Progress:
    """Where a run stands, beside the model and the optimizer: with them, all that going on needs."""

    nats: Tensor
    """The training loss summed since the last row; on the device, unlooked at."""
    tokens: Tensor
    """The target tokens since the last row."""
    step: int = 0
    seconds: float = 0.0
    row_began: float = 0.0
    """The second in which the last row was closed."""
    cache: Cache | None = None
    """What a recurrent model carries into the next batch."""
    history: History = field(default_factory=History)


def open_folder(out: Path | None, run: Progress) -> None:
    """Make the folder of a run; its log then holds the rows of the history, and no checkpoint is older."""
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    if run.step == 0:
        for name in ("last", "best"):
            (out / f"{name}.safetensors").unlink(missing_ok=True)
    rows = "".join(json.dumps(row) + "\n" for row in run.history.rows())
    (out / "log.jsonl").write_text(rows)


def close_row(run: Progress, rate: float, validation_loss: float | None, out: Path | None) -> dict[str, Any]:
    """Add a row to the history and to the log, and begin the next: the one place that looks at the losses.

    Raises FloatingPointError for a loss that is not finite.
    """
    tokens = run.tokens.item()
    row = {
        "step": run.step,
        "train_loss": run.nats.item() / tokens,
        "validation_loss": validation_loss,
        "learning_rate": rate,
        "tokens_per_second": tokens / (run.seconds - run.row_began),
        "seconds": run.seconds,
    }
    for name in ("train_loss", "validation_loss"):
        if row[name] is not None and not math.isfinite(cast(float, row[name])):
            raise _diverged(run, f"{name} became {row[name]}", out)
    run.history.add(row)
    run.nats.zero_()
    run.tokens.zero_()
    if out:
        with (out / "log.jsonl").open("a") as log:
            log.write(json.dumps(row) + "\n")
    return row


def save_run(
    run: Progress,
    out: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    batches: Iterable[Batch],
) -> None:
    """Write `last.safetensors`: all that going on bit for bit needs.

    Raises FloatingPointError, and leaves the old file, if a loss or a weight is not finite.
    """
    weights_are_finite = all(bool(p.isfinite().all()) for p in model.parameters())
    if not weights_are_finite or not run.nats.isfinite():
        raise _diverged(
            run, "the loss is no longer finite" if weights_are_finite else "a weight is no longer finite", out
        )
    state = {
        **{name: value for name, value in vars(run).items() if name not in ("history", "cache")},
        "history": asdict(run.history),
        "cache": None if run.cache is None else vars(run.cache),
        "batches": batches.state_dict() if isinstance(batches, Resumable) else None,
        "scaler": scaler.state_dict(),
        "random": random_state(cast(LanguageModel, model).device),
    }
    save_checkpoint(out / "last.safetensors", model=model, optimizer=optimizer, state=state)


def restore_run(
    run: Progress,
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    batches: Iterable[Batch],
) -> None:
    """Stand where `save_run` was called.

    Raises ValueError for a file that does not fit, or `batches` that cannot say where they are.
    """
    if not isinstance(batches, Resumable):
        raise ValueError(
            f"a {type(batches).__name__} of batches cannot be resumed; give StreamBatches or WindowBatches"
        )
    state = load_checkpoint(path, model=model, optimizer=optimizer)
    if state.get("batches") is None:
        raise ValueError(f"{path} does not say where its run stood; resume from a last.safetensors")
    device = cast(LanguageModel, model).device
    run.nats.copy_(state["nats"])
    run.tokens.copy_(state["tokens"])
    run.step, run.seconds, run.row_began = state["step"], state["seconds"], state["row_began"]
    run.history = History(**{**state["history"], "stopped": ""})
    if state["cache"] is not None:
        run.cache = cast(LanguageModel, model).new_cache(len(state["cache"]["lengths"]), None)
        vars(run.cache).update(_to(device, state["cache"]))
    batches.load_state_dict(state["batches"])
    if scaler.is_enabled() and state["scaler"]:
        scaler.load_state_dict(state["scaler"])
    set_random_state(state["random"], device)


def _to(device: torch.device, tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return tree.to(device)
    if isinstance(tree, dict):
        return {key: _to(device, value) for key, value in tree.items()}
    return type(tree)(_to(device, value) for value in tree) if isinstance(tree, (list, tuple)) else tree


def _diverged(run: Progress, what: str, out: Path | None) -> FloatingPointError:
    kept = out and (out / "last.safetensors").exists()
    return FloatingPointError(
        f"training stopped after step {run.step}: {what}; a lower learning rate or a smaller clip may help"
        + (f"; {out / 'last.safetensors'} is from before" if out and kept else "")
    )
