"""A network and an n-gram model as one: each is trusted where it has been right before."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lmtutorial.batches import IGNORE, Batch
from lmtutorial.models.cache import Cache, LanguageModel
from lmtutorial.models.ngram import NGram


class Mixture:
    """p(w | h) = (1 - a) p_model(w | h) + a p_ngram(w | h), with a weight a for each length of match.

    The match is how many tokens of the context the n-gram model has seen in a row (`NGram.predict`): a long
    match is a quotation, which counts know best; after a short one the network knows better. A
    `LanguageModel`, so it can be measured and written with like any other; not a module. Source: Jelinek and
    Mercer 1980 (interpolation by context); Chelba et al. 2014 (a network and n-grams).

    >>> from lmtutorial.models.lstm import LSTM, LSTMConfig
    >>> ngram = NGram.train([0, 1, 0, 1, 0, 2], order=2, vocab_size=3)
    >>> model = Mixture(LSTM(LSTMConfig(3, width=4)), ngram, torch.tensor([0.0, 1.0]))
    >>> torch.allclose(model(torch.tensor([[0, 1]])), ngram(torch.tensor([[0, 1]])))  # all match
    True
    """

    def __init__(self, model: LanguageModel, ngram: NGram, weights: Tensor) -> None:
        """`weights`, (order,), are the n-gram model's after a match of 0, 1, ... `order - 1` tokens.

        Raises ValueError for models of different vocabularies, or weights that are not `order` shares.
        """
        if model.vocab_size != ngram.vocab_size:
            raise ValueError(f"the vocabularies differ: {model.vocab_size} and {ngram.vocab_size} tokens")
        if weights.shape != (ngram.order,) or not ((weights >= 0) & (weights <= 1)).all():
            raise ValueError(f"weights must be {ngram.order} numbers from 0 to 1, got {weights.tolist()}")
        self.model, self.ngram, self.weights = model, ngram, weights.to(torch.float32)
        self.vocab_size, self.context = model.vocab_size, model.context

    @property
    def device(self) -> torch.device:
        """Where the network computes, and the sum is made."""
        return self.model.device

    def __call__(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Logits, here log-probabilities: (batch, time) int64 -> (batch, time, vocab_size)."""
        assert cache is None or isinstance(cache, MixtureCache)
        of_model = self.model(tokens, cache and cache.model).float().log_softmax(-1)
        of_ngram, matched = self.ngram.predict(tokens.cpu(), cache and cache.ngram)
        weight = self.weights[matched][..., None].to(self.device)
        return torch.logaddexp(of_model + torch.log1p(-weight), of_ngram.to(self.device) + weight.log())

    def new_cache(self, batch: int, max_len: int | None) -> MixtureCache:
        """A cache for each of the two."""
        return MixtureCache(self.model.new_cache(batch, max_len), self.ngram.new_cache(batch, max_len))


class MixtureCache:
    """The caches of the network and of the n-gram model, moved alike."""

    def __init__(self, model: Cache, ngram: Cache) -> None:
        self.model, self.ngram = model, ngram

    @property
    def lengths(self) -> Tensor:
        """(batch,) int64: how many tokens of each row were read."""
        return self.model.lengths

    def reorder(self, rows: Tensor) -> None:
        """Row b becomes what row `rows[b]` was."""
        self.model.reorder(rows)
        self.ngram.reorder(rows.cpu())

    def truncate(self, lengths: Tensor) -> None:
        """Forget what row b read after its first `lengths[b]` tokens."""
        self.model.truncate(lengths)
        self.ngram.truncate(lengths.cpu())

    def copy_out(self, row: int, start: int, stop: int) -> tuple[Any, Any]:
        """What each of the two copies."""
        return self.model.copy_out(row, start, stop), self.ngram.copy_out(row, start, stop)

    def copy_in(self, rows: Sequence[Sequence[tuple[Any, Any]]], to: Sequence[int] | None = None) -> None:
        """Row b, or `to[b]`, becomes one that has read the pieces `rows[b]`."""
        self.model.copy_in([[of_model for of_model, _ in pieces] for pieces in rows], to)
        self.ngram.copy_in([[of_ngram for _, of_ngram in pieces] for pieces in rows], to)

    def detach(self) -> None:
        """Cut the graph."""
        self.model.detach()


@torch.inference_mode()
def fit_weights(model: LanguageModel, ngram: NGram, batches: Iterable[Batch], steps: int = 50) -> Tensor:
    """The weights, (order,), with which a `Mixture` makes the targets of `batches` most probable.

    Expectation-maximization: a weight becomes the mean share that the n-gram model has in the probability of
    the targets, which never lowers their likelihood. The text should be one that neither model was trained
    on. Matches that it does not have keep the weight 1/2. Source: Dempster, Laird and Rubin 1977.

    >>> from lmtutorial.batches import WindowBatches
    >>> from lmtutorial.models.lstm import LSTM, LSTMConfig
    >>> ngram = NGram.train([0, 1, 2] * 20, order=2, vocab_size=3)
    >>> fit_weights(LSTM(LSTMConfig(3, width=4)), ngram, WindowBatches([0, 1, 2] * 20, batch=2, time=9)) > 0.9
    tensor([False,  True])
    """
    matches, of_model, of_ngram = [], [], []
    for batch in batches:
        there = batch.targets != IGNORE
        targets = batch.targets.clamp_min(0)[..., None]
        ngram_logits, matched = ngram.predict(batch.inputs)
        model_logits = model(batch.inputs.to(model.device)).float().log_softmax(-1).cpu()
        matches.append(matched[there])
        of_model.append(model_logits.gather(-1, targets)[..., 0][there].double().exp())
        of_ngram.append(ngram_logits.gather(-1, targets)[..., 0][there].double().exp())
    match, p, q = torch.cat(matches), torch.cat(of_model), torch.cat(of_ngram)
    weights = torch.full((ngram.order,), 0.5, dtype=torch.float64)
    times = torch.bincount(match, minlength=ngram.order)
    for _ in range(steps):
        share = weights[match] * q / ((1 - weights[match]) * p + weights[match] * q)
        sums = torch.zeros_like(weights).index_add_(0, match, share)
        weights = torch.where(times > 0, sums / times.clamp_min(1), weights)
    return weights.float()
