"""Greedy decoding and sampling: one forward a step for all prompts, from any language model.

No step waits for the device: tokens stay there until the end, and whether all texts have ended is asked only
now and then. The noise of a text is drawn before the first step.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor

from lmtutorial.decode.constraints import NOTHING, Allowed, Rows
from lmtutorial.decode.logits import Filters
from lmtutorial.decode.noise import check_seed, row_noise
from lmtutorial.decode.prompts import Prompts, check_eos, check_prompts, decoding, prefill
from lmtutorial.models.cache import LanguageModel


class Generation(NamedTuple):
    """What a decoder wrote after one prompt."""

    tokens: list[int]
    """The new tokens only, the end-of-text token included where it was met."""
    logprob: float
    """The log-probability of `tokens` given the prompt, in nats, under the model itself: at temperature 1 and
    unfiltered, whatever they were drawn from."""
    finished: bool
    """Whether the text came to its end, an end-of-text token or the end of what was allowed, not only to the
    limit of new tokens."""


def greedy(
    model: LanguageModel,
    prompts: Prompts,
    max_new_tokens: int,
    *,
    eos: int | Collection[int] | None = None,
    allowed: Allowed | None = None,
) -> list[Generation]:
    """The most likely token at each step, after each of the prompts (the first of them where several tie).

    This is sampling from a point mass: see `sample` for what is common to both.

    >>> from lmtutorial.models.ngram import NGram
    >>> model = NGram.train([0, 1, 2, 3] * 20, order=2, vocab_size=4)
    >>> [generation.tokens for generation in greedy(model, [[0], [3, 0, 1]], 5, eos=3)]
    [[1, 2, 3], [2, 3]]
    """
    return sample(model, prompts, max_new_tokens, temperature=0.0, eos=eos, allowed=allowed)


def sample(
    model: LanguageModel,
    prompts: Prompts,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    typical_p: float | None = None,
    repetition_penalty: float = 1.0,
    eos: int | Collection[int] | None = None,
    seed: int | None = None,
    allowed: Allowed | None = None,
) -> list[Generation]:
    """Random texts after each of the prompts: token by token, drawn from the filtered distribution.

    `prompts` are lists of token ids, of any lengths and any number. Each text ends with an `eos` token (an id
    or a collection of ids) or after `max_new_tokens`. The filters are those of
    `lmtutorial.decode.logits.Filters`, in its order; the repetition penalty counts the prompt's tokens too.

    A text depends on its own prompt only, not on its neighbors: its noise comes from `seed`, its prompt, and
    how many times the same prompt stands before it (so that copies of a prompt get different texts). With the
    same seed a larger `max_new_tokens` only goes on. Without one, a seed is drawn from torch's global
    generator, so that `torch.manual_seed` rules it.

    `allowed` is asked at each step which tokens may follow the new tokens so far; others get probability 0,
    before all filters. See `lmtutorial.decode.constraints`, whose `Matching` allows what matches a pattern.

    Nothing is computed for gradients. A model in training mode is read with its dropout off and then put back
    as it was.

    Raises ValueError or TypeError, before the model runs, for an empty prompt, an id that the model does not
    know, a prompt with no room for `max_new_tokens` in the model's context, and an option out of its range;
    ValueError where the model gives logits that are NaN, or probability 0 to all tokens that are allowed.

    >>> from lmtutorial.models.ngram import NGram
    >>> model = NGram.train([0, 1, 0, 2] * 20, order=2, vocab_size=3)
    >>> [first, second] = sample(model, [[0], [0]], 6, top_k=2, seed=1)
    >>> len(first.tokens), first.finished, first.tokens == second.tokens
    (6, False, False)
    """
    filters = Filters(temperature, top_k, top_p, min_p, typical_p, repetition_penalty)
    ids = check_prompts(model, prompts, max_new_tokens)
    ends = check_eos(model, eos)
    seed = check_seed(seed)
    if not ids:
        return []
    with decoding(model):
        rows = Rows(allowed, len(ids), ends) if allowed else None
        steps = _steps(model, ids, max_new_tokens, filters, seed, rows)
        stops = ends | {NOTHING} if rows else ends
        tokens_NB, logprobs_NB = _collect(steps, model, (max_new_tokens, len(ids)), stops)
    texts = zip(tokens_NB.T.tolist(), logprobs_NB.T.tolist(), strict=True)
    return [_generation(row, tokens, logprobs, ends) for row, (tokens, logprobs) in enumerate(texts)]


def stream(
    model: LanguageModel,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    typical_p: float | None = None,
    repetition_penalty: float = 1.0,
    eos: int | Collection[int] | None = None,
    seed: int | None = None,
    allowed: Allowed | None = None,
) -> Iterator[int]:
    """The tokens of `sample(model, [prompt], ...)[0]`, each as soon as it is known.

    Checks its arguments when called, computes when iterated. Between two tokens the model is in the caller's
    hands, in its own mode and with gradients as they were.

    >>> from lmtutorial.models.ngram import NGram
    >>> model = NGram.train([0, 1, 2, 3] * 20, order=2, vocab_size=4)
    >>> for token in stream(model, [0], 3, temperature=0):
    ...     print(token)
    1
    2
    3
    """
    filters = Filters(temperature, top_k, top_p, min_p, typical_p, repetition_penalty)
    ids = check_prompts(model, [prompt], max_new_tokens)
    ends = check_eos(model, eos)
    rows = Rows(allowed, 1, ends) if allowed else None
    return _stream(_steps(model, ids, max_new_tokens, filters, check_seed(seed), rows), model, ends)


class _Step(NamedTuple):
    """The next token of every row, and its log-probability under the model; (batch,) each."""

    tokens: Tensor
    logprobs: Tensor


def _stream(steps: Iterator[_Step], model: LanguageModel, ends: frozenset[int]) -> Iterator[int]:
    for done in count():
        with decoding(model):
            step = next(steps, None)
            if step is None:
                return
            token, logprob = int(step.tokens), float(step.logprobs)
        if token == NOTHING:
            return
        _refuse_nan(logprob, row=0, done=done)
        yield token
        if token in ends:
            return


def _collect(
    steps: Iterator[_Step], model: LanguageModel, shape: tuple[int, int], ends: frozenset[int]
) -> tuple[Tensor, Tensor]:
    """Tokens and log-probabilities, both of `shape` (steps, batch) or shorter: until all rows have ended."""
    tokens_NB = torch.empty(shape, dtype=torch.int64, device=model.device)
    logprobs_NB = torch.empty(shape, dtype=torch.float64, device=model.device)
    ended_B = torch.zeros(shape[1], dtype=torch.bool, device=model.device)
    is_end_V = torch.zeros(model.vocab_size + 1, dtype=torch.bool, device=model.device)  # NOTHING is the last
    is_end_V[list(ends)] = True
    every = patience(model.device)
    done = 0
    for step in steps:
        tokens_NB[done] = step.tokens
        logprobs_NB[done] = step.logprobs
        done += 1
        if ends:
            ended_B |= is_end_V[step.tokens]
            if done % every == 0 and ended_B.all():
                break
    return tokens_NB[:done], logprobs_NB[:done]


def patience(device: torch.device) -> int:
    """Steps between two questions whether all texts have ended.

    On a GPU each question waits for the device to catch up, so that it is worth up to 15 steps computed for
    nothing. On a CPU there is nothing to wait for.
    """
    return 1 if device.type == "cpu" else 16


def _steps(
    model: LanguageModel,
    ids: list[list[int]],
    max_new_tokens: int,
    filters: Filters,
    seed: int | None,
    rows: Rows | None,
) -> Iterator[_Step]:
    """Step after step, one forward each, all on the device."""
    if not max_new_tokens:
        return
    noise_NB = None if filters.greedy else row_noise(ids, max_new_tokens, seed).to(model.device)
    logits_BV, cache = prefill(model, ids, max_new_tokens)
    seen_BV = None if filters.repetition_penalty == 1 else _seen(ids, logits_BV)
    tokens_B1 = torch.empty(0)
    for step in range(max_new_tokens):
        if step:
            logits_BV = model(tokens_B1, cache)[:, -1]
        noise_B = None if noise_NB is None else noise_NB[step]
        choice_BV = logits_BV if rows is None else rows.restrict(logits_BV)
        tokens_B1 = filters.choose(choice_BV, noise_B, seen_BV).unsqueeze(1)
        if seen_BV is not None:
            seen_BV.scatter_(1, tokens_B1, True)
        logprobs_BV = logits_BV.log_softmax(-1, dtype=torch.promote_types(logits_BV.dtype, torch.float32))
        written_B = tokens_B1[:, 0] if rows is None else rows.read(tokens_B1[:, 0])
        yield _Step(written_B, logprobs_BV.gather(1, tokens_B1)[:, 0])


def _seen(ids: list[list[int]], logits_BV: Tensor) -> Tensor:
    """Which tokens each prompt holds, (batch, vocab)."""
    seen_BV = torch.zeros(logits_BV.shape, dtype=torch.bool)
    for row, prompt in enumerate(ids):
        seen_BV[row, prompt] = True
    return seen_BV.to(logits_BV.device)


def _generation(row: int, tokens: list[int], logprobs: list[float], ends: frozenset[int]) -> Generation:
    """Cut one row behind its first end."""
    end = next((step for step, token in enumerate(tokens) if token in ends or token == NOTHING), None)
    length = len(tokens) if end is None else end + (tokens[end] != NOTHING)
    for done, logprob in enumerate(logprobs[:length]):
        _refuse_nan(logprob, row, done)
    return Generation(tokens[:length], sum(logprobs[:length]), end is not None)


def _refuse_nan(logprob: float, row: int, done: int) -> None:
    if math.isnan(logprob):
        raise ValueError(f"the model's logits after prompt {row} and {done} new tokens are NaN")
