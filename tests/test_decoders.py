"""Each decoder by its name writes what its function does, and options fit the decoder."""

import dataclasses

import pytest

from lmtutorial.decode.beam import beam_search
from lmtutorial.decode.best_of import best_of
from lmtutorial.decode.constraints import Matching
from lmtutorial.decode.guesses import PromptLookup
from lmtutorial.decode.mcts import mcts
from lmtutorial.decode.sampling import greedy, sample
from lmtutorial.decode.speculative import Speculation, speculative
from lmtutorial.decoders import OPTIONS, Decoding, read_draft, read_reward
from lmtutorial.models.ngram import NGram
from lmtutorial.tokenizers import CharTokenizer

TEXT = "the king and the queen, the fool and the king. " * 30
TOKENIZER = CharTokenizer.train(TEXT)
MODEL = NGram.train(TOKENIZER.encode_array(TEXT), order=4, vocab_size=TOKENIZER.vocab_size)
PROMPT = TOKENIZER.encode("the ")


def kings(text):
    return text.count("king")


def of_tokens(prompt, new):
    return kings(TOKENIZER.decode([*prompt, *new]))


def write(decoder, n=1, **options):
    resources = {name: options.pop(name) for name in ("draft", "reward", "report") if name in options}
    return Decoding(decoder, **options).write(MODEL, TOKENIZER, PROMPT, 12, n, **resources)


def test_the_decoders_write_what_their_functions_do():
    assert [write("beam", 2, width=5, length_penalty=0.5)] == beam_search(
        MODEL, [PROMPT], 12, width=5, n_best=2, length_penalty=0.5
    )
    found = write("mcts", 2, reward=kings, simulations=8, seed=3, temperature=0.9, top_k=5)
    assert found == mcts(
        MODEL, [PROMPT] * 2, 12, reward=of_tokens, simulations=8, seed=3, temperature=0.9, top_k=5,
        rollout="sample",
    )  # fmt: skip
    found = write("best_of", 2, reward=kings, tries=5, seed=3, temperature=0.9, top_p=0.8)
    assert found == best_of(
        MODEL, [PROMPT] * 2, 12, reward=of_tokens, n=5, seed=3, temperature=0.9, top_p=0.8
    )
    found = write("sample", 3, seed=4, min_p=0.1, repetition_penalty=1.2, match="(king|fool)[., ]")
    assert found == sample(
        MODEL, [PROMPT] * 3, 12, seed=4, min_p=0.1, repetition_penalty=1.2,
        allowed=Matching("(king|fool)[., ]", TOKENIZER),
    )  # fmt: skip
    for draft in (None, PromptLookup(), MODEL):
        report = Speculation()
        drafted = write("speculative", 2, draft=draft, temperature=0.7, seed=1, lookahead=3, report=report)
        assert report.calls
        assert drafted == speculative(
            MODEL, draft or PromptLookup(), [PROMPT] * 2, 12, temperature=0.7, seed=1, lookahead=3
        )
    assert [write("speculative", temperature=0.0)[0].tokens] == [
        text.tokens for text in greedy(MODEL, [PROMPT], 12)
    ]


@pytest.mark.parametrize("decoder", list(OPTIONS))
def test_an_option_of_another_decoder_is_refused(decoder):
    for option in set().union(*OPTIONS.values()):
        if option in OPTIONS[decoder]:
            Decoding(decoder).check({option})
        else:
            with pytest.raises(
                ValueError, match=rf"{option} is for the decoders? [\w, ]+, not for {decoder}"
            ):
                Decoding(decoder).check({"decoder", option})


def test_every_option_of_a_decoder_is_a_field_or_comes_with_the_call():
    names = {field.name for field in dataclasses.fields(Decoding)}
    assert set().union(*OPTIONS.values()) == names - {"decoder"} | {"reward", "draft"}


def test_bad_rewards_and_drafts_are_named(tmp_path):
    (tmp_path / "rewards.py").write_text("kings = 3\ndef length(text):\n    return len(text)\n")
    assert read_reward(f"{tmp_path / 'rewards.py'}:length")("abc") == 3
    for decoder in ("mcts", "best_of"):
        with pytest.raises(
            ValueError,
            match=rf"{decoder}', which needs a reward: generate or serve with --reward FILE\.py:FUNCTION",
        ):
            write(decoder)
    (tmp_path / "kin.py").write_text(
        "from rewards import length\ndef one(text):\n    return 1 / length('')\n"
    )
    with pytest.raises(ValueError, match=r"the reward failed on '.*': ZeroDivisionError\('division by zero'"):
        write("best_of", reward=read_reward(f"{tmp_path / 'kin.py'}:one"))
    with pytest.raises(FileNotFoundError, match=r"there is no file nowhere\.py"):
        read_reward("nowhere.py:f")
    with pytest.raises(ValueError, match="has no function 'kings'"):
        read_reward(f"{tmp_path / 'rewards.py'}:kings")
    with pytest.raises(ValueError, match=r"must be FILE\.py:FUNCTION"):
        read_reward("kings")
    assert isinstance(read_draft("lookup", TOKENIZER, None), PromptLookup)
    assert read_draft("same", TOKENIZER, lambda name: (MODEL, TOKENIZER)) is MODEL
    other = CharTokenizer.train("zyx" + TEXT)
    with pytest.raises(ValueError, match="'other' has another tokenizer than the model"):
        read_draft("other", TOKENIZER, lambda name: (MODEL, other))
    two = [CharTokenizer("ab", specials=specials) for specials in (["<a>", "<b>"], ["<b>", "<a>"])]
    with pytest.raises(ValueError, match="another tokenizer"):
        read_draft("other", two[0], lambda name: (MODEL, two[1]))


def test_a_decoder_that_is_none_is_refused_with_those_that_are():
    with pytest.raises(ValueError, match="decoder is 'magic'; it must be one of sample, best_of, beam"):
        Decoding("magic")


def test_a_tree_search_calls_before_each_token():
    steps = []
    Decoding("mcts", simulations=4).write(
        MODEL, TOKENIZER, PROMPT, 6, reward=len, on_step=lambda: steps.append(None)
    )
    assert 1 <= len(steps) <= 6


def test_a_pattern_that_no_token_begins_is_refused():
    with pytest.raises(ValueError, match=r"match: no token of this vocabulary continues b''"):
        write("sample", match="é+")
