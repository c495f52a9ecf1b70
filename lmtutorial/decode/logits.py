"""From logits to probabilities, and from probabilities to a token: one way for every decoder.

The filters are those of Hugging Face's `generate`, in its order: repetition penalty, temperature, top-k,
top-p, min-p, typical; equal to it logit for logit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

Pass = Callable[[Tensor, Any], Tensor]

COLDEST = 1e-30
"""Lower temperatures than this count as this: dividing by them would overflow float32."""


def to_probs(
    logits: Tensor,
    temperature: float = 1.0,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    typical_p: float | None = None,
    repetition_penalty: float = 1.0,
    seen: Tensor | None = None,
) -> Tensor:
    """The distribution that a decoder draws the next token from: logits (..., vocab) to probabilities.

    Greedy decoding is the point mass on the largest logit (the first of them where several tie), which
    temperature 0 and top_k=1 give. The options are those of `Filters`; `seen` (..., vocab) bool marks the
    tokens that `repetition_penalty` makes less likely. Half-precision logits give float32 probabilities.

    Raises ValueError or TypeError for an option out of its range, and where a penalty lacks `seen`.

    >>> logits = torch.tensor([2.0, 1.0, 0.0]).log()
    >>> to_probs(logits)
    tensor([0.6667, 0.3333, 0.0000])
    >>> to_probs(logits, temperature=0.5)  # probabilities squared, and normalized again
    tensor([0.8000, 0.2000, 0.0000])
    >>> to_probs(logits, temperature=0)
    tensor([1., 0., 0.])
    """
    return Filters(temperature, top_k, top_p, min_p, typical_p, repetition_penalty).probs(logits, seen)


@dataclass(frozen=True)
class Filters:
    """What a decoder does to the model's distribution before it draws a token; by default nothing.

    >>> Filters(temperature=0.8, top_k=50).greedy
    False
    """

    temperature: float = 1.0
    """Divides the logits: below 1 sharper, above 1 flatter, 0 greedy."""
    top_k: int | None = None
    """Keep the k largest logits, and those that tie with the k-th; 1 is greedy."""
    top_p: float | None = None
    """Keep the fewest, likeliest tokens that hold this much of the probability."""
    min_p: float | None = None
    """Keep tokens with at least this share of the likeliest token's probability."""
    typical_p: float | None = None
    """Keep the fewest tokens, of those about as surprising as is usual here, that hold this much."""
    repetition_penalty: float = 1.0
    """Divides positive logits and multiplies negative ones of tokens in the prompt or generated before."""

    def __post_init__(self) -> None:
        temperature, penalty = self.temperature, self.repetition_penalty
        if not (_is_number(temperature) and 0 <= temperature < math.inf):
            raise _refusal("temperature", temperature, "0 (greedy) or a finite number above 0")
        if not (_is_number(penalty) and 0 < penalty < math.inf):
            raise _refusal("repetition_penalty", penalty, "a finite number above 0; 1 changes nothing")
        if self.top_k is not None and not (_is_number(self.top_k, Integral) and self.top_k >= 1):
            raise _refusal("top_k", self.top_k, "an integer of at least 1, or None to keep all tokens")
        for name in ("top_p", "min_p", "typical_p"):
            share = getattr(self, name)
            if share is not None and not (_is_number(share) and 0 <= share <= 1):
                raise _refusal(name, share, "a number from 0 to 1, or None to keep all tokens")

    @property
    def greedy(self) -> bool:
        """Whether all probability is on one token, so that drawing needs no noise."""
        return self.temperature == 0 or self.top_k == 1

    def probs(self, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """The distribution to draw from; see `to_probs`."""
        if self.greedy:
            best = argmax(self.penalized(logits, seen)).unsqueeze(-1)
            return torch.zeros_like(logits, dtype=precise(logits).dtype).scatter_(-1, best, 1.0)
        return self.filtered(logits, seen).softmax(-1)

    def choose(self, logits: Tensor, uniforms: Tensor | None, seen: Tensor | None = None) -> Tensor:
        """`draw(self.probs(logits, seen), uniforms)`, without forming a point mass where it is one."""
        if self.greedy:
            return argmax(self.penalized(logits, seen))
        assert uniforms is not None
        return draw(self.probs(logits, seen), uniforms)

    def penalized(self, logits: Tensor, seen: Tensor | None) -> Tensor:
        """Logits, in float32 at least, after the repetition penalty."""
        logits = precise(logits)
        if self.repetition_penalty == 1:
            return logits
        if seen is None:
            raise ValueError(
                f"repetition_penalty={self.repetition_penalty} needs `seen`, a bool tensor like the logits "
                "that marks the tokens to penalize"
            )
        return penalize(logits, seen, self.repetition_penalty)

    def filtered(self, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """Logits after all filters, in Hugging Face's order: -inf where a token was dropped."""
        logits = self.penalized(logits, seen)
        for keep, value in self.passes.items():
            logits = keep(logits, value)
        return logits

    @property
    def passes(self) -> dict[Pass, float]:
        """What changes the logits after the penalty, in the order of `PASSES`, each with its value."""
        values: dict[Pass, float] = {}
        if self.temperature != 1:
            values[cool] = max(self.temperature, COLDEST)
        if self.top_k is not None:
            values[keep_top_k] = self.top_k
        if self.top_p is not None and self.top_p < 1:
            values[keep_top_p] = self.top_p
        if self.min_p:
            values[keep_min_p] = self.min_p
        if self.typical_p is not None and self.typical_p < 1:
            values[keep_typical] = self.typical_p
        return values


def penalize(logits: Tensor, seen: Tensor, penalty: float | Tensor) -> Tensor:
    """Make the tokens marked in `seen` less likely: positive logits / penalty, negative ones * penalty.

    `penalty` is one number, or one for each row, (..., 1).
    Source: Keskar et al., "CTRL", 2019, section 4.1; with a sign rule, as in Hugging Face.

    >>> penalize(torch.tensor([2.0, -2.0, 2.0]), torch.tensor([True, True, False]), 2.0)
    tensor([ 1., -4.,  2.])
    """
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def cool(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """Divide by the temperature, one number, or one for each row, (..., 1).

    >>> cool(torch.tensor([2.0, 1.0]), 0.5)
    tensor([4., 2.])
    """
    return logits / (temperature.to(logits) if isinstance(temperature, Tensor) else temperature)


def keep_top_k(logits: Tensor, k: int | Tensor) -> Tensor:
    """Drop (-inf) all but the `k` largest logits; those that tie with the k-th stay.

    `k` is one number, or one for each row, (..., 1).
    Source: Fan et al., "Hierarchical Neural Story Generation", ACL 2018.

    >>> keep_top_k(torch.tensor([1.0, 3.0, 2.0]), 2)
    tensor([-inf, 3., 2.])
    """
    vocab = logits.shape[-1]
    if isinstance(k, Tensor):
        kth = _sort(logits).gather(-1, vocab - k.clamp(max=vocab))
    else:
        kth = logits.topk(min(k, vocab)).values[..., -1:]
    return logits.masked_fill(logits < kth, -math.inf)


def keep_top_p(logits: Tensor, p: float | Tensor) -> Tensor:
    """Drop (-inf) the least likely tokens that together hold at most 1 - p of the probability.

    At least one token stays, and tokens that tie with the last one that stays do too. `p` is one number, or
    one for each row, (..., 1).
    Source: Holtzman et al., "The Curious Case of Neural Text Degeneration", ICLR 2020.

    >>> keep_top_p(torch.tensor([0.5, 0.3, 0.2]).log(), 0.7).exp()
    tensor([0.5000, 0.3000, 0.0000])
    """
    rising = _sort(logits)
    cumulative = rising.softmax(-1).cumsum(-1)
    rest = (1 - p).to(cumulative) if isinstance(p, Tensor) else torch.full_like(cumulative[..., :1], 1 - p)
    dropped = torch.searchsorted(cumulative, rest, right=True)
    cut = rising.gather(-1, dropped.clamp_(max=logits.shape[-1] - 1))
    return logits.masked_fill(logits < cut, -math.inf)


def keep_min_p(logits: Tensor, p: float | Tensor) -> Tensor:
    """Drop (-inf) tokens with less than `p` times the probability of the likeliest one.

    `p` is one number, or one for each row, (..., 1).
    Source: Nguyen et al., "Turning Up the Heat: Min-p Sampling", ICLR 2025.

    >>> keep_min_p(torch.tensor([0.6, 0.3, 0.1]).log(), 0.25).exp()
    tensor([0.6000, 0.3000, 0.0000])
    """
    probs = logits.softmax(-1)
    p = p.to(probs) if isinstance(p, Tensor) else p
    return logits.masked_fill(probs < p * probs.amax(-1, keepdim=True), -math.inf)


def keep_typical(logits: Tensor, p: float | Tensor) -> Tensor:
    """Drop (-inf) all but the most typical tokens, as few as together hold `p` of the probability.

    A token is typical whose surprise, -log of its probability, is near the mean surprise, the entropy: where
    all is open, not even the likeliest token need be. `p` is one number, or one for each row, (..., 1).
    Source: Meister et al., "Locally Typical Sampling", TACL 2023.

    >>> keep_typical(torch.tensor([0.4, 0.15, 0.15, 0.15, 0.15]).log(), 0.5).exp()
    tensor([0.0000, 0.1500, 0.1500, 0.1500, 0.1500])
    """
    logprobs = logits.log_softmax(-1)
    probs = logprobs.exp()
    entropy = -(probs * logprobs).nansum(-1, keepdim=True)
    distances = (-logprobs - entropy).abs()
    rising, order = distances.sort(-1)
    held = probs.gather(-1, order).cumsum(-1)
    p = p.to(held) if isinstance(p, Tensor) else p
    last = (held < p).sum(-1, keepdim=True).clamp(max=logits.shape[-1] - 1)
    return logits.masked_fill(distances > rising.gather(-1, last), -math.inf)


PASSES: tuple[Pass, ...] = (cool, keep_top_k, keep_top_p, keep_min_p, keep_typical)
"""In Hugging Face's order."""


def draw(probs: Tensor, uniforms: Tensor) -> Tensor:
    """One token a row: the first whose cumulative probability passes the row's noise.

    Takes probs (..., vocab), which need not sum to 1, and noise (...) uniform in [0, 1); gives ids (...).
    A token of probability 0 is never drawn. One number a row: about 20 times faster on a CPU than
    `torch.multinomial`, which draws one a token.

    >>> draw(torch.tensor([0.2, 0.0, 0.8]).expand(3, 3), torch.tensor([0.0, 0.19, 0.21]))
    tensor([0, 0, 2])
    """
    # A GPU sums in no fixed order; in float32 a token of probability 0 could come out with a sliver of it.
    cumulative = probs.cumsum(-1, dtype=torch.float64 if probs.is_cuda else None)
    largest = 1 - torch.finfo(cumulative.dtype).eps / 2  # 1 itself, by rounding, would pass the last token
    noise = uniforms.unsqueeze(-1).to(cumulative).clamp(max=largest) * cumulative[..., -1:]
    tokens = torch.searchsorted(cumulative, noise, right=True).squeeze(-1)
    return tokens.clamp_(max=probs.shape[-1] - 1)  # out of range only where probs are NaN


# On a CPU numpy sorts 20 times faster than torch (which sorts ids too) and finds a maximum 10 times faster.


def _sort(logits: Tensor) -> Tensor:
    """Values in rising order."""
    if logits.device.type == "cpu":
        return torch.from_numpy(np.sort(logits.detach().numpy(), axis=-1))
    return logits.sort(-1).values


def argmax(logits: Tensor) -> Tensor:
    """The id of the largest logit, the first of them where several tie."""
    if logits.device.type == "cpu":
        return torch.as_tensor(logits.detach().numpy().argmax(-1))
    return logits.argmax(-1)


def precise(logits: Tensor) -> Tensor:
    """In float32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _is_number(value: object, kind: type = Real) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _refusal(name: str, value: object, allowed: str) -> Exception:
    error = ValueError if _is_number(value) else TypeError
    return error(f"{name} is {value!r}; it must be {allowed}")
