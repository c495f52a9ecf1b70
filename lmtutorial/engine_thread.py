"""An engine in a thread of its own, asked and heard from an asyncio event loop."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Sequence

from lmtutorial.engine import Engine
from lmtutorial.request import Busy, Event, Handle, Request

_log = logging.getLogger(__name__)

Inbox = asyncio.Queue[tuple[int, Event]]


class Turns:
    """A lock that is given in the order in which it was asked for: of two loops none waits for long.

    >>> with Turns():
    ...     pass
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._asked = self._given = 0

    def __enter__(self) -> None:
        with self._changed:
            mine, self._asked = self._asked, self._asked + 1
            self._changed.wait_for(lambda: self._given == mine)

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._given += 1
            self._changed.notify_all()


class EngineThread:
    """Steps an engine while there is anything to do, and sleeps while there is not.

    The engine's events cross to the event loop once a step, whatever their number. All methods are called
    from the loop that `start` was called from.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.turns = Turns()
        """Held during each step, by whoever else uses the engine's model too."""
        self._inboxes: dict[Handle, tuple[int, Inbox]] = {}
        self._wake = threading.Event()
        self._closing = False
        self._time_is_up = False
        self._thread = threading.Thread(target=self._drive, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to step; from the event loop that will ask."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread is running."""
        return self._thread.is_alive()

    def submit(self, requests: Sequence[Request]) -> Answers:
        """Queue all of the requests, or none.

        Raises Busy if the queue has no room for all of them, or the thread is about to end; what
        `Engine.submit` raises for a request that cannot be.
        """
        if self._closing or not self.alive:
            raise Busy("the server is shutting down")
        if len(requests) > self.engine.room:
            raise Busy(f"{len(requests)} more requests do not fit into the queue; try again in a moment")
        answers = Answers(self._wake.set)
        try:
            for number, request in enumerate(requests):
                handle = self.engine.submit(request)
                self._inboxes[handle] = number, answers.inbox
                answers.handles.append(handle)
        except BaseException:
            answers.cancel()
            raise
        self._wake.set()
        return answers

    def abort(self) -> None:
        """End all requests that are on their way with an error, soon."""
        self._time_is_up = True
        self._wake.set()

    async def close(self) -> None:
        """Take no more requests, finish those that are on their way, end the thread."""
        self._closing = True
        self._wake.set()
        await asyncio.to_thread(self._thread.join)

    def _drive(self) -> None:
        while self.engine.busy or not self._closing:
            if not self.engine.busy:
                self._wake.wait()
                self._wake.clear()
                continue
            try:
                if self._time_is_up:
                    raise RuntimeError("the server is shutting down")
                with self.turns:
                    events = self.engine.step()
            except Exception as error:
                # of no single request: all that are on their way fail, the next may not
                _log.error("a step failed", exc_info=error)
                events = self.engine.abort(error)
            try:
                self._loop.call_soon_threadsafe(self._deliver, events)
            except RuntimeError:  # the loop was closed by force: no one is left to hear
                return

    def _deliver(self, events: list[Event]) -> None:
        for event in events:
            number, inbox = self._inboxes[event.handle]
            inbox.put_nowait((number, event))
            if event.finish:
                del self._inboxes[event.handle]


class Answers:
    """The events of some requests, each with its request's number, as they come: an asynchronous iterator.

    Whoever stops listening before the end must `cancel`.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        """`wake` is called when they are cancelled."""
        self.inbox: Inbox = asyncio.Queue()
        self.handles: list[Handle] = []
        self.watch: asyncio.Task[None] | None = None
        """Who cancels them when their reader goes away; held here, so that it lives as long as they do."""
        self._wake = wake

    async def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        left = len(self.handles)
        while left:
            number, event = await self.inbox.get()
            left -= event.finish is not None
            yield number, event

    def cancel(self) -> None:
        """Drop what has not ended."""
        for handle in self.handles:
            handle.cancel()
        self._wake()
