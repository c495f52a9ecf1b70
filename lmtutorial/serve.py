"""An OpenAI-compatible server over the engine: /v1/completions, /v1/models, /health.

    server = Server(Engine(model, tokenizer=tokenizer), name="my-model")
    server.run()  # until Ctrl-C

Needs the extra "serve" (fastapi and uvicorn). Any client of OpenAI's can ask it:

    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none")
    client.completions.create(model="my-model", prompt="To be", max_tokens=100)

The engine samples, all texts side by side. The other decoders take turns with it:

    client.completions.create(..., extra_body={"decoder": "beam", "width": 8})
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

import fastapi
import uvicorn
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from lmtutorial.completion import ApiError, Completion, Writer, gather
from lmtutorial.decode.guesses import Guesser
from lmtutorial.decode.prompts import check_prompts
from lmtutorial.decode.sampling import Generation
from lmtutorial.decoders import Decoding, Draft, Reward
from lmtutorial.engine import Engine
from lmtutorial.engine_thread import Answers, EngineThread
from lmtutorial.request import Busy
from lmtutorial.search_thread import GoOn, Lend, Search, SearchThread

NAMES = {"max_new_tokens": "max_tokens", "top_logprobs": "logprobs", "n_best": "n"}
"""What the arguments of this package are called in OpenAI's API."""


@dataclass(frozen=True)
class Writers:
    """What the texts come from: an engine, and beside it the decoders that write whole texts."""

    engine: EngineThread
    searches: SearchThread
    draft: Draft | None
    reward: Reward | None


def create_app(writers: Writers, name: str, max_body: int) -> fastapi.FastAPI:
    """The web application: the threads of `writers` start and end with it; the model is called `name`."""
    thread = writers.engine

    @asynccontextmanager
    async def lifespan(app: fastapi.FastAPI) -> AsyncIterator[None]:
        thread.start()
        yield
        await writers.searches.close()
        await thread.close()

    app = fastapi.FastAPI(title="lmtutorial", lifespan=lifespan, docs_url=None, redoc_url=None)

    @app.exception_handler(ApiError)
    async def refuse(_: fastapi.Request, error: ApiError) -> Response:
        return JSONResponse(error.body(), error.status)

    @app.exception_handler(HTTPException)
    async def refuse_route(request: fastapi.Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        if error.status_code == 404:
            message += "; there are /v1/completions, /v1/models and /health"
        return JSONResponse(ApiError(error.status_code, message).body(), error.status_code, error.headers)

    @app.get("/health")
    async def health() -> Response:
        """Whether the engine is running, and how much it has to do."""
        engine = thread.engine
        state = {"running": engine.running, "waiting": engine.queue - engine.room, "rows": engine.rows}
        state["searches"] = writers.searches.pending
        return JSONResponse(
            {"status": "ok" if thread.alive else "down"} | state, 200 if thread.alive else 503
        )

    @app.get("/v1/models")
    async def models() -> Response:
        """The one model that is served."""
        return JSONResponse({"object": "list", "data": [_model(name)]})

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> Response:
        """The model, if it has this name."""
        _check_name(model, name)
        return JSONResponse(_model(name))

    @app.post("/v1/completions")
    async def completions(request: fastapi.Request) -> Response:
        """Texts after the prompts, whole or as a stream of server-sent events."""
        asked = Completion.parse(await _body(request, max_body))
        _check_name(asked.model, name)
        answers, writer = await _ask(writers, asked)
        answers.watch = asyncio.create_task(_cancel_when_gone(request, answers))
        if asked.stream:
            return StreamingResponse(_stream(asked, answers, writer), media_type="text/event-stream")
        return JSONResponse(await _whole(answers, writer))

    return app


class Server:
    """A server that is bound to its address, and answers while it runs.

    Binds to this machine alone unless `host` says otherwise; port 0 takes one that is free. Nothing is
    encrypted, and whoever reaches the port may use the model. When it is told to stop, by Ctrl-C, SIGTERM or
    `stop`, it takes no more requests, finishes for at most `grace` seconds what is on its way, and answers
    the rest with an error.

    Of the decoders that a request may name, "best_of" and "mcts" find texts that `reward` likes, and what
    "speculative" writes is proposed by `draft`, by default `PromptLookup()`.

    Raises OSError for an address that is taken, ValueError for a port that is none and for an engine
    without a tokenizer.
    """

    def __init__(
        self,
        engine: Engine,
        name: str,
        *,
        host: str = "127.0.0.1",
        port: int = 8000,
        max_body: int = 1 << 20,
        grace: float = 10.0,
        draft: Draft | None = None,
        reward: Reward | None = None,
    ) -> None:
        if engine.tokenizer is None:
            raise ValueError("a server needs an engine with a tokenizer: Engine(model, tokenizer=...)")
        if not 0 <= port <= 65535:
            raise ValueError(f"port is {port}; it must be from 0 to 65535")
        if max_body < 1 or not 0 <= grace < math.inf:
            raise ValueError(f"max_body is {max_body} and grace {grace}; they must be at least 1 and 0")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, port), family=family, backlog=1024)
        self.host, self.port = host, self._socket.getsockname()[1]
        thread = EngineThread(engine)
        searches = SearchThread(thread)
        app = create_app(Writers(thread, searches, draft, reward), name, max_body)
        config = uvicorn.Config(
            app, log_level="error", access_log=False, lifespan="on",
            timeout_graceful_shutdown=math.ceil(grace) + 5,
        )  # fmt: skip
        self._server = _Server(config, [thread.abort, searches.abort], grace)

    @property
    def url(self) -> str:
        """Where it listens, without a path."""
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    @property
    def local(self) -> bool:
        """Whether only this machine can reach it."""
        return ip_address(self._socket.getsockname()[0]).is_loopback

    def run(self) -> None:
        """Answer until told to stop. After Ctrl-C, in the main thread, it ends with KeyboardInterrupt."""
        self._server.run(sockets=[self._socket])

    def stop(self) -> None:
        """Tell it to stop; from any thread."""
        self._server.should_exit = True


class _Server(uvicorn.Server):
    """uvicorn's, which waits for answers on their way, with an end to its patience that they can hear of."""

    def __init__(self, config: uvicorn.Config, aborts: list[Callable[[], None]], grace: float) -> None:
        super().__init__(config)
        self._aborts, self._grace = aborts, grace

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        late = [loop.call_later(self._grace, abort) for abort in self._aborts]
        try:
            await super().shutdown(sockets)
        finally:  # also where it is forced to end: a thread that goes on would hold up the process
            for timer in late:
                timer.cancel()
            for abort in self._aborts:
                abort()


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "lmtutorial"}


def _check_name(asked: str, name: str) -> None:
    if asked != name:
        raise ApiError(404, f"there is no model {asked!r} here, only {name!r}", "model", "model_not_found")


async def _body(request: fastapi.Request, most: int) -> bytes:
    """The body. One that is too long is read on for a while, unkept, so that its sender hears the answer."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size <= most:
            parts.append(part)
        elif size > 16 * most:
            break
    if size > most:
        raise ApiError(413, f"the body is over the {most:,} bytes that this server reads")
    return b"".join(parts)


async def _ask(writers: Writers, asked: Completion) -> tuple[Answers, Writer]:
    """Put the requests into the queue that they are for. Raises ApiError where they cannot be."""
    engine, decoding = writers.engine.engine, asked.decoding()
    assert engine.tokenizer is not None
    if asked.logprobs is not None and (asked.echo or not asked.stepwise):
        what = "not with echo" if asked.echo else "by the decoder sample only, without match"
        raise ApiError(400, f"logprobs: they are reported {what}", "logprobs")
    try:
        prompts = await asyncio.to_thread(asked.prompts, engine.tokenizer)  # slow, where the text is long
    except ValueError as error:
        raise ApiError(400, str(error), "prompt") from None
    unknown = [token for prompt in prompts for token in prompt if token >= engine.tokenizer.vocab_size]
    if asked.echo and unknown:
        raise ApiError(400, f"echo: the token {unknown[0]} of the prompt is no text", "echo")
    if len(prompts) * asked.n > engine.queue:
        texts = f"{len(prompts) * asked.n} texts are more than the {engine.queue} that can wait at once"
        raise ApiError(400, texts, "n" if len(prompts) <= engine.queue else "prompt")
    try:
        check_prompts(engine.model, prompts, asked.max_tokens)  # all at once: errors say which
        requests = asked.requests(prompts, engine.tokenizer.eos)
        if asked.stepwise:
            answers = writers.engine.submit(requests)
        else:
            searches = [_search(writers, asked, decoding, prompt) for prompt in prompts]
            answers = await writers.searches.submit(requests, searches)
    except Busy as error:
        raise ApiError(429, str(error), code="busy") from None
    except (ValueError, TypeError) as error:
        message = re.sub(r"\w+", lambda name: NAMES.get(name[0], name[0]), str(error))
        first = message.split()[0].rstrip(":")  # messages begin with a name
        raise ApiError(400, message, first if first in Completion.model_fields else "prompt") from None
    return answers, Writer(asked, prompts, engine.tokenizer)


def _search(writers: Writers, asked: Completion, decoding: Decoding, prompt: list[int]) -> Search:
    """The texts that are asked for after a prompt, by a decoder that writes them whole."""
    engine = writers.engine.engine
    rows = decoding.rows(asked.n)
    if rows > engine.rows:
        given = {"beam": f"width is {decoding.width}", "best_of": f"tries is {decoding.tries}"}
        first = given.get(decoding.decoder, f"n is {asked.n}")
        raise ValueError(
            f"{first}; with n = {asked.n} that takes {rows} rows at once, this server has {engine.rows}"
        )

    def search(lend: Lend, go_on: GoOn) -> list[Generation]:
        assert engine.tokenizer is not None
        draft = writers.draft
        if draft is not None and not isinstance(draft, Guesser):
            draft = lend(draft)
        texts = decoding.write(
            lend(engine.model), engine.tokenizer, prompt, asked.max_tokens, asked.n,
            draft=draft, reward=writers.reward, on_step=go_on,
        )  # fmt: skip
        if len(texts) < asked.n:
            raise ApiError(400, f"n is {asked.n}; there are only {len(texts)} texts", "n")
        return texts

    return search


async def _whole(answers: Answers, writer: Writer) -> dict[str, Any]:
    choices = writer.opening()
    async for number, event in answers:
        gather(choices[number], writer.choice(number, event))
    return writer.body(choices, answers.handles)


async def _stream(asked: Completion, answers: Answers, writer: Writer) -> AsyncIterator[str]:
    """The answer as server-sent events."""
    try:
        for choice in writer.opening():
            if asked.echo:
                yield _event(writer.body([choice]))
        async for number, event in answers:
            choice = writer.choice(number, event)
            if choice["text"] or choice["logprobs"] or choice["finish_reason"]:
                yield _event(writer.body([choice]))
        if asked.stream_options.include_usage:
            yield _event(writer.body([], answers.handles))
        yield "data: [DONE]\n\n"
    except ApiError as error:
        yield _event(error.body())
        answers.cancel()


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def _cancel_when_gone(request: fastapi.Request, answers: Answers) -> None:
    """Nobody waits for the answer once the client has gone, or has it whole."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    answers.cancel()
