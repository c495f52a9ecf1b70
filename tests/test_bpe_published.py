"""Laws of tokenizers from elsewhere: they cut and number exactly as Hugging Face's library does."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_bpe import few_signs, known
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE

from lmtutorial.bpe_library import BPETokenizer, byte_letters
from lmtutorial.bpe_published import PublishedBPE
from lmtutorial.tokenizers import load_tokenizer

TEXT = "In 1234 low, lower; 12.5 is lower than 99 — newer, don't you think? ½ of 10²  is\n\n  50. " * 3
OWN = BPETokenizer.train(TEXT, 300, specials=[])
SPECIALS = ["<|im_end|>", "<|endoftext|>", "<|im|>"]
texts = few_signs | st.text(alphabet="ab 019½²ⅷ٣中é😀.,'\n\t<|im_end>") | known | st.just(TEXT)


@st.composite
def vocabularies(draw):
    """The vocabulary and merges of `OWN`, numbered at random, with the special tokens anywhere."""
    state = json.loads(OWN.to_library().to_str())["model"]
    names = [*state["vocab"], *SPECIALS]
    ids = draw(st.permutations(range(len(names))))
    return dict(zip(names, ids, strict=True)), [tuple(merge) for merge in state["merges"]]


def library(vocabulary, merges, split_digits):
    """The library's tokenizer, put together without this package."""
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges))
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_]) if split_digits else bytes_
    tokenizer.add_special_tokens(SPECIALS)
    return tokenizer


@given(vocabulary=vocabularies(), text=texts, split_digits=st.booleans())
def test_it_encodes_as_the_library_does_and_decodes_back(vocabulary, text, split_digits):
    ours = PublishedBPE.from_vocabulary(*vocabulary, specials=SPECIALS, split_digits=split_digits)
    theirs = library(*vocabulary, split_digits)
    ids = ours.encode(text, specials=True)
    assert ids == theirs.encode(text).ids
    assert ours.decode(ids, specials=True) == text
    plain = ours.encode(text)
    assert ours.decode(plain) == text
    assert int(ours.token_bytes[plain].sum()) == len(text.encode())
    assert ours.vocab_size == theirs.get_vocab_size() == len(ours.token_bytes)


@given(vocabulary=vocabularies(), text=texts, split_digits=st.booleans())
def test_it_goes_through_the_librarys_file_and_through_its_own(
    tmp_path_factory, vocabulary, text, split_digits
):
    theirs = library(*vocabulary, split_digits)
    ours = PublishedBPE.from_library(json.loads(theirs.to_str()), ends_with="<|im|>")
    assert ours.eos == vocabulary[0]["<|im|>"]
    assert ours.specials == {name: vocabulary[0][name] for name in SPECIALS}
    assert ours.to_library().encode(text).ids == ours.encode(text)
    path = tmp_path_factory.mktemp("saved") / "tokenizer.json"
    ours.save(path)
    again = load_tokenizer(path)
    assert isinstance(again, PublishedBPE)
    assert again.encode(text, specials=True) == ours.encode(text, specials=True)
    assert (again.eos, again.specials, again.ids) == (ours.eos, ours.specials, ours.ids)


def test_no_token_holds_two_digits_where_digits_are_split():
    state = json.loads(
        BPETokenizer.train("1999 2000 1999 2000 19 20 " * 9, 280, specials=[]).to_library().to_str()
    )
    options = {"merges": state["model"]["merges"], "specials": []}
    together = PublishedBPE.from_vocabulary(state["model"]["vocab"], **options)
    apart = PublishedBPE.from_vocabulary(state["model"]["vocab"], **options, split_digits=True)
    assert together.tokens("in 1999") == ["i", "n", " 1999"]
    assert apart.tokens("in 1999") == ["i", "n", " ", "1", "9", "9", "9"]


def test_the_usual_names_end_a_text_unless_another_is_named():
    vocabulary = {letter: i for i, letter in enumerate(byte_letters())}
    specials = {"<|im_end|>": 256, "<|endoftext|>": 257}
    for ends_with, eos in ((None, 257), ("<|im_end|>", 256)):
        tokenizer = PublishedBPE.from_vocabulary(
            vocabulary | specials, [], specials=list(specials), ends_with=ends_with
        )
        assert tokenizer.eos == eos
    assert PublishedBPE.from_vocabulary(vocabulary, [], specials=[]).eos is None
    with pytest.raises(ValueError, match=r"ends_with is '<eos>'; it must be one of \['<|im_end|>'"):
        PublishedBPE.from_vocabulary(vocabulary | specials, [], specials=list(specials), ends_with="<eos>")


def test_a_byte_that_the_vocabulary_lacks_is_an_error_where_a_text_holds_it():
    tokenizer = PublishedBPE.from_vocabulary({"a": 0, "b": 1, "ab": 2}, ["a b"], specials=[])
    assert tokenizer.encode("abba") == [2, 1, 0]
    with pytest.raises(ValueError, match=r"text has 'é' \(U\+00E9\) at position 2; this tokenizer lacks"):
        tokenizer.encode("abé")


@pytest.mark.parametrize(
    ("vocabulary", "merges", "message"),
    [
        ({"a": 0, "b": 1}, ["a b"], "1 tokens are not in the vocabulary, such as 'ab'"),
        ({"a": 0, "b": 1, "ab": 2, "what": 3}, ["a b"], "1 tokens are no byte, merge or .* such as 'what'"),
        ({"a": 0, "b": 1, "ab": 3}, ["a b"], "ids must be 0 to 2, each once"),
        ({"a": 0, "b": 0, "ab": 1}, ["a b"], "ids must be 0 to 2, each once"),
        ({"a": 0, "ab": 1}, ["a b"], "merge 0 is 'a b'; it must be two tokens that exist by then"),
        ({"a": 0, "b": 1, "ab": 2}, ["a b c"], "merge 0 is 'a b c'"),
        ({"a": 0, "aa": 1, "aaa": 2}, ["a a", "aa a", "a aa"], "merge 2.*makes b'aaa', which token 257 is"),
    ],
    ids=str,
)
def test_a_vocabulary_that_does_not_fit_its_merges_is_refused(vocabulary, merges, message):
    with pytest.raises(ValueError, match=message):
        PublishedBPE.from_vocabulary(vocabulary, merges, specials=[])


def changed(**changes):
    vocabulary = {letter: i for i, letter in enumerate(byte_letters())} | {
        n: 256 + i for i, n in enumerate(SPECIALS)
    }
    state = json.loads(library(vocabulary, [], split_digits=True).to_str())
    for place, value in changes.items():
        outer, _, inner = place.partition("__")
        (state if not inner else state[outer])[inner or outer] = value
    return state


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__type": "Unigram"}, r"model\.type is 'Unigram', which is not supported"),
        ({"model__byte_fallback": True}, r"model\.byte_fallback is True"),
        ({"model__ignore_merges": True}, r"model\.ignore_merges is True"),
        ({"model__dropout": 0.1}, r"model\.dropout is 0\.1"),
        ({"normalizer": {"type": "NFC"}}, r"normalizer is .*NFC.*; it must be null"),
        (
            {"pre_tokenizer": {"type": "Metaspace"}},
            "pre_tokenizer is .*Metaspace.*it must be GPT-2's ByteLevel",
        ),
        ({"pre_tokenizer": None}, "pre_tokenizer is None; it must be"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "add_prefix_space"),
        ({"pre_tokenizer": {"type": "ByteLevel", "use_regex": False}}, "use_regex"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits"}]}}, "Digits"),
        ({"added_tokens": [{"id": 256, "content": "<|im_end|>", "special": False}]}, "it must be special"),
    ],
    ids=str,
)
def test_another_kind_of_tokenizer_is_refused(changes, message):
    PublishedBPE.from_library(changed())
    with pytest.raises(ValueError, match=message):
        PublishedBPE.from_library(changed(**changes))
