"""Decode steps through `torch.compile`: one graph for all of them, however long the texts grow.

    fast = compiled(model)              # or compiled(quantize(model))
    greedy(fast, prompts, 256)          # the first step of a batch compiles, for seconds to minutes

A compiler's graph stands for one set of shapes, and a cache that grows has new ones at each step. Here all
of the cache goes in, with its length and the window that is looked at left open, and the tokens' positions
are numbers in a tensor: nothing that the graph was specialized to changes. How it is written (`_Window`)
matters as much: scattering into a slice of the stacked layers would have the whole cache copied each step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lmtutorial.models.cache import Cache
from lmtutorial.models.kv_cache import KVCache
from lmtutorial.models.stand_in import StandIn
from lmtutorial.models.transformer import Transformer
from lmtutorial.quantize import QuantizedLinear


class CompiledTransformer(StandIn):
    """A Transformer whose decode steps are compiled; a `LanguageModel`. See `compiled`."""

    def __init__(self, model: Transformer, longest: int, backend: str | Callable[..., Any]) -> None:
        super().__init__(model, longest)
        self._slots = torch.arange(model.context, device=model.device)
        self._steps: dict[bool, Callable[..., Tensor]] = {
            one_row: _compile(_one_row(model) if one_row else model, backend) for one_row in (True, False)
        }

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """As the model's own: (batch, time) int64 -> (batch, time, vocab_size)."""
        assert cache is None or isinstance(cache, KVCache)
        batch, time = tokens.shape
        if cache is None or time > self.longest or cache.max_len == 1 or torch.is_grad_enabled():
            return self.model(tokens, cache)  # type: ignore[no-any-return]
        slots = self._slots[: max(2, cache.window(time))]  # a size of 1 is never left open by the compiler
        if self.device.type == "cpu":
            torch._dynamo.mark_dynamic(slots, 0)
        for tensor in (cache.keys, cache.values):
            torch._dynamo.mark_dynamic(tensor, 3)
            torch._dynamo.mark_static_address(tensor, guard=False)  # a CUDA graph writes to it in place
        one_row = batch * time == 1 and self.device.type == "cpu"
        logits = self._steps[one_row](tokens, cache.keys, cache.values, cache.lengths, slots)
        cache.lengths = cache.lengths + time
        return logits


def compiled(
    model: Transformer, longest: int = 1, *, backend: str | Callable[..., Any] = "inductor"
) -> CompiledTransformer:
    """`model`, with its decode steps compiled: the same logits to rounding, and no Python between them.

    Forwards of up to `longest` tokens a row with a cache are compiled, once for each number of rows and of
    tokens; prompts, and what needs gradients, go to the model itself, which is shared, not copied. It must
    not be changed in type, device or structure afterwards, because no step looks whether it was. On CUDA each
    graph is captured as a CUDA graph and looks at the whole cache: make it no longer than needed.

    `backend` is what `torch.compile` takes. Raises TypeError for another kind of model, ValueError for one
    with a window and for `longest` below 1. The C++ compiler that `torch.compile` asks for on a CPU must be
    installed; it does not find torch where that lies in a folder with a space in its path.

    >>> from lmtutorial.models.transformer import TransformerConfig
    >>> model = Transformer(TransformerConfig(vocab_size=65, context=16, width=32)).eval()
    >>> compiled(model).vocab_size
    65
    """
    if not isinstance(model, Transformer):
        raise TypeError(f"compiled takes a Transformer, not a {type(model).__name__}")
    if model.config.window is not None:
        raise ValueError(f"window is {model.config.window}; compiled steps see all of a text: window=None")
    if longest < 1:
        raise ValueError(f"longest is {longest}; it must be at least 1")
    return CompiledTransformer(model, longest, backend)


class _Window(KVCache):
    """A cache that looks at the slots it is given, and is written to in a way that compilers do in place."""

    def __init__(self, keys: Tensor, values: Tensor, lengths: Tensor, slots: Tensor) -> None:
        self.keys, self.values, self.lengths, self._slots = keys, values, lengths, slots

    def make_room(self, time: int) -> Tensor:
        device = self.lengths.device
        self._positions_BT = self.lengths[:, None] + torch.arange(time, device=device)
        self._visible_B1TS = self._slots <= self._positions_BT[:, None, :, None]
        batch, heads = self.keys.shape[1:3]
        self._rows_B11 = torch.arange(batch, device=device)[:, None, None]
        self._heads_H = torch.arange(heads, device=device)
        return self._positions_BT

    def extend(self, layer: int, k_BHTD: Tensor, v_BHTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        layer_111 = torch.full((1, 1, 1), layer, device=self._heads_H.device)
        index = (layer_111, self._rows_B11, self._heads_H, self._positions_BT[:, :, None])  # (B, T, H) places
        self.keys.index_put_(index, k_BHTD.transpose(1, 2).to(self.keys.dtype))
        self.values.index_put_(index, v_BHTD.transpose(1, 2).to(self.values.dtype))
        window = len(self._slots)
        return self.keys[layer, :, :, :window], self.values[layer, :, :, :window], self._visible_B1TS


class _OneRow(nn.Module):
    """A linear layer for a single vector: what compilers make a loop of their own for, on a CPU.

    Twice as fast there as the library's matrix product, and int8 weights are turned back inside of the loop.
    """

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        linear = self.linear
        weight: Any = linear.weight() if isinstance(linear, QuantizedLinear) else linear.weight
        y = torch.mv(weight.to(x.dtype), x.flatten())
        return (y if linear.bias is None else y + linear.bias).view(1, 1, -1)  # type: ignore[operator]


def _one_row(model: Transformer) -> Transformer:
    """`model` with its linear layers replaced; the tensors are shared."""
    tensors = [*model.parameters(), *model.buffers()]
    shared = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    for module in list(shared.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear | QuantizedLinear):
                setattr(module, name, _OneRow(child))
    return shared


def _compile(model: Transformer, backend: str | Callable[..., Any]) -> Callable[..., Tensor]:
    def step(tokens: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, slots: Tensor) -> Tensor:
        return model(tokens, _Window(keys, values, lengths, slots))  # type: ignore[no-any-return]

    # Looking at each call whether any of a model's hundred tensors has changed makes a small model's step a
    # tenth longer. Without it graphs are found by code object alone, so that each model needs its own.
    step.__code__ = step.__code__.replace()
    options: dict[str, Any] = {}
    if skip := getattr(torch.compiler, "skip_guard_on_all_nn_modules_unsafe", None):
        options["guard_filter_fn"] = skip
    if backend == "inductor" and model.device.type == "cuda":
        options["triton.cudagraphs"] = True
    return torch.compile(step, fullgraph=True, dynamic=False, backend=backend, options=options)
