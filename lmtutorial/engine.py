"""Continuous batching: requests come and go while every step is one forward for all that are there.

    engine = Engine(model, rows=16)
    handle = engine.submit(Request(prompt, max_new_tokens=100))
    engine.run()  # or, to see each token as it comes: engine.step() while engine.busy
    text = handle.result()

A batch that is decoded together waits for its longest text. Here a row whose text has ended is given to the
next request at once. A step admits waiting requests into free rows, reads one token in each row, draws the
next tokens, and retires the texts that have ended.
Source: Yu et al., "Orca: A distributed serving system for Transformer-based generative models", OSDI 2022.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from lmtutorial.decode.prompts import decoding
from lmtutorial.decode.rows import RowSampler
from lmtutorial.decode.sampling import Generation
from lmtutorial.models.cache import LanguageModel
from lmtutorial.prefix_cache import PrefixCache
from lmtutorial.request import Busy, Event, Handle, Request, Top, check_request
from lmtutorial.vocabulary import Tokenizer

READ_AT_ONCE = 2048
"""The most tokens of prompts in one forward, padding included; a longer prompt is read alone. It bounds the
memory of the logits, and how long the texts on their way wait for those that come."""


class Engine:
    """Writes many texts side by side, each the one that `sample(model, [prompt], ...)` writes alone.

    The texts share one cache of `rows` rows with room for `max_len` tokens each (default: the model's
    context). Every step is one forward of shape (rows, 1), whichever rows are taken. What a request asks for,
    and whatever becomes of it, changes nothing in its neighbors' texts; only the last digits of logits may
    depend on what else is in the batch, as in any batch.

    At most `queue` requests wait; then `submit` raises `Busy`. Prompts that begin like earlier texts are not
    read again: the states of up to `keep` tokens are kept in blocks of `block`, see `PrefixCache`. With a
    `tokenizer` the events carry text, and requests may name stop strings.

    `submit` and `Handle.cancel` may be called from any thread, all else from one.

    >>> from lmtutorial.decode.logits import Filters
    >>> from lmtutorial.models.ngram import NGram
    >>> engine = Engine(NGram.train([0, 1, 2, 3] * 20, order=2, vocab_size=4), rows=2, max_len=9)
    >>> requests = [Request([first], max_new_tokens=first + 1, filters=Filters(0)) for first in (0, 1, 2)]
    >>> [text.tokens for text in engine.generate(requests)], engine.steps
    ([[1], [2, 3], [3, 0, 1]], 3)
    """

    def __init__(
        self,
        model: LanguageModel,
        rows: int = 16,
        *,
        max_len: int | None = None,
        queue: int = 256,
        keep: int = 4096,
        block: int = 16,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        max_len = model.context if max_len is None else max_len
        if max_len is None:
            raise ValueError("this model has no limit of its own; give max_len, the longest text in tokens")
        for name, value in (("rows", rows), ("queue", queue), ("max_len", max_len)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if model.context is not None and max_len > model.context:
            raise ValueError(f"max_len is {max_len}; the model's context is {model.context}")
        self.model, self.rows, self.max_len = model, rows, max_len
        self.queue, self.tokenizer = queue, tokenizer
        self.prefixes = PrefixCache(keep, block)
        self.steps = self.tokens_read = 0  # forwards of all rows; prompt tokens read in forwards of their own
        self._waiting: deque[Handle] = deque()
        self._lock = threading.Lock()  # of `_waiting`
        self._events: list[
            Event
        ] = []  # of this step; a step that fails leaves them to the next, or to `abort`
        self._streamed: dict[Handle, deque[Event]] = {}
        self._empty_rows()
        self._clear_cache()

    def _empty_rows(self) -> None:
        self._texts: list[Handle | None] = [None] * self.rows
        self._free = list(reversed(range(self.rows)))

    def _clear_cache(self) -> None:
        rows, device = self.rows, self.model.device
        self._failed = True  # until all is there
        vars(self).pop("_cache", None)  # lets go of the old memory before the new is taken
        self._cache = self.model.new_cache(rows, self.max_len)
        self._sampler = RowSampler(rows, self.model.vocab_size, self.max_len, device)
        self._tokens_R1 = torch.zeros(rows, 1, dtype=torch.int64, device=device)  # to be read next
        self._taken_R = torch.zeros(rows, dtype=torch.int64, device=device)
        self._failed = False

    @property
    def running(self) -> int:
        """How many texts are on their way."""
        return self.rows - len(self._free)

    @property
    def room(self) -> int:
        """How many more requests may wait."""
        return self.queue - len(self._waiting)

    @property
    def busy(self) -> bool:
        """Whether anything is left to do."""
        return bool(self._waiting or self.running)

    def submit(self, request: Request) -> Handle:
        """Put a request into the queue.

        Raises ValueError or TypeError, as `sample` does, for a request that cannot be, Busy if the queue is
        full; then nothing is queued.
        """
        return self._enqueue(check_request(request, self.model, self.max_len, self.tokenizer))

    def step(self) -> list[Event]:
        """Admit what waits, write one token of every text, retire what has ended: the events of all that.

        Raises what the model raises; then `abort`, or the texts on their way are in a state of no use.
        """
        with decoding(self.model):
            if self._failed:
                self._clear_cache()
            self._drop_cancelled()
            self._admit()
            if self.running:
                self._advance()
        return self._take_events()

    def run(self) -> None:
        """Step until nothing is left to do."""
        while self.busy:
            self.step()

    def generate(self, requests: Iterable[Request]) -> list[Generation]:
        """The texts of any number of requests, in their order.

        Those that may get longest come first, so that at the end no row is left to write a long one alone.
        Raises what `submit` does before any work; what the first request that fails does after all of it.
        """
        handles = [check_request(r, self.model, self.max_len, self.tokenizer) for r in requests]
        for handle in sorted(handles, key=lambda handle: -handle.request.max_new_tokens):
            while self.room < 1:
                self.step()
            self._enqueue(handle)
        self.run()
        return [handle.result() for handle in handles]

    def stream(self, request: Request) -> Iterator[Event]:
        """The events of one request, each as soon as it is there; other texts advance along with it.

        Raises what `submit` does, at once.
        """
        handle = self.submit(request)
        self._streamed[handle] = deque()
        return self._follow(handle)

    def _follow(self, handle: Handle) -> Iterator[Event]:
        events = self._streamed[handle]  # also those of steps that others have asked for
        try:
            while events or handle.finish is None:
                if not events:
                    self.step()
                while events:
                    yield events.popleft()
        finally:
            handle.cancel()
            del self._streamed[handle]

    def abort(self, error: Exception) -> list[Event]:
        """End all requests with this error, where a step has failed, or time is up: their last events."""
        with self._lock:
            handles = [text for text in self._texts if text] + list(self._waiting)
            self._waiting.clear()
        for handle in handles:
            if handle.finish is None:
                self._tell(handle.end("error", error))
        self._empty_rows()
        self._failed = True  # the next step clears the cache: there may be no memory for it now
        return self._take_events()

    def _tell(self, event: Event) -> None:
        self._events.append(event)
        if event.handle in self._streamed:
            self._streamed[event.handle].append(event)

    def _take_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _enqueue(self, handle: Handle) -> Handle:
        with self._lock:
            if self.room < 1:
                raise Busy(f"{self.queue} requests are waiting already; try again when some have ended")
            self._waiting.append(handle)
        return handle

    def _drop_cancelled(self) -> None:
        with self._lock:
            dropped = [handle for handle in self._waiting if handle.cancelled]
            for handle in dropped:
                self._waiting.remove(handle)
        for handle in dropped:
            self._tell(handle.end("cancelled"))
        for row, text in enumerate(self._texts):
            if text is not None and text.cancelled:
                self._tell(text.end("cancelled"))
                self._retire(row)

    def _admit(self) -> None:
        """Give the free rows to those that wait longest, and read their prompts but for the last token."""
        seats: dict[int, Handle] = {}
        with self._lock:
            for _ in range(min(len(self._waiting), len(self._free))):
                text = self._waiting.popleft()
                if text.request.max_new_tokens:
                    row = self._free.pop()
                    self._texts[row] = seats[row] = text
                else:
                    self._tell(text.end("length"))
        while seats:
            texts = [text.prompt[:-1] for text in seats.values()]
            rows = [list(seats)[i] for i in self.prefixes.alike(texts, READ_AT_ONCE)]
            group = {row: seats.pop(row) for row in rows}
            try:
                self._seat(group)
            except Exception as error:  # out of memory, say: what is on its way is in another cache
                for row, text in group.items():
                    self._tell(text.end("error", error))
                    self._retire(row)

    def _seat(self, group: dict[int, Handle]) -> None:
        """Read the prompts of some texts into their rows, and set up what the steps need."""
        pieces, read = self.prefixes.read(self.model, [text.prompt[:-1] for text in group.values()])
        self._cache.copy_in(pieces, list(group))
        self.tokens_read += read
        for row, text in group.items():
            request = text.request
            self._sampler.take(
                row, text.prompt, request.max_new_tokens, request.filters, text.seed, request.copy
            )
            self._tokens_R1[row] = text.prompt[-1]
            self._taken_R[row] = 1

    def _advance(self) -> None:
        """One forward of all rows: a token for every text."""
        self._cache.truncate(self._cache.lengths * self._taken_R)  # free rows read on the spot
        logits_RV = self.model(self._tokens_R1, self._cache)[:, -1]
        self.steps += 1
        tokens_R = self._sampler.choose(logits_RV, self._cache.lengths)
        self._tokens_R1 = tokens_R.unsqueeze(1)
        logprobs_RV = logits_RV.log_softmax(-1, dtype=torch.promote_types(logits_RV.dtype, torch.float32))
        logprobs_R = logprobs_RV.gather(1, self._tokens_R1).squeeze(1)
        likeliest = self._likeliest(logprobs_RV)
        for row, (token, logprob) in enumerate(zip(tokens_R.tolist(), logprobs_R.tolist(), strict=True)):
            text = self._texts[row]
            if text is not None:
                try:
                    event = text.add(token, logprob, likeliest[row][: text.request.top_logprobs])
                except Exception as error:  # its own, and no other's
                    event = text.end("error", error)
                self._tell(event)
                if event.finish:
                    self._retire(row)

    def _likeliest(self, logprobs_RV: Tensor) -> list[Top]:
        """As many of the likeliest tokens of each row as any text wants to know."""
        most = max(text.request.top_logprobs for text in self._texts if text)
        if not most:
            return [()] * len(logprobs_RV)
        logprobs, ids = logprobs_RV.topk(most)
        return [tuple(zip(*row, strict=True)) for row in zip(ids.tolist(), logprobs.tolist(), strict=True)]

    def _retire(self, row: int) -> None:
        """Free a row. What its text has read is kept for others; what a failure has left is wiped out."""
        text, self._texts[row] = self._texts[row], None
        assert text is not None
        self._free.append(row)
        self._taken_R[row] = 0
        self._sampler.free(row)
        if text.finish == "error":  # a NaN would reach the row's next text before it is overwritten: 0 * NaN
            blank = self.model.new_cache(1, self.max_len).copy_out(0, 0, self.max_len)
            self._cache.copy_in([[blank]], [row])
        else:
            self.prefixes.keep(self._cache, row, (text.prompt + text.tokens)[:-1])
