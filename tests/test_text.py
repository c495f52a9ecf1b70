"""Text that comes piece by piece is the text that comes at once: no torn character, no missed stop."""

import codecs

import pytest
from history_model import HistoryModel
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtutorial.decode.constraints import Matching
from lmtutorial.decode.sampling import sample
from lmtutorial.decode.text import TextStream, stream_text
from lmtutorial.files.download import DownloadError
from lmtutorial.gguf_file import gguf_tokenizer, open_gguf
from lmtutorial.pretrained import fetch_pretrained
from lmtutorial.tokenizers import BPETokenizer, CharTokenizer, PublishedBPE, WordTokenizer

SAMPLE = "Zoë, 日本語, and naïve 🎻🎻 players: “to be, or not to be” — that’s it. \n\n" * 3
LETTERS = {letter: i for i, letter in enumerate("abcÃ©ðŁİ»")}  # bytes of é and of 🎻 among them
TOKENIZERS = {
    "bytes": BPETokenizer([]),
    "bpe": BPETokenizer.train(SAMPLE, 300),
    "published": PublishedBPE.from_vocabulary({**LETTERS, "<|endoftext|>": len(LETTERS)}, []),
    "char": CharTokenizer.train(SAMPLE, unk=True, specials=["<|endoftext|>"]),
    "word": WordTokenizer.train(SAMPLE),
    "spaced": WordTokenizer.train(SAMPLE, style="wikitext"),
}
some_stops = st.lists(st.text("ae \n", min_size=1, max_size=2), max_size=2)
law = settings(max_examples=100)


@pytest.fixture(scope="module", params=[*TOKENIZERS, "smollm2"])
def tokenizer(request):
    if request.param in TOKENIZERS:
        return TOKENIZERS[request.param]
    try:
        return gguf_tokenizer(open_gguf(fetch_pretrained("smollm2-135m")))
    except DownloadError as error:
        pytest.skip(f"SmolLM2-135M is neither in the cache nor to be had: {error}")


def random_tokens(data, tokenizer):
    """Ids of any kind, and of texts, so that whole and torn characters both come."""
    ids = st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30)
    tokens = data.draw(ids)
    if not isinstance(tokenizer, PublishedBPE) or tokenizer.vocab_size > 300:
        start, stop = sorted([data.draw(st.integers(0, len(SAMPLE))) for _ in range(2)])
        tokens = tokens + tokenizer.encode(SAMPLE[start:stop]) + data.draw(ids)
    return tokens


def read(stream, tokens):
    return [stream.push(token) for token in tokens] + [stream.finish()]


def whole_characters(data):
    """The text of some bytes, without a part of a character at its end that may still be completed."""
    return codecs.getincrementaldecoder("utf-8")("replace").decode(data)


@law
@given(data=st.data(), specials=st.booleans())
def test_the_pieces_together_are_the_text(tokenizer, data, specials):
    tokens = random_tokens(data, tokenizer)
    whole = tokenizer.decode(tokens, specials=specials)
    pieces = read(TextStream(tokenizer, specials=specials), tokens)
    assert "".join(pieces) == whole
    for done in range(len(tokens)):  # nothing is held back but a part of a character
        so_far = tokenizer.decode_bytes(tokens[: done + 1], specials=specials)
        assert "".join(pieces[: done + 1]) == whole_characters(so_far)


@law
@given(st.binary(max_size=40))
def test_any_bytes_come_out_as_python_decodes_them(data):
    assert "".join(read(TextStream(TOKENIZERS["bytes"]), data)) == data.decode("utf-8", "replace")


@law
@given(st.text(), st.data())
def test_no_piece_of_a_good_text_holds_a_replacement_character(text, data):
    tokenizer = TOKENIZERS["bpe"]
    stream = TextStream(tokenizer)
    assert [c for piece in read(stream, tokenizer.encode(text)) for c in piece] == list(text)


def first_stop(text, stops):
    """Where the first stop string begins that is complete, reading one character after the other."""
    for end in range(len(text) + 1):
        if met := [stop for stop in stops if text[:end].endswith(stop)]:
            return end - max(map(len, met))
    return None


@law
@given(st.text("ab\n", max_size=30), st.text("ab\n", min_size=1, max_size=4))
def test_a_text_is_cut_where_str_find_finds_its_stop_string(text, stop):
    stream = TextStream(TOKENIZERS["bytes"], stop)
    place = text.find(stop)
    assert "".join(read(stream, text.encode())) == (text if place < 0 else text[:place])
    assert stream.stopped == (place >= 0)


@law
@given(data=st.data())
def test_stop_strings_are_found_across_tokens_and_their_beginnings_are_held_back(tokenizer, data):
    tokens = random_tokens(data, tokenizer)
    whole = tokenizer.decode(tokens)
    stops = data.draw(st.lists(st.text("ab ,\ufffd", min_size=1, max_size=3), max_size=3))
    for _ in range(data.draw(st.integers(0, 2)) if whole else 0):
        start = data.draw(st.integers(0, len(whole) - 1))
        stops.append(whole[start : start + data.draw(st.integers(1, 6))])
    place = first_stop(whole, stops)
    stream, emitted = TextStream(tokenizer, stops), ""
    for done, token in enumerate(tokens):
        emitted += stream.push(token)
        known = whole_characters(tokenizer.decode_bytes(tokens[: done + 1]))
        assert stream.stopped == (first_stop(known, stops) is not None)
        if not stream.stopped:  # what is held back is the longest end that may become a stop string
            beginnings = {stop[:size] for stop in stops for size in range(len(stop))}
            assert known == emitted + max((b for b in beginnings | {""} if known.endswith(b)), key=len)
    emitted += stream.finish()
    assert emitted == whole[:place]
    assert stream.stopped == (place is not None)
    assert stream.push(tokens[0]) == stream.finish() == "" if stream.stopped else True


def test_a_streamed_text_can_be_held_to_a_pattern():
    tokenizer = TOKENIZERS["char"]
    allowed = Matching("(to be )*", tokenizer)
    model = HistoryModel(tokenizer.vocab_size)
    for seed in range(5):
        text = "".join(stream_text(model, tokenizer, "to be", 20, seed=seed, allowed=allowed))
        assert ("to be " * 4).startswith(text)
        assert len(text) == 20 or len(text) % 6 == 0


@law
@given(st.integers(0, 10**6), st.sampled_from(["bytes", "bpe", "char", "word"]), some_stops)
def test_streamed_text_is_the_text_of_the_sampled_tokens(seed, name, stop):
    tokenizer = TOKENIZERS[name]
    model = HistoryModel(tokenizer.vocab_size, seed=seed % 5)
    prompt = tokenizer.encode("to be")
    options = {"seed": seed, "top_k": 30, "eos": tokenizer.eos}
    whole = tokenizer.decode(sample(model, [prompt], 20, **options)[0].tokens)
    model.forwards.clear()
    pieces = list(stream_text(model, tokenizer, "to be", 20, stop=stop, **options))
    assert "".join(pieces) == whole[: first_stop(whole, stop)]
    assert all(pieces)
    assert pieces == list(stream_text(model, tokenizer, prompt, 20, stop=stop, **options))


def test_a_stop_string_ends_the_computation():
    tokenizer = CharTokenizer("ab")
    model = HistoryModel(2)
    model.table[:] = model.table.new_tensor([1.0, 0.0])
    assert list(stream_text(model, tokenizer, "b", 1000, stop=["aaaa"], temperature=0)) == []
    assert len(model.forwards) == 4


def test_of_two_stop_strings_the_one_that_is_complete_first_ends_the_text():
    stream = TextStream(TOKENIZERS["bytes"], ["abcd", "bc"])
    assert "".join(read(stream, b"xabcd")) == "xa"
    whole = TextStream(CharTokenizer("abcdx"), ["abc", "bc"])
    assert "".join(read(whole, [4, 0, 1, 2, 3])) == "x"


@pytest.mark.parametrize(
    ("stop", "error", "message"),
    [
        ("", ValueError, "stop holds an empty string"),
        (["a", ""], ValueError, "stop holds an empty string"),
        (["a", 3], TypeError, "stop holds 3; it must be a string or a list of strings"),
    ],
)
def test_stop_strings_that_cannot_be_are_refused_before_the_model_runs(stop, error, message):
    model = HistoryModel(256)
    with pytest.raises(error, match=message):
        stream_text(model, TOKENIZERS["bytes"], "a", 5, stop=stop)
    assert model.forwards == []


def test_unknown_ids_are_refused():
    with pytest.raises(ValueError, match="token id 257 at position 0 is not among the ids, 0 to 256"):
        TextStream(TOKENIZERS["bytes"]).push(257)
