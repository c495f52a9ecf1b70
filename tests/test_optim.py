"""Laws of `lmtutorial.optim`: the same update as textbook Adam, and schedules with the promised shape."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lmtutorial.optim import SCHEDULES, build_optimizer, constant, cosine, parameter_groups


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.inner = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight


def test_every_parameter_is_in_one_group_and_only_matrices_outside_embeddings_decay():
    model = Tied()
    decayed, rest = parameter_groups(model, 0.1)
    assert [id(p) for p in decayed["params"]] == [id(model.inner.weight)]
    everything = [id(p) for group in (decayed, rest) for p in group["params"]]
    assert sorted(everything) == sorted(id(p) for p in model.parameters())
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)


def test_frozen_parameters_are_left_out():
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    optimizer = build_optimizer(model, 1e-3)
    assert [p.shape for group in optimizer.param_groups for p in group["params"]] == [(2, 3)]


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_updates_equal_adam_written_out(weight_decay):
    torch.manual_seed(0)
    layer = nn.Linear(5, 3).double()
    expected = {name: p.detach().clone() for name, p in layer.named_parameters()}
    first = {name: torch.zeros_like(p) for name, p in expected.items()}
    second = {name: torch.zeros_like(p) for name, p in expected.items()}
    rate, beta1, beta2 = 0.05, 0.8, 0.95
    optimizer = build_optimizer(layer, rate, weight_decay=weight_decay, betas=(beta1, beta2))
    for t in range(1, 6):
        optimizer.zero_grad()
        (layer(torch.randn(4, 5, dtype=torch.double)) ** 2).sum().backward()
        for name, p in layer.named_parameters():
            first[name] = beta1 * first[name] + (1 - beta1) * p.grad
            second[name] = beta2 * second[name] + (1 - beta2) * p.grad**2
            step = (first[name] / (1 - beta1**t)) / ((second[name] / (1 - beta2**t)).sqrt() + 1e-8)
            shrink = 1 - rate * (weight_decay if name == "weight" else 0.0)
            expected[name] = expected[name] * shrink - rate * step
        optimizer.step()
    for name, p in layer.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name])


@settings(deadline=None, max_examples=60)
@given(
    steps=st.integers(1, 500),
    warmup=st.integers(0, 600),
    peak=st.floats(1e-6, 10),
    floor=st.floats(0, 1),
    name=st.sampled_from(sorted(SCHEDULES)),
)
def test_schedules_rise_to_the_peak_then_never_rise_again(steps, warmup, peak, floor, name):
    rates = [SCHEDULES[name](step, steps, peak=peak, warmup=warmup, floor=floor) for step in range(steps + 3)]
    climb, descent = rates[: min(warmup, len(rates))], rates[warmup:]
    assert all(0 < rate <= peak * (1 + 1e-12) for rate in climb)
    assert all(a < b for a, b in itertools.pairwise(climb))
    assert all(a >= b - 1e-12 * peak for a, b in itertools.pairwise(descent))
    assert all(rate >= floor * peak * (1 - 1e-9) for rate in descent)
    if warmup and len(climb) == warmup:
        assert math.isclose(climb[-1], peak)


def test_cosine_ends_at_its_floor_and_is_half_way_at_half_time():
    assert cosine(100, 100, peak=2.0, floor=0.25) == pytest.approx(0.5)
    assert cosine(50, 100, peak=2.0) == pytest.approx(1.0)
    assert constant(10**9, 1, peak=2.0) == 2.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": -1.0}, r"learning_rate .* got -1\.0"),
        ({"learning_rate": math.nan}, r"learning_rate .* got nan"),
        ({"weight_decay": -0.1}, r"weight_decay .* got -0\.1"),
        ({"betas": (0.9, 1.0)}, r"betas .* got \(0\.9, 1\.0\)"),
    ],
)
def test_bad_settings_are_refused_with_the_value(options, message):
    options = {"learning_rate": 1e-3, **options}
    with pytest.raises(ValueError, match=message):
        build_optimizer(nn.Linear(2, 2), options.pop("learning_rate"), **options)


def test_a_model_without_parameters_is_refused():
    with pytest.raises(ValueError, match="Identity has no parameter to train"):
        build_optimizer(nn.Identity(), 1e-3)
