"""How well a model predicts a text: totals first, divided once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from lmtutorial.batches import IGNORE, Batch
from lmtutorial.losses import lm_loss
from lmtutorial.models.cache import Cache, LanguageModel, carried


class Evaluation(NamedTuple):
    """The total cost of a text: `nats` over `tokens` targets, which spell `bytes` bytes (None: unknown).

    >>> result = Evaluation(nats=6931.47, tokens=2000, bytes=5000)
    >>> round(result.perplexity, 2), round(result.bits_per_token, 2), round(result.bits_per_byte, 2)
    (32.0, 5.0, 2.0)
    """

    nats: float
    tokens: int
    bytes: int | None = None

    @property
    def loss(self) -> float:
        """Nats per target token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp of the loss: among how many equally likely tokens the model seems to choose.

        Comparable only between models that share a tokenizer; `bits_per_byte` compares across tokenizers.
        Source: Jelinek et al., "Perplexity: a measure of the difficulty of speech recognition tasks", 1977.
        """
        return math.exp(self.loss)

    @property
    def bits_per_token(self) -> float:
        """The loss in bits."""
        return self.loss / math.log(2)

    @property
    def bits_per_byte(self) -> float:
        """Total bits over the bytes that the target tokens spell: comparable between any two tokenizers.

        Raises ValueError where the bytes were not counted.
        """
        if not self.bytes:
            raise ValueError(
                "the bytes were not counted; call evaluate(..., token_bytes=tokenizer.token_bytes)"
            )
        return self.nats / math.log(2) / self.bytes


@torch.inference_mode()
def evaluate(
    model: LanguageModel,
    batches: Iterable[Batch],
    *,
    token_bytes: npt.NDArray[np.int64] | None = None,
    total: Callable[[float], float] = float,
) -> Evaluation:
    """The total negative log-likelihood of all target tokens of `batches`, dropout off.

    Where a batch `continues` the one before, the model's cache is carried over, so that no token loses its
    context at a seam. `token_bytes` (vocab,) says how many bytes each token spells. Where several processes
    evaluate some rows each, `total` adds up what they found.

    Raises ValueError if `batches` holds no target.

    >>> from lmtutorial.batches import StreamBatches
    >>> from lmtutorial.models.lstm import LSTM, LSTMConfig
    >>> result = evaluate(LSTM(LSTMConfig(vocab_size=50, width=8)), StreamBatches(range(50), batch=2, time=5))
    >>> result.tokens
    49
    """
    nats = torch.zeros((), dtype=torch.float64, device=model.device)
    counts = torch.zeros(model.vocab_size, dtype=torch.int64)
    cache: Cache | None = None
    with _evaluating(model):
        for batch in batches:
            inputs, targets, continues = batch.to(model.device)
            cache = carried(model, cache, len(inputs), continues)
            nats += lm_loss(model(inputs, cache), targets).nats
            counts += torch.bincount(batch.targets[batch.targets != IGNORE].cpu(), minlength=len(counts))
    tokens = int(total(int(counts.sum())))
    if not tokens:
        raise ValueError("there is no target to evaluate on; give batches of a text of at least 2 tokens")
    total_bytes = None if token_bytes is None else int(total(int(counts.numpy() @ token_bytes)))
    return Evaluation(total(nats.item()), tokens, total_bytes)


@contextmanager
def _evaluating(model: LanguageModel) -> Iterator[None]:
    """Dropout off inside, as it was afterwards."""
    was_training = isinstance(model, nn.Module) and model.training
    if isinstance(model, nn.Module):
        model.eval()
    try:
        yield
    finally:
        if isinstance(model, nn.Module):
            model.train(was_training)
