"""A decoder by its name, with its options: what the command line and the server choose from."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lmtutorial.decode.beam import beam_search
from lmtutorial.decode.best_of import best_of
from lmtutorial.decode.constraints import Matching
from lmtutorial.decode.guesses import Guesser, PromptLookup
from lmtutorial.decode.mcts import mcts
from lmtutorial.decode.sampling import Generation, sample
from lmtutorial.decode.speculative import Speculation, speculative
from lmtutorial.models.cache import LanguageModel
from lmtutorial.vocabulary import Tokenizer

Name = Literal["sample", "best_of", "beam", "mcts", "speculative"]
Reward = Callable[[str], float]
"""A number for a whole text, prompt included: the higher the better."""
Draft = LanguageModel | Guesser

FILTERS = ("temperature", "top_k", "top_p", "min_p", "typical_p")
OPTIONS = {
    "sample": {*FILTERS, "repetition_penalty", "seed", "match"},
    "best_of": {"temperature", "top_k", "top_p", "seed", "reward", "tries"},
    "beam": {"width", "length_penalty"},
    "mcts": {"temperature", "top_k", "seed", "reward", "simulations"},
    "speculative": {*FILTERS, "seed", "draft", "lookahead"},
}
"""By decoder, which options it has a use for; an option that stands nowhere here is for all."""


@dataclass(frozen=True)
class Decoding:
    """How to choose tokens.

    >>> Decoding("beam").check({"width", "seed"})
    Traceback (most recent call last):
    ...
    ValueError: seed is for the decoders sample, best_of, mcts, speculative, not for beam
    """

    decoder: Name = "sample"
    """Draw tokens; or find the likeliest text (beam), the one that a reward likes (best_of, mcts); or draw
    tokens that a draft has proposed (speculative)."""
    temperature: float = 1.0
    """all but beam: below 1 safer, above 1 bolder, 0 always the likeliest token."""
    top_k: int | None = None
    """all but beam: choose only among this many of the likeliest tokens."""
    top_p: float | None = None
    """sample, best_of, speculative: choose only among the likeliest tokens of this probability together."""
    min_p: float | None = None
    """sample, speculative: choose only among tokens at least this share as likely as the likeliest."""
    typical_p: float | None = None
    """sample, speculative: choose only among the tokens nearest to the usual surprise, as with top_p."""
    repetition_penalty: float = 1.0
    """sample: above 1, tokens that were used already become less likely."""
    match: str | None = None
    """sample: a regular expression; only new text that matches it, or still can, is written."""
    width: int = 4
    """beam: how many texts are in hand at each step, at least as many as are asked for."""
    length_penalty: float = 1.0
    """beam: texts are ranked by their log-probability / length**this."""
    tries: int = 16
    """best_of: how many texts are drawn, to keep the one with the best reward."""
    simulations: int = 64
    """mcts: how many continuations are tried before each token."""
    lookahead: int = 4
    """speculative: how many tokens are proposed at a time."""
    seed: int | None = None
    """all but beam: the same seed writes the same texts. None: new ones each time."""

    def __post_init__(self) -> None:
        if self.decoder not in OPTIONS:
            raise ValueError(f"decoder is {self.decoder!r}; it must be one of {', '.join(OPTIONS)}")

    def check(self, given: Iterable[str]) -> None:
        """Raise ValueError if an option that was `given` has no use for this decoder."""
        for name in sorted(given):
            owners = [decoder for decoder, options in OPTIONS.items() if name in options]
            if owners and self.decoder not in owners:
                are = "decoder" if len(owners) == 1 else "decoders"
                raise ValueError(f"{name} is for the {are} {', '.join(owners)}, not for {self.decoder}")

    def rows(self, n: int) -> int:
        """How many texts are in hand at once when `n` are asked for."""
        return {"beam": self.width, "best_of": n * self.tries}.get(self.decoder, n)

    def write(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        max_new_tokens: int,
        n: int = 1,
        *,
        draft: Draft | None = None,
        reward: Reward | None = None,
        report: Speculation | None = None,
        on_step: Callable[[], None] = lambda: None,
    ) -> list[Generation]:
        """`n` texts after the prompt, of a beam search the `n` best; the end of text ends them.

        `draft` is for "speculative", by default `PromptLookup()`; `reward` for "best_of" and "mcts", which
        calls `on_step` before it commits a token. Raises ValueError where a reward is missing, and what the
        decoder's function raises.
        """
        prompts, eos = [list(prompt)] * n, tokenizer.eos
        filters = {name: getattr(self, name) for name in FILTERS}
        if self.decoder == "beam":
            [texts] = beam_search(
                model, prompts[:1], max_new_tokens, width=self.width, length_penalty=self.length_penalty,
                eos=eos, n_best=n,
            )  # fmt: skip
            return texts if max_new_tokens else texts * n
        if self.decoder == "speculative":
            return speculative(
                model, draft or PromptLookup(), prompts, max_new_tokens, lookahead=self.lookahead, eos=eos,
                seed=self.seed, report=report, **filters,
            )  # fmt: skip
        if self.decoder == "sample":
            return sample(
                model, prompts, max_new_tokens, repetition_penalty=self.repetition_penalty, eos=eos,
                seed=self.seed, allowed=self._allowed(tokenizer), **filters,
            )  # fmt: skip
        if reward is None:
            needed = "generate or serve with --reward FILE.py:FUNCTION, a function of the text"
            raise ValueError(f"decoder is {self.decoder!r}, which needs a reward: {needed}")

        def rate(prompt: list[int], new: Sequence[int]) -> float:
            text = tokenizer.decode([*prompt, *new])
            try:
                return reward(text)
            except Exception as error:
                raise ValueError(f"the reward failed on {text!r}: {error!r}") from error

        if self.decoder == "best_of":
            return best_of(
                model, prompts, max_new_tokens, reward=rate, n=self.tries, temperature=self.temperature,
                top_k=self.top_k, top_p=self.top_p, eos=eos, seed=self.seed,
            )  # fmt: skip
        return mcts(
            model, prompts, max_new_tokens, reward=rate, simulations=self.simulations, rollout="sample",
            temperature=self.temperature, top_k=self.top_k, eos=eos, seed=self.seed,
            on_step=lambda _: on_step(),
        )  # fmt: skip

    def _allowed(self, tokenizer: Tokenizer) -> Matching | None:
        if self.match is None:
            return None
        try:
            matching = Matching(self.match, tokenizer)
            matching([])  # raises where no token can begin a match
            return matching
        except ValueError as error:
            raise ValueError(f"match: {error}") from error


def read_reward(place: str) -> Reward:
    """The function that a place, FILE.py:FUNCTION, names. The file is run, and may import those beside it.

    Raises ValueError for a place that names no function, FileNotFoundError for a file that is not there.
    """
    path, _, name = place.rpartition(":")
    if not path:
        raise ValueError(f"reward is {place!r}; it must be FILE.py:FUNCTION, a function of the text")
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path} to take the reward {name!r} from")
    sys.path.insert(0, str(Path(path).resolve().parent))
    function = runpy.run_path(path).get(name)
    if not callable(function):
        raise ValueError(f"{path} has no function {name!r}")
    return function  # type: ignore[no-any-return]


def read_draft(
    name: str, tokenizer: Tokenizer, load: Callable[[str], tuple[LanguageModel, Tokenizer]]
) -> Draft:
    """What proposes tokens: `PromptLookup` for "lookup", else the model that `load` gives for the name.

    Raises ValueError for a model with another tokenizer.
    """
    if name == "lookup":
        return PromptLookup()
    draft, its = load(name)
    if _pieces(its) != _pieces(tokenizer):
        raise ValueError(f"the draft {name!r} has another tokenizer than the model; it must have the same")
    return draft


def _pieces(tokenizer: Tokenizer) -> list[bytes]:
    return [tokenizer.decode_bytes([token], specials=True) for token in range(tokenizer.vocab_size)]
