"""The training loop: one function from a model and its batches to a history."""

from __future__ import annotations

import itertools
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

from torch import nn

from lmtutorial.batches import IGNORE, Batch
from lmtutorial.checkpoint import find_checkpoint, save_checkpoint
from lmtutorial.devices import seeded
from lmtutorial.distributed import Processes
from lmtutorial.lost_process import watching
from lmtutorial.metrics import evaluate
from lmtutorial.models.cache import LanguageModel
from lmtutorial.resume import restore_run, save_run
from lmtutorial.runs import History, Progress, Resumable, close_row, open_folder, tensorboard_log
from lmtutorial.schedules import SCHEDULES
from lmtutorial.train_config import TrainConfig as TrainConfig
from lmtutorial.update import Updater


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
    last weights, not its best (with `config.ema` their average), and is left in evaluation mode. Ctrl-C ends
    the run, with a checkpoint, after the update under way. In a `process_group` each process reads the same
    batches and takes its rows of them; with `config.shard` the model stays spread over the processes.

    Raises ValueError for `batches` that hold no target, FloatingPointError when the loss or a weight is no
    longer finite, ProcessLostError when another process of the group died; the checkpoints are then those
    from before.

    >>> from lmtutorial.batches import StreamBatches
    >>> from lmtutorial.models.lstm import LSTM, LSTMConfig
    >>> model = LSTM(LSTMConfig(vocab_size=5, width=16))
    >>> config = TrainConfig(steps=60, learning_rate=0.02, warmup=5)
    >>> history = train(model, StreamBatches([0, 1, 2, 3, 4] * 20, batch=2, time=10), config)
    >>> history.train_loss[0] > 1 > 0.1 > history.train_loss[-1]
    True
    """
    update = Updater(model, config)
    processes, run = update.processes, Progress.begin(update.device)
    loggers = [on_log] if on_log else []
    if config.tensorboard and config.out and processes.rank == 0:
        loggers.append(tensorboard_log(config.out / "tensorboard"))
    with (
        seeded(config.seed + processes.rank, update.device),
        _ctrl_c() as interrupted,
        watching(run, config.out, processes),
    ):
        if resume is not None:
            restore_run(run, find_checkpoint(resume, "last"), update, batches)
        open_folder(run, config, processes)
        start = time.perf_counter() - run.seconds
        model.train()
        over = _limit_reached(config, run)
        for group in _groups(batches, 0 if over else config.accumulation):
            rate = _learning_rate(config, run)
            update(group, rate, run)

            run.seconds, stop = processes.agree(time.perf_counter() - start, interrupted.is_set())
            over = _limit_reached(config, run)
            look = validation is not None and bool(over or run.step % config.eval_every == 0)
            with update.average.applied() if update.average and look else nullcontext():
                if over or look or run.step % config.log_every == 0:
                    loss = _loss_on(validation, cast(LanguageModel, model), processes) if look else None
                    row = close_row(run, rate, loss, config, processes)
                    for log in loggers if processes.rank == 0 else []:
                        log(row)
                    run.seconds, _ = processes.agree(time.perf_counter() - start)
                    run.row_began = run.seconds
                if config.out and look and run.history.best_step == run.step:
                    best = {"step": run.step, "validation_loss": run.history.best_loss}
                    save_checkpoint(config.out / "best.safetensors", model=model, state=best)
            over = over or _out_of_patience(config, run) or ("interrupted" if stop else "")
            run.history.stopped = over
            if config.out and (over or run.step % config.save_every == 0):
                save_run(run, config.out, update, batches)
            if over:
                break
    if update.average:
        update.average.copy_to_model()
    model.eval()
    return run.history


def _groups(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """`size` batches at a time, epoch after epoch; with a size of 0, nothing."""
    stream = _endless(batches)
    while group := list(itertools.islice(stream, size)):
        yield group


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
    limits = {"steps": (config.steps, run.step), "time": (config.max_seconds, run.seconds),
              "tokens": (config.max_tokens, run.all_tokens)}  # fmt: skip
    return next((name for name, (limit, done) in limits.items() if limit is not None and done >= limit), "")


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
    """How many updates the run will make in all: its limit, or what its pace makes of its time or tokens."""
    steps = math.inf if config.steps is None else float(config.steps)
    if run.step and config.max_seconds is not None:
        steps = min(steps, run.step * config.max_seconds / run.seconds)
    if run.step and config.max_tokens is not None:
        steps = min(steps, run.step * config.max_tokens / run.all_tokens)
    return steps


def _loss_on(validation: Iterable[Batch] | None, model: LanguageModel, processes: Processes) -> float:
    """Nats per token of the validation text; the same batches at each look."""
    assert validation is not None
    shares = (processes.share(batch, spare=True) for batch in validation)
    loss = evaluate(model, shares, total=processes.total).loss
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
