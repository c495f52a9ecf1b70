"""Laws of `lmtutorial.devices`: the choice follows what the device can do, and bad names are refused."""

from __future__ import annotations

import pytest
import torch

from lmtutorial import devices
from lmtutorial.devices import choose_device, choose_precision, random_state, seeded, set_random_state

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((6, 0), torch.float32), ((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)],
)
def test_cuda_gets_the_best_type_of_its_generation(capability, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_precision("auto", CUDA, 1) == expected


@pytest.mark.parametrize("unit", ["_is_amx_tile_supported", "_is_avx512_bf16_supported", None])
def test_a_cpu_gets_bfloat16_where_it_has_it_of_either_kind_and_the_model_is_large(unit, monkeypatch):
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda there=name == unit: there, raising=False)
    large = devices.CPU_BFLOAT16_PAYS
    assert choose_precision("auto", CPU, large - 1) == torch.float32
    assert choose_precision("auto", CPU, large) == (torch.bfloat16 if unit else torch.float32)
    assert choose_precision("auto", torch.device("mps"), large) == torch.float32


@pytest.mark.parametrize("requested", ["float32", "bfloat16"])
def test_what_is_asked_for_is_given(requested):
    assert choose_precision(requested, CPU, 1) == getattr(torch, requested)


def test_bad_requests_are_refused_with_the_value():
    with pytest.raises(ValueError, match="'int8'; it must be auto, float32, bfloat16 or float16"):
        choose_precision("int8", CPU, 1)
    with pytest.raises(ValueError, match="'float16' on a CPU"):
        choose_precision("float16", CPU, 1)
    with pytest.raises(ValueError, match="device is 'gpu'; it must be auto or one of: cpu"):
        choose_device("gpu")
    with pytest.raises(ValueError, match=r"device is 'cuda:99'"):
        choose_device("cuda:99")


def test_auto_finds_a_device_that_computes():
    assert torch.ones(2, device=choose_device()).sum().item() == 2


def test_random_numbers_go_on_where_they_were_saved_and_outside_nothing_moves():
    before = torch.get_rng_state()
    with seeded(5, CPU):
        torch.rand(3)
        state = random_state(CPU)
        expected = torch.rand(4)
        torch.rand(9)
        set_random_state(state, CPU)
        assert torch.equal(torch.rand(4), expected)
    assert torch.equal(torch.get_rng_state(), before)
