"""What every decoder does before its first step: check the prompts, and read them in one forward."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lmtutorial.models.cache import Cache, LanguageModel

Prompts = Sequence[Sequence[int]]
"""Token ids, one list a prompt, of any lengths; tensors and arrays of integers do as well."""


def check_prompts(model: LanguageModel, prompts: Prompts, max_new_tokens: int) -> list[list[int]]:
    """The prompts as lists of ints, each with room for `max_new_tokens` more in the model's context.

    Raises TypeError for what is no list of integers, ValueError for a prompt that is empty, too long, or
    holds an id that the model does not know; the message quotes the prompt's index and the value.
    """
    if not isinstance(max_new_tokens, Integral):
        raise TypeError(f"max_new_tokens is {max_new_tokens!r}; it must be an integer of at least 0")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 0")
    if isinstance(prompts, str | bytes) or not isinstance(prompts, Iterable):
        raise TypeError(
            f"prompts is {_shortened(prompts)}; it must be a list of prompts, each a list of token ids"
        )
    return [_check_prompt(model, row, prompt, max_new_tokens) for row, prompt in enumerate(prompts)]


def _check_prompt(model: LanguageModel, row: int, prompt: object, max_new_tokens: int) -> list[int]:
    values = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise TypeError(
            f"prompt {row} is {_shortened(prompt)}; a prompt is a list of token ids: encode text with the "
            "tokenizer first, and write [[1, 2]] for the one prompt [1, 2]"
        )
    values = list(values)
    for value in values:
        if not isinstance(value, Integral):
            raise TypeError(f"prompt {row} holds {_shortened(value)}; token ids are integers")
    ids = [int(value) for value in values]
    if not ids:
        raise ValueError(
            f"prompt {row} is empty; a model needs a token to start from: give it the id of the end of text "
            "(tokenizer.eos) or of a line break"
        )
    if min(ids) < 0 or max(ids) >= model.vocab_size:
        place, bad = next((i, t) for i, t in enumerate(ids) if not 0 <= t < model.vocab_size)
        raise ValueError(
            f"prompt {row} holds token {bad} at position {place}; the ids of this model are 0 to "
            f"{model.vocab_size - 1}"
        )
    total = len(ids) + max_new_tokens
    if model.context is not None and total > model.context:
        raise ValueError(
            f"prompt {row} has {len(ids):,} tokens; with max_new_tokens={max_new_tokens} that is {total:,}, "
            f"over the context of {model.context:,}"
        )
    return ids


def check_eos(model: LanguageModel, eos: int | Collection[int] | None) -> frozenset[int]:
    """The ids that end a text: none, one or several. Raises like `check_prompts`."""
    if eos is None:
        return frozenset()
    if isinstance(eos, str | bytes) or not isinstance(eos, Iterable | Integral):
        raise TypeError(f"eos is {_shortened(eos)}; it must be a token id, a collection of them, or None")
    ids: list[int] = list(eos) if isinstance(eos, Iterable) else [eos]
    for token in ids:
        if not isinstance(token, Integral):
            raise TypeError(f"eos holds {_shortened(token)}; token ids are integers")
        if not 0 <= token < model.vocab_size:
            raise ValueError(f"eos is {token}; the ids of this model are 0 to {model.vocab_size - 1}")
    return frozenset(int(token) for token in ids)


def prefill(model: LanguageModel, prompts: list[list[int]], max_new_tokens: int) -> tuple[Tensor, Cache]:
    """Read all prompts in one forward: the logits of what follows each, (batch, vocab), and the cache.

    Ragged prompts are padded on the right. Each row's logits are those at its own last token, and the cache
    is cut back to each row's length, so that nothing has seen the padding. The cache has room for
    `max_new_tokens` more tokens a row.
    """
    tokens_BT = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True).to(model.device)
    lengths_B = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    batch, time = tokens_BT.shape
    cache = model.new_cache(batch, time + max_new_tokens)
    logits_BTV = model(tokens_BT, cache)
    cache.truncate(lengths_B)
    return logits_BTV[torch.arange(batch, device=model.device), lengths_B - 1], cache


@contextmanager
def decoding(model: LanguageModel) -> Iterator[None]:
    """No gradients and no dropout inside; afterwards every module is in the mode it was in."""
    training = [m for m in model.modules() if m.training] if isinstance(model, nn.Module) else []
    for module in training:
        module.training = False
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
