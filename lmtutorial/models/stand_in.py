"""A Transformer behind other steps: what the models of `native` and `compiled` have in common."""

from __future__ import annotations

import torch
from torch import nn

from lmtutorial.models.kv_cache import KVCache
from lmtutorial.models.transformer import Transformer


class StandIn(nn.Module):
    """Has the sizes, the device and the cache of `model`, which it shares; a subclass adds `forward`."""

    def __init__(self, model: Transformer, longest: int) -> None:
        super().__init__()
        self.model, self.longest = model, longest
        self.config, self.vocab_size, self.context = model.config, model.vocab_size, model.context

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    def new_cache(self, batch: int, max_len: int | None) -> KVCache:
        """The model's own cache."""
        return self.model.new_cache(batch, max_len)
