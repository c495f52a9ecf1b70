"""What a training run knows of itself: how far it is, its history, and the log that it writes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from lmtutorial.distributed import Processes
from lmtutorial.models.cache import Cache
from lmtutorial.train_config import TrainConfig


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

    `train_loss` is the mean over the target tokens since the row before, `gradient_norm` the mean length of
    the gradient, before clipping, since then. `validation_loss` is None in rows without a look. `skipped`
    counts the updates left out so far. `best_step` and `best_loss` are those of the best look.
    """

    step: list[int] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    validation_loss: list[float | None] = field(default_factory=list)
    learning_rate: list[float] = field(default_factory=list)
    gradient_norm: list[float] = field(default_factory=list)
    tokens_per_second: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    best_step: int | None = None
    best_loss: float | None = None
    stopped: str = ""
    """Why the run ended: "steps", "time", "tokens", "patience" (early stopping) or "interrupted"."""

    def rows(self) -> list[dict[str, Any]]:
        """The same, as one dictionary a row.

        >>> History([10], [2.5], [None], [0.001], [0.7], [900.0], [3.1], [0]).rows()[0]["train_loss"]
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
    gradient_norm: Tensor
    """The lengths of the gradients summed since the last row; on the device, too."""
    tokens: int = 0
    """The target tokens since the last row, of updates that were made."""
    row_tokens: int = 0
    """The same, of skipped updates too: what was read."""
    all_tokens: int = 0
    """The target tokens of the run."""
    step: int = 0
    """The updates of the run, made or skipped."""
    saved_step: int = 0
    """How many of them the last checkpoint knows."""
    skipped: int = 0
    """How many of them were skipped."""
    row_steps: int = 0
    """The updates since the last row, made or skipped."""
    usual_norm: float = 0.0
    """A running mean of the gradient's length; kept only where spikes are skipped."""
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    row_began: float = 0.0
    """The second in which the last row was closed."""
    cache: Cache | None = None
    """What a recurrent model carries into the next batch."""
    history: History = field(default_factory=History)

    @classmethod
    def begin(cls, device: torch.device) -> Progress:
        """A run that has made no update."""
        return cls(nats=torch.zeros((), device=device), gradient_norm=torch.zeros((), device=device))

    def is_usual(self, norm: float, factor: float) -> bool:
        """Whether a gradient is finite and at most `factor` times as long as those before it were.

        The first 20 show what is usual. Raises FloatingPointError for 20 unusual ones in a row.
        """
        usual = math.isfinite(norm) and (self.step < 20 or norm <= factor * self.usual_norm)
        self.skipped += not usual
        self.skipped_in_a_row = 0 if usual else self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= 20:
            raise FloatingPointError(
                f"training stopped after step {self.step}: 20 updates in a row were skipped, the last with a "
                f"gradient of length {norm:.3g}, where {self.usual_norm:.3g} is usual"
            )
        if usual:
            self.usual_norm += (norm - self.usual_norm) / min(self.step + 1, 50)
        return usual


def open_folder(run: Progress, config: TrainConfig, processes: Processes) -> None:
    """Make the folder of a run; its log then holds the rows of the history, and no checkpoint is older."""
    if config.out is None or processes.rank:
        return
    config.out.mkdir(parents=True, exist_ok=True)
    if run.step == 0:
        for name in ("last", "best"):
            (config.out / f"{name}.safetensors").unlink(missing_ok=True)
    rows = "".join(json.dumps(row) + "\n" for row in run.history.rows())
    (config.out / "log.jsonl").write_text(rows)


def close_row(
    run: Progress, rate: float, validation_loss: float | None, config: TrainConfig, processes: Processes
) -> dict[str, Any]:
    """Add a row to the history and to the log, and begin the next: the one place that looks at the losses.

    Raises FloatingPointError for a loss that is not finite.
    """
    made = run.row_steps - (run.skipped - (run.history.skipped[-1] if run.history.skipped else 0))
    row = {
        "step": run.step,
        "train_loss": processes.total(run.nats.item()) / run.tokens if made else math.nan,
        "validation_loss": validation_loss,
        "learning_rate": rate,
        "gradient_norm": run.gradient_norm.item() / made if made else math.nan,
        "tokens_per_second": run.row_tokens / (run.seconds - run.row_began),
        "seconds": run.seconds,
        "skipped": run.skipped,
    }
    for name in ("train_loss", "validation_loss"):
        if made and row[name] is not None and not math.isfinite(cast(float, row[name])):
            raise diverged(run, f"{name} became {row[name]}", config.out)
    run.history.add(row)
    run.nats.zero_()
    run.gradient_norm.zero_()
    run.tokens = run.row_tokens = run.row_steps = 0
    if config.out and processes.rank == 0:
        with (config.out / "log.jsonl").open("a") as log:
            log.write(json.dumps(row) + "\n")
    return row


def tensorboard_log(folder: Path) -> Callable[[dict[str, Any]], None]:
    """A function that writes each row to `folder` for TensorBoard.

    Raises ValueError where the package `tensorboard` is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("tensorboard=True needs the package tensorboard: pip install tensorboard") from error
    writer = SummaryWriter(str(folder))

    def write(row: dict[str, Any]) -> None:
        for name, value in row.items():
            if name != "step" and value is not None:
                writer.add_scalar(name, value, row["step"])
        writer.flush()

    return write


def diverged(run: Progress, what: str, out: Path | None) -> FloatingPointError:
    """The error that ends a run, with what can be done."""
    return FloatingPointError(
        f"training stopped after step {run.step}: {what}; a lower learning rate or a smaller clip may help"
        + last_checkpoint(run, out)
    )


def last_checkpoint(run: Progress, out: Path | None) -> str:
    """The part of a message that says where the run can go on, if it can."""
    if out is None or not (out / "last.safetensors").exists():
        return ""
    return f"; {out / 'last.safetensors'} is from step {run.saved_step}"
