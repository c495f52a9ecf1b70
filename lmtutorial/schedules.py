"""Learning-rate schedules: pure functions from the number of an update to its rate."""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[..., float]
"""(step, steps, *, peak, warmup, floor) -> the rate of the update from `step` to `step + 1`."""


def constant(step: float, steps: float, *, peak: float, warmup: int = 0, floor: float = 0.0) -> float:
    """The rate `peak`, after a linear warm-up over `warmup` steps; `steps` and `floor` have no effect.

    >>> [constant(step, 100, peak=0.4, warmup=4) for step in (0, 1, 3, 50)]
    [0.1, 0.2, 0.4, 0.4]
    """
    return peak * _ramp(step, warmup)


def cosine(step: float, steps: float, *, peak: float, warmup: int = 0, floor: float = 0.0) -> float:
    """Linear warm-up to `peak` over `warmup` steps, then half a cosine down to `floor * peak` at `steps`.

    Past `steps` it stays at the floor.
    Source: Loshchilov and Hutter, "SGDR", 2017 (the cosine); Goyal et al. 2017 (the warm-up).

    >>> [round(cosine(step, 100, peak=1.0, warmup=20, floor=0.1), 3) for step in (0, 19, 20, 60, 100, 200)]
    [0.05, 1.0, 1.0, 0.55, 0.1, 0.1]
    """
    if step < warmup:
        return peak * _ramp(step, warmup)
    left = 0.5 * (1 + math.cos(math.pi * _share(step, warmup, steps)))
    return peak * (floor + (1 - floor) * left)


def linear(step: float, steps: float, *, peak: float, warmup: int = 0, floor: float = 0.0) -> float:
    """Linear warm-up to `peak`, then a straight line down to `floor * peak` at `steps`.

    Source: Defazio et al., "Optimal linear decay learning rate schedules and further refinements", 2023.

    >>> [round(linear(step, 100, peak=1.0, warmup=20), 3) for step in (0, 20, 60, 100)]
    [0.05, 1.0, 0.5, 0.0]
    """
    if step < warmup:
        return peak * _ramp(step, warmup)
    return peak * (floor + (1 - floor) * (1 - _share(step, warmup, steps)))


def wsd(
    step: float, steps: float, *, peak: float, warmup: int = 0, floor: float = 0.0, decay: float = 0.4
) -> float:
    """Warm-up, stable, decay: `peak` until the last share `decay` of the steps, then a straight line down.

    While the rate is stable nothing depends on `steps`, so one run can be cooled down at several lengths.
    Source: Hu et al., "MiniCPM", 2024; Hägele et al., "Scaling laws and compute-optimal training beyond
    fixed training durations", NeurIPS 2024.

    >>> [round(wsd(step, 100, peak=1.0, warmup=20), 3) for step in (0, 20, 60, 80, 100)]
    [0.05, 1.0, 1.0, 0.5, 0.0]
    """
    if step < warmup:
        return peak * _ramp(step, warmup)
    begin = max(warmup, (1 - decay) * steps) if steps < math.inf else math.inf
    left = 1.0 if step < begin else 1 - _share(step, begin, steps)
    return peak * (floor + (1 - floor) * left)


def _ramp(step: float, warmup: int) -> float:
    """The share of the peak that the warm-up allows at `step`; never 0, so that step 0 already learns."""
    return min(1.0, (step + 1) / warmup) if warmup else 1.0


def _share(step: float, begin: float, end: float) -> float:
    """How far `step` is on the way from `begin` to `end`, between 0 and 1."""
    return min(1.0, (step - begin) / max(end - begin, 1))


SCHEDULES: dict[str, Schedule] = {"constant": constant, "cosine": cosine, "linear": linear, "wsd": wsd}
