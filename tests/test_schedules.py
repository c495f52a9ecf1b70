"""Schedules have the shape that their names promise."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtutorial.schedules import SCHEDULES, constant, cosine, linear, wsd


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
    assert linear(50, 100, peak=2.0, floor=0.5) == pytest.approx(1.5)


def test_wsd_holds_the_peak_until_its_decay_and_then_falls_to_the_floor():
    rates = [wsd(step, 100, peak=2.0, warmup=10, floor=0.1, decay=0.3) for step in range(101)]
    assert rates[10:71] == [2.0] * 61
    assert rates[85] == pytest.approx(1.1)
    assert rates[100] == pytest.approx(0.2)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_without_a_known_end_the_rate_stays_finite(name):
    assert 0 < SCHEDULES[name](5, math.inf, peak=1.0, warmup=2) <= 1
