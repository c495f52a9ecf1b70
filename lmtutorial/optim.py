"""AdamW with its parameter groups, and learning-rate schedules as pure functions step -> rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Schedule = Callable[..., float]  # (step, steps, *, peak, warmup, floor) -> learning rate


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for an optimizer: what weight decay pulls toward zero, and what it leaves alone.

    Matrices decay. Biases and gains do not: there are few of them and they set scales. Embeddings do not
    either, nor the head tied to one: the row of a rare token would shrink at every step that does not meet it
    (OLMo 2, 2024, section 3.3). A tensor shared by two modules is listed once.

    >>> groups = parameter_groups(nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2)), weight_decay=0.1)
    >>> [(group["weight_decay"], [tuple(p.shape) for p in group["params"]]) for group in groups]
    [(0.1, [(2, 3)]), (0.0, [(5, 3), (2,)])]
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.dim() >= 2 and id(p) not in embeddings]
    chosen = {id(p) for p in decayed}
    rest = [p for p in trained if id(p) not in chosen]
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]


def build_optimizer(
    model: nn.Module,
    learning_rate: float,
    *,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
) -> torch.optim.AdamW:
    """AdamW over the parameters of `model` that want gradients, in the groups of `parameter_groups`.

    With `weight_decay=0` this is Adam. On CPU and CUDA the fused implementation is used: one pass over the
    parameters a step. Source: Kingma and Ba 2015 (Adam); Loshchilov and Hutter 2019 (decoupled weight decay).

    Raises ValueError for a rate or decay that is negative or not finite, or betas outside [0, 1).

    >>> optimizer = build_optimizer(nn.Linear(3, 2), 1e-3, weight_decay=0.1)
    >>> [group["weight_decay"] for group in optimizer.param_groups]
    [0.1, 0.0]
    """
    for name, value in (("learning_rate", learning_rate), ("weight_decay", weight_decay)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be a finite number that is at least 0, got {value}")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas}")
    groups = [group for group in parameter_groups(model, weight_decay) if group["params"]]
    if not groups:
        raise ValueError(f"{type(model).__name__} has no parameter to train")
    fused = all(p.device.type in ("cpu", "cuda") for group in groups for p in group["params"])
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)


def _ramp(step: float, warmup: int) -> float:
    """The share of the peak that the warm-up allows at `step`; never 0, so that step 0 already learns."""
    return min(1.0, (step + 1) / warmup) if warmup else 1.0


def constant(step: float, steps: float, *, peak: float, warmup: int = 0, floor: float = 0.0) -> float:
    """The rate `peak`, after a linear warm-up over `warmup` steps; `steps` and `floor` have no effect.

    >>> [constant(step, 100, peak=0.4, warmup=4) for step in (0, 1, 3, 50)]
    [0.1, 0.2, 0.4, 0.4]
    """
    return peak * _ramp(step, warmup)


def cosine(step: float, steps: float, *, peak: float, warmup: int = 0, floor: float = 0.0) -> float:
    """Linear warm-up to `peak` over `warmup` steps, then half a cosine down to `floor * peak` at `steps`.

    The rate of the update from `step` to `step + 1`; past `steps` it stays at the floor.
    Source: Loshchilov and Hutter, "SGDR", 2017 (the cosine); Goyal et al. 2017 (the warm-up).

    >>> [round(cosine(step, 100, peak=1.0, warmup=20, floor=0.1), 3) for step in (0, 19, 20, 60, 100, 200)]
    [0.05, 1.0, 1.0, 0.55, 0.1, 0.1]
    """
    if step < warmup:
        return peak * _ramp(step, warmup)
    share = min(1.0, (step - warmup) / max(steps - warmup, 1))
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share)))


SCHEDULES: dict[str, Schedule] = {"constant": constant, "cosine": cosine}
