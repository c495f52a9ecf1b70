"""Weights in 8 or 4 bits: a quarter or an eighth of the bytes to keep, and to read at each token.

Each row of a matrix (or each group of weights in a row) is stored as small integers and one scale:
weight = integer * scale, to half a scale. The largest weight of the row gets the largest integer. That is
round-to-nearest, which needs no data; sources: Dettmers et al., "LLM.int8()", NeurIPS 2022, section 2; Yao et
al., "ZeroQuant", NeurIPS 2022, for the groups.

    small = quantize(model)                      # a LanguageModel, which decoders use like any other
    save_quantized("small.safetensors", small)

`QuantizedLinear` is the definition, on any device: it turns the integers back into weights and multiplies.
That saves memory, and no time.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmtutorial.checkpoint import load_checkpoint, save_checkpoint
from lmtutorial.models.transformer import Transformer, TransformerConfig
from lmtutorial.tensorfile import read_tree


@dataclass(frozen=True)
class Scheme:
    """How weights are stored.

    >>> Scheme(bits=4, group=32).largest
    7
    """

    bits: int = 8
    """8, or 4, of which two share a byte."""
    group: int | None = None
    """How many weights of a row share a scale; None: the whole row."""

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"bits is {self.bits!r}; it must be 8 or 4")
        if self.group is not None and (self.group < 2 or self.group % 2):
            raise ValueError(f"group is {self.group!r}; it must be an even number from 2 on, or None")

    @property
    def largest(self) -> int:
        """The largest integer that a weight becomes; its negative is the smallest."""
        return 127 if self.bits == 8 else 7


class QuantizedLinear(nn.Module):
    """`nn.Linear` with its weights as integers; for inference only.

    `integers` is (out, in) int8, or (out, in / 2) uint8 where two weights of 4 bits share a byte; `scale` is
    (out, groups), in float32 also where the weights were in a half-precision type.

    >>> linear = nn.Linear(64, 2)
    >>> small = QuantizedLinear.of(linear, Scheme())
    >>> bool((small.weight() - linear.weight).abs().max() <= small.scale.max() / 2 + 1e-9)
    True
    """

    integers: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, integers: Tensor, scale: Tensor, bias: Tensor | None, scheme: Scheme) -> None:
        super().__init__()
        self.scheme = scheme
        self.register_buffer("integers", integers)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    @classmethod
    def of(cls, linear: nn.Linear, scheme: Scheme) -> QuantizedLinear:
        """Round the weights of `linear`, whose bias stays as it is."""
        weight = linear.weight.detach().to(torch.promote_types(linear.weight.dtype, torch.float32))
        if not weight.isfinite().all():
            raise ValueError("a weight is NaN or infinite; only finite weights can be rounded")
        width = weight.shape[1]
        if (scheme.bits == 4 and width % 2) or width % (scheme.group or width):
            raise ValueError(f"rows of {width} weights do not divide into {scheme}")
        groups_OGI = weight.view(len(weight), -1, scheme.group or width)
        largest_OG1 = groups_OGI.abs().amax(-1, keepdim=True)
        scale_OG1 = (largest_OG1 / scheme.largest).clamp(min=torch.finfo(weight.dtype).tiny)
        integers_OI = (groups_OGI / scale_OG1).round().to(torch.int8).flatten(1)
        integers = _pack(integers_OI) if scheme.bits == 4 else integers_OI
        bias = None if linear.bias is None else linear.bias.detach().clone()
        return cls(integers, scale_OG1.squeeze(-1), bias, scheme)

    def weight(self) -> Tensor:
        """The weights that the integers stand for, (out, in), in the type of the scales."""
        integers_OI = _unpack(self.integers) if self.scheme.bits == 4 else self.integers
        groups_OGI = integers_OI.view(*self.scale.shape, -1).to(self.scale.dtype)
        return (groups_OGI * self.scale.unsqueeze(-1)).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return F.linear(x, self.weight().to(x.dtype), self.bias)

    def extra_repr(self) -> str:
        """For `print`."""
        return f"out={len(self.integers)}, {self.scheme}"


def quantize(model: Transformer, bits: int = 8, group: int | None = None) -> Transformer:
    """A copy of `model` whose linear layers, its head too, are `QuantizedLinear`; in evaluation mode.

    `group` weights of a row share a scale; None: all of them. Embeddings, norms and biases stay as they are;
    where the head shared the embedding's matrix, it now has its own, smaller one.

    Raises TypeError for a model without linear layers, ValueError for bits or a group that does not fit and
    for weights that are NaN or infinite.

    >>> from lmtutorial.models.transformer import TransformerConfig
    >>> model = Transformer(TransformerConfig(vocab_size=512, context=16, width=64, layers=1))
    >>> weight_bytes(model), weight_bytes(quantize(model)), weight_bytes(quantize(model, bits=4))
    (344832, 222720, 179712)
    """
    scheme = Scheme(bits, group)
    if not any(type(module) is nn.Linear for module in model.modules()):
        raise TypeError(f"{type(model).__name__} holds no nn.Linear: there is nothing to quantize")
    keep = {id(p): p for p in model.parameters()}  # shared, not copied, until it is known what stays
    small = copy.deepcopy(model, keep)
    for module in list(small.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, QuantizedLinear.of(child, scheme))
    return copy.deepcopy(small).requires_grad_(False).eval()


def weight_bytes(model: nn.Module) -> int:
    """How many bytes the parameters and saved buffers of a model take, each counted once.

    >>> weight_bytes(nn.Linear(10, 5))
    220
    """
    tensors = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    return sum(tensor.nbytes for tensor in tensors.values())


def save_quantized(path: str | Path, model: Transformer) -> Path:
    """Write a model of `quantize` to a safetensors file, integers and scales as tensors; returns its path."""
    schemes = {module.scheme for module in model.modules() if isinstance(module, QuantizedLinear)}
    if len(schemes) != 1:
        raise ValueError(f"a model of `quantize` has one scheme, this one has {len(schemes)}")
    return save_checkpoint(path, model=model, state={"scheme": dataclasses.asdict(schemes.pop())})


def load_quantized(path: str | Path, device: torch.device | str = "cpu") -> Transformer:
    """The model of `save_quantized`, built from the file alone, in evaluation mode.

    Raises FileNotFoundError, or ValueError for a damaged file or a model that was not quantized.
    """
    tree = read_tree(path)
    scheme = tree.get("state", {}).get("scheme")
    if scheme is None or tree["kind"] != "transformer":
        raise ValueError(f"{path} holds no quantized Transformer; `load_model` reads other checkpoints")
    model = quantize(Transformer(TransformerConfig(**tree["config"])), **scheme)
    load_checkpoint(path, model=model)
    return model.to(device)


def _pack(integers: Tensor) -> Tensor:
    """Two integers from -8 to 7 a byte: the even places are its low half."""
    halves = (integers + 8).to(torch.uint8)
    return halves[..., 0::2] | halves[..., 1::2] << 4


def _unpack(packed: Tensor) -> Tensor:
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2).to(torch.int8) - 8
