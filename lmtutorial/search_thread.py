"""Decoders that write whole texts, in a thread beside an engine's: the two take turns with the model."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from torch import Tensor

from lmtutorial.decode.prompts import decoding
from lmtutorial.decode.sampling import Generation
from lmtutorial.engine_thread import Answers, EngineThread, Turns
from lmtutorial.models.cache import Cache, LanguageModel
from lmtutorial.request import Busy, Event, Handle, Request, check_request

_log = logging.getLogger(__name__)

Lend = Callable[[LanguageModel], LanguageModel]
"""From a model to one that computes the same, in turns with the engine's steps."""
GoOn = Callable[[], None]
"""Raises where a search should end. A lent model calls it; what takes long without one must do so itself."""
Search = Callable[[Lend, GoOn], list[Generation]]
"""Decodes with models that it has been lent."""


class SearchThread:
    """Runs one search at a time; each of its forwards waits for the engine's step, and the step for it.

    All methods are called from the event loop that runs the engine's thread.
    """

    def __init__(self, engine: EngineThread) -> None:
        self.queue = engine.engine.queue
        self.pending = 0
        """How many texts are searched for or waited for."""
        self._engine = engine
        self._pool = ThreadPoolExecutor(1, "search")
        self._time_is_up = False

    async def submit(self, requests: Sequence[Request], searches: Sequence[Search]) -> Answers:
        """Queue searches that together write a text for each request, answered by one event, at their end.

        Raises ValueError or TypeError, before anything is queued, for a request that cannot be and for what
        the search's decoder refuses; Busy where no more texts can wait.
        """
        engine = self._engine.engine
        handles = [check_request(r, engine.model, engine.max_len, engine.tokenizer) for r in requests]
        self._check_room(len(handles))
        for search in searches:
            await asyncio.to_thread(_try_arguments, search)
        self._check_room(len(handles))  # others may have come meanwhile
        answers = Answers(wake=lambda: None)
        answers.handles += handles
        self.pending += len(handles)
        loop = asyncio.get_running_loop()
        self._pool.submit(self._run, searches, answers, loop)
        return answers

    def _check_room(self, texts: int) -> None:
        if self.pending + texts > self.queue:
            raise Busy(f"{self.pending} texts are being searched for; try again in a moment")

    def abort(self) -> None:
        """End all searches with an error, soon."""
        self._time_is_up = True

    async def close(self) -> None:
        """Finish what was submitted, and end the thread."""
        await asyncio.to_thread(self._pool.shutdown)

    def _run(self, searches: Sequence[Search], answers: Answers, loop: asyncio.AbstractEventLoop) -> None:
        def go_on() -> None:
            if self._time_is_up:
                raise RuntimeError("the server is shutting down")
            if all(handle.cancelled for handle in answers.handles):
                raise _Cancelled

        try:
            texts = []
            for search in searches:
                go_on()
                texts += search(lambda model: _Lent(model, self._engine.turns, go_on), go_on)
            events = [_written(handle, text) for handle, text in zip(answers.handles, texts, strict=True)]
        except _Cancelled:
            events = [handle.end("cancelled") for handle in answers.handles]
        except BaseException as error:  # its own, and no other's; a reward may even raise SystemExit
            _log.error("a search failed", exc_info=error)
            failure = error if isinstance(error, Exception) else RuntimeError(repr(error))
            events = [handle.end("error", failure) for handle in answers.handles]

        def deliver() -> None:
            self.pending -= len(events)
            for numbered in enumerate(events):
                answers.inbox.put_nowait(numbered)

        loop.call_soon_threadsafe(deliver)


class _Lent:
    """A model whose forwards wait for their turn; `before` is called ahead of each, and may raise."""

    def __init__(self, model: LanguageModel, turns: Turns, before: GoOn) -> None:
        self.vocab_size, self.context = model.vocab_size, model.context
        self.new_cache = model.new_cache
        self._model, self._turns, self._before = model, turns, before

    @property
    def device(self) -> Any:
        return self._model.device

    def __call__(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        self._before()
        with self._turns, decoding(self._model):
            return self._model(tokens, cache)


class _Cancelled(Exception):
    """Nobody waits for the texts any more."""


class _ArgumentsAreFine(Exception):
    """A decoder has checked its arguments, since it asks for a first forward."""


def _try_arguments(search: Search) -> None:
    """Raise what a search raises before its first forward."""

    def enough() -> None:
        raise _ArgumentsAreFine

    with suppress(_ArgumentsAreFine, MemoryError, RuntimeError):  # no memory now: there may be in its turn
        search(lambda model: _Lent(model, Turns(), enough), lambda: None)


def _written(handle: Handle, text: Generation) -> Event:
    """A whole text as one event, cut at a stop string."""
    stream = handle.stream
    assert stream is not None
    for token in text.tokens:
        handle.text += "" if token in handle.ends else stream.push(token)
        handle.tokens.append(token)
        if stream.stopped:
            break
    handle.text += stream.finish()
    handle.finish = "stop" if text.finished or stream.stopped else "length"
    return Event(handle, None, handle.text, finish=handle.finish)
