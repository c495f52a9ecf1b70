"""Cross-entropy as a sum and a count: whoever reports divides once, at the end."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lmtutorial.batches import IGNORE

CHUNK = 2**18
"""Logits turned into probabilities at a time: what a CPU keeps in its cache; a GPU takes 64 times as many."""


class LossSum(NamedTuple):
    """The negative log-likelihood of some tokens in nats, and how many they were; two scalar tensors."""

    nats: Tensor
    tokens: Tensor


def lm_loss(logits: Tensor, targets: Tensor, ignore: int = IGNORE) -> LossSum:
    """The total cross-entropy of `targets` under `logits`, in nats, and the number of targets counted.

    Takes logits (..., vocab) of any floating type and targets (...) int64; targets equal to `ignore` count
    for nothing. Sums in float32. Equal to `F.cross_entropy(..., reduction="sum")` in value and gradient, but
    where that keeps a second tensor as large as the logits for the backward pass, this one computes the
    probabilities again, a chunk of rows at a time.

    Raises ValueError where the shapes do not fit.

    >>> loss = lm_loss(torch.zeros(2, 3, 50), torch.tensor([[7, 7, 7], [7, 7, IGNORE]]))
    >>> round(float(loss.nats / loss.tokens), 4)  # a uniform guess among 50 tokens costs log 50 nats
    3.912
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"targets of shape {tuple(targets.shape)} do not fit logits of shape {tuple(logits.shape)}; "
            f"logits (..., vocab) need targets {tuple(logits.shape[:-1])}"
        )
    nats = _SummedCrossEntropy.apply(logits.flatten(0, -2), targets.flatten(), ignore)  # type: ignore[no-untyped-call]
    return LossSum(nats, (targets != ignore).sum())


class _SummedCrossEntropy(torch.autograd.Function):
    """Sum over rows of -log softmax(logits)[target], keeping only the logits for the way back."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor, ignore: int) -> Tensor:
        ctx.save_for_backward(logits_NV, targets_N)
        ctx.ignore = ignore
        nats = logits_NV.new_zeros((), dtype=torch.float32)
        for rows in _chunks(logits_NV):
            nats += F.cross_entropy(
                logits_NV[rows].float(), targets_N[rows], ignore_index=ignore, reduction="sum"
            )
        return nats

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        logits_NV, targets_N = ctx.saved_tensors
        counted_N1 = (targets_N != ctx.ignore).unsqueeze(1)
        index_N1 = targets_N.unsqueeze(1).clamp_min(0)
        grad_NV = torch.empty_like(logits_NV)
        minus_one = grads[0].new_full((1, 1), -1.0)
        for rows in _chunks(logits_NV):  # d(-log p_target)/d(logits) = p - onehot(target)
            grad = logits_NV[rows].softmax(-1, dtype=torch.float32)
            grad.scatter_add_(1, index_N1[rows], minus_one.expand(len(grad), 1))
            torch.mul(grad, counted_N1[rows] * grads[0], out=grad_NV[rows])
        return grad_NV, None, None


def _chunks(logits_NV: Tensor) -> list[slice]:
    size = CHUNK if logits_NV.device.type == "cpu" else 64 * CHUNK
    step = max(1, size // logits_NV.shape[1])
    return [slice(start, start + step) for start in range(0, len(logits_NV), step)]
