"""The training loop: one function from a model and its batches to a history."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import nn

from lmtutorial.batches import IGNORE, Batch
from lmtutorial.checkpoint import find_checkpoint, save_checkpoint
from lmtutorial.devices import Precision, choose_precision, seeded
from lmtutorial.losses import lm_loss
from lmtutorial.metrics import evaluate
from lmtutorial.models.cache import LanguageModel, carried
from lmtutorial.optimizer_groups import build_optimizer
from lmtutorial.runs import History, Progress, Resumable, close_row, open_folder, restore_run, save_run
from lmtutorial.schedules import SCHEDULES


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    >>> TrainConfig(steps=2000, schedule="constant").learning_rate
    0.002
    """

    steps: int | None = 1000
    """Stop after this many updates. None: no limit but the time's."""
    max_seconds: float | None = None
    """Stop after this many seconds; the learning rate's schedule then follows the clock. None: no limit."""
    learning_rate: float = 2e-3
    """The highest learning rate of the run."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """How the learning rate moves after the warm-up."""
    warmup: int = 50
    """Updates over which the learning rate rises from near zero to its highest."""
    floor: float = 0.05
    """Where the cosine ends, as a share of the highest learning rate."""
    weight_decay: float = 0.01
    """How strongly matrices are pulled toward zero."""
    betas: tuple[float, float] = (0.9, 0.99)
    """How long Adam's averages of the gradient and of its square remember."""
    clip: float | None = 1.0
    """Gradients longer than this are shortened to it (global norm). None: never."""
    precision: Precision = "auto"
    """The type matrix products are computed in; auto takes what is fast on the device."""
    eval_every: int = 250
    """Updates between two looks at the validation text."""
    patience: int | None = None
    """Stop after this many looks in a row without a better validation loss. None: never."""
    log_every: int = 10
    """Updates between two rows of the log."""
    save_every: int = 500
    """Updates between two saved checkpoints."""
    out: Path | None = None
    """The folder for checkpoints and the log. None: keep nothing."""
    seed: int = 0
    """Where the random numbers of the run (dropout) start."""

    def __post_init__(self) -> None:
        if isinstance(self.out, str):
            object.__setattr__(self, "out", Path(self.out))  # how a frozen dataclass sets a field of its own
        if self.steps is None and self.max_seconds is None:
            raise ValueError("steps and max_seconds are both None; one of them must say when to stop")
        for name in ("steps", "patience", "eval_every", "log_every", "save_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        for name in ("max_seconds", "learning_rate", "clip"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}; it must be a finite number above 0")
        if self.warmup < 0:
            raise ValueError(f"warmup is {self.warmup}; it must be at least 0")
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor is {self.floor}; it is a share, between 0 and 1")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay is {self.weight_decay}; it must be a finite number, at least 0")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas is {self.betas}; it must be two numbers in [0, 1)")
        for name, allowed in (("schedule", SCHEDULES), ("precision", get_args(Precision))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}")


def train(
    model: nn.Module,
    batches: Iterable[Batch],
    config: TrainConfig,
    *,
    validation: Iterable[Batch] | None = None,
    on_log: Callable[[dict[str, Any]], None] | None = None,
    resume: str | Path | None = None,
) -> History:
    """Train `model` in place on `batches`, an epoch after the other, until `config` says stop.

    `model` is a `LanguageModel` and an `nn.Module`. Where a batch `continues`, the model's cache is carried
    over, cut from the graph: truncated backpropagation through time. With `config.out` the folder holds
    `last.safetensors` (all that resuming needs), `best.safetensors` (the weights with the lowest validation
    loss) and `log.jsonl`. `on_log` is called with each row of the history. `resume` is a checkpoint or the
    folder of one; on a CPU the run then goes on bit for bit as if it had not stopped. The model keeps its
    last weights, not its best, and is left in evaluation mode. Ctrl-C ends the run, with a checkpoint, after
    the update under way.

    Raises ValueError for `batches` that hold no target, FloatingPointError when the loss or a weight is no
    longer finite; the checkpoints are then those from before.

    >>> from lmtutorial.batches import StreamBatches
    >>> from lmtutorial.models.lstm import LSTM, LSTMConfig
    >>> model = LSTM(LSTMConfig(vocab_size=5, width=16))
    >>> config = TrainConfig(steps=60, learning_rate=0.02, warmup=5)
    >>> history = train(model, StreamBatches([0, 1, 2, 3, 4] * 20, batch=2, time=10), config)
    >>> history.train_loss[0] > 1 > 0.1 > history.train_loss[-1]
    True
    """
    lm = cast(LanguageModel, model)
    device = lm.device
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = build_optimizer(
        model, config.learning_rate, weight_decay=config.weight_decay, betas=config.betas
    )
    precision = choose_precision(config.precision, device, sum(p.numel() for p in parameters))
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    run = Progress(torch.zeros((), device=device), torch.zeros((), dtype=torch.int64, device=device))
    with seeded(config.seed, device), _ctrl_c() as interrupted:
        if resume is not None:
            restore_run(run, find_checkpoint(resume, "last"), model, optimizer, scaler, batches)
        open_folder(config.out, run)
        if _limit_reached(config, run):
            return run.history
        begin = time.perf_counter() - run.seconds
        model.train()
        for batch in _endless(batches):
            rate = _learning_rate(config, run)
            for group in optimizer.param_groups:
                group["lr"] = rate

            inputs, targets, continues = batch.to(device)
            run.cache = carried(lm, run.cache, len(inputs), continues)
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                loss = lm_loss(model(inputs, run.cache), targets)
            optimizer.zero_grad()
            scaler.scale(loss.nats / loss.tokens).backward()  # type: ignore[no-untyped-call]
            if config.clip is not None:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(parameters, config.clip)
            scaler.step(optimizer)
            scaler.update()

            run.step += 1
            run.seconds = time.perf_counter() - begin
            run.nats += loss.nats.detach()  # stays on the device: looking at it would wait for the device
            run.tokens += loss.tokens
            over = _limit_reached(config, run)
            look = validation is not None and bool(over or run.step % config.eval_every == 0)
            if over or look or run.step % config.log_every == 0:
                row = close_row(run, rate, _loss_on(validation, lm) if look else None, config.out)
                if on_log is not None:
                    on_log(row)
                run.row_began = run.seconds = time.perf_counter() - begin
            if config.out and look and run.history.best_step == run.step:
                best = {"step": run.step, "validation_loss": run.history.best_loss}
                save_checkpoint(config.out / "best.safetensors", model=model, state=best)
            over = over or _out_of_patience(config, run) or ("interrupted" if interrupted.is_set() else "")
            run.history.stopped = over
            if config.out and (over or run.step % config.save_every == 0):
                save_run(run, config.out, model, optimizer, scaler, batches)
            if over:
                break
    model.eval()
    return run.history


def _endless(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Epoch after epoch; batches without a target are passed over."""
    fruitless = 0
    while fruitless < 2:  # one may be the empty rest of the epoch that a checkpoint was saved in
        fruitless += 1
        for batch in batches:
            if (batch.targets != IGNORE).any():
                fruitless = 0
                yield batch
    raise ValueError("batches held no target; training needs batches that can be iterated epoch after epoch")


def _limit_reached(config: TrainConfig, run: Progress) -> str:
    if config.steps is not None and run.step >= config.steps:
        return "steps"
    if config.max_seconds is not None and run.seconds >= config.max_seconds:
        return "time"
    return ""


def _out_of_patience(config: TrainConfig, run: Progress) -> str:
    out = config.patience is not None and run.history.looks_since_best() >= config.patience
    return "patience" if out else ""


def _learning_rate(config: TrainConfig, run: Progress) -> float:
    """Of the update that comes next."""
    return SCHEDULES[config.schedule](
        run.step,
        _expected_steps(config, run),
        peak=config.learning_rate,
        warmup=config.warmup,
        floor=config.floor,
    )


def _expected_steps(config: TrainConfig, run: Progress) -> float:
    """How many updates the run will make in all: its limit, or what its pace so far makes of its time."""
    steps = math.inf if config.steps is None else float(config.steps)
    if config.max_seconds is None or run.step == 0:
        return steps
    return min(steps, run.step * config.max_seconds / run.seconds)


def _loss_on(validation: Iterable[Batch] | None, model: LanguageModel) -> float:
    """Nats per token of the validation text; the same batches at each look."""
    assert validation is not None
    loss = evaluate(model, validation).loss
    if isinstance(validation, Resumable):
        validation.load_state_dict({**validation.state_dict(), "epoch": 0})
    return loss


@contextmanager
def _ctrl_c() -> Iterator[threading.Event]:
    """Inside, the first Ctrl-C sets the event, so that no update is cut in half; the second interrupts."""
    pressed = threading.Event()

    def remember(*_: object) -> None:
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()

    if threading.current_thread() is not threading.main_thread():
        yield pressed
        return
    before = signal.signal(signal.SIGINT, remember)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler if before is None else before)
