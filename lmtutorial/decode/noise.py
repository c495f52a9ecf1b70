"""Where the randomness of a generated text comes from: its own generator, whatever its neighbors do."""

from __future__ import annotations

from collections import Counter
from numbers import Integral

import numpy as np
import torch
from torch import Tensor


def check_seed(seed: int | None) -> int | None:
    """The seed, if it is None or an integer of at least 0; otherwise ValueError or TypeError."""
    if seed is None:
        return None
    if not isinstance(seed, Integral):
        raise TypeError(f"seed is {seed!r}; it must be an integer of at least 0, or None")
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must be at least 0")
    return int(seed)


def row_noise(prompts: list[list[int]], steps: int, seed: int | None) -> Tensor:
    """Uniform numbers in [0, 1), one a row and step: (steps, batch) float64, on the CPU.

    A row's numbers depend on `seed`, its own prompt, and how many rows before it have the same prompt: a
    batch does not change what any of its rows draws, and copies of a prompt draw apart. More steps go on
    where fewer ended. Without a seed, one is drawn from torch's global generator.

    All numbers are drawn before the first step, so that no step does it, and every device sees the same.

    >>> alone = row_noise([[5, 6]], steps=3, seed=0)
    >>> row_noise([[1], [5, 6]], steps=4, seed=0)[:3, 1:].equal(alone)
    True
    """
    return torch.from_numpy(np.stack([rng.random(steps) for rng in row_generators(prompts, seed)], axis=1))


def row_generators(prompts: list[list[int]], seed: int | None) -> list[np.random.Generator]:
    """The generator that each row draws from; see `row_noise`."""
    if seed is None:
        seed = int(torch.randint(2**63 - 1, ()))
    copies: Counter[tuple[int, ...]] = Counter()
    generators = []
    for prompt in prompts:
        key = tuple(prompt)
        generators.append(text_generator(prompt, seed, copies[key]))
        copies[key] += 1
    return generators


def text_generator(prompt: list[int], seed: int, copy: int = 0) -> np.random.Generator:
    """The generator of a row that has `copy` rows with the same prompt before it."""
    # numpy hashes all of it; the length keeps apart prompts that differ in zeros at the end
    return np.random.default_rng([seed, copy, len(prompt), *prompt])
