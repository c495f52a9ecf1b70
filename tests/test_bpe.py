import os
import random
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmtutorial import bpe
from lmtutorial.bpe import BPE, count_pairs, learn_merges, learn_merges_plain, merge
from lmtutorial.bpe_library import BPETokenizer, byte_letters
from lmtutorial.words import gpt2_pattern

few_signs = st.text(st.sampled_from("aab bc1.é中\n"), max_size=60)  # so few that pairs repeat
known = st.text(st.characters(exclude_categories=("Cn", "Cs")), max_size=40)  # to Python's Unicode tables


@st.composite
def random_merges(draw, signs="aab bé中"):
    """Any merges that `BPE` accepts, not only those that training would find."""
    pieces = [bytes([byte]) for byte in range(256)]
    likely = list("".join(sorted(set(signs))).encode())
    merges = []
    for _ in range(draw(st.integers(0, 12))):
        ids = st.sampled_from(likely + list(range(256, len(pieces))))
        pair = draw(ids), draw(ids)
        made = pieces[pair[0]] + pieces[pair[1]]
        if made not in pieces:
            pieces.append(made)
            merges.append(pair)
    return merges


def words_of(text):
    return Counter(gpt2_pattern().findall(text))


def encode_by_definition(text, merges):
    """Cut into words and bytes, then apply every merge, in order, everywhere."""
    ids = []
    for word in gpt2_pattern().findall(text):
        tokens = tuple(word.encode())
        for i, pair in enumerate(merges):
            tokens = merge(tokens, pair, 256 + i)
        ids.extend(tokens)
    return ids


def merges_before_a_tie(text, merges):
    """How many merges have one pair that is more frequent than all others, before the first that has not."""
    words = {tuple(word.encode()): count for word, count in words_of(text).items()}
    for i in range(merges):
        best = count_pairs(words).most_common(2)
        if len(best) == 2 and best[0][1] == best[1][1]:
            return i
        merged = Counter()
        for word, count in words.items():
            merged[merge(word, best[0][0], 256 + i)] += count
        words = merged
    return merges


def tie_free_text(seed):
    """All beginnings of three words without a letter in common, beginning i 2**(i + 1) times."""
    rng = random.Random(seed)
    letters = iter(rng.sample("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ", 12))
    stems = ["".join(next(letters) for _ in range(length)) for length in (3, 4, 5)]
    beginnings = [stem[:end] for stem in stems for end in range(1, len(stem) + 1)]
    rng.shuffle(beginnings)
    words = [f" {word}" for i, word in enumerate(beginnings) for _ in range(2 << i)]
    rng.shuffle(words)
    return "".join(words), len(beginnings)


@given(st.dictionaries(few_signs | st.text(max_size=8), st.integers(1, 9), max_size=12), st.integers(0, 40))
def test_the_fast_trainer_learns_the_merges_of_the_definition(words, merges):
    spelled = Counter({tuple(word.encode()): count for word, count in words.items()})
    for min_count in (1, 2, 5):
        assert learn_merges(words, merges, min_count) == learn_merges_plain(spelled, merges, min_count)


@pytest.mark.parametrize("seed", range(10))
def test_merges_are_the_librarys_on_a_tie_free_corpus(seed):
    text, merges = tie_free_text(seed)
    assert merges_before_a_tie(text, merges) == merges
    learned = BPE.train(text, 256 + merges).merges
    assert len(learned) == merges
    assert learned == BPETokenizer.train(text, 256 + merges, specials=()).merges


def test_merges_are_the_librarys_on_random_corpora_up_to_the_first_tie():
    rng = random.Random(0)
    compared = 0
    for _ in range(50):
        vocabulary = ["".join(rng.choices("abc", k=rng.randint(1, 5))) for _ in range(40)]
        text = " ".join(rng.choices(vocabulary, weights=[1.1**i for i in range(40)], k=2_000))
        sure = merges_before_a_tie(text, merges=20)
        compared += sure
        library = BPETokenizer.train(text, 256 + sure, specials=())
        assert BPE.train(text, 256 + sure).merges == library.merges
    assert compared >= 50 * 20 / 2  # most merges were compared


@given(st.text(st.sampled_from("aabbcd12.,"), min_size=1, max_size=80), st.integers(0, 30))
def test_merges_are_the_librarys_even_with_ties_where_the_order_of_bytes_is_the_same(text, merges):
    ours, library = BPE.train(text, 256 + merges), BPETokenizer.train(text, 256 + merges, specials=())
    assert ours.merges == library.merges


@given((few_signs | known).filter(bool), st.integers(0, 30))
def test_the_definition_in_the_librarys_order_of_bytes_is_the_library(text, merges):
    """The library numbers bytes by the letters it writes them with, which matters among equal counts only."""
    letters = byte_letters()
    byte_of = sorted(range(256), key=lambda byte: letters[byte])
    number = {byte: i for i, byte in enumerate(byte_of)}
    words = {tuple(number[byte] for byte in word.encode()): n for word, n in words_of(text).items()}
    learned = [
        tuple(byte_of[part] if part < 256 else part for part in pair)
        for pair in learn_merges_plain(words, merges)
    ]
    assert learned == BPETokenizer.train(text, 256 + merges, specials=()).merges


@given(random_merges(), few_signs | st.text())
def test_encode_applies_the_merges_in_order(merges, text):
    assert BPE(merges).encode(text) == encode_by_definition(text, merges)


@given(few_signs, few_signs)
def test_a_trained_tokenizer_encodes_by_the_definition(corpus, text):
    trained = BPE.train(corpus, 300)
    assert trained.encode(text) == encode_by_definition(text, trained.merges)


@given(random_merges(), few_signs | st.text())
def test_decode_undoes_encode_for_every_text(merges, text):
    tokenizer = BPE(merges)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(text), errors="strict") == text


@given(random_merges(), st.data())
def test_any_ids_decode_to_their_bytes_with_replacement(merges, data):
    tokenizer = BPE(merges)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1)))
    found = b"".join(tokenizer.pieces[i] for i in ids)
    assert tokenizer.decode(ids) == found.decode("utf-8", "replace")
    assert tokenizer.decode(np.array(ids, dtype=np.uint16)) == tokenizer.decode(ids)
    assert tokenizer.decode(torch.tensor(ids, dtype=torch.int64)) == tokenizer.decode(ids)


def test_half_a_character_is_replaced_or_refused():
    half = BPE([]).encode("é")[:1]
    assert BPE([]).decode(half) == "\ufffd"
    with pytest.raises(UnicodeDecodeError):
        BPE([]).decode(half, errors="strict")


@pytest.mark.parametrize("ids", [[0, -1], [65, 256], np.array([1, 300]), torch.tensor([7, 1_000])])
def test_ids_out_of_range_are_refused(ids):
    with pytest.raises(ValueError, match=rf"token id {int(ids[1])} at position 1 .* 0 to 255"):
        BPE([]).decode(ids)


def test_a_batch_of_sequences_is_refused():
    with pytest.raises(ValueError, match=r"shape \(1, 2\)"):
        BPE([]).decode(torch.tensor([[65, 66]]))


@given(st.text(), st.integers(0xD800, 0xDFFF).map(chr), st.text())
def test_lone_surrogates_are_refused_with_their_place(before, surrogate, after):
    with pytest.raises(ValueError, match=f"at position {len(before)},"):
        BPE([]).encode(before + surrogate + after)
    with pytest.raises(ValueError, match=f"at position {len(before)},"):
        BPE.train(before + surrogate + after, 300)


def test_words_beyond_the_cache_are_encoded_alike(monkeypatch):
    text = "to be or not to be that is the question " * 2
    tokenizer = BPE.train(text, 280)
    expected = tokenizer.encode(text)
    monkeypatch.setattr(bpe._WordCache, "LIMIT", 2)
    small = BPE(tokenizer.merges)
    assert small.encode(text) == expected
    assert len(small._ids) <= 2


@given(few_signs)
def test_training_ends_where_no_pair_repeats(text):
    tokenizer = BPE.train(text, 10_000)
    left = Counter()
    for word, count in words_of(text).items():
        ids = tokenizer.encode(word)
        for pair in pairwise(ids):
            left[pair] += count
    assert all(count == 1 for count in left.values())


def test_training_does_not_depend_on_the_order_of_hashes():
    text = Path(bpe.__file__).read_text(encoding="utf-8")
    program = "import sys; from lmtutorial.bpe import BPE; print(BPE.train(sys.stdin.read(), 700).merges)"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            input=text,
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONUTF8": "1"},
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(outputs) == 1
    assert outputs == {f"{BPE.train(text, 700).merges}\n"}


@pytest.mark.parametrize(
    ("merges", "error", "message"),
    [
        ([(97, 256)], ValueError, r"merge 0 is \(97, 256\).* from 0 to 255"),
        ([(97, 98), (-1, 256)], ValueError, r"merge 1 is \(-1, 256\).* from 0 to 256"),
        ([(97, 98, 99)], ValueError, r"merge 0 is \(97, 98, 99\)"),
        ([(97, 98), (97, 98)], ValueError, r"merge 1, \(97, 98\), makes b'ab', which token 256 is"),
        ([(97.0, 98)], TypeError, "integer"),
    ],
)
def test_impossible_merges_are_refused(merges, error, message):
    with pytest.raises(error, match=message):
        BPE(merges)


def test_impossible_training_is_refused():
    with pytest.raises(ValueError, match="vocab_size is 255; it must be at least 256"):
        BPE.train("text", 255)
    with pytest.raises(ValueError, match="min_count is 0"):
        BPE.train("text", 256, min_count=0)
    with pytest.raises(TypeError, match="bytes"):
        BPE.train(b"text", 256)
