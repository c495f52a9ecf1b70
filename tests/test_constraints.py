"""Only what is allowed is written, as likely as the model makes it among what is allowed."""

import math
import random
import re

import pytest
import regex
import torch
from history_model import HistoryModel
from hypothesis import given
from hypothesis import strategies as st
from test_logits import chi_squared
from test_sampling import VOCAB, law, models, options, ragged, texts

from lmtutorial.bpe_library import BPETokenizer
from lmtutorial.decode.automaton import (
    NEVER,
    Automaton,
    characters,
    derivative,
    nullable,
    outside,
    parse,
)
from lmtutorial.decode.constraints import Matching
from lmtutorial.decode.logits import to_probs
from lmtutorial.decode.sampling import greedy, sample, stream
from lmtutorial.tokenizers import CharTokenizer

# The automaton, against Python's `re` and the package `regex`, which knows partial matches

SIGNS = "ab1é€😀 \n"
NO_CHARACTER = "[^\x00-\U0010ffff]"
CLASSES = [
    ".",
    r"\d",
    r"\D",
    r"\w",
    r"\W",
    r"\s",
    r"\S",
    "[ab]",
    "[^a]",
    "[^é-€]",
    r"[^a€\d]",
    "[à-😀]",
    r"[\w€]",
]
atoms = st.sampled_from([*"ab1é€😀", *CLASSES, r"[\Sa]", "", r"\n", r"\u20ac", NO_CHARACTER])
patterns = st.recursive(
    atoms,
    lambda part: st.one_of(
        st.tuples(part, part).map("".join),
        st.tuples(part, part).map(lambda pair: f"(?:{pair[0]}|{pair[1]})"),
        st.tuples(part, st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "{0,2}", "{2,}", "*?", "{0}"])).map(
            lambda pair: f"({pair[0]}){pair[1]}"
        ),
    ),
    max_leaves=6,
)
signs = st.text(SIGNS, max_size=5)


def automaton_of(pattern):
    """None where no text matches."""
    return None if parse(pattern) == NEVER else Automaton(pattern)


@law
@given(patterns, st.lists(signs, min_size=10, max_size=20))
def test_a_text_matches_if_python_says_so(pattern, several):
    automaton = automaton_of(pattern)
    for text in several:
        state = automaton and automaton.read(0, text.encode())
        matches = state is not None and automaton.is_match(state)
        assert matches == bool(re.fullmatch(pattern, text, re.ASCII))


@law
@given(patterns, st.lists(signs, min_size=10, max_size=20))
def test_a_text_begins_a_match_if_it_is_a_partial_match(pattern, several):
    automaton = automaton_of(pattern)
    for text in several if automaton else []:
        begins = automaton.read(0, text.encode()) is not None
        assert begins or not regex.fullmatch(pattern, text, regex.ASCII)
        if begins:  # and then some bytes lead to a match
            assert shortest_match(automaton, automaton.read(0, text.encode())) is not None
        elif NO_CHARACTER not in pattern:
            assert not regex.fullmatch(pattern, text, regex.ASCII, partial=True)


def shortest_match(automaton, state):
    seen, frontier = {state}, [(state, b"")]
    for at, text in frontier:
        if automaton.is_match(at):
            return text
        for byte in range(256):
            after = automaton.steps[at][byte]
            if after is not None and after not in seen:
                seen.add(after)
                frontier.append((after, text + bytes([byte])))
    return None


@given(st.lists(st.tuples(st.integers(0, 0x10FFFF), st.integers(0, 0x10FFFF)).map(sorted), max_size=4))
@law
def test_a_class_is_the_utf8_of_its_characters_and_of_no_others(ranges):
    ranges = [tuple(pair) for pair in ranges]
    edges = {c + d for pair in ranges for c in pair for d in (-1, 0, 1)} | {
        0,
        0x7F,
        0x80,
        0x7FF,
        0x800,
        0xFFFF,
    }
    for wanted, members in ((True, characters(ranges)), (False, characters(outside(ranges)))):
        for code in edges - set(range(0xD800, 0xE000)):
            if 0 <= code <= 0x10FFFF:
                state = members
                for byte in chr(code).encode():
                    state = derivative(state, byte)
                assert nullable(state) == (wanted == any(low <= code <= high for low, high in ranges))


def test_surrogates_and_overlong_forms_are_no_characters():
    anything = Automaton("(?s).*")
    for bad in (
        "\ud800".encode("utf-8", "surrogatepass"),
        b"\xc0\x80",
        b"\xe0\x80\x80",
        b"\xf4\x90\x80\x80",
        b"\xff",
    ):
        assert anything.read(0, bad) is None


def test_repetition_and_long_patterns_need_no_more_states_than_there_are():
    automaton = Automaton("(?:ab|a*){3,150}(?:x{200}|y)?" + "literal" * 100)
    assert automaton.read(0, b"ab" * 100 + b"x" * 200 + b"literal" * 100) is not None
    assert len(automaton.steps) < 5000


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("^a$", "uses at; allowed are characters, classes, groups"),
        (r"a\b", "uses at"),
        ("a(?=b)", "uses assert"),
        (r"(a)\1", "uses groupref"),
        ("(?i)a", "sets flags"),
        ("(?i:a)", "uses subpattern"),
        ("a++", "uses possessive_repeat"),
        ("a(", "is no regular expression: missing \\)"),
        ("[^\x00-\U0010ffff]", "no text matches the pattern"),
    ],
)
def test_other_patterns_are_refused(pattern, message):
    with pytest.raises(ValueError, match=message):
        Automaton(pattern)


# Sampling under a rule


def random_rule(seed, *, ends=0.05):
    """Some tokens after each text, none after a few."""

    def allowed(tokens):
        rng = random.Random(f"{seed} {tokens}")
        if tokens and rng.random() < ends:
            return torch.zeros(VOCAB, dtype=torch.bool)
        mask = torch.tensor([rng.random() < 0.4 for _ in range(VOCAB)])
        mask[rng.randrange(VOCAB)] = True
        return mask

    return allowed


@law
@given(st.integers(0, 99), ragged, st.integers(0, 8), options)
def test_every_token_was_allowed_and_a_text_ends_where_nothing_is(seed, prompts, steps, drawing):
    model, allowed, eos = HistoryModel(VOCAB, seed), random_rule(seed), drawing["eos"]
    for g in sample(model, prompts, steps, allowed=allowed, **drawing):
        assert all(allowed(g.tokens[:i])[token] for i, token in enumerate(g.tokens))
        met = bool(g.tokens) and g.tokens[-1] in (eos if isinstance(eos, set) else {eos})
        stuck = len(g.tokens) < steps and not allowed(g.tokens).any()
        assert g.finished == (met or stuck)
        assert g.finished or len(g.tokens) == steps


@law
@given(st.integers(0, 99), ragged, st.integers(0, 8), options)
def test_a_rule_knows_neither_neighbors_nor_streams(seed, prompts, steps, drawing):
    model, allowed = HistoryModel(VOCAB, seed), random_rule(seed)
    distinct = [list(p) for p in dict.fromkeys(map(tuple, prompts))]
    together = sample(model, distinct, steps, allowed=allowed, **drawing)
    for prompt, text in zip(distinct, together, strict=True):
        assert [text] == sample(model, [prompt], steps, allowed=allowed, **drawing)
        assert text.tokens == list(stream(model, prompt, steps, allowed=allowed, **drawing))


@law
@given(models, ragged, st.integers(0, 8), options)
def test_a_rule_that_allows_all_changes_nothing(model, prompts, steps, drawing):
    ruled = sample(
        model, prompts, steps, allowed=lambda tokens: torch.ones(VOCAB, dtype=torch.bool), **drawing
    )
    assert ruled == sample(model, prompts, steps, **drawing)


@law
@given(st.integers(0, 99), ragged, st.integers(0, 8))
def test_greedy_takes_the_likeliest_of_the_allowed(seed, prompts, steps):
    model, allowed = HistoryModel(VOCAB, seed), random_rule(seed)
    for prompt, g in zip(prompts, greedy(model, prompts, steps, allowed=allowed), strict=True):
        for i, token in enumerate(g.tokens):
            logits = model(torch.tensor([prompt + g.tokens[:i]]))[0, -1]
            assert token == logits.masked_fill(~allowed(g.tokens[:i]), -math.inf).argmax()


def test_texts_are_as_likely_as_the_model_makes_them_among_the_allowed_at_each_step():
    model, allowed = HistoryModel(VOCAB, 3), random_rule(5, ends=0)

    def probs(tokens):
        logits = model(torch.tensor([[5, *tokens]]))[0, -1].double()
        return to_probs(logits.masked_fill(~allowed(tokens), -math.inf), temperature=0.9, top_p=0.95)

    joint = torch.cat([p * probs([token]) for token, p in enumerate(probs([]))])
    drawn = sample(model, [[5]] * 10_000, 2, temperature=0.9, top_p=0.95, allowed=allowed, seed=0)
    pairs = torch.tensor([g.tokens for g in drawn]) @ torch.tensor([VOCAB, 1])
    assert chi_squared(pairs.bincount(minlength=VOCAB**2), joint) > 1e-3


def test_probability_0_for_all_that_is_allowed_is_an_error():
    model = HistoryModel(VOCAB)
    model.table[:, 3] = -math.inf

    def allowed(tokens):
        return torch.arange(VOCAB) == (3 if tokens == [7] else 7)

    with pytest.raises(ValueError, match=r"probability 0 to every token allowed after prompt 0 .* \[7\]"):
        sample(model, [[1], [2]], 3, allowed=allowed)


@pytest.mark.parametrize(
    "mask", [None, [True] * VOCAB, torch.ones(VOCAB), torch.ones(VOCAB + 1, dtype=torch.bool)]
)
def test_what_is_no_mask_is_refused(mask):
    with pytest.raises(ValueError, match=r"it must give a bool tensor of shape \(12,\)"):
        sample(HistoryModel(VOCAB), [[1]], 3, allowed=lambda tokens: mask)


# Sampling texts that match

TEXT = "To be, or not to be: that is the question. € 1603, 😀 é 1623; naïve café — “all’s well” 12.50 "
BPE = BPETokenizer.train(TEXT * 3, vocab_size=300)
CHARS = CharTokenizer("".join(sorted(set(TEXT))))
PATTERNS = [
    r"\d{4}-\d\d-\d\d", r"(?:yes|no|not sure)", r"[a-z ]+\.", r".{3,9}", r"[€😀]+", r"\d+(?:\.\d\d)? €",
    r"(?:é|[^a-z0-9])*", r"[^\x00-\x7f]{2,4}", r"\w+(?: \w+)*", "",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_text_matches_or_begins_a_match_where_the_limit_ends_it(pattern):
    for seed in range(8):
        model = HistoryModel(BPE.vocab_size, seed)
        model.table[:, BPE.eos] += 4
        for g in sample(model, [[1], [2, 3]], 30, allowed=Matching(pattern, BPE), eos=BPE.eos, seed=seed):
            written = BPE.decode_bytes(g.tokens)
            if g.finished:
                assert re.fullmatch(pattern, written.decode(), re.ASCII)
            else:
                assert len(g.tokens) == 30
                whole = written.decode(errors="ignore")
                assert regex.fullmatch(pattern, whole, regex.ASCII, partial=True)


@pytest.mark.parametrize("tokenizer", [BPE, CHARS], ids=["bpe", "char"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_mask_is_what_trying_every_token_gives(pattern, tokenizer):
    rng, automaton = random.Random(0), Automaton(pattern)
    for _ in range(6):
        allowed, tokens = Matching(pattern, tokenizer), []
        for _ in range(8):
            state = automaton.read(0, tokenizer.decode_bytes(tokens))
            tried = [
                automaton.is_match(state)
                if token == tokenizer.eos
                else automaton.read(state, tokenizer.decode_bytes([token])) is not None
                for token in range(tokenizer.vocab_size)
            ]
            if not any(tried) and not automaton.is_match(state):
                with pytest.raises(ValueError, match="no token of this vocabulary continues"):
                    allowed(tokens)
                break
            assert allowed(tokens).tolist() == tried
            choices = [token for token in allowed(tokens).nonzero()[:, 0].tolist() if token != tokenizer.eos]
            if not choices:
                break
            tokens.append(rng.choice(choices))


def test_without_an_end_of_text_a_match_that_cannot_go_on_ends_the_text():
    tokenizer = CharTokenizer("0123456789-.")
    for g in sample(HistoryModel(12), [[1], [2]], 20, allowed=Matching(r"\d{4}-\d\d", tokenizer), seed=0):
        assert re.fullmatch(r"\d{4}-\d\d", tokenizer.decode(g.tokens))
        assert g.finished


def test_behind_the_end_nothing_follows_even_where_the_decoder_was_not_told():
    allowed = Matching("(?:to)+", BPE)
    told, untold = (
        sample(HistoryModel(BPE.vocab_size), [[1]] * 9, 40, allowed=allowed, seed=0, **end)
        for end in ({"eos": BPE.eos}, {})
    )
    assert texts(told) == texts(untold)


def test_a_beginning_that_no_token_continues_is_an_error_that_says_so():
    with pytest.raises(ValueError, match="no token of this vocabulary continues b'be' to a match"):
        sample(HistoryModel(CHARS.vocab_size), [[1]], 9, allowed=Matching("beZ", CHARS))
    with pytest.raises(ValueError, match="eos is 300; the ids of this tokenizer are 0 to 299"):
        Matching("a", BPE, eos=300)
