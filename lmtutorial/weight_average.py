"""A running average of the weights: steadier than the weights themselves while the learning rate is high."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lmtutorial.sharding import spread


class WeightAverage:
    """The exponential moving average of a model's parameters, a <- d a + (1 - d) w after each update.

    The decay d grows to `decay` from a low start, (1 + updates) / (10 + updates), so that the first weights
    are soon forgotten. Source: Polyak and Juditsky 1992 (averaging); Izmailov et al. 2018.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> average = WeightAverage(model, decay=0.9)
    >>> with torch.no_grad():
    ...     _ = model.weight.fill_(2.0)
    >>> average.update(updates=1000)
    >>> start = (average.weights["weight"].item() - 2 * 0.1) / 0.9  # what the weight was before
    >>> with average.applied():
    ...     inside = model.weight.item()
    >>> inside != 2.0 and model.weight.item() == 2.0
    True
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._parameters = dict(model.named_parameters())
        self.weights: dict[str, Tensor] = {name: p.detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Take in the weights as they are now, after `updates` updates before this one."""
        decay = min(self.decay, (1 + updates) / (10 + updates))
        torch._foreach_lerp_(list(self.weights.values()), list(self._parameters.values()), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model has the averaged weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self._parameters.items():  # in place: compiled and spread weights stay put
            average = self.weights[name].clone()
            self.weights[name].copy_(parameter)
            parameter.copy_(average)

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """The model's weights become the average."""
        for name, parameter in self._parameters.items():
            parameter.copy_(self.weights[name])

    def load(self, weights: dict[str, Tensor]) -> None:
        """Go on from saved `weights`."""
        for name, tensor in self.weights.items():
            tensor.copy_(spread(weights[name], like=tensor))
