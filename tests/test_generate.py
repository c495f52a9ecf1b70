"""`lmtutorial generate` with each decoder: what the library's function writes, and flags that fit."""

import dataclasses

import pytest

from lmtutorial.commands import Generate
from lmtutorial.decode.beam import beam_search
from lmtutorial.decode.mcts import mcts
from lmtutorial.decode.sampling import greedy
from lmtutorial.generate import OPTIONS, write
from lmtutorial.models.ngram import NGram
from lmtutorial.tokenizers import CharTokenizer

TEXT = "the king and the queen, the fool and the king. " * 30
TOKENIZER = CharTokenizer.train(TEXT)
MODEL = NGram.train(TOKENIZER.encode_array(TEXT), order=4, vocab_size=TOKENIZER.vocab_size)
PROMPT = TOKENIZER.encode("the ")


def generate(load=None, **flags):
    return write(Generate(prompt="the ", max_new_tokens=12, **flags), MODEL, TOKENIZER, load)


def test_the_decoders_write_what_their_functions_do(tmp_path):
    rewards = tmp_path / "rewards.py"
    rewards.write_text("def kings(text):\n    return text.count('king')\n")
    of_beam, _ = generate(decoder="beam", width=5, samples=2, length_penalty=0.5)
    assert [of_beam] == beam_search(MODEL, [PROMPT], 12, width=5, n_best=2, length_penalty=0.5)
    of_search, _ = generate(
        decoder="mcts", reward=f"{rewards}:kings", simulations=8, samples=1, seed=3, temperature=1.0
    )
    assert of_search == mcts(
        MODEL, [PROMPT], 12, reward=lambda prompt, new: TOKENIZER.decode([*prompt, *new]).count("king"),
        simulations=8, temperature=1.0, top_k=None, rollout="sample", seed=3,
    )  # fmt: skip
    for flags in ({"draft": "lookup"}, {"draft": "itself", "load": lambda name: (MODEL, TOKENIZER)}):
        drafted, note = generate(decoder="speculative", temperature=0.0, samples=1, **flags)
        assert [t.tokens for t in drafted] == [t.tokens for t in greedy(MODEL, [PROMPT], 12)]
        assert "saved" in note
    matching, _ = generate(match="(king|fool)[., ]", samples=4, seed=0)
    assert {TOKENIZER.decode(text.tokens)[:4] for text in matching} <= {"king", "fool"}


@pytest.mark.parametrize("decoder", list(OPTIONS))
def test_a_flag_of_another_decoder_is_refused(decoder):
    others = {"match": "a", "width": 7, "reward": "x.py:f", "draft": "gpt2"}
    for flag, value in others.items():
        if flag not in OPTIONS[decoder]:
            with pytest.raises(ValueError, match=rf"--{flag} is for --decoder \w+, not for {decoder}"):
                generate(decoder=decoder, **{flag: value})


def test_every_option_of_a_decoder_is_a_flag():
    names = {field.name for field in dataclasses.fields(Generate)}
    assert set().union(*OPTIONS.values()) <= names


def test_bad_rewards_and_drafts_are_named(tmp_path):
    (tmp_path / "rewards.py").write_text("kings = 3\n")
    with pytest.raises(ValueError, match=r"reward is None; --decoder mcts needs --reward FILE\.py:FUNCTION"):
        generate(decoder="mcts")
    with pytest.raises(FileNotFoundError, match=r"there is no file nowhere\.py"):
        generate(decoder="mcts", reward="nowhere.py:f")
    with pytest.raises(ValueError, match="has no function 'kings'"):
        generate(decoder="mcts", reward=f"{tmp_path / 'rewards.py'}:kings")
    other = CharTokenizer.train("zyx" + TEXT)
    with pytest.raises(ValueError, match="has another tokenizer than the model"):
        generate(decoder="speculative", draft="other", load=lambda name: (MODEL, other))
