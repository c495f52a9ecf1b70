"""Weights spread over several processes (FSDP2), so that none must hold all of them, and put together again.

Each process keeps its part of every tensor: of the weights, of their gradients, and of what the optimizer
remembers, with AdamW in float32 16 bytes a weight in all. The whole weights of a block are there only while
it computes. At the start each process holds the whole weights once. Sources: Rajbhandari et al., "ZeRO", SC
2020 (stage 3); Zhao et al., "PyTorch FSDP", VLDB 2023.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:  # loading it takes a second, which most programs can save
    from torch.distributed.tensor import DTensor


def shard(model: nn.Module, precision: torch.dtype = torch.float32) -> None:
    """Spread a model's weights over all processes, in place; each of its `blocks` is gathered on its own.

    All processes call it with the same weights, whole, on the device that computes; later they call the model
    together. On GPUs the blocks are gathered in `precision`: autocast's own copies would outlive them.

    Raises ValueError on CPUs with a torch that cannot, as 2.6.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    if any(map(is_spread, model.parameters())):
        return
    # logits are a view of what the head computed; here nobody changes them in place
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    device = next(model.parameters()).device.type
    if device == "cpu" and not can_spread_on_cpus():
        raise ValueError(
            f"torch {torch.__version__} spreads weights over GPUs only; a newer one does over CPUs"
        )
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    lower = precision if device != "cpu" and precision != torch.float32 else None
    policy = MixedPrecisionPolicy(lower, torch.float32 if lower else None, cast_forward_inputs=False)
    for block in [block for module in model.modules() for block in getattr(module, "blocks", ())]:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)

    def give_back(*_: object) -> None:
        """What is gathered for a forward pass is kept for the backward pass, also where none follows."""
        if not torch.is_grad_enabled():
            cast(FSDPModule, model).reshard()

    model.register_forward_hook(give_back)


def can_spread_on_cpus() -> bool:
    """Whether this torch's FSDP2 has all it needs on CPUs."""
    return hasattr(torch.cpu.Stream, "record_event")


def is_spread(tensor: Tensor) -> bool:
    """Whether each process holds a part of the tensor."""
    return hasattr(tensor, "full_tensor")


def local_part(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that is spread; any other as it is."""
    return cast("DTensor", tensor).to_local() if is_spread(tensor) else tensor


def together(tensor: Tensor) -> Tensor:
    """A tensor that is spread, whole; any other as it is. All processes call it."""
    return cast("DTensor", tensor).full_tensor() if is_spread(tensor) else tensor


def spread(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor spread as `like` is; where that is whole, or it is a single number, as it is.

    All processes call it.
    """
    if not is_spread(like) or not tensor.dim():
        return tensor
    from torch.distributed.tensor import distribute_tensor

    model = cast("DTensor", like)
    return distribute_tensor(tensor.to(like.device), model.device_mesh, model.placements)


def gathered(tree: Any, keep: bool = True) -> Any:
    """A nesting of dictionaries, lists and tuples with every tensor that is spread put together on the CPU.

    All processes call it; those that do not `keep` the result get None in place of these tensors.

    >>> gathered({"a": [torch.ones(2), 3]})
    {'a': [tensor([1., 1.]), 3]}
    """
    if isinstance(tree, Tensor) and is_spread(tree):
        whole = together(tree.detach())  # one at a time: they may not fit together
        return whole.cpu() if keep else None
    if isinstance(tree, dict):
        return {key: gathered(value, keep) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(gathered(value, keep) for value in tree)
    return tree
