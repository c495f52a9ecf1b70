"""The body of OpenAI's /v1/completions: what may be asked, and what the answers look like.

Source: OpenAI's API reference, "Create completion".
"""

from __future__ import annotations

import time
import uuid
from dataclasses import fields
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lmtutorial.decode.logits import Filters
from lmtutorial.decoders import Decoding, Name
from lmtutorial.request import Event, Handle, Request
from lmtutorial.vocabulary import Tokenizer

NO_EFFECT: dict[str, Any] = {
    "best_of": 1, "suffix": "", "presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {},
}  # fmt: skip
"""What is in OpenAI's API and not in this one: taken with the value that changes nothing, else refused."""

ELSEWHERE = {
    "best_of": 'ask for {"decoder": "best_of", "tries": ...}',
    "draft": "it is chosen where the server is started: serve --draft",
    "reward": "it is chosen where the server is started: serve --reward",
}
"""What to do in place of giving these."""

T = TypeVar("T")
Some = Annotated[list[T], Field(min_length=1)]
PROMPTS = "it must be a string, a list of strings, a list of token ids, or a list of such lists"

MOST_SIMULATIONS = 1024
"""Before each token of a tree search: between two tokens a search that needs no model cannot be stopped."""

LEAST = -9999.0
"""Stands for a log-probability of minus infinity, which JSON cannot write."""


class ApiError(Exception):
    """An answer other than 200, in OpenAI's shape: `param` is the argument at fault."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        """What the client gets."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class StreamOptions(BaseModel):
    """How to stream."""

    include_usage: bool = False
    """Whether the last chunk counts the tokens."""


class Completion(BaseModel):
    """The body of a request: OpenAI's arguments, and the options of `Decoding`."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str
    prompt: str | Some[int] | Some[str] | Some[list[int]]
    max_tokens: int = Field(16, ge=0)
    temperature: float = 1.0
    top_p: float = 1.0
    n: int = Field(1, ge=1)
    stop: str | list[str] = []
    seed: int | None = None
    logprobs: int | None = Field(None, ge=0)
    echo: bool = False
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float = 1.0
    decoder: Name = "sample"
    match: str | None = None
    width: int = Field(4, ge=1)
    length_penalty: float = 1.0
    tries: int = Field(16, ge=1)
    simulations: int = Field(64, ge=1, le=MOST_SIMULATIONS)
    lookahead: int = Field(4, ge=1)
    user: str = ""

    @model_validator(mode="before")
    @classmethod
    def _drop_what_changes_nothing(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        return {
            name: value
            for name, value in body.items()
            if value is not None and not (name in NO_EFFECT and value == NO_EFFECT[name])
        }

    @classmethod
    def parse(cls, body: bytes) -> Completion:
        """Read a body. Raises ApiError for what is none."""
        try:
            return cls.model_validate_json(body)
        except ValidationError as error:
            first = error.errors()[0]
            param = str(first["loc"][0]) if first["loc"] else None
            message = first["msg"] if param is None else f"{param}: {first['msg']}"
            if param == "prompt":
                message = f"prompt: {PROMPTS}"
            elif first["type"] == "extra_forbidden":
                message = f"{param} is not an argument of this server, or not with this value"
                message = f"{message}; {ELSEWHERE[param]}" if param in ELSEWHERE else message
            raise ApiError(400, message, param) from None

    def prompts(self, tokenizer: Tokenizer) -> list[list[int]]:
        """The token ids of each prompt. Raises ValueError for text that the tokenizer cannot encode."""
        prompts: Any = self.prompt
        if isinstance(prompts, str) or isinstance(prompts[0], int):
            prompts = [prompts]
        return [tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]

    @property
    def stepwise(self) -> bool:
        """Whether an engine can write the texts: it samples, and knows no expressions to match."""
        return self.decoder == "sample" and self.match is None

    def decoding(self) -> Decoding:
        """The decoder that is asked for. Raises ApiError for an option that it has no use for.

        An option with its default changes nothing, wherever it is given.
        """
        decoding = Decoding(**{field.name: getattr(self, field.name) for field in fields(Decoding)})
        defaults = {name: field.default for name, field in Completion.model_fields.items()}
        given = {name for name in self.model_fields_set if getattr(self, name) != defaults[name]}
        try:
            decoding.check(given)
        except ValueError as error:
            raise ApiError(400, str(error), str(error).split()[0]) from None
        return decoding

    def requests(self, prompts: list[list[int]], eos: int | None) -> list[Request]:
        """The requests to the engine: `n` for the first prompt, `n` for the second, and so on."""
        filters = Filters(
            self.temperature, self.top_k, self.top_p, self.min_p, self.typical_p, self.repetition_penalty
        )
        return [
            Request(prompt, self.max_tokens, filters, eos, self.stop, self.seed, copy, self.logprobs or 0)
            for prompt in prompts
            for copy in range(self.n)
        ]


class Writer:
    """Writes the events of an engine as the JSON of one answer: in chunks, or gathered."""

    def __init__(self, asked: Completion, prompts: list[list[int]], tokenizer: Tokenizer) -> None:
        self._asked, self._prompts, self._tokenizer = asked, prompts, tokenizer
        self._name, self._time = f"cmpl-{uuid.uuid4().hex}", int(time.time())
        self._offsets = [0] * (len(prompts) * asked.n)

    def opening(self) -> list[dict[str, Any]]:
        """The choices before anything is written: empty, or what is to be echoed."""
        texts = [self._tokenizer.decode(p) if self._asked.echo else "" for p in self._prompts]
        texts = [text for text in texts for _ in range(self._asked.n)]
        self._offsets = [len(text) for text in texts]
        return [_choice(number, text) for number, text in enumerate(texts)]

    def choice(self, number: int, event: Event) -> dict[str, Any]:
        """What one event adds to the choice `number`. Raises ApiError if it is a failure."""
        if isinstance(event.handle.error, ApiError):
            raise event.handle.error
        if event.finish in ("error", "cancelled"):
            raise ApiError(500, str(event.handle.error or "the request was cancelled"))
        choice = _choice(number, event.text, event.finish)
        if self._asked.logprobs is not None:
            choice["logprobs"] = self._logprobs(number, event)
        return choice

    def body(self, choices: list[dict[str, Any]], handles: list[Handle] | None = None) -> dict[str, Any]:
        """The answer, or a chunk of it; with `handles` it says how many tokens they took."""
        body: dict[str, Any] = {"id": self._name, "object": "text_completion", "created": self._time}
        body |= {"model": self._asked.model, "choices": choices}
        if handles is not None:
            read, written = sum(map(len, self._prompts)), sum(len(handle.tokens) for handle in handles)
            counts = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
            body["usage"] = counts
        return body

    def _logprobs(self, number: int, event: Event) -> dict[str, list[Any]]:
        if event.token is None:
            return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        name, offset = self._token(event.token), self._offsets[number]
        self._offsets[number] += len(self._tokenizer.decode([event.token]))
        top: dict[str, float] = {}
        for token, logprob in event.top:
            top.setdefault(self._token(token), max(logprob, LEAST))  # of two that read alike the likelier
        return {
            "tokens": [name], "token_logprobs": [max(event.logprob, LEAST)], "top_logprobs": [top],
            "text_offset": [offset],
        }  # fmt: skip

    def _token(self, token: int) -> str:
        """A token as text; one that is a part of a character as OpenAI writes it, "bytes:\\xe2".

        A model may have more ids than its tokenizer: padding.
        """
        if token >= self._tokenizer.vocab_size:
            return f"<{token}>"
        piece = self._tokenizer.decode_bytes([token], specials=True)
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def gather(whole: dict[str, Any], more: dict[str, Any]) -> None:
    """Add to a choice what came after it."""
    whole["text"] += more["text"]
    whole["finish_reason"] = more["finish_reason"]
    if whole["logprobs"] is None:
        whole["logprobs"] = more["logprobs"]
    else:
        for name, values in more["logprobs"].items():
            whole["logprobs"][name] += values


def _choice(number: int, text: str, finish: str | None = None) -> dict[str, Any]:
    return {"index": number, "text": text, "logprobs": None, "finish_reason": finish}
