import unicodedata
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel

from lmtutorial.words import check_text, check_training_text, chunks, gpt2_pattern, plain_words, spaced_words

spacious = st.text(
    st.sampled_from("ab'sll 1½_-.é中\u00a0\u3000\x1c\x85\n\r\t")
)  # where words are hard to cut


def library_words(text):
    cut = ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
    return [text[start:end] for _, (start, end) in cut]


@pytest.mark.parametrize("block", range(0x20))
def test_every_assigned_character_is_cut_as_by_the_library(block):
    codes = range(block << 12, (block + 1) << 12)
    known = [c for c in map(chr, codes) if unicodedata.category(c) not in ("Cn", "Cs", "Co")]
    text = "\n".join(f"a{c}1{c} {c}{c}-" for c in known)
    assert gpt2_pattern().findall(text) == library_words(text)


@given(spacious | st.text(st.characters(exclude_categories=("Cn", "Cs"))))
def test_text_is_cut_as_by_the_library(text):
    assert gpt2_pattern().findall(text) == library_words(text)


@given(spacious | st.text())
def test_words_joined_are_the_text(text):
    assert "".join(gpt2_pattern().findall(text)) == text
    assert "".join(plain_words(text)) == text


@given(spacious | st.text())
def test_spaced_words_are_those_of_split_with_each_newline(text):
    assert [word for word in spaced_words(text) if word != "\n"] == text.split()
    assert spaced_words(text).count("\n") == text.count("\n")


@given(spacious | st.text(), st.integers(1, 20))
def test_chunks_cut_no_word(text, size):
    parts = list(chunks(text, size))
    assert all(len(part) >= size for part in parts[:-1])
    words = chain.from_iterable(map(gpt2_pattern().findall, parts))
    assert list(words) == gpt2_pattern().findall(text)


def test_text_with_spaces_is_cut_into_chunks():
    assert len(list(chunks("to be " * 100, size=10))) > 40


def test_what_is_no_text_is_refused():
    with pytest.raises(TypeError, match="must be a str, not bytes"):
        check_text(b"bytes")
    with pytest.raises(ValueError, match=r"'\\ud800' at position 2"):
        check_text("ab\ud800")
    with pytest.raises(ValueError, match="empty"):
        check_training_text("")
