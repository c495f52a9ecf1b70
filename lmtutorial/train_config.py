"""How to train: the settings of a run, each with what it does."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from lmtutorial.devices import Precision
from lmtutorial.optimizer_groups import OptimizerName
from lmtutorial.schedules import SCHEDULES


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    >>> TrainConfig(steps=2000, schedule="constant").learning_rate
    0.002
    """

    steps: int | None = 1000
    """Stop after this many updates. None: no limit but the time's."""
    max_seconds: float | None = None
    """Stop after this many seconds; the learning rate's schedule then follows the clock. None: no limit."""
    max_tokens: int | None = None
    """Stop after this many target tokens; the schedule then follows them. None: no limit."""
    optimizer: OptimizerName = "adamw"
    """AdamW for everything, or Muon for the matrices inside the network and AdamW for the rest."""
    learning_rate: float = 2e-3
    """The highest learning rate of the run."""
    schedule: Literal["constant", "cosine", "linear", "wsd"] = "cosine"
    """How the learning rate moves after the warm-up."""
    warmup: int = 50
    """Updates over which the learning rate rises from near zero to its highest."""
    floor: float = 0.05
    """Where the schedule ends, as a share of the highest learning rate."""
    weight_decay: float = 0.01
    """How strongly matrices are pulled toward zero."""
    betas: tuple[float, float] = (0.9, 0.99)
    """How long Adam's averages of the gradient and of its square remember."""
    clip: float | None = 1.0
    """Gradients longer than this are shortened to it (global norm). None: never."""
    skip_spikes: float | None = None
    """Leave out updates whose gradient is not finite, or this many times longer than usual. None: never."""
    accumulation: int = 1
    """Batches whose gradients are added before each update, as if they were one larger batch."""
    ema: float | None = None
    """Keep a running average of the weights with this decay, to be measured and kept. None: no average."""
    precision: Precision = "auto"
    """The type matrix products are computed in; auto takes what is fast on the device."""
    compile: bool = False
    """Compile the model first: takes up to minutes, on CPUs also a C++ compiler; updates then are faster."""
    shard: bool = False
    """Spread the weights over the processes (FSDP2), for models that do not fit; alone nothing happens."""
    eval_every: int = 250
    """Updates between two looks at the validation text."""
    patience: int | None = None
    """Stop after this many looks in a row without a better validation loss. None: never."""
    log_every: int = 10
    """Updates between two rows of the log."""
    save_every: int = 500
    """Updates between two saved checkpoints."""
    out: Path | None = None
    """The folder for checkpoints and the log. None: keep nothing."""
    tensorboard: bool = False
    """Write the log for TensorBoard too, into the folder `tensorboard` of `out`."""
    seed: int = 0
    """Where the random numbers of the run (dropout) start."""

    def __post_init__(self) -> None:
        if isinstance(self.out, str):
            object.__setattr__(self, "out", Path(self.out))  # how a frozen dataclass sets a field of its own
        if self.steps is None and self.max_seconds is None and self.max_tokens is None:
            raise ValueError("steps, max_seconds and max_tokens are all None; one must say when to stop")
        for name in (
            "steps", "max_tokens", "patience", "accumulation", "eval_every", "log_every", "save_every"
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        for name in ("max_seconds", "learning_rate", "clip", "skip_spikes"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}; it must be a finite number above 0")
        if self.warmup < 0:
            raise ValueError(f"warmup is {self.warmup}; it must be at least 0")
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor is {self.floor}; it is a share, between 0 and 1")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay is {self.weight_decay}; it must be a finite number, at least 0")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas is {self.betas}; it must be two numbers in [0, 1)")
        if self.skip_spikes is not None and self.skip_spikes <= 1:
            raise ValueError(f"skip_spikes is {self.skip_spikes}; it must be above 1, the usual length")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema is {self.ema}; it is a decay, between 0 and 1")
        if self.tensorboard and self.out is None:
            raise ValueError("tensorboard is True and out is None; give a folder to write to")
        if self.shard and self.optimizer == "muon":
            raise ValueError("shard is True and optimizer is 'muon', which needs whole matrices; use 'adamw'")
        choices: tuple[tuple[str, Collection[str]], ...] = (
            ("schedule", SCHEDULES),
            ("precision", get_args(Precision)),
            ("optimizer", get_args(OptimizerName)),
        )
        for name, allowed in choices:
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}")
