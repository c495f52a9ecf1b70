"""Which optimizer gets which parameters: weight decay's groups, and Muon beside AdamW."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.optim import Optimizer

from lmtutorial.optim import Muon, check_settings

OptimizerName = Literal["adamw", "muon"]


class MuonAdamW(Optimizer):
    """Muon for the matrices inside a network and AdamW for the rest, as one optimizer.

    The rest are embeddings, vectors, and the layer named `head`, whose rows are tokens like an embedding's.

    >>> optimizer = MuonAdamW(nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 3)), lr=0.01)
    >>> [[tuple(p.shape) for p in group["params"]] for group in optimizer.param_groups]
    [[(3, 3)], [(5, 3), (3,)]]
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        *,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        momentum: float = 0.95,
    ) -> None:
        matrices, rest = parameter_groups(model, weight_decay)
        matrices, head = _without_head(model, matrices)
        if not matrices["params"]:
            raise ValueError(f"{type(model).__name__} has no matrix inside; Muon has nothing to do")
        self._muon = Muon([matrices], lr, momentum)
        others = [group for group in (head, rest) if group["params"]]
        self._adamw = torch.optim.AdamW(others, lr, betas, fused=_can_fuse(others)) if others else None
        super().__init__(self._inner_groups(), {})
        self._share()

    def _inner(self) -> list[Optimizer]:
        return [self._muon] if self._adamw is None else [self._muon, self._adamw]

    def _inner_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self._inner() for group in optimizer.param_groups]

    def _share(self) -> None:
        """One state and one list of groups: what is set or restored from outside holds inside."""
        groups = [self.param_groups[:1], self.param_groups[1:]]
        for optimizer, own in zip(self._inner(), groups, strict=False):
            optimizer.param_groups, optimizer.state = own, self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """What `load_state_dict` calls."""
        super().__setstate__(state)
        self._share()

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        for optimizer in self._inner():
            optimizer.step()


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
    kind: OptimizerName = "adamw",
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
) -> Optimizer:
    """The optimizer that training uses, over the parameters of `model` that want gradients.

    "adamw" is AdamW in the groups of `parameter_groups`, with `weight_decay=0` plain Adam; "muon" is
    `MuonAdamW`. AdamW is torch's: on CPU and CUDA it is fused, one pass over the parameters a step.

    Raises ValueError for a rate or decay that is negative or not finite, or betas outside [0, 1).

    >>> optimizer = build_optimizer(nn.Linear(3, 2), 1e-3, weight_decay=0.1)
    >>> [group["weight_decay"] for group in optimizer.param_groups]
    [0.1, 0.0]
    """
    if kind not in get_args(OptimizerName):
        raise ValueError(f"the optimizer is {kind!r}; it must be one of {', '.join(get_args(OptimizerName))}")
    check_settings(learning_rate=learning_rate, weight_decay=weight_decay, betas=betas)
    groups = [group for group in parameter_groups(model, weight_decay) if group["params"]]
    if not groups:
        raise ValueError(f"{type(model).__name__} has no parameter to train")
    if kind == "muon":
        return MuonAdamW(model, learning_rate, weight_decay=weight_decay, betas=betas)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=_can_fuse(groups))


def _without_head(model: nn.Module, matrices: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The group of matrices in two: those inside the network, and the matrix of `model.head`."""
    last = getattr(model, "head", None)
    ids = {id(p) for p in last.parameters()} if isinstance(last, nn.Module) else set()
    head = [p for p in matrices["params"] if id(p) in ids]
    inside = [p for p in matrices["params"] if id(p) not in ids]
    return {**matrices, "params": inside}, {**matrices, "params": head}


def _can_fuse(groups: list[dict[str, Any]]) -> bool:
    return all(p.device.type in ("cpu", "cuda") for group in groups for p in group["params"])
