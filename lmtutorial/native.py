"""Decode steps in one call of C++: a Transformer on a CPU, not far from as fast as its memory can be read.

`lmtutorial/native.cpp`, beside this file, is the step. It is compiled when first used, by the C++ compiler of
the machine (`CXX`, g++ or clang++, a few seconds), and kept in the cache folder of this package.

    fast = native(model)                # or native(quantize(model))
    greedy(fast, prompts, 256)
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from ctypes import POINTER, Structure, c_float, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmtutorial.files.storage import cache_dir
from lmtutorial.models.cache import Cache
from lmtutorial.models.kv_cache import KVCache
from lmtutorial.models.stand_in import StandIn
from lmtutorial.models.transformer import Transformer
from lmtutorial.provenance import processor
from lmtutorial.quantize import QuantizedLinear

SOURCE = Path(__file__).with_name("native.cpp")
FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-std=c++17", "-fopenmp"]
SHARED = ["-shared", "-fPIC"]


class NativeTransformer(StandIn):
    """A Transformer whose decode steps are one call of C++; a `LanguageModel`. See `native`."""

    def __init__(self, model: Transformer, longest: int) -> None:
        super().__init__(model, longest)
        self._step = _library().step
        self._kept: list[object] = []  # what the pointers point to
        self._c = self._describe()

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """As the model's own: (batch, time) int64 -> (batch, time, vocab_size)."""
        assert cache is None or isinstance(cache, KVCache)
        batch, time = tokens.shape
        if cache is None or batch * time > self.longest or torch.is_grad_enabled():
            return self.model(tokens, cache)  # type: ignore[no-any-return]
        if not self._fits(tokens, cache):
            return self.model(tokens, cache)  # type: ignore[no-any-return]
        tokens, lengths = tokens.contiguous(), cache.lengths.contiguous()
        logits = torch.empty(batch, time, self.vocab_size)
        state = _Cache(
            cache.keys.data_ptr(), cache.values.data_ptr(), lengths.data_ptr(), batch, cache.max_len
        )
        failed = self._step(
            self._c, state, tokens.data_ptr(), time, logits.data_ptr(), torch.get_num_threads()
        )
        if failed:
            return self.model(tokens, cache)  # type: ignore[no-any-return]  # raises, and says what is wrong
        cache.lengths = lengths + time
        return logits

    def _fits(self, tokens: Tensor, cache: KVCache) -> bool:
        """Whether the C++ may read and write them. What it may not, the model itself takes or refuses."""
        c = self.config
        shape = (c.layers, len(tokens), c.shared_heads, cache.max_len, c.head_size)
        return (tokens.dtype, cache.keys.dtype, cache.keys.shape) == (torch.int64, torch.float32, shape)

    def _describe(self) -> _Model:
        """The model as the C++ sees it: sizes, and where in memory each tensor begins."""
        m: Any = self.model
        c = self.config
        blocks = (_Block * c.layers)()
        for block, own in zip(blocks, m.blocks, strict=True):
            attention, mlp = own.attention, own.mlp
            block.attention_norm, block.mlp_norm = self._norm(own.attention_norm), self._norm(own.mlp_norm)
            block.qkv, block.mix = self._linear(attention.qkv), self._linear(attention.out)
            block.up, block.down = self._linear(mlp.up), self._linear(mlp.down)
            if c.qk_norm:
                block.q_norm = self._at(attention.q_norm.weight)
                block.k_norm = self._at(attention.k_norm.weight)
        learned = c.position == "learned"
        return _Model(
            c.layers, c.width, c.heads, c.shared_heads, c.head_size, c.hidden,
            ("gelu", "swiglu", "relu2").index(c.mlp), c.norm_eps,
            self._at(m.embedding.weight), self._at(m.position.table.weight) if learned else None,
            None if learned else self._at(m.position.cos), None if learned else self._at(m.position.sin),
            self._norm(m.norm), self._linear(m.head), blocks,
        )  # fmt: skip

    def _linear(self, linear: Any) -> _Linear:
        if isinstance(linear, QuantizedLinear):
            out, width = linear.integers.shape
            integers, scale = self._at(linear.integers), self._at(linear.scale)
            return _Linear(None, integers, scale, self._at(linear.bias), out, width)
        out, width = linear.weight.shape
        return _Linear(self._at(linear.weight), None, None, self._at(linear.bias), out, width)

    def _norm(self, norm: Any) -> _Norm:
        return _Norm(self._at(norm.weight), self._at(getattr(norm, "bias", None)))

    def _at(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        assert tensor.is_contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()


def native(model: Transformer, longest: int = 64) -> NativeTransformer:
    """`model`, with its decode steps in C++: the same logits to rounding, several times as fast.

    The model is in float32 and on the CPU, or comes from `quantize` with 8 bits and no groups. It is shared,
    not copied; it must not be moved to another type or device afterwards. Forwards of more than `longest`
    tokens in all (batch times time), without a cache, or with gradients go to the model itself.

    Uses `torch.get_num_threads()` threads. Raises TypeError or ValueError for another kind of model, and
    OSError, with what the compiler said, where the C++ cannot be compiled.

    >>> from lmtutorial.models.transformer import TransformerConfig
    >>> model = Transformer(TransformerConfig(vocab_size=65, context=16, width=32)).eval()
    >>> fast, tokens = native(model), torch.tensor([[1, 2, 3]])
    >>> with torch.no_grad():
    ...     torch.allclose(fast(tokens, fast.new_cache(1, 16)), model(tokens), atol=1e-5)
    True
    """
    if not isinstance(model, Transformer):
        raise TypeError(f"native takes a Transformer, not a {type(model).__name__}")
    if longest < 1:
        raise ValueError(f"longest is {longest}; it must be at least 1")
    if model.config.window is not None:
        raise ValueError(f"window is {model.config.window}; native steps see all of a text: window=None")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.device.type != "cpu" or tensor.dtype not in (torch.float32, torch.int8):
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}; native steps take float32, and int8 of "
                "`quantize`, on the CPU"
            )
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear) and module.scale.shape[1] > 1:
            raise ValueError(f"{name} has {module.scheme}; native steps take a scale a row: group=None")
    return NativeTransformer(model, longest)


@functools.cache
def _library() -> ctypes.CDLL:
    """Compiled for this very processor, so that its name tells source, compiler, flags and processor."""
    compiler = shutil.which(os.environ.get("CXX", "")) or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise FileNotFoundError("native steps need a C++ compiler: install g++ or clang++, or set CXX to one")
    openmp = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    flags = [*FLAGS, *SHARED, *map(str, openmp[:1])]  # PyTorch's own threads, not a second team beside them
    named = SOURCE.read_text(), compiler, flags, torch.__version__, processor(), _instructions()
    key = hashlib.sha256(repr(named).encode())
    path = cache_dir() / f"native-{key.hexdigest()[:16]}.so"
    if not path.is_file():
        _compile([compiler, *flags, str(SOURCE)], path)
    return _load(path)


def _instructions() -> str:
    """What the processor can do, where Linux says so: machines that share a home may have the same name."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.step.argtypes = [POINTER(_Model), POINTER(_Cache), c_void_p, c_int64, c_void_p, c_int]
    library.step.restype = c_int
    return library


def _compile(command: list[str], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}")  # several processes may compile at once
    done = subprocess.run([*command, "-o", str(beside)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)} failed:\n{done.stderr}")
    os.replace(beside, path)


class _Linear(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("weight", "int8", "scale", "bias")),
        *((name, c_int64) for name in ("out", "in")),
    )


class _Norm(Structure):
    _fields_ = (("weight", c_void_p), ("bias", c_void_p))


class _Block(Structure):
    _fields_ = (
        *((name, _Norm) for name in ("attention_norm", "mlp_norm")),
        *((name, _Linear) for name in ("qkv", "mix", "up", "down")),
        *((name, c_void_p) for name in ("q_norm", "k_norm")),
    )


class _Model(Structure):
    _fields_ = (
        *((n, c_int64) for n in ("layers", "width", "heads", "kv_heads", "size", "hidden", "mlp")),
        ("eps", c_float),
        *((name, c_void_p) for name in ("embedding", "positions", "cos", "sin")),
        ("norm", _Norm),
        ("head", _Linear),
        ("blocks", POINTER(_Block)),
    )


class _Cache(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("keys", "values", "lengths")),
        *((name, c_int64) for name in ("batch", "max_len")),
    )
