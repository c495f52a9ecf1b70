"""What is left to a process when another one dies: to end soon, and to say where training can go on."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from lmtutorial.distributed import PATIENCE, Processes
from lmtutorial.runs import Progress, last_checkpoint

GRACE = 15.0
"""Seconds that a process which is told to end gets to save and end; `torchrun` kills it after 30."""


class ProcessLostError(RuntimeError):
    """Another process of the group died or does not answer, so that this one cannot go on."""


@contextmanager
def watching(run: Progress, out: Path | None, processes: Processes) -> Iterator[None]:
    """Inside, an error that comes from another process's death is a `ProcessLostError`: it says what to do.

    SIGTERM is a Ctrl-C: `torchrun` sends it to those that are left, clusters to jobs that must go.
    """

    def message(what: str) -> str:
        return (
            f"training stopped after step {run.step}: another of the {processes.size} processes {what}"
            + last_checkpoint(run, out)
        )

    if processes.size == 1:
        yield
        return
    with _sigterm_as_ctrl_c(lambda: message("died or hangs")):
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and "gloo" not in str(error):
                raise
            slow = "timed out" in str(error).lower() or "timeout" in str(error).lower()
            what = f"gave no answer for {PATIENCE.total_seconds() / 60:.0f} minutes" if slow else "died"
            raise ProcessLostError(message(what)) from error


@contextmanager
def _sigterm_as_ctrl_c(last_words: Callable[[], str]) -> Iterator[None]:
    """Where the main thread waits for a dead process inside of CUDA, no handler written in Python runs.

    So another thread hears the signal too, and if that thread does not end, says the words and ends all.
    """
    if os.name != "posix" or threading.current_thread() is not threading.main_thread():
        yield
        return
    heard, over = threading.Event(), threading.Event()

    def handle(*_: object) -> None:
        if not heard.is_set():  # some clusters send it to torchrun and to its processes
            heard.set()
            signal.raise_signal(signal.SIGINT)

    def listen() -> None:
        while number := os.read(reader, 1):
            if number[0] == signal.SIGTERM and not over.wait(GRACE):
                print(f"lmtutorial: {last_words()}", file=sys.stderr, flush=True)
                os._exit(1)
        os.close(reader)

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    after = signal.signal(signal.SIGTERM, handle) or signal.SIG_DFL
    other_writer = signal.set_wakeup_fd(writer)  # where the signal is written before any handler runs
    threading.Thread(target=listen, daemon=True).start()
    try:
        yield
    except ProcessLostError:
        after = signal.SIG_IGN  # torchrun's is on its way, but the message comes first
        raise
    finally:
        over.set()
        signal.signal(signal.SIGTERM, after)
        signal.set_wakeup_fd(other_writer)
        os.close(writer)
