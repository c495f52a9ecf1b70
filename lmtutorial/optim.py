"""Optimizers written to be read: SGD with momentum, Adam, AdamW and Muon."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lmtutorial.devices import bfloat16_pays

Parameters = Iterable[Tensor] | Iterable[dict[str, Any]]


class SGD(Optimizer):
    """Stochastic gradient descent, with momentum: m <- mu m + g, then w <- w - lr m.

    Equal to `torch.optim.SGD`. Source: Robbins and Monro 1951; Polyak 1964 (momentum).

    >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
    >>> optimizer = SGD([weight], lr=0.1, momentum=0.9)
    >>> for _ in range(2):
    ...     weight.grad = torch.tensor([1.0])
    ...     optimizer.step()
    >>> weight.detach()  # 1 - 0.1 - 0.1 * 1.9
    tensor([0.7100])
    """

    def __init__(self, params: Parameters, lr: float, momentum: float = 0.0) -> None:
        check_settings(lr=lr, momentum=momentum)
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        for group, p, grad, state in _with_gradients(self):
            m = state.setdefault("momentum_buffer", torch.zeros_like(p))
            m.mul_(group["momentum"]).add_(grad)
            p.sub_(m, alpha=group["lr"])


class Adam(Optimizer):
    """Adam: the running mean of the gradient over the root of the running mean of its square.

        m <- beta1 m + (1 - beta1) g          v <- beta2 v + (1 - beta2) g^2
        w <- w - lr m' / (sqrt(v') + eps)     m' = m / (1 - beta1^t),  v' = v / (1 - beta2^t)

    Both averages start at 0, so early ones are too small; the division by 1 - beta^t mends that. Equal to
    `torch.optim.Adam`. Source: Kingma and Ba, "Adam", ICLR 2015, algorithm 1.

    >>> weight = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    >>> weight.grad = torch.tensor([100.0, 0.01])
    >>> Adam([weight], lr=0.1).step()
    >>> weight.detach()  # the first step has the length of the learning rate, whatever the gradient's
    tensor([0.9000, 0.9000])
    """

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        check_settings(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        for group, p, grad, state in _with_gradients(self):
            (beta1, beta2), lr = group["betas"], group["lr"]
            m = state.setdefault("exp_avg", torch.zeros_like(p))
            v = state.setdefault("exp_avg_sq", torch.zeros_like(p))
            t = state["step"] = state.get("step", 0) + 1
            m.lerp_(grad, 1 - beta1)
            v.lerp_(grad.square(), 1 - beta2)
            unbiased_m, unbiased_v = m / (1 - beta1**t), v / (1 - beta2**t)
            p.mul_(1 - lr * group["weight_decay"])  # 1 for Adam
            p.sub_(lr * unbiased_m / (unbiased_v.sqrt() + group["eps"]))


class AdamW(Adam):
    """Adam that also shrinks each weight by the share lr * weight_decay, whatever its gradient.

    A penalty in the loss would be divided by sqrt(v) like any gradient, and so decay the least where
    gradients are large; here the decay is decoupled from it. Equal to `torch.optim.AdamW`.
    Source: Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019.

    >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
    >>> weight.grad = torch.tensor([0.0])
    >>> AdamW([weight], lr=0.1, weight_decay=0.5).step()
    >>> weight.detach()
    tensor([0.9500])
    """

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay)


class Muon(Optimizer):
    """Momentum whose matrix is orthogonalized before it is applied, so that all directions move alike.

    With the momentum's singular value decomposition U S V^T, the step is about U V^T, scaled by
    0.2 sqrt(max(rows, columns)), so that its entries are as large as those of Adam's usual steps and both can
    use one learning rate. For the matrices inside a network; embeddings, heads and vectors are Adam's.
    Equal to `torch.optim.Muon(adjust_lr_fn="match_rms_adamw")`, which newer versions of torch have, but
    matrices of one shape are orthogonalized together.

    Sources: Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024 (the method);
    Liu et al., "Muon is scalable for LLM training", 2025 (the scale and the weight decay).

    >>> weight = torch.nn.Parameter(torch.zeros(2, 2))
    >>> weight.grad = torch.tensor([[100.0, 0.0], [0.0, 1.0]])
    >>> Muon([weight], lr=0.1, weight_decay=0.0).step()
    >>> bool((weight.diagonal() < -0.01).all())  # both directions moved, the weak one too
    True
    """

    def __init__(
        self, params: Parameters, lr: float = 1e-3, momentum: float = 0.95, weight_decay: float = 0.1
    ) -> None:
        check_settings(lr=lr, momentum=momentum, weight_decay=weight_decay)
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        shapes = [tuple(p.shape) for group in self.param_groups for p in group["params"] if p.dim() != 2]
        if shapes:
            raise ValueError(f"Muon is for matrices; a parameter has shape {shapes[0]}")

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        updates = defaultdict(list)
        for group, p, grad, state in _with_gradients(self):
            momentum = group["momentum"]
            m = state.setdefault("momentum_buffer", torch.zeros_like(p))
            m.lerp_(grad, 1 - momentum)
            updates[p.shape].append((group, p, grad.lerp(m, momentum)))  # Nesterov: one step ahead
        for (rows, columns), alike in updates.items():
            steps = orthogonalize(torch.stack([update for _, _, update in alike]))
            for (group, p, _), step in zip(alike, steps, strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(step, alpha=group["lr"] * 0.2 * math.sqrt(max(rows, columns)))


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest orthogonal matrices, nearly: (many, rows, columns), singular values moved to about 1.

    Each step applies the polynomial a s + b s^3 + c s^5 to all singular values s, by products of matrices
    alone. Its coefficients make small values grow fast; in the end all are between 0.7 and 1.2. So little
    hangs on the last digits that bfloat16 is enough, where that is faster.
    Source: Jordan et al. 2024 (a Newton-Schulz iteration).

    >>> matrix = torch.diag(torch.tensor([9.0, 3.0, 1.0]))
    >>> singular = torch.linalg.svdvals(orthogonalize(matrix[None]).float())
    >>> bool((singular > 0.6).all() and (singular < 1.3).all())
    True
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices  # the smaller side first: a smaller square below
    x = x.to(torch.bfloat16 if bfloat16_pays(x.device, x.numel()) else torch.float32)
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)  # no singular value above 1
    for _ in range(steps):
        square = x @ x.mT
        higher = torch.baddbmm(square, square, square, beta=b, alpha=c)  # b x x^T + c (x x^T)^2
        x = torch.baddbmm(x, higher, x, beta=a)
    return x.mT if tall else x


def _with_gradients(optimizer: Optimizer) -> list[tuple[dict[str, Any], Tensor, Tensor, dict[str, Any]]]:
    """(group, parameter, gradient, state) of each parameter that has a gradient."""
    return [
        (group, p, p.grad, optimizer.state[p])
        for group in optimizer.param_groups
        for p in group["params"]
        if p.grad is not None
    ]


def check_settings(*, betas: tuple[float, float] = (0.0, 0.0), **settings: float) -> None:
    """Raises ValueError for a setting that is negative or not finite, or betas outside [0, 1)."""
    for name, value in settings.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be a finite number that is at least 0, got {value}")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas}")
