"""The decoder-only Transformer: one file, from GPT-2's exact mathematics to the parts of today's models.

Sources: Vaswani et al., "Attention is all you need", NeurIPS 2017; Radford et al., "Language models are
unsupervised multitask learners" (GPT-2), 2019; Touvron et al., "LLaMA", 2023. Each switch of
`TransformerConfig` names the paper that it comes from.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmtutorial.models.cache import Cache
from lmtutorial.models.kernels import RMSNorm, attend
from lmtutorial.models.kv_cache import KVCache
from lmtutorial.models.sliding_cache import Band, SlidingKVCache

Position = Literal["learned", "rotary"]
Norm = Literal["layer", "rms"]
MLPKind = Literal["gelu", "swiglu", "relu2"]
Angles = tuple[Tensor, Tensor]
Turn = Callable[[Tensor, Any], Tensor]


@dataclass(frozen=True)
class TransformerConfig:
    """The shape of a Transformer, and its switches; as it stands the `modern` preset, see also `gpt2`.

    >>> TransformerConfig(vocab_size=2000, width=192, heads=6, kv_heads=2).hidden
    512
    """

    vocab_size: int
    """How many tokens the model knows."""
    context: int = 256
    """The longest sequence it can read, in tokens."""
    width: int = 256
    """The size of the embedding and of what flows from block to block."""
    layers: int = 4
    """How many blocks lie on each other."""
    heads: int = 4
    """How many attention heads a block has; each sees `width / heads` numbers of a token."""
    kv_heads: int | None = None
    """How many key-value heads the heads share (Ainslie et al., EMNLP 2023). None: each has its own."""
    hidden: int | None = None
    """The width inside the MLP. None: 4 width, and for swiglu, which has three matrices, 8/3 width."""
    dropout: float = 0.0
    """The share of activations dropped in training."""
    position: Position = "rotary"
    """How order gets in: a learned vector each position, or rotated queries and keys (Su et al. 2021)."""
    norm: Norm = "rms"
    """LayerNorm, with biases everywhere (Ba et al. 2016), or RMSNorm, with none (Zhang and Sennrich 2019)."""
    mlp: MLPKind = "swiglu"
    """The nonlinearity: GELU, SwiGLU (Shazeer 2020), or the square of ReLU (So et al., Primer, 2021)."""
    qk_norm: bool = False
    """Whether queries and keys are normalized before they meet (Henry et al. 2020)."""
    tied: bool = True
    """Whether the head shares the embedding's matrix (Press and Wolf 2017)."""
    rope_base: float = 10_000.0
    """How slowly the slowest pair of a rotary position turns."""
    norm_eps: float = 1e-5
    """What the norms add to the variance."""
    window: int | None = None
    """How many tokens, itself included, a token sees in each layer (Jiang et al. 2023). None: all before."""

    def __post_init__(self) -> None:
        if self.kv_heads is None:
            object.__setattr__(self, "kv_heads", self.heads)  # how a frozen dataclass sets a field of its own
        if self.hidden is None:
            # 8/3 width, up to the next multiple of 64
            hidden = 64 * math.ceil(self.width / 24) if self.mlp == "swiglu" else 4 * self.width
            object.__setattr__(self, "hidden", hidden)
        for name in ("vocab_size", "context", "width", "layers", "heads", "kv_heads", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.width % self.heads:
            raise ValueError(f"width is {self.width}; it must be a multiple of heads, which is {self.heads}")
        if self.heads % self.shared_heads:
            raise ValueError(f"heads is {self.heads}; it must be a multiple of kv_heads, {self.kv_heads}")
        if self.position == "rotary" and self.head_size % 2:
            raise ValueError(
                f"width / heads is {self.head_size}; rotary positions turn pairs: it must be even"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be at least 0 and below 1")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window is {self.window}; it must be at least 1, or None")
        for name in ("rope_base", "norm_eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a finite number above 0")
        for name, allowed in (("position", Position), ("norm", Norm), ("mlp", MLPKind)):
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(get_args(allowed))}"
                )

    @classmethod
    def gpt2(
        cls,
        vocab_size: int = 50_257,
        context: int = 1024,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        dropout: float = 0.0,
    ) -> TransformerConfig:
        """GPT-2's architecture, by default the smallest of its four sizes (124M parameters).

        >>> TransformerConfig.gpt2().position
        'learned'
        """
        return cls(
            vocab_size, context, width, layers, heads, dropout=dropout,
            position="learned", norm="layer", mlp="gelu",
        )  # fmt: skip

    @property
    def head_size(self) -> int:
        """How many numbers of a token a head sees."""
        return self.width // self.heads

    @property
    def shared_heads(self) -> int:
        """`kv_heads`, which is no longer None."""
        assert self.kv_heads is not None
        return self.kv_heads


class Transformer(nn.Module):
    """A Transformer that gives the logits of each next token; a `LanguageModel`.

    >>> model = Transformer(TransformerConfig(vocab_size=65, context=16, width=32))
    >>> model(torch.zeros(2, 7, dtype=torch.int64)).shape
    torch.Size([2, 7, 65])
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_size, self.context = config.vocab_size, config.context
        self.window = config.window or config.context
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.position = _Learned(config) if config.position == "learned" else _Rotary(config)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.layers)])
        self.norm = _norm(config, config.width)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embedding.weight
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw fresh weights.

        All matrices are normal with a standard deviation of 0.02, positions 0.01, biases 0, as in GPT-2's
        released code. What a block adds starts small: GPT-2 divides the output projections by the square root
        of their number; without biases (`norm="rms"`) they start at 0, so that each block starts as the
        identity (Zhang et al., "Fixup", ICLR 2019; Yang et al., "Tensor Programs V", 2022).
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        if isinstance(self.position, _Learned):
            nn.init.normal_(self.position.table.weight, std=0.01)
        small = 0.02 / math.sqrt(2 * self.config.layers) if self.config.norm == "layer" else 0.0
        for module in self.modules():
            if isinstance(module, Block):
                nn.init.normal_(module.attention.out.weight, std=small)
                nn.init.normal_(module.mlp.down.weight, std=small)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.weight.device

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Logits of each next token: (batch, time) int64 -> (batch, time, vocab_size).

        Raises ValueError for more tokens than the context, or than the cache, holds.
        """
        assert cache is None or isinstance(cache, KVCache)
        positions_BT = self._positions(tokens, cache)
        x_BTC, angles = self.position(self.embedding(tokens), positions_BT)
        x_BTC = self.dropout(x_BTC)
        seen = self._band(tokens) if cache is None else cache
        for layer, block in enumerate(self.blocks):
            x_BTC = block(x_BTC, angles, seen, layer)
        if cache is not None:
            cache.advance()
        return self.head(self.norm(x_BTC))  # type: ignore[no-any-return]

    def _positions(self, tokens: Tensor, cache: KVCache | None) -> Tensor:
        """Where the tokens stand in their rows: (batch, time), or (1, time) if all rows begin at 0."""
        time = tokens.shape[1]
        if cache is not None:
            return cache.make_room(time)
        if time > self.context:
            raise ValueError(f"{time:,} tokens are over the context of {self.context:,}")
        return torch.arange(time, device=tokens.device)[None]

    def _band(self, tokens: Tensor) -> Band | None:
        """The mask of a window that is shorter than the text."""
        time = tokens.shape[1]
        return Band(self.window, time, tokens.device) if time > self.window else None

    def new_cache(self, batch: int, max_len: int | None) -> KVCache:
        """An empty cache for `batch` rows of at most `max_len` tokens.

        Raises ValueError for None, an endless stream, and for more tokens than the context.
        """
        if max_len is None or max_len > self.context:
            raise ValueError(f"a cache of max_len {max_len} is over the model's context of {self.context:,}")
        c, like = self.config, self.embedding.weight
        shape = (c.layers, batch, c.shared_heads, max_len, c.head_size)
        if max_len > self.window:
            return SlidingKVCache(*shape, window=self.window, like=like)
        return KVCache(*shape, like=like)


class Block(nn.Module):
    """Attention, then an MLP, each on a normalized copy of the stream and added to it (pre-norm)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention_norm = _norm(config, config.width)
        self.attention = Attention(config)
        self.mlp_norm = _norm(config, config.width)
        self.mlp = MLP(config)

    def forward(self, x_BTC: Tensor, angles: Angles | None, cache: KVCache | None, layer: int) -> Tensor:
        """(batch, time, width) -> the same."""
        x_BTC = x_BTC + self.attention(self.attention_norm(x_BTC), angles, cache, layer)
        return x_BTC + self.mlp(self.mlp_norm(x_BTC))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Each token gathers from the tokens before it: a weighted average, several times over (heads)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = config.heads, config.shared_heads, config.head_size
        biases = config.norm == "layer"
        self.qkv = nn.Linear(config.width, (self.heads + 2 * self.kv_heads) * self.size, bias=biases)
        self.q_norm = RMSNorm(self.size, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.size, config.norm_eps) if config.qk_norm else nn.Identity()
        self.turn: Turn = rotate if config.position == "rotary" else _unturned
        self.out = nn.Linear(config.width, config.width, bias=biases)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTC: Tensor, angles: Angles | None, cache: KVCache | None, layer: int) -> Tensor:
        """(batch, time, width) -> the same; keys and values of earlier tokens come from the cache."""
        batch, time, width = x_BTC.shape
        qkv_BTHD = self.qkv(x_BTC).view(batch, time, -1, self.size)
        q, k, v = qkv_BTHD.transpose(1, 2).split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        q, k = self.turn(self.q_norm(q), angles), self.turn(self.k_norm(k), angles)
        k, v, visible = (k, v, None) if cache is None else cache.extend(layer, k, v)
        mixed_BHTD = attend(q, k, v, visible, self.dropout.p if self.training else 0.0)
        mixed_BTC = mixed_BHTD.transpose(1, 2).reshape(batch, time, width)
        return self.dropout(self.out(mixed_BTC))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """What each token makes of what it has gathered: wider, through a nonlinearity, and back."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        assert config.hidden is not None
        biases, gated = config.norm == "layer", config.mlp == "swiglu"
        self.up = nn.Linear(config.width, config.hidden * (2 if gated else 1), bias=biases)
        self.activation = {"gelu": _gelu, "swiglu": _swiglu, "relu2": _relu2}[config.mlp]
        self.down = nn.Linear(config.hidden, config.width, bias=biases)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """(batch, time, width) -> the same."""
        return self.dropout(self.down(self.activation(self.up(x_BTC))))  # type: ignore[no-any-return]


class _Learned(nn.Module):
    """A vector for each position, added to the token's."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.table = nn.Embedding(config.context, config.width)

    def forward(self, x_BTC: Tensor, positions_BT: Tensor) -> tuple[Tensor, None]:
        return x_BTC + self.table(positions_BT), None


class _Rotary(nn.Module):
    """By what angles queries and keys turn at each position; the embedding stays as it is."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        speeds = config.rope_base ** -(torch.arange(0, config.head_size, 2) / config.head_size)
        angles = torch.arange(config.context)[:, None] * speeds
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x_BTC: Tensor, positions_BT: Tensor) -> tuple[Tensor, Angles]:
        return x_BTC, (self.cos[positions_BT][:, None], self.sin[positions_BT][:, None])


def rotate(x: Tensor, angles: Angles) -> Tensor:
    """Turn each pair (x[i], x[i + size/2]) of (..., size) by its angle, given as cosines and sines.

    The product of a query and a key, both turned by their positions, depends on the distance alone.

    >>> quarter = (torch.tensor([0.0]), torch.tensor([1.0]))
    >>> rotate(torch.tensor([1.0, 0.0]), quarter)
    tensor([0., 1.])
    """
    cos, sin = (a.to(x.dtype) for a in angles)
    one, other = x.chunk(2, dim=-1)
    return torch.cat([one * cos - other * sin, other * cos + one * sin], dim=-1)


def _unturned(x: Tensor, angles: Any) -> Tensor:
    return x


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")  # as GPT-2 computes it (Hendrycks and Gimpel 2016)


def _swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _norm(config: TransformerConfig, size: int) -> nn.Module:
    kind: Any = nn.LayerNorm if config.norm == "layer" else RMSNorm
    return kind(size, config.norm_eps)  # type: ignore[no-any-return]
