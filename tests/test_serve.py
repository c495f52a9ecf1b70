"""OpenAI's own client gets from the server what `sample` writes, and bad company changes nothing."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import openai
import pytest
import torch

from lmtutorial.decode.sampling import sample
from lmtutorial.decode.text import TextStream
from lmtutorial.decoders import Decoding
from lmtutorial.engine import Engine
from lmtutorial.models.transformer import Transformer, TransformerConfig
from lmtutorial.serve import Server
from lmtutorial.tokenizers import BPETokenizer, CharTokenizer

TOKENIZER = CharTokenizer("abcdefgh é\n", specials=["<|endoftext|>"])


def random_transformer(**config):
    torch.manual_seed(0)
    vocab = TOKENIZER.vocab_size
    shape = TransformerConfig(vocab, context=128, width=16, layers=2, heads=2, tied=False, **config)
    model = Transformer(shape).to(torch.float64).eval()  # no near-ties
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return model


MODEL = random_transformer()


class Troubled:
    """The model, slowly; or not at all, while it is told to fail."""

    def __init__(self, seconds=0.0):
        self.seconds, self.fails, self.called = seconds, False, time.monotonic()
        self.vocab_size, self.context, self.device = MODEL.vocab_size, MODEL.context, MODEL.device

    def new_cache(self, batch, max_len):
        if self.fails:
            raise MemoryError("no memory is left for a cache")
        return MODEL.new_cache(batch, max_len)

    def __call__(self, tokens, cache):
        self.called = time.monotonic()
        time.sleep(self.seconds)
        if self.fails:
            raise MemoryError("no memory is left")
        return MODEL(tokens, cache)

    def rests(self, seconds):
        """Whether nobody has asked it for so long."""
        return time.monotonic() - self.called > seconds


@contextmanager
def serving(model=MODEL, rows=4, queue=64, tokenizer=TOKENIZER, **options):
    server = Server(Engine(model, rows, queue=queue, tokenizer=tokenizer), "tiny", port=0, **options)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: health(server)["status"] == "ok")
        yield server
    finally:
        server.stop()
        thread.join(timeout=30)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def server():
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with connect(server) as client:
        yield client


def connect(server, kind=openai.OpenAI):
    http = openai.DefaultHttpxClient if kind is openai.OpenAI else openai.DefaultAsyncHttpxClient
    plain = http(verify=False, timeout=60)  # reading certificates takes longer than all else
    return kind(base_url=f"{server.url}/v1", api_key="none", max_retries=0, http_client=plain)


def wait_until(happens, seconds=20):
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.02)


def ask(server, method, path, body=None, headers=None):
    """Status and JSON of a raw request."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    try:
        connection.request(method, path, body, headers or {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def health(server):
    return ask(server, "GET", "/health")[1]


def alone(prompt, max_tokens, n=1, **options):
    """The texts that `sample` writes, and why they ended."""
    ids = TOKENIZER.encode(prompt) if isinstance(prompt, str) else prompt
    texts = sample(MODEL, [ids] * n, max_tokens, eos=TOKENIZER.eos, **options)
    return [(TOKENIZER.decode(t.tokens), "stop" if t.finished else "length") for t in texts]


def choices(completion):
    assert [choice.index for choice in completion.choices] == list(range(len(completion.choices)))
    return [(choice.text, choice.finish_reason) for choice in completion.choices]


def streamed(chunks):
    """What the chunks add up to: texts and finish reasons by index."""
    texts, ends = {}, {}
    for chunk in chunks:
        for choice in chunk.choices:
            assert choice.index not in ends
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            if choice.finish_reason:
                ends[choice.index] = choice.finish_reason
    return [(texts[i], ends[i]) for i in sorted(ends)]


PROMPTS = ["a", "bad cafe", "dead beef\n", "é", "head head head head head head"]


def test_64_clients_at_once_each_get_what_is_written_alone(server):
    async def visit(i):
        options = {"temperature": [0, 0.7, 1.3][i % 3], "top_p": [1, 0.9][i % 2], "seed": i}
        prompt, steps = PROMPTS[i % len(PROMPTS)], 5 + i % 40
        async with connect(server, openai.AsyncOpenAI) as client:
            found = await client.completions.create(
                model="tiny", prompt=prompt, max_tokens=steps, stream=i % 2 == 1, **options
            )
            found = streamed([chunk async for chunk in found]) if i % 2 else choices(found)
        return found, alone(prompt, steps, **options)

    async def visits():
        return await asyncio.gather(*map(visit, range(64)))

    for found, expected in asyncio.run(visits()):
        assert found == expected


@pytest.mark.parametrize(
    "options",
    [
        {"prompt": "abc", "max_tokens": 40, "seed": 1},
        {"prompt": [1, 2, 3], "max_tokens": 10, "n": 3, "seed": 2, "logprobs": 2},
        {"prompt": ["a", "b", "a bad cab"], "max_tokens": 20, "n": 2, "seed": 3, "stop": ["ab", "e"]},
        {"prompt": [[1], [2, 3]], "max_tokens": 8, "temperature": 0, "echo": True, "stop": "a"},
        {"prompt": "h", "max_tokens": 0, "logprobs": 1},
        {
            "prompt": "h",
            "max_tokens": 30,
            "seed": 5,
            "extra_body": {"top_k": 3, "min_p": 0.1, "repetition_penalty": 2},
        },
    ],
)
def test_a_stream_adds_up_to_the_answer_given_at_once(client, options):
    whole = client.completions.create(model="tiny", **options)
    chunks = list(
        client.completions.create(
            model="tiny", stream=True, stream_options={"include_usage": True}, **options
        )
    )
    assert streamed(chunks) == choices(whole)
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1
    for choice in whole.choices:
        parts = [
            c.logprobs for chunk in chunks for c in chunk.choices if c.index == choice.index and c.logprobs
        ]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            if options.get("logprobs"):
                together = [value for part in parts for value in getattr(part, name)]
                assert together == getattr(choice.logprobs, name)


def test_several_prompts_and_copies_come_in_order_and_are_those_of_sample(client):
    answer = client.completions.create(model="tiny", prompt=["ab", "c"], n=3, max_tokens=12, seed=7)
    assert choices(answer) == alone("ab", 12, n=3, seed=7) + alone("c", 12, n=3, seed=7)
    written = sum(len(text) + (end == "stop") for text, end in choices(answer))
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, written)
    assert answer.usage.total_tokens == 3 + written


def test_text_is_cut_before_a_stop_string_and_echo_puts_the_prompt_before_it(client):
    [(text, _)] = alone("abc", 40, seed=1)
    stop = text[5:7]
    answer = client.completions.create(
        model="tiny", prompt="abc", max_tokens=40, seed=1, stop=stop, echo=True
    )
    assert choices(answer) == [("abc" + text[: text.index(stop)], "stop")]


def test_logprobs_are_those_of_one_uncached_forward(client):
    answer = client.completions.create(
        model="tiny", prompt="abc", max_tokens=9, seed=4, logprobs=3, temperature=0.8
    )
    [found] = [choice.logprobs for choice in answer.choices]
    ids = TOKENIZER.encode("abc" + "".join(found.tokens), specials=True)
    with torch.no_grad():
        logprobs = MODEL(torch.tensor([ids]))[0, 2:-1].log_softmax(-1)
    for i, row in enumerate(logprobs):
        assert found.token_logprobs[i] == pytest.approx(float(row[ids[3 + i]]))
        values, best = row.topk(3)
        names = [TOKENIZER.decode([t], specials=True) for t in best.tolist()]
        assert found.top_logprobs[i] == pytest.approx(dict(zip(names, values.tolist(), strict=True)))
        assert found.text_offset[i] == i


def test_a_character_of_several_tokens_is_never_torn():
    torch.manual_seed(0)
    tokenizer = BPETokenizer([])  # a token for each byte
    model = Transformer(TransformerConfig(tokenizer.vocab_size, context=64, width=16)).double().eval()
    with serving(model, tokenizer=tokenizer) as server, connect(server) as client:
        options = {"model": "tiny", "prompt": "né", "max_tokens": 60, "seed": 0, "logprobs": 2}
        whole = client.completions.create(**options).choices[0]
        expected = sample(model, [tokenizer.encode("né")], 60, seed=0, eos=tokenizer.eos)[0]
        assert whole.text == tokenizer.decode(expected.tokens)
        assert streamed(client.completions.create(stream=True, **options))[0][0] == whole.text
        assert any(name.startswith("bytes:\\x") for name in whole.logprobs.tokens)


def likes_a(text):
    return text.count("a") - text.count("b")


def written(decoder, prompt="abc", max_tokens=9, n=1, stop=(), **options):
    """The texts that a decoder writes alone, and why they ended."""
    ids = TOKENIZER.encode(prompt)
    texts = Decoding(decoder, **options).write(
        MODEL, TOKENIZER, ids, max_tokens, n, draft=MODEL, reward=likes_a
    )
    cut = []
    for text in texts:
        stream = TextStream(TOKENIZER, stop)
        pieces = [stream.push(token) for token in text.tokens if token != TOKENIZER.eos] + [stream.finish()]
        cut.append(("".join(pieces), "stop" if text.finished or stream.stopped else "length"))
    return cut


SEARCHES = {
    "beam": {"width": 4, "n": 3, "length_penalty": 0.5},
    "mcts": {"simulations": 6, "n": 2, "seed": 1, "temperature": 0.9, "top_k": 4},
    "best_of": {"tries": 2, "n": 2, "seed": 1, "top_p": 0.9},
    "speculative": {"lookahead": 3, "n": 2, "seed": 1, "temperature": 0.8, "min_p": 0.01},
    "sample": {"match": "(ab|c)*", "n": 2, "seed": 5},
}


@pytest.fixture(scope="module")
def searching():
    with serving(draft=MODEL, reward=likes_a) as server, connect(server) as client:
        yield server, client


@pytest.mark.parametrize("stop", [(), ("a", "bc")])
@pytest.mark.parametrize("decoder", list(SEARCHES))
def test_each_decoder_can_be_asked_for_whole_and_as_a_stream(searching, decoder, stop):
    _, client = searching
    options = dict(SEARCHES[decoder])
    body = {
        "model": "tiny",
        "prompt": ["abc", "hé"],
        "max_tokens": 9,
        "n": options.pop("n"),
        "stop": list(stop),
    }
    body["extra_body"] = {"decoder": decoder, **options}
    whole = client.completions.create(**body)
    alone = [text for p in body["prompt"] for text in written(decoder, p, n=body["n"], stop=stop, **options)]
    assert choices(whole) == alone
    assert streamed(client.completions.create(**body, stream=True)) == alone
    assert whole.usage.prompt_tokens == 5


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"decoder": "beam", "seed": 3}, "seed", "seed is for the decoders sample, .* not for beam"),
        ({"width": 3}, "width", "width is for the decoder beam, not for sample"),
        ({"decoder": "magic"}, "decoder", "Input should be 'sample', 'best_of'"),
        ({"decoder": "beam", "width": 0}, "width", "greater than or equal to 1"),
        ({"decoder": "beam", "width": 3, "n": 4}, "n", "^n is 4; it must be from 1 to width"),
        ({"decoder": "beam", "width": 5}, "width", "width is 5; .* takes 5 rows at once, this server has 4"),
        ({"decoder": "beam", "length_penalty": "long"}, "length_penalty", "valid number"),
        ({"decoder": "beam", "prompt": [99]}, "prompt", "holds token 99"),
        ({"decoder": "beam", "logprobs": 2}, "logprobs", "by the decoder sample only"),
        ({"decoder": "mcts", "temperature": -1}, "temperature", "temperature is -1"),
        ({"decoder": "best_of", "tries": 2, "n": 3}, "tries", "tries is 2; with n = 3 that takes 6 rows"),
        ({"match": "a", "n": 5}, "n", "n is 5; with n = 5 that takes 5 rows"),
        ({"best_of": 3}, "best_of", '; ask for {"decoder": "best_of", "tries": ...}'),
        ({"draft": "shakespeare"}, "draft", "where the server is started"),
        ({"decoder": "beam", "prompt": ["a", "b", ""]}, "prompt", "prompt 2 is empty"),
        ({"decoder": "speculative", "max_tokens": 200}, "prompt", "over the context of 128"),
        ({"decoder": "mcts", "simulations": 1025}, "simulations", "less than or equal to 1024"),
        ({"match": "(a"}, "match", "is no regular expression"),
        ({"match": "z+"}, "match", "no token of this vocabulary continues"),
        ({"match": "(" * 400 + "a" + ")" * 400}, "match", "too many groups|is no regular expression"),
        ({"decoder": "beam", "width": 4, "n": 4, "max_tokens": 1}, None, None),
        ({"decoder": "beam", "width": 2, "temperature": 1.0, "tries": 16, "seed": None}, None, None),
    ],
)
def test_a_search_that_cannot_be_is_refused_before_it_begins(searching, change, param, message):
    server, _ = searching
    body = {"model": "tiny", "prompt": "a", "max_tokens": 9} | change
    status, answer = ask(server, "POST", "/v1/completions", json.dumps(body))
    if param is None:
        assert status == 200
    else:
        assert (status, answer["error"]["param"]) == (400, param)
        assert re.search(message, answer["error"]["message"]), answer
    assert health(server)["searches"] == 0


def test_each_prompt_of_a_search_is_tried_before_it_begins():
    torch.manual_seed(0)
    draft = Transformer(TransformerConfig(TOKENIZER.vocab_size, context=12, width=8, layers=1, heads=1))
    with serving(draft=draft.double()) as server:
        for prompts in (["a", "abcdabcdab"], ["abcdabcdab", "a"]):
            body = {"model": "tiny", "prompt": prompts, "max_tokens": 9, "decoder": "speculative"}
            status, answer = ask(server, "POST", "/v1/completions", json.dumps(body))
            assert (status, answer["error"]["param"]) == (400, "prompt")
            assert "over the draft's context of 12" in answer["error"]["message"]


def test_a_server_without_a_reward_says_what_it_lacks(server):
    body = {"model": "tiny", "prompt": "a", "decoder": "best_of", "tries": 2}
    status, answer = ask(server, "POST", "/v1/completions", json.dumps(body))
    assert (status, answer["error"]["param"]) == (400, "decoder")
    assert "needs a reward" in answer["error"]["message"]


def test_a_search_and_a_stream_take_turns():
    with serving(Troubled(0.02), reward=likes_a) as server, connect(server) as client:
        chunks = iter(
            client.completions.create(model="tiny", prompt="a", max_tokens=100, stream=True, seed=3)
        )
        first = next(chunks)
        begun = time.monotonic()
        found = client.completions.create(
            model="tiny", prompt="abc", max_tokens=9, extra_body={"decoder": "beam", "width": 2}
        )
        assert time.monotonic() - begun < 1.5  # 10 forwards among the 100 of the stream, which take 2 s
        assert choices(found) == written("beam", width=2)
        assert health(server)["running"] == 1
        assert streamed([first, *chunks]) == alone("a", 100, seed=3)


def test_a_search_whose_client_goes_away_ends():
    with serving(Troubled(0.05)) as server:
        body = {"model": "tiny", "prompt": "a", "max_tokens": 120, "decoder": "beam", "width": 2}
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        connection.request("POST", "/v1/completions", json.dumps(body))
        wait_until(lambda: health(server)["searches"] == 1)
        gone = time.monotonic()
        connection.close()
        wait_until(lambda: health(server)["searches"] == 0)
        assert time.monotonic() - gone < 3  # 120 forwards would have taken 6 seconds


def test_more_searches_than_may_wait_are_answered_with_429():
    with serving(Troubled(0.05), queue=2) as server, connect(server) as client:
        body = {
            "model": "tiny",
            "prompt": "a",
            "max_tokens": 40,
            "extra_body": {"decoder": "beam", "width": 2},
        }
        with ThreadPoolExecutor(2) as pool:
            both = [pool.submit(client.completions.create, **body) for _ in range(2)]
            wait_until(lambda: health(server)["searches"] == 2)
            with pytest.raises(openai.RateLimitError, match="2 texts are being searched for"):
                client.completions.create(**body)
            assert [choices(one.result()) for one in both] == [written("beam", "a", 40, width=2)] * 2


def test_what_fails_in_a_search_fails_alone():
    def divided(text):
        return 1 / (len(text) - len(text))

    def leaves(text):
        raise SystemExit("enough")

    with serving(reward=leaves) as server, connect(server) as client:
        with pytest.raises(openai.InternalServerError, match="SystemExit"):
            client.completions.create(model="tiny", prompt="a", extra_body={"decoder": "best_of", "tries": 2})
        assert health(server)["searches"] == 0
    model = Troubled()
    with serving(model, reward=divided) as server, connect(server) as client:
        with pytest.raises(openai.InternalServerError, match="division by zero"):
            client.completions.create(model="tiny", prompt="a", extra_body={"decoder": "best_of", "tries": 2})
        model.fails = True
        for stream in (False, True):
            with pytest.raises(openai.APIError, match="no memory is left"):
                list(client.completions.create(
                    model="tiny", prompt="a", stream=stream, extra_body={"decoder": "beam"}
                ))  # fmt: skip
        model.fails = False
        found = client.completions.create(
            model="tiny", prompt="abc", max_tokens=9, extra_body={"decoder": "beam"}
        )
        assert choices(found) == written("beam")


def test_a_search_that_takes_longer_than_the_grace_is_answered_with_an_error():
    with (
        serving(Troubled(0.05), grace=0.3) as server,
        connect(server) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        slow = pool.submit(
            client.completions.create,
            model="tiny",
            prompt="a",
            max_tokens=120,
            extra_body={"decoder": "beam"},
        )
        wait_until(lambda: health(server)["searches"] == 1)
        stopped = time.monotonic()
        server.stop()
        with pytest.raises(openai.APIError, match="the server is shutting down"):
            slow.result()
        assert time.monotonic() - stopped < 4


def test_a_tree_search_that_needs_no_model_ends_when_its_client_goes_away():
    model = Troubled()
    with serving(model, reward=likes_a) as server:
        body = {"model": "tiny", "prompt": "a", "max_tokens": 120, "decoder": "mcts", "top_k": 1}
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        connection.request("POST", "/v1/completions", json.dumps(body | {"simulations": 1024}))
        wait_until(lambda: health(server)["searches"] == 1)
        wait_until(lambda: model.rests(0.3))  # all there is to read has been read
        assert health(server)["searches"] == 1
        connection.close()
        gone = time.monotonic()
        wait_until(lambda: health(server)["searches"] == 0)
        assert time.monotonic() - gone < 5  # 120 tokens of it took 14 seconds on two quiet cores


def test_a_server_that_is_forced_to_end_ends_its_searches():
    model = Troubled(0.05)
    with serving(model) as server:
        body = {"model": "tiny", "prompt": "a", "max_tokens": 120, "decoder": "beam", "width": 2}
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        connection.request("POST", "/v1/completions", json.dumps(body))
        wait_until(lambda: health(server)["searches"] == 1)
        server._server.force_exit = True  # as a second Ctrl-C does
    connection.close()
    wait_until(lambda: model.rests(0.3), seconds=2)


def test_models_are_listed_and_found_by_name(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    for lost in (
        lambda: client.models.retrieve("huge"),
        lambda: client.completions.create(model="huge", prompt="a"),
    ):
        with pytest.raises(openai.NotFoundError, match="there is no model 'huge' here, only 'tiny'") as error:
            lost()
        assert error.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"prompt": None}, "prompt", "it must be a string, a list of strings"),
        ({"prompt": []}, "prompt", "it must be a string"),
        ({"prompt": [1, "a"]}, "prompt", "it must be a string"),
        ({"prompt": ""}, "prompt", "prompt 0 is empty"),
        ({"prompt": [[1], []]}, "prompt", "is empty"),
        ({"prompt": [99]}, "prompt", "holds token 99 at position 0; the ids of this model are 0 to 11"),
        ({"prompt": "Zeus"}, "prompt", "text has 'Z' .* at position 0"),
        (
            {"prompt": "a" * 120},
            "prompt",
            "120 tokens; with max_tokens=9 that is 129, over the context of 128",
        ),
        ({"max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
        ({"max_tokens": "9"}, "max_tokens", "valid integer"),
        ({"max_tokens": 200}, "prompt", "over the context of 128"),
        ({"temperature": -1}, "temperature", "temperature is -1.0; it must be 0"),
        ({"temperature": "hot"}, "temperature", "valid number"),
        ({"top_p": 1.5}, "top_p", "top_p is 1.5; it must be a number from 0 to 1"),
        ({"top_k": 0}, "top_k", "top_k is 0"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 65}, "n", "65 texts are more than the 64 that can wait"),
        ({"seed": -1}, "seed", "seed is -1"),
        ({"stop": [""]}, "stop", "empty"),
        ({"stop": [1]}, "stop", "valid string"),
        ({"logprobs": 13}, "logprobs", "must be from 0 to 12"),
        ({"logprobs": 1, "echo": True}, "logprobs", "not with echo"),
        ({"logit_bias": {"1": 5}}, "logit_bias", "logit_bias is not an argument of this server"),
        ({"best_of": 3}, "best_of", "not with this value"),
        ({"colour": "red"}, "colour", "is not an argument"),
        ({"model": None}, "model", "Field required"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_cannot_be_is_answered_with_what_is_wrong(server, change, param, message, stream):
    body = {"model": "tiny", "prompt": "a", "max_tokens": 9, "stream": stream} | change
    status, answer = ask(server, "POST", "/v1/completions", json.dumps(body))
    assert (status, answer["error"]["type"], answer["error"]["param"]) == (
        400,
        "invalid_request_error",
        param,
    )
    assert re.search(message, answer["error"]["message"]), answer
    assert health(server)["running"] == health(server)["waiting"] == 0


@pytest.mark.parametrize(
    "body", ["", "{", "[]", "null", '{"model": "tiny"', "\x00", '{"model": "\\ud800"}', "NaN"]
)
def test_a_body_that_is_no_json_object_is_answered_with_400(server, body):
    status, answer = ask(server, "POST", "/v1/completions", body)
    assert status == 400
    assert answer["error"]["message"]


def test_arguments_that_change_nothing_are_taken(client):
    options = {
        "best_of": 1,
        "suffix": None,
        "presence_penalty": 0,
        "logit_bias": {},
        "user": "me",
        "logprobs": None,
    }
    answer = client.completions.create(model="tiny", prompt="a", max_tokens=5, seed=0, **options)
    assert choices(answer) == alone("a", 5, seed=0)


def test_what_is_not_there_is_answered_in_the_same_shape(server):
    for method, path, status in [
        ("GET", "/v2", 404),
        ("GET", "/v1/completions", 405),
        ("POST", "/v1/models", 405),
    ]:
        found, answer = ask(server, method, path)
        assert found == status
        assert answer["error"]["message"].startswith(f"{method} {path}")


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_long_is_refused_and_the_next_request_is_answered(chunked):
    with serving(max_body=1000) as server, connect(server) as client:
        body = json.dumps({"model": "tiny", "prompt": "a" * 5000}).encode()
        status, answer = ask(
            server, "POST", "/v1/completions", iter([body[:3000], body[3000:]]) if chunked else body
        )
        assert status == 413
        assert "over the 1,000 bytes" in answer["error"]["message"]
        with pytest.raises(openai.APIStatusError) as error:
            client.completions.create(model="tiny", prompt="a" * 5000)
        assert error.value.status_code == 413
        assert choices(client.completions.create(model="tiny", prompt="a", max_tokens=5, seed=0)) == alone(
            "a", 5, seed=0
        )


def test_a_full_queue_is_answered_with_429_and_has_room_again():
    with serving(Troubled(0.02), rows=1, queue=2) as server, connect(server) as client:
        first = client.completions.create(
            model="tiny", prompt="a", max_tokens=100, stream=True, temperature=0
        )
        next(iter(first))
        second = client.completions.create(model="tiny", prompt="a", max_tokens=3, n=2, stream=True)
        with pytest.raises(openai.RateLimitError, match="do not fit into the queue"):
            client.completions.create(model="tiny", prompt="a")
        first.close()
        assert len(streamed(second)) == 2
        assert choices(client.completions.create(model="tiny", prompt="a", max_tokens=5, seed=0)) == alone(
            "a", 5, seed=0
        )


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_rows_and_its_place_in_the_queue(stream):
    with serving(Troubled(0.05), rows=1) as server, connect(server) as client:
        body = {"model": "tiny", "prompt": "a", "max_tokens": 120, "n": 3, "temperature": 0, "stream": stream}
        if stream:
            chunks = client.completions.create(**body)
            next(iter(chunks))
        else:
            connection = http.client.HTTPConnection("127.0.0.1", server.port)
            connection.request("POST", "/v1/completions", json.dumps(body))
        wait_until(lambda: health(server)["running"] == 1)
        assert health(server)["waiting"] == 2
        gone = time.monotonic()
        chunks.close() if stream else connection.close()
        wait_until(lambda: health(server)["running"] == health(server)["waiting"] == 0)
        assert time.monotonic() - gone < 5  # 360 steps would have taken 18 seconds
        assert choices(client.completions.create(model="tiny", prompt="a", max_tokens=5, seed=0)) == alone(
            "a", 5, seed=0
        )


def test_logits_that_are_nan_are_an_error_of_their_own_request():
    model = random_transformer()
    with torch.no_grad():
        model.embedding.weight[5] = torch.nan
    with serving(model) as server, connect(server) as client:
        with pytest.raises(openai.InternalServerError, match="new tokens are NaN"):
            client.completions.create(model="tiny", prompt=[[1], [5]], logprobs=0)
        with pytest.raises(openai.APIError, match="new tokens are NaN"):
            list(client.completions.create(model="tiny", prompt=[[5]], stream=True))
        assert health(server)["status"] == "ok"


def test_a_forward_that_fails_is_an_error_of_those_on_their_way_only():
    model = Troubled()
    with serving(model) as server, connect(server) as client:
        model.fails = True
        with pytest.raises(openai.InternalServerError, match="no memory is left"):
            client.completions.create(model="tiny", prompt="a")
        model.fails = False
        assert choices(client.completions.create(model="tiny", prompt="a", max_tokens=5, seed=0)) == alone(
            "a", 5, seed=0
        )


def test_ids_that_the_tokenizer_does_not_know_have_a_name_and_cannot_be_echoed():
    tokenizer = CharTokenizer("abcdef", specials=["<|endoftext|>"])
    with serving(tokenizer=tokenizer) as server:
        body = {"model": "tiny", "prompt": "a", "max_tokens": 1, "logprobs": 12, "seed": 0}
        status, answer = ask(server, "POST", "/v1/completions", json.dumps(body))
        assert status == 200
        [top] = answer["choices"][0]["logprobs"]["top_logprobs"]
        assert {"a", "<7>", "<11>"} < set(top)
        body = {"model": "tiny", "prompt": [1, 11], "max_tokens": 1, "echo": True}
        status, answer = ask(server, "POST", "/v1/completions", json.dumps(body))
        assert (status, answer["error"]["param"]) == (400, "echo")
        assert "the token 11 of the prompt is no text" in answer["error"]["message"]


def test_a_server_that_is_stopped_finishes_what_is_on_its_way():
    with serving(Troubled(0.02)) as server, connect(server) as client:
        chunks = client.completions.create(model="tiny", prompt="a", max_tokens=60, stream=True, seed=3)
        first = next(iter(chunks))
        server.stop()
        assert streamed([first, *chunks]) == alone("a", 60, seed=3)
        with pytest.raises(openai.APIConnectionError):
            client.completions.create(model="tiny", prompt="a")


def test_what_takes_longer_than_the_grace_is_answered_with_an_error():
    with serving(Troubled(0.05), grace=0.3) as server, connect(server) as client:
        chunks = client.completions.create(
            model="tiny", prompt="a", max_tokens=120, stream=True, temperature=0
        )
        next(iter(chunks))
        stopped = time.monotonic()
        server.stop()
        with pytest.raises(openai.APIError, match="the server is shutting down"):
            list(chunks)
        assert time.monotonic() - stopped < 4


def test_a_server_listens_on_this_machine_alone_and_says_so_otherwise(server):
    assert server.local
    assert server.url == f"http://127.0.0.1:{server.port}"
    everywhere = Server(Engine(MODEL, tokenizer=TOKENIZER), "tiny", host="0.0.0.0", port=0)
    assert not everywhere.local
    everywhere._socket.close()


def test_what_cannot_be_served_is_said_at_the_start(server):
    with pytest.raises(OSError, match="in use"):
        Server(Engine(MODEL, tokenizer=TOKENIZER), "tiny", port=server.port)
    with pytest.raises(ValueError, match="needs an engine with a tokenizer"):
        Server(Engine(MODEL), "tiny", port=0)
    with pytest.raises(ValueError, match="port is 99999; it must be from 0 to 65535"):
        Server(Engine(MODEL, tokenizer=TOKENIZER), "tiny", port=99999)
    with pytest.raises(ValueError, match="grace -1"):
        Server(Engine(MODEL, tokenizer=TOKENIZER), "tiny", port=0, grace=-1)


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_the_command_serves_a_model_until_ctrl_c():
    command = [sys.executable, "-m", "lmtutorial.cli", "serve", "--checkpoint", "shakespeare-draft"]
    command += ["--port", "0", "--rows", "2", "--max-len", "100", "--device", "cpu"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    line = child.stdout.readline()
    assert line.startswith("shakespeare-draft at http://127.0.0.1:"), child.communicate()
    with openai.OpenAI(
        base_url=line.split(" at ")[1].split(",")[0], api_key="none", max_retries=20
    ) as client:
        answer = client.completions.create(model="shakespeare-draft", prompt="KING.", max_tokens=20, seed=0)
    assert len(answer.choices[0].text) >= 10
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=60)
    assert (child.returncode, errors) == (0, "")
