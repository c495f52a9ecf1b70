"""What `lmtutorial generate` does: the decoder that a command names, with the options that it gives."""

from __future__ import annotations

import dataclasses
import runpy
from collections.abc import Callable
from pathlib import Path

from lmtutorial.commands import Generate
from lmtutorial.decode.beam import beam_search
from lmtutorial.decode.constraints import Matching
from lmtutorial.decode.guesses import PromptLookup
from lmtutorial.decode.mcts import mcts
from lmtutorial.decode.sampling import Generation, sample
from lmtutorial.decode.speculative import Speculation, speculative
from lmtutorial.models.cache import LanguageModel
from lmtutorial.tokenizers import Tokenizer

Load = Callable[[str], tuple[LanguageModel, Tokenizer]]
FILTERS = ("temperature", "top_k", "top_p", "min_p")
OPTIONS = {
    "sample": {*FILTERS, "repetition_penalty", "seed", "match"},
    "beam": {"width", "length_penalty"},
    "mcts": {"temperature", "top_k", "seed", "reward", "simulations"},
    "speculative": {*FILTERS, "seed", "draft", "lookahead"},
}
"""By decoder, which flags it has a use for; the others are those that no decoder is named for."""


def write(
    command: Generate, model: LanguageModel, tokenizer: Tokenizer, load: Load
) -> tuple[list[Generation], str]:
    """The new tokens of each text, and what there is to say about how they were found.

    `load` gives the model and the tokenizer of a draft. Raises ValueError for a flag that the decoder has no
    use for, and for what the decoder refuses.
    """
    _check_flags(command)
    prompt = tokenizer.encode(command.prompt)
    room = command.max_new_tokens if model.context is None else max(0, model.context - len(prompt))
    prompts, steps = [prompt] * command.samples, min(command.max_new_tokens, room)
    filters = {name: getattr(command, name) for name in FILTERS}
    if command.decoder == "beam":
        [texts] = beam_search(
            model, [prompt], steps, width=command.width, length_penalty=command.length_penalty,
            eos=tokenizer.eos, n_best=min(command.samples, command.width),
        )  # fmt: skip
        return texts, ""
    if command.decoder == "mcts":
        texts = mcts(
            model, prompts, steps, reward=_reward(command, tokenizer), simulations=command.simulations,
            temperature=command.temperature, top_k=command.top_k, rollout="sample", eos=tokenizer.eos,
            seed=command.seed,
        )  # fmt: skip
        return texts, ""
    if command.decoder == "speculative":
        report = Speculation()
        texts = speculative(
            model, _draft(command, tokenizer, load), prompts, steps, lookahead=command.lookahead,
            eos=tokenizer.eos, seed=command.seed, report=report, **filters,
        )  # fmt: skip
        found = f"{report.calls} forwards, {report.calls_saved} saved; {report.acceptance_rate:.0%} accepted"
        return texts, found
    allowed = None if command.match is None else Matching(command.match, tokenizer)
    texts = sample(
        model, prompts, steps, repetition_penalty=command.repetition_penalty, eos=tokenizer.eos,
        seed=command.seed, allowed=allowed, **filters,
    )  # fmt: skip
    return texts, ""


def _check_flags(command: Generate) -> None:
    if command.samples < 1:
        raise ValueError(f"samples is {command.samples}; it must be at least 1")
    used = OPTIONS[command.decoder]
    for field in dataclasses.fields(command):
        owners = [name for name, options in OPTIONS.items() if field.name in options]
        if owners and field.name not in used and getattr(command, field.name) != field.default:
            flag = "--" + field.name.replace("_", "-")
            raise ValueError(f"{flag} is for --decoder {' and '.join(owners)}, not for {command.decoder}")


def _draft(command: Generate, tokenizer: Tokenizer, load: Load) -> LanguageModel | PromptLookup:
    if command.draft == "lookup":
        return PromptLookup()
    draft, its_tokenizer = load(command.draft)
    sizes = its_tokenizer.vocab_size, tokenizer.vocab_size
    if sizes[0] != sizes[1] or any(
        its_tokenizer.decode([i]) != tokenizer.decode([i]) for i in range(sizes[0])
    ):
        raise ValueError(
            f"the draft {command.draft!r} has another tokenizer than the model; it must have the same"
        )
    return draft


def _reward(command: Generate, tokenizer: Tokenizer) -> Callable[[list[int], list[int]], float]:
    """The user's function of a text, as one of token ids."""
    path, _, name = (command.reward or "").rpartition(":")
    if not path:
        raise ValueError(
            f"reward is {command.reward!r}; --decoder mcts needs --reward FILE.py:FUNCTION, a function of "
            "the text that gives a number, the higher the better"
        )
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path} to take the reward {name!r} from")
    function = runpy.run_path(path).get(name)
    if not callable(function):
        raise ValueError(f"{path} has no function {name!r}")
    return lambda prompt, new: function(tokenizer.decode([*prompt, *new]))
