"""What an engine is asked for, and what it answers: a request, its handle, and the events of each step."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch

from lmtutorial.decode.logits import Filters
from lmtutorial.decode.noise import check_seed
from lmtutorial.decode.prompts import check_eos, check_prompts
from lmtutorial.decode.sampling import Generation
from lmtutorial.decode.text import TextStream
from lmtutorial.models.cache import LanguageModel
from lmtutorial.vocabulary import Tokenizer

Finish = Literal["stop", "length", "cancelled", "error"]
"""Why a text ended: an end-of-text token or a stop string, its limit of tokens, its reader, or a failure."""

Top = tuple[tuple[int, float], ...]
"""The likeliest tokens and their log-probabilities in nats, the likeliest first."""

PLAIN = Filters()


class Busy(RuntimeError):
    """An engine's queue is full: try again when some requests have ended."""


@dataclass(frozen=True)
class Request:
    """One text to write: the arguments of `sample`, for one prompt.

    >>> Request([5, 1], max_new_tokens=20, filters=Filters(temperature=0.8), seed=1).filters.greedy
    False
    """

    prompt: Sequence[int]
    """Token ids, at least one."""
    max_new_tokens: int
    """The most tokens to write; with the prompt at most the engine's `max_len`."""
    filters: Filters = PLAIN
    """Temperature, top-k, top-p, min-p and repetition penalty."""
    eos: int | Collection[int] | None = None
    """The ids that end the text."""
    stop: str | Sequence[str] = ()
    """The strings that end the text, which then ends before them; for an engine with a tokenizer."""
    seed: int | None = None
    """The same seed writes the same text after the same prompt. None: a new text each time."""
    copy: int = 0
    """Which of the texts that `sample` writes after copies of the prompt: 0 is the first."""
    top_logprobs: int = 0
    """How many of the likeliest tokens to report beside each token."""


class Event(NamedTuple):
    """What one step did for one request: a token, or the end, or both."""

    handle: Handle
    token: int | None
    """The new token; None where the request ended without one: cancelled, failed, or none were wanted."""
    text: str = ""
    """What is now certain of the text and was not before; it may lag behind the tokens."""
    logprob: float = math.nan
    """Of the token, in nats, under the model itself, whatever it was drawn from."""
    top: Top = ()
    """As many as the request wants to know."""
    finish: Finish | None = None
    """Why the text ended with this event, or None."""


@dataclass(eq=False)
class Handle:
    """A request on its way: what is written so far, and how it ended."""

    request: Request
    prompt: list[int]
    ends: frozenset[int]
    seed: int
    stream: TextStream | None
    tokens: list[int] = field(default_factory=list)
    """The new tokens so far, an end-of-text token included."""
    logprobs: list[float] = field(default_factory=list)
    """One for each token, in nats."""
    text: str = ""
    """The new text so far, if the engine has a tokenizer, without an end-of-text token or a stop string."""
    finish: Finish | None = None
    """Why the text ended; None while it is on its way."""
    error: Exception | None = None
    """What went wrong, where `finish` is "error"."""
    cancelled: bool = False

    def cancel(self) -> None:
        """Ask the engine to drop the request, at its next step. May be called from any thread."""
        self.cancelled = True

    def result(self) -> Generation:
        """The whole text. Raises the request's own error if it failed, RuntimeError if it has no result."""
        if self.error is not None:
            raise self.error
        if self.finish not in ("stop", "length"):
            raise RuntimeError(f"the request has no result: it {self._state()}")
        return Generation(self.tokens, sum(self.logprobs), self.finish == "stop")

    def add(self, token: int, logprob: float, top: Top = ()) -> Event:
        """Write one more token. Raises ValueError for logits that are NaN, or a token that is no text."""
        if math.isnan(logprob):
            raise ValueError(f"the model's logits after {len(self.tokens)} new tokens are NaN")
        ended = token in self.ends
        text = "" if ended or self.stream is None else self.stream.push(token)
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if ended or (self.stream is not None and self.stream.stopped):
            self.finish = "stop"
        elif len(self.tokens) == self.request.max_new_tokens:
            self.finish = "length"
        if self.finish and self.stream is not None:
            text += self.stream.finish()
        self.text += text
        return Event(self, token, text, logprob, top, self.finish)

    def end(self, finish: Finish, error: Exception | None = None) -> Event:
        """End without another token."""
        self.finish, self.error = finish, error
        return Event(self, None, finish=finish)

    def _state(self) -> str:
        return "was cancelled" if self.finish else f"has {len(self.tokens)} tokens and goes on"


def check_request(
    request: Request, model: LanguageModel, max_len: int, tokenizer: Tokenizer | None
) -> Handle:
    """A handle for a request that an engine with room for `max_len` tokens a text can fulfill.

    Raises ValueError or TypeError, quoting what is wrong, for one that it cannot.
    """
    [prompt] = check_prompts(model, [request.prompt], request.max_new_tokens)
    total = len(prompt) + request.max_new_tokens
    if total > max_len:
        raise ValueError(
            f"the prompt has {len(prompt):,} tokens; with max_new_tokens={request.max_new_tokens} that is "
            f"{total:,}, over this engine's max_len of {max_len:,}"
        )
    if request.stop and tokenizer is None:
        raise ValueError(f"stop is {request.stop!r}; an engine without a tokenizer knows no strings")
    if not 0 <= request.top_logprobs <= model.vocab_size:
        raise ValueError(
            f"top_logprobs is {request.top_logprobs}; it must be from 0 to {model.vocab_size}, the vocabulary"
        )
    seed = check_seed(request.seed)
    seed = int(torch.randint(2**63 - 1, ())) if seed is None else seed
    stream = None if tokenizer is None else TextStream(tokenizer, request.stop)
    return Handle(request, prompt, check_eos(model, request.eos), seed, stream)
