"""What the device at hand can do: where to compute, in which precision, with which random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Literal

import torch
from torch import Tensor, nn

Precision = Literal["auto", "float32", "bfloat16", "float16"]

CPU_BFLOAT16_PAYS = 1_000_000
"""Numbers in a model's matrices from which a CPU that can trains in bfloat16: 1.4 to 2 times as fast. Below,
float32 gives every machine the same results."""


def choose_device(name: str = "auto") -> torch.device:
    """The device called `name`; "auto" is CUDA where there is one, then Apple's MPS, then the CPU.

    Raises ValueError for a name that torch does not know, or a device that is not there.

    >>> choose_device("cpu")
    device(type='cpu')
    """
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if there[kind]))
    found = ", ".join(kind for kind in there if there[kind])
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device is {name!r}; it must be auto or one of: {found}") from error
    if not there.get(device.type, False):
        raise ValueError(f"device is {name!r}, which is not there; auto picks among: {found}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device is {name!r}; there are {torch.cuda.device_count()} CUDA devices, from cuda:0"
        )
    return device


def choose_precision(requested: Precision, device: torch.device, parameters: int) -> torch.dtype:
    """The type that matrix products are computed in; the weights themselves stay float32.

    "auto" is bfloat16 on CUDA devices from Ampere on (compute capability 8.0), float16 on Volta and Turing
    (a T4 has fast float16 and no bfloat16; it needs loss scaling), bfloat16 on CPUs with instructions for
    it (without them it was measured three times slower) from `CPU_BFLOAT16_PAYS` parameters on, else
    float32.

    >>> choose_precision("auto", torch.device("cpu"), parameters=1000)
    torch.float32
    """
    if requested != "auto":
        if requested not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"precision is {requested!r}; it must be auto, float32, bfloat16 or float16")
        if requested == "float16" and device.type == "cpu":
            raise ValueError(
                "precision is 'float16' on a CPU, which has bfloat16 and float32 only; auto chooses"
            )
        dtype: torch.dtype = getattr(torch, requested)
        return dtype
    if bfloat16_pays(device, parameters):
        return torch.bfloat16
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0):
        return torch.float16
    return torch.float32


def bfloat16_pays(device: torch.device, numbers: int) -> bool:
    """Whether matrices of so many numbers in all are multiplied faster in bfloat16 than in float32.

    They are where the device itself does so: CUDA devices from Ampere on, CPUs with AMX (Intel, 2023) or
    AVX512-BF16 (AMD, 2022). On others it takes several times as long.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")  # some torch versions lack one
    able = device.type == "cpu" and any(getattr(torch.cpu, name, bool)() for name in names)
    return able and numbers >= CPU_BFLOAT16_PAYS


@cache
def cpu_computes_lstm_in_bfloat16() -> bool:
    """Whether torch's LSTM runs in bfloat16 on this CPU: on PCs its routine is for AVX-512 only."""
    lstm = nn.LSTM(1, 1, device="meta").to_empty(device="cpu")  # draws no random numbers
    try:
        with torch.autocast("cpu", torch.bfloat16):
            lstm(torch.zeros(1, 1, 1))
    except RuntimeError:
        return False
    return True


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, torch's random numbers start from `seed`; afterwards they go on as if nothing had been drawn.

    >>> with seeded(0, torch.device("cpu")):
    ...     print(round(torch.rand(()).item(), 4))
    0.4963
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The state of the random numbers that computing on `device` draws from, as tensors."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Go on from `random_state`; a state saved on another kind of device restores what both share."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
