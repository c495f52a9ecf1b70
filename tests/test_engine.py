"""Whatever comes, goes, fails or waits beside it, every text is the one that `sample` writes alone."""

import collections
from itertools import islice

import pytest
import torch
from cache_laws import check_copying_to
from history_model import HistoryModel
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtutorial.decode.logits import Filters
from lmtutorial.decode.noise import text_generator
from lmtutorial.decode.rows import RowSampler
from lmtutorial.decode.sampling import sample
from lmtutorial.engine import Engine
from lmtutorial.models.lstm import LSTM, LSTMConfig
from lmtutorial.models.mixture import Mixture
from lmtutorial.models.ngram import NGram
from lmtutorial.models.transformer import Transformer, TransformerConfig
from lmtutorial.prefix_cache import PrefixCache
from lmtutorial.request import Busy, Request
from lmtutorial.tokenizers import CharTokenizer

VOCAB, MAX_LEN = 12, 24
TOKENIZER = CharTokenizer("abcdefghijkl")
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def random_lstm(device="cpu"):
    torch.manual_seed(0)
    model = LSTM(LSTMConfig(VOCAB, width=8, layers=2, dropout=0.5)).to(device, torch.float64)
    with torch.no_grad():
        model.head.weight.mul_(8)  # an untrained model is almost uniform: nothing that it reads would matter
    return model.eval()


def random_transformer(device="cpu", **config):
    torch.manual_seed(0)
    shape = TransformerConfig(VOCAB, context=MAX_LEN, width=16, layers=2, heads=4, dropout=0.5, **config)
    model = Transformer(shape).to(device, torch.float64).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return model


def random_ngram():
    text = torch.randint(VOCAB, (400,), generator=torch.Generator().manual_seed(0))
    return NGram.train(text, order=3, vocab_size=VOCAB)


MODELS = {
    "history": HistoryModel(VOCAB),
    "history with ties": HistoryModel(VOCAB, ties=True),
    "n-gram": random_ngram(),
    "mixture": Mixture(random_lstm(), random_ngram(), torch.tensor([0.2, 0.5, 0.8])),
    **{f"transformer on {d}": random_transformer(d, kv_heads=2, qk_norm=True) for d in DEVICES},
    **{f"gpt2 on {d}": random_transformer(d, position="learned", norm="layer", mlp="gelu") for d in DEVICES},
    **{f"lstm on {d}": random_lstm(d) for d in DEVICES},
}
models = st.sampled_from(list(MODELS.values()))
every_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)

filters = st.builds(
    Filters,
    temperature=st.sampled_from([0, 0.3, 1, 1.7, 2]),
    top_k=st.none() | st.integers(1, VOCAB),
    top_p=st.none() | st.floats(0, 1),
    min_p=st.none() | st.floats(0, 0.5),
    typical_p=st.none() | st.floats(0, 1),
    repetition_penalty=st.sampled_from([1.0, 1.0, 0.7, 3.0]),
)
prompts = st.builds(  # many begin alike
    lambda stem, length, end: (stem * 3)[:length] + end,
    st.sampled_from([[1, 2, 3], [1, 2, 4], [7]]),
    st.integers(0, 9),
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=4),
)
requests = st.builds(
    Request,
    prompt=prompts,
    max_new_tokens=st.integers(0, 10),
    filters=st.sampled_from([Filters(0), Filters(1, top_k=5)]) | filters,
    eos=st.none() | st.integers(0, VOCAB - 1) | st.frozensets(st.integers(0, VOCAB - 1), max_size=3),
    seed=st.integers(0, 10**20),
    copy=st.integers(0, 2),
)
engines = st.fixed_dictionaries(
    {"rows": st.integers(1, 4), "keep": st.sampled_from([0, 7, 100]), "block": st.integers(1, 4)}
)
law = settings(max_examples=80)


def alone(model, request):
    """The text that `sample` writes for a request."""
    options = vars(request.filters) | {"eos": request.eos, "seed": request.seed}
    copies = [request.prompt] * (request.copy + 1)
    return sample(model, copies, request.max_new_tokens, **options)[request.copy]


def check(generation, expected):
    assert (generation.tokens, generation.finished) == (expected.tokens, expected.finished)
    assert generation.logprob == pytest.approx(expected.logprob, abs=1e-4)


@st.composite
def schedules(draw):
    """Requests, each with the step before which it comes and, maybe, that before which it is cancelled."""
    visits = draw(
        st.lists(
            st.tuples(requests, st.integers(0, 12), st.none() | st.integers(0, 20)), min_size=1, max_size=9
        )
    )
    return sorted(visits, key=lambda visit: visit[1])


@law
@given(models, schedules(), engines, st.integers(1, 3))
def test_every_text_is_the_one_written_alone_whatever_the_schedule(model, schedule, options, queue):
    engine = Engine(model, max_len=MAX_LEN, queue=queue, **options)
    events, handles, coming, now = collections.defaultdict(list), {}, list(enumerate(schedule)), 0
    while coming or engine.busy:
        while coming and coming[0][1][1] <= now:
            try:
                handles[coming[0][0]] = engine.submit(coming[0][1][0])
            except Busy:
                assert engine.room == 0
                break
            coming.pop(0)
        for number, handle in handles.items():
            if schedule[number][2] is not None and schedule[number][2] <= now:
                handle.cancel()
        for event in engine.step():
            events[event.handle].append(event)
        now += 1
    for number, (request, _, _) in enumerate(schedule):
        handle, expected = handles[number], alone(model, request)
        happened = events[handle]
        assert [event.token for event in happened if event.token is not None] == handle.tokens
        assert [event.finish for event in happened] == [None] * (len(happened) - 1) + [handle.finish]
        if handle.finish == "cancelled":
            assert handle.tokens == expected.tokens[: len(handle.tokens)]
            with pytest.raises(RuntimeError, match="was cancelled"):
                handle.result()
        else:
            check(handle.result(), expected)


@law
@given(
    st.lists(st.none() | filters, min_size=1, max_size=6), st.integers(0, 9999), st.booleans(), st.booleans()
)
def test_rows_with_filters_of_their_own_draw_what_each_draws_alone(wanted, seed, ties, double):
    draw = torch.Generator().manual_seed(seed)
    kind = torch.float64 if double else torch.float32
    sampler = RowSampler(len(wanted), VOCAB, MAX_LEN, torch.device("cpu"))
    prompts = [torch.randint(VOCAB, (4,), generator=draw).tolist() for _ in wanted]
    lengths = torch.full((len(wanted),), 4)
    for row, own in enumerate(wanted):
        sampler.take(row, prompts[row], 9, own or Filters(), seed)
    for row, own in enumerate(wanted):
        if own is None:
            sampler.free(row)
    for _ in range(3):
        logits = torch.randn(len(wanted), VOCAB, generator=draw).to(kind) * 3
        logits = logits.round() if ties else logits
        before = logits.clone()
        tokens = sampler.choose(logits, lengths)
        assert torch.equal(logits, before)
        for row, own in enumerate(wanted):
            if own is not None:
                noise = torch.from_numpy(text_generator(prompts[row][:4], seed).random(9))
                seen = torch.zeros(VOCAB, dtype=torch.bool)
                seen[prompts[row]] = True
                place = int(lengths[row]) - 4
                assert tokens[row] == own.choose(logits[row : row + 1], noise[place : place + 1], seen[None])
            prompts[row].append(int(tokens[row]))
        lengths = lengths + 1


@law
@given(models, st.lists(requests, max_size=9), engines)
def test_generate_writes_any_number_of_texts_in_their_order(model, wanted, options):
    engine = Engine(model, max_len=MAX_LEN, queue=2, **options)
    for _ in range(2):  # the second time most of the prompts are known
        for generation, request in zip(engine.generate(wanted), wanted, strict=True):
            check(generation, alone(model, request))


@law
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 4), st.booleans())
def test_a_row_is_refilled_at_once_and_every_step_is_one_forward_of_one_shape(sizes, rows, known):
    model = HistoryModel(VOCAB)
    engine = Engine(model, rows, max_len=MAX_LEN)
    wanted = [Request([1], steps, Filters(0)) for steps in sizes]
    if known:  # all at once: the longest first
        engine.generate(wanted)
        sizes = sorted(sizes, reverse=True)
    else:  # as they come
        for request in wanted:
            engine.submit(request)
        engine.run()
    free_at = [0] * rows
    for steps in sizes:  # who comes next sits where it is free soonest
        free_at[free_at.index(min(free_at))] += steps
    assert model.forwards == [(rows, 1)] * engine.steps
    assert engine.steps == max(free_at)


@every_model
@given(prompts, st.integers(1, 5), st.integers(1, 4))
@settings(max_examples=20)
def test_what_prompts_share_is_read_once(model, prompt, copies, block):
    def read(keep, wanted):
        engine = Engine(model, rows=2, max_len=MAX_LEN, keep=keep, block=block)
        texts = [generation.tokens for generation in engine.generate(wanted)]
        return engine.tokens_read, texts

    wanted = [Request(prompt, 3, seed=0, copy=i) for i in range(copies)]
    wanted += [Request([*prompt, 5], 3, seed=0)]
    apart, texts = read(0, wanted)
    shared, same = read(100, wanted)
    assert same == texts
    known = len(prompt) - 1
    assert apart == copies * known + known + 1
    assert shared <= known + copies * (known % block) + 1 + (block - 1)


def test_a_text_that_goes_on_reads_only_what_is_new():
    engine = Engine(MODELS["transformer on cpu"], max_len=MAX_LEN, block=2)
    [first] = engine.generate([Request([1, 2, 3], 8, Filters(0))])
    read = engine.tokens_read
    [second] = engine.generate([Request([1, 2, 3, *first.tokens, 9], 3, Filters(0))])
    assert (
        engine.tokens_read - read <= 1
    )  # ten tokens are known in five blocks, and the last is read in the step
    check(second, alone(engine.model, Request([1, 2, 3, *first.tokens, 9], 3, Filters(0))))


@law
@given(
    models,
    st.lists(
        st.tuples(requests, st.lists(st.text("abcdefghijkl", min_size=1, max_size=3), max_size=3)),
        min_size=1,
        max_size=6,
    ),
    engines,
)
def test_a_stop_string_ends_a_text_before_it(model, wanted, options):
    engine = Engine(model, max_len=MAX_LEN, tokenizer=TOKENIZER, **options)
    handles = {}
    for request, stop in wanted:
        handle = engine.submit(Request(**{**vars(request), "stop": stop}))
        handles[handle] = [request, stop, ""]
    while engine.busy:
        for event in engine.step():
            handles[event.handle][2] += event.text
    for handle, (request, stop, text) in handles.items():
        expected = alone(model, request)
        ended = expected.finished
        whole = TOKENIZER.decode(expected.tokens[:-1] if ended else expected.tokens)
        places = [(whole.find(s) + len(s), whole.find(s)) for s in stop if s in whole]
        place = min(places)[1] if places else None  # of the one that is complete first
        assert handle.text == text == whole[:place]
        assert handle.finish == ("stop" if ended or place is not None else "length")
        assert handle.tokens == expected.tokens[: len(handle.tokens)]


@every_model
def test_the_likeliest_tokens_are_reported_to_those_who_ask(model):
    engine = Engine(model, rows=3, max_len=MAX_LEN)
    wanted = [Request([1, 2], 4, seed=0, top_logprobs=n) for n in (0, 3, VOCAB)]
    handles = [engine.submit(request) for request in wanted]
    events = collections.defaultdict(list)
    while engine.busy:
        for event in engine.step():
            events[event.handle].append(event)
    for handle, request in zip(handles, wanted, strict=True):
        text = torch.tensor([[1, 2, *handle.tokens]], device=model.device)
        with torch.no_grad():
            logprobs = model(text)[0, 1:-1].double().log_softmax(-1).cpu()
        for event, row in zip(events[handle], logprobs, strict=True):
            assert len(event.top) == request.top_logprobs
            assert event.logprob == pytest.approx(float(row[event.token]), abs=1e-5)
            best = row.sort(descending=True).values.tolist()
            assert [logprob for _, logprob in event.top] == pytest.approx(best[: len(event.top)], abs=1e-5)
            assert all(logprob == pytest.approx(float(row[token]), abs=1e-5) for token, logprob in event.top)


def broken_transformer():
    """A model that makes NaN of token 5, for a text that holds it and for no other."""
    model = random_transformer(tied=False)
    with torch.no_grad():
        model.embedding.weight[5] = torch.nan
        model.head.weight[5] = -10.0
        model.head.weight[5, 0] = 0.0
    return model


@given(st.lists(st.tuples(prompts, st.integers(1, 6)), min_size=2, max_size=6), engines)
@settings(max_examples=50)
def test_a_text_whose_logits_are_nan_fails_alone_and_leaves_its_row_clean(wanted, options):
    model = broken_transformer()
    engine = Engine(model, max_len=MAX_LEN, **options)
    handles = [engine.submit(Request(p, n, Filters(1.0, top_k=3), seed=1)) for p, n in wanted]
    engine.run()
    for handle in handles:
        try:
            expected = alone(model, handle.request)
        except ValueError:
            with pytest.raises(ValueError, match="new tokens are NaN"):
                handle.result()
        else:
            check(handle.result(), expected)


class Failing(HistoryModel):
    """Runs out of memory on token 5 in a prompt; cannot take a step at all while `tired`."""

    tired = False

    def __call__(self, tokens, cache=None):
        if self.tired or (tokens.shape[1] > 1 and (tokens == 5).any()):
            raise MemoryError("no memory is left")
        return super().__call__(tokens, cache)


def test_a_prompt_that_cannot_be_read_fails_alone():
    engine = Engine(Failing(), rows=2, max_len=MAX_LEN)
    handles = [engine.submit(Request(p, 4, seed=0)) for p in ([1], [2, 5, 1], [1, 2, 3], [5, 1, 2])]
    engine.run()
    assert [handle.finish for handle in handles] == ["length", "error", "length", "error"]
    with pytest.raises(MemoryError):
        handles[1].result()
    for handle in (handles[0], handles[2]):
        check(handle.result(), alone(HistoryModel(), handle.request))


def test_after_a_step_that_failed_all_can_be_ended_and_the_engine_goes_on():
    model = Failing()
    engine = Engine(model, rows=2, max_len=MAX_LEN)
    handles = [engine.submit(Request([1], 4, seed=0)) for _ in range(3)]
    engine.step()
    model.tired = True
    with pytest.raises(MemoryError) as failure:
        engine.step()
    events = engine.abort(failure.value)
    assert {event.handle for event in events} == set(handles)
    assert all(handle.finish == "error" for handle in handles)
    assert not engine.busy
    model.tired = False
    check(engine.generate([Request([1, 2], 4, seed=0)])[0], alone(HistoryModel(), Request([1, 2], 4, seed=0)))


def test_no_event_is_lost_where_a_step_fails():
    model = Failing()
    engine = Engine(model, rows=3, max_len=MAX_LEN)
    running = engine.submit(Request([1], 4, seed=0))
    engine.step()
    unread, empty = engine.submit(Request([2, 5, 1], 4)), engine.submit(Request([1], 0))
    model.tired = True
    with pytest.raises(MemoryError) as failure:
        engine.step()
    events = engine.abort(failure.value)
    assert [(event.handle, event.finish) for event in events] == [
        (empty, "length"), (unread, "error"), (running, "error"),
    ]  # fmt: skip
    assert engine.abort(failure.value) == []


def test_where_there_is_no_memory_for_a_cache_all_is_ended_and_the_engine_goes_on_once_there_is():
    class Full(Failing):
        def new_cache(self, batch, max_len):
            if self.tired:
                raise MemoryError("no memory is left for a cache")
            return super().new_cache(batch, max_len)

    model, wanted = Full(), Request([1, 2], 4, seed=0)
    engine = Engine(model, rows=2, max_len=MAX_LEN)
    handles = [engine.submit(wanted)]
    engine.step()
    model.tired = True
    for _ in range(2):
        with pytest.raises(MemoryError) as failure:
            engine.step()
        assert [event.handle for event in engine.abort(failure.value)] == handles
        handles = [engine.submit(wanted) for _ in range(3)]
    model.tired = False
    engine.run()
    for handle in handles:
        check(handle.result(), alone(HistoryModel(), wanted))


def test_a_top_k_beyond_all_numbers_keeps_all_tokens_and_harms_no_neighbor():
    model = HistoryModel()
    requests = [Request([1], 6, Filters(top_k=k), seed=k % 7) for k in (2**63, 3, 10**30)]
    for text, request in zip(
        Engine(model, rows=3, max_len=MAX_LEN).generate(requests), requests, strict=True
    ):
        check(text, alone(model, request))


def test_streams_side_by_side_yield_all_their_tokens():
    model = HistoryModel()
    engine = Engine(model, rows=2, max_len=MAX_LEN)
    requests = [Request([first], 3 + 2 * first, seed=first) for first in (1, 2, 3)]
    streams, seen = [engine.stream(request) for request in requests], [[], [], []]
    engine.step()  # whoever else steps the engine takes nothing from them
    for _ in range(9):
        for stream, tokens in zip(streams, seen, strict=True):
            tokens += [event.token for event in islice(stream, 1)]
    assert seen == [alone(model, request).tokens for request in requests]
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        engine.stream(Request([], 3))  # at once


def test_a_token_that_the_tokenizer_does_not_know_ends_its_own_text_only():
    model = HistoryModel(VOCAB)
    engine = Engine(model, rows=2, max_len=MAX_LEN, tokenizer=CharTokenizer("abcdefghijk"))
    handles = [engine.submit(Request([1], 6, seed=seed)) for seed in range(8)]
    engine.run()
    for handle in handles:
        expected = alone(model, handle.request).tokens
        assert (handle.finish == "error") == (11 in expected)
        assert handle.tokens == (expected[: expected.index(11)] if 11 in expected else expected)
    assert {handle.finish for handle in handles} == {"error", "length"}


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        (Request([], 4), ValueError, "prompt 0 is empty"),
        (Request([12], 4), ValueError, "holds token 12 at position 0; the ids of this model are 0 to 11"),
        (Request(["a"], 4), TypeError, "token ids are integers"),
        (
            Request([1] * 20, 5),
            ValueError,
            "20 tokens; with max_new_tokens=5 that is 25, over .* max_len of 24",
        ),
        (Request([1], -1), ValueError, "max_new_tokens is -1"),
        (Request([1], 4, eos=12), ValueError, "eos is 12"),
        (Request([1], 4, seed=-1), ValueError, "seed is -1"),
        (Request([1], 4, stop=["a"]), ValueError, r"stop is \['a'\]; an engine without a tokenizer"),
        (Request([1], 4, top_logprobs=13), ValueError, "top_logprobs is 13; it must be from 0 to 12"),
    ],
)
def test_a_request_that_cannot_be_is_refused_at_once(request_, error, message):
    engine = Engine(HistoryModel(VOCAB), max_len=MAX_LEN)
    with pytest.raises(error, match=message):
        engine.submit(request_)
    with pytest.raises(error, match=message):
        engine.generate([Request([1], 4), request_])
    assert not engine.busy
    assert engine.model.forwards == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 0}, "rows is 0; it must be at least 1"),
        ({"queue": 0}, "queue is 0"),
        ({"max_len": None}, "give max_len"),
        ({"max_len": 101}, "max_len is 101; the model's context is 100"),
        ({"keep": -1}, "tokens is -1"),
        ({"block": 0}, "block is 0"),
    ],
)
def test_an_engine_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Engine(
            HistoryModel(context=None if "max_len" in options and not options["max_len"] else 100), **options
        )


def test_a_full_queue_refuses_and_takes_again_when_there_is_room():
    engine = Engine(HistoryModel(), rows=1, max_len=MAX_LEN, queue=2)
    engine.submit(Request([1], 3))
    engine.submit(Request([1], 3))
    with pytest.raises(Busy, match="2 requests are waiting already"):
        engine.submit(Request([1], 3))
    engine.step()
    engine.submit(Request([1], 3)).cancel()
    assert engine.room == 0
    engine.step()
    assert engine.room == 1


def test_a_stream_yields_each_token_while_others_go_on():
    engine = Engine(HistoryModel(), rows=2, max_len=MAX_LEN)
    other = engine.submit(Request([3], 9, seed=2))
    request = Request([1, 2], 5, seed=0)
    stream = engine.stream(request)
    seen = [(event.token, len(other.tokens)) for event in stream]
    assert [token for token, _ in seen] == alone(engine.model, request).tokens
    assert [count for _, count in seen] == [1, 2, 3, 4, 5]
    stream = engine.stream(request)
    next(stream)
    stream.close()  # whoever stops listening gives the row back
    engine.step()
    assert engine.running == 1


def test_a_model_in_training_mode_is_read_without_dropout_and_left_as_it_was():
    model = random_lstm()
    expected = alone(model, Request([1], 9, seed=0))
    model.train()
    check(Engine(model, max_len=MAX_LEN).generate([Request([1], 9, seed=0)])[0], expected)
    assert all(module.training for module in model.modules())


@every_model
@given(st.lists(st.integers(1, 8), min_size=1, max_size=4), st.integers(0, 999))
@settings(max_examples=20)
def test_pieces_fill_the_rows_they_are_meant_for_and_no_other(model, lengths, seed):
    check_copying_to(model, lengths, seed)


@law
@given(st.lists(st.lists(st.integers(0, 2), max_size=9), max_size=20), st.integers(0, 12), st.integers(1, 3))
def test_prefixes_are_found_up_to_the_first_gap_and_never_outgrow_their_room(texts, room, block):
    model, prefixes = random_ngram(), PrefixCache(room, block)
    for text in texts:
        cache = model.new_cache(1, 9)
        if text:
            model(torch.tensor([text]), cache)
        pieces = prefixes.keep(cache, 0, text)
        assert prefixes.tokens <= room
        assert len(pieces) == (len(text) // block if room >= block else 0)
        if len(text) <= room:
            found = prefixes.find(text)
            assert [t for piece in found for t in piece.tolist()] == text[: len(text) // block * block]
    for text in texts:
        found = [t for piece in prefixes.find(text) for t in piece.tolist()]
        assert found == text[: len(found)]
