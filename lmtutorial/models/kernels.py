"""Two operations that torch's kernels for CPUs are slow at in training, written out in plain products.

Both equal torch's own, to which everything else than training on a CPU goes. What they are worth, by length:
benchmarks/kernels.py.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """Causal attention: each query's average of the values, weighted by softmax(q k / sqrt(size)).

    q is (batch, heads, time, size), k and v (batch, kv heads, slots, size); every heads / kv heads queries
    share one key. `visible` (batch, 1, time, slots) says which slots a query sees; None: those up to its own
    place. Returns (batch, heads, time, size), equal to `F.scaled_dot_product_attention`, which takes 2 to 4
    times as long in training on short texts in bfloat16 on CPUs, and no longer from about 512 tokens on.

    >>> q = k = torch.zeros(1, 1, 3, 2)
    >>> attend(q, k, torch.tensor([[[[0.0], [1.0], [2.0]]]])).flatten()  # means of what was seen
    tensor([0.0000, 0.5000, 1.0000])
    """
    short = k.shape[2] <= 256  # the plain products fill time * time numbers a head
    if short and q.device.type == "cpu" and q.requires_grad and visible is None and q.dtype == torch.bfloat16:
        return _attend_plainly(q, k, v, dropout)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=visible, is_causal=visible is None, dropout_p=dropout,
        enable_gqa=k.shape[1] < q.shape[1],
    )  # fmt: skip


def _attend_plainly(q_BHTD: Tensor, k_BJTD: Tensor, v_BJTD: Tensor, dropout: float) -> Tensor:
    batch, kv_heads, time, size = k_BJTD.shape
    q_NMD = q_BHTD.reshape(batch * kv_heads, -1, size)  # the queries that share a key, below each other
    hidden_TT = q_BHTD.new_full((time, time), float("-inf")).triu(1)
    hidden_MT = hidden_TT.repeat(q_NMD.shape[1] // time, 1).expand(len(q_NMD), -1, -1)
    scores_NMT = torch.baddbmm(hidden_MT, q_NMD, k_BJTD.flatten(0, 1).mT, alpha=size**-0.5)
    weights_NMT = F.dropout(scores_NMT.softmax(-1), dropout)
    return (weights_NMT @ v_BJTD.flatten(0, 1)).view(batch, -1, time, v_BJTD.shape[-1])


class RMSNorm(nn.RMSNorm):
    """`nn.RMSNorm`, x / sqrt(mean(x^2) + eps) * weight; torch 2.13 trains a little slower on CPUs.

    >>> RMSNorm(4)(torch.tensor([2.0, -2.0, 2.0, -2.0])).detach()
    tensor([ 1.0000, -1.0000,  1.0000, -1.0000])
    """

    eps: float

    def __init__(self, size: int, eps: float = 1e-5) -> None:
        super().__init__(size, eps)

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) -> the same, in the type of x."""
        if x.device.type == "cpu" and x.requires_grad:
            return _RMSNorm.apply(x, self.weight, self.eps)  # type: ignore[no-any-return, no-untyped-call]
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        at_least = torch.float64 if x.dtype == torch.float64 else torch.float32
        squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=at_least).square()
        scale = (squares / x.shape[-1] + eps).rsqrt().to(x.dtype)
        unit = x * scale
        ctx.save_for_backward(unit, scale, weight)
        y: Tensor = unit * weight.to(x.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        unit, scale, weight = ctx.saved_tensors
        grad_weight = (grads[0] * unit).flatten(0, -2).sum(0, dtype=weight.dtype)
        grad = grads[0] * weight.to(unit.dtype)
        radial = (grad * unit).mean(-1, keepdim=True)  # what would only change the length has no effect
        return (grad - unit * radial) * scale, grad_weight, None
