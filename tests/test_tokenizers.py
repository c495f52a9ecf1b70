import gzip
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_bpe import few_signs, known, random_merges

from lmtutorial import bpe_library
from lmtutorial.bpe import BPE
from lmtutorial.tokenizers import BPETokenizer, CharTokenizer, Tokenizer, WordTokenizer, load_tokenizer

TEXT = (
    "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak -- what's 2½ é中?\n"
)
SPACED = " = Valkyria Chronicles III = \n \n The role @-@ playing <unk> was 3 , 000 yen . \n"
MAKERS = {
    "char": lambda: CharTokenizer.train(TEXT, unk=True, specials=["<|endoftext|>"]),
    "word": lambda: WordTokenizer.train(TEXT, 30),
    "wikitext": lambda: WordTokenizer.train(SPACED, 12, style="wikitext"),
    "bpe": lambda: BPETokenizer.train(TEXT * 2, 280, specials=["<|endoftext|>", "<|user|>"]),
}
TRAINERS = {
    "char": CharTokenizer.train,
    "word": lambda text: WordTokenizer.train(text, None),
    "bpe": lambda text: BPETokenizer.train(text, 300),
}
texts = few_signs | st.text()
every_tokenizer = pytest.mark.parametrize("name", MAKERS)
every_trainer = pytest.mark.parametrize("train", TRAINERS.values(), ids=TRAINERS)
needs_wikitext = pytest.mark.skipif(
    not Path(os.environ.get("LMTUTORIAL_DATA", ""), "wikitext-2/train.txt.gz").is_file(),
    reason="LMTUTORIAL_DATA names no folder with wikitext-2/train.txt.gz",
)


@cache
def made(name) -> Tokenizer:
    return MAKERS[name]()


def bytes_of(tokenizer, ids):
    return int(tokenizer.token_bytes[ids].sum())


@every_trainer
@given(text=texts.filter(bool))
def test_known_text_comes_back_and_its_bytes_add_up(train, text):
    tokenizer = train(text)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert (
        "".join(tokenizer.tokens(text)) == text or tokenizer.kind == "bpe"
    )  # a token may be half a character
    assert bytes_of(tokenizer, ids) == len(text.encode())


@given(text=texts, corpus=texts.filter(bool))
def test_bpe_brings_back_text_that_it_was_not_trained_on(text, corpus):
    tokenizer = BPETokenizer.train(corpus, 300)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert bytes_of(tokenizer, ids) == len(text.encode())


@given(st.lists(st.lists(st.sampled_from(["the", "@-@", "<unk>", "<eos>", "3.5", "戦場"]))))
def test_tokenized_lines_come_back_and_their_bytes_add_up(lines):
    text = "".join("".join(f" {word}" for word in line) + " \n" for line in lines)
    tokenizer = WordTokenizer.train(text or " \n", None, style="wikitext")
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(ids) == sum(len(line) + 1 for line in lines)
    assert ids.count(tokenizer.eos) == len(lines)
    assert ids.count(tokenizer.unk) == text.count("<unk>")
    assert bytes_of(tokenizer, ids) == len(text.encode()) - len(" <unk>") * text.count("<unk>")


@given(texts)
def test_other_spacing_is_normalized_to_tokenized_lines(text):
    tokenizer = WordTokenizer.train(text + "\n", None, style="wikitext")
    parts = [f" {word}" for line in text.split("\n") for word in [*line.split(), "\n"]]
    assert tokenizer.decode(tokenizer.encode(text)) == "".join(parts[:-1])


def test_tokenized_text_always_has_the_line_end_and_unk_once():
    tokenizer = WordTokenizer.train("a a b <unk> <unk> <unk>", 3, style="wikitext")
    assert (tokenizer.words, tokenizer.eos, tokenizer.specials) == (["\n", "a"], 0, {"<unk>": 2})
    assert tokenizer.encode(" a b <unk> \n") == [1, 2, 2, 0]


@needs_wikitext
def test_wikitext_has_the_tokens_that_the_literature_counts():
    path = Path(os.environ["LMTUTORIAL_DATA"], "wikitext-2/train.txt.gz")
    text = gzip.decompress(path.read_bytes()).decode()
    tokenizer = WordTokenizer.train(text, None, style="wikitext")
    ids = tokenizer.encode_array(text)
    assert (len(ids), tokenizer.vocab_size) == (2_088_628, 33_278)


@given(random_merges(), few_signs | known)
def test_bpe_encodes_and_decodes_as_the_library_and_the_tokenizer_from_scratch(merges, text):
    tokenizer = BPETokenizer.from_merges(merges)
    ids = BPE(merges).encode(text)
    assert tokenizer.encode(text) == ids
    assert tokenizer.to_library().encode(text).ids == ids
    assert tokenizer.to_library().decode(ids) == text


@given(corpus=few_signs.filter(bool), text=few_signs)
def test_trained_bpe_encodes_as_the_library(corpus, text):
    tokenizer = BPETokenizer.train(corpus, 300)
    assert tokenizer.to_library().encode(text).ids == tokenizer.encode(text)


def test_training_on_the_chunks_of_a_long_text_is_training_on_the_text(monkeypatch):
    text = "".join(f"{i}: some word{i % 97}s,  and\n\n\tno  more -- {i * i}\n" for i in range(6_000))
    assert len(text) > 5 * (1 << 15)
    merges = BPETokenizer.train(text, 400).merges
    assert BPETokenizer.train(text, 400).merges == merges
    monkeypatch.setattr(bpe_library, "chunks", lambda text: [text])
    assert BPETokenizer.train(text, 400).merges == merges


@every_tokenizer
@given(text=texts)
def test_arrays_hold_the_same_ids_as_lists(name, text):
    ids = made(name).encode(text)
    array = made(name).encode_array(text)
    assert array.tolist() == ids
    assert array.dtype == np.uint16
    assert all(type(i) is int for i in ids)
    assert made(name).decode(array) == made(name).decode(ids)
    assert made(name).decode(torch.tensor(ids, dtype=torch.int64)) == made(name).decode(ids)


@pytest.mark.parametrize(("characters", "dtype"), [(1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)])
def test_arrays_take_the_smallest_type_that_fits(characters, dtype):
    text = "".join(chr(0x10000 + i) for i in range(characters))
    tokenizer = CharTokenizer.train(text)
    assert tokenizer.encode_array(text).dtype == dtype == tokenizer.dtype
    assert tokenizer.encode(text) == list(range(characters))


@every_tokenizer
@given(text=st.lists(st.sampled_from([*"ab <|", "<unk>", "<eos>", "<|endoftext|>", "<|user|>"])).map("".join))
def test_plain_text_never_makes_a_special_token(name, text):
    tokenizer = made(name)
    ends = {i for special, i in tokenizer.specials.items() if special != "<unk>"}
    assert not ends & set(tokenizer.encode(text))


@given(st.lists(st.sampled_from(["a", " b", "<|end", "<|endoftext|>", "<|user|>", "<|user|>s"])).map("".join))
def test_special_tokens_are_read_and_written_when_asked(text):
    tokenizer = BPETokenizer.train(TEXT, 280, specials=["<|user|>", "<|endoftext|>", "<|user|>s"])
    ids = tokenizer.encode(text, specials=True)
    longest = tokenizer.specials["<|user|>s"]
    assert tokenizer.decode(ids, specials=True) == text
    assert ids.count(longest) == text.count("<|user|>s")
    assert ids.count(tokenizer.eos) == text.count("<|endoftext|>")
    plain = text.replace("<|user|>s", "").replace("<|user|>", "").replace("<|endoftext|>", "")
    assert tokenizer.decode(ids) == plain
    assert bytes_of(tokenizer, ids) == len(plain.encode())


@every_tokenizer
def test_special_tokens_come_last_and_have_no_bytes(name):
    tokenizer = made(name)
    count = len(tokenizer.specials)
    assert list(tokenizer.specials.values()) == list(
        range(tokenizer.vocab_size - count, tokenizer.vocab_size)
    )
    assert tokenizer.token_bytes.shape == (tokenizer.vocab_size,)
    assert tokenizer.token_bytes.dtype == np.int64
    assert (tokenizer.token_bytes[-count:] == 0).all()
    assert (tokenizer.token_bytes[:-count] > 0).all()


def test_eos_is_the_end_of_a_text_or_of_a_tokenized_line():
    assert made("char").eos == made("char").specials["<|endoftext|>"]
    assert made("word").eos == made("word").specials["<eos>"]
    assert made("bpe").eos == made("bpe").specials["<|endoftext|>"]
    assert made("wikitext").encode("\n") == [made("wikitext").eos]
    assert CharTokenizer.train(TEXT).eos is None


def test_unknown_pieces_become_unk_and_are_shown():
    assert made("char").encode("F@\U0010ffff")[1:] == [made("char").unk] * 2
    assert made("char").decode(made("char").encode("w@")) == "w\ufffd"
    words = WordTokenizer.train("to be or not to be", 7)
    assert words.decode(words.encode("to be seen")) == "to be <unk>"
    assert words.token_bytes[words.unk] == 0


def test_an_unknown_character_is_named_with_its_code_point():
    with pytest.raises(ValueError, match=r"'é' \(U\+00E9\) at position 3, .* 4 characters; .* unk=True"):
        CharTokenizer.train("cafe").encode("café")
    with pytest.raises(ValueError, match=r"'😀' \(U\+1F600\) at position 1,"):
        CharTokenizer.train("cafe").encode("c😀é")
    with pytest.raises(ValueError, match=r"word 1 of the text, ' tea', is not one of the 1 words"):
        WordTokenizer.train("coffee", specials=()).encode("coffee tea")


def test_characters_are_numbered_by_code_point():
    assert CharTokenizer.train("hello\n").characters == "\nehlo"


@given(st.lists(st.sampled_from("abcde"), min_size=1), st.integers(3, 8))
def test_the_most_frequent_words_are_kept(words, vocab_size):
    tokenizer = WordTokenizer.train("".join(f" {word}" for word in words), vocab_size)
    ranked = sorted(set(words), key=lambda word: (-words.count(word), word))
    assert tokenizer.words == [f" {word}" for word in ranked[: vocab_size - 2]]
    assert tokenizer.vocab_size == min(vocab_size, len(ranked) + 2)


@every_tokenizer
def test_training_twice_gives_the_same_file(name, tmp_path):
    MAKERS[name]().save(tmp_path / "first.json")
    MAKERS[name]().save(tmp_path / "second.json")
    assert (tmp_path / "first.json").read_bytes() == (tmp_path / "second.json").read_bytes()


@every_tokenizer
def test_a_saved_tokenizer_comes_back_whole(name, tmp_path):
    tokenizer = made(name)
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert os.listdir(tmp_path) == ["tokenizer.json"]
    assert type(loaded) is type(tokenizer)
    assert (loaded.specials, loaded.eos, loaded.unk) == (tokenizer.specials, tokenizer.eos, tokenizer.unk)
    assert loaded.token_bytes.tolist() == tokenizer.token_bytes.tolist()
    for text in (TEXT, SPACED, "other words <|user|>"):
        ids = tokenizer.encode(text, specials=True)
        assert loaded.encode(text, specials=True) == ids
        assert loaded.decode(ids, specials=True) == tokenizer.decode(ids, specials=True)


OURS = {"format": "lmtutorial tokenizer", "version": 1, "kind": "char", "specials": [], "characters": "ab"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe", "not JSON"),
        (b"to be or not", "not JSON"),
        (b"[1, 2]", 'no "format"'),
        (b'{"version": "1.0", "model": {"type": "BPE"}}', 'no "format"'),
        (OURS | {"version": 2}, "version 2; this lmtutorial reads version 1"),
        (OURS | {"kind": "sentencepiece"}, "kind 'sentencepiece', which is none of char, word, bpe"),
        (OURS | {"kind": []}, r"kind \[\]"),
        (OURS | {"characters": "aa"}, "damaged .* must differ"),
        (OURS | {"characters": 5}, "damaged .* must be a str"),
        (OURS | {"specials": "<eos>"}, "damaged .* list of names"),
        (OURS | {"kind": "word"}, "damaged"),
        ({key: OURS[key] for key in OURS if key != "specials"}, "damaged .*specials"),
        (OURS | {"more": 1}, "damaged .*more"),
    ],
)
def test_other_files_are_refused_with_the_reason(content, message, tmp_path):
    path = tmp_path / "file.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(ValueError, match=message) as caught:
        load_tokenizer(path)
    assert str(path) in str(caught.value)


def test_damaged_merges_and_words_are_refused(tmp_path):
    head = {key: OURS[key] for key in ("format", "version", "specials")}
    for state in (
        {"kind": "bpe", "merges": [[97, 999]]},
        {"kind": "bpe", "merges": [[97.5, 98]]},
        {"kind": "bpe", "merges": 5},
        {"kind": "word", "words": ["a", 1], "style": "plain"},
        {"kind": "word", "words": ["a", "a"], "style": "plain"},
        {"kind": "word", "words": ["a"], "style": "spaced"},
    ):
        (tmp_path / "damaged.json").write_text(json.dumps(head | state))
        with pytest.raises(ValueError, match="damaged"):
            load_tokenizer(tmp_path / "damaged.json")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: CharTokenizer.train(""), ValueError, "empty"),
        (lambda: WordTokenizer.train(""), ValueError, "empty"),
        (lambda: BPETokenizer.train(""), ValueError, "empty"),
        (lambda: BPETokenizer.train(b"text"), TypeError, "not bytes"),
        (lambda: BPETokenizer.train("text", 256), ValueError, "vocab_size is 256; .* 257"),
        (lambda: WordTokenizer.train("text", 2), ValueError, "vocab_size is 2; it must be over 2"),
        (lambda: WordTokenizer.train("text", style="bert"), ValueError, "'bert'.* plain, wikitext"),
        (lambda: CharTokenizer.train("text", specials="<eos>"), TypeError, "list of names, not '<eos>'"),
        (lambda: CharTokenizer.train("text", specials=["<s>", "<s>"]), ValueError, "differ"),
        (lambda: CharTokenizer.train("text", specials=[""]), TypeError, "list of names"),
        (lambda: CharTokenizer.train("a\udc00"), ValueError, "surrogate"),
        (lambda: made("bpe").encode("a\udc00"), ValueError, "surrogate"),
        (lambda: made("char").encode(b"a"), TypeError, "not bytes"),
        (lambda: made("bpe").decode([280]), ValueError, "token id 280 at position 0 .* 0 to 279"),
        (lambda: made("word").decode([-1]), ValueError, "token id -1 at position 0"),
    ],
)
def test_bad_arguments_are_refused_with_the_reason(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_the_library_is_imported_when_it_is_needed():
    program = (
        "import sys, lmtutorial.tokenizers as ours; ours.CharTokenizer.train('ab').encode('ab'); "
        "ours.BPETokenizer([]).encode('ab'); assert 'tokenizers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
