"""How each result of the ledger is made: `lmtutorial repro ID` runs one of these recipes again."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from lmtutorial.batches import SlidingWindows, WindowBatches
from lmtutorial.corpora import load_corpus
from lmtutorial.devices import seeded
from lmtutorial.ledger import Result
from lmtutorial.metrics import evaluate
from lmtutorial.models.mixture import Mixture, fit_weights
from lmtutorial.models.ngram import NGram
from lmtutorial.models.transformer import Transformer, TransformerConfig
from lmtutorial.tokenizers import CharTokenizer
from lmtutorial.train import TrainConfig, train


@dataclass(frozen=True)
class Recipe:
    """A result that can be made again."""

    what: str
    """What is measured, on which text, with which context."""
    unit: str
    run: Callable[[int], float]
    """From a seed to a value; lower is better."""
    config: str
    """The settings, to be read."""
    seeds: tuple[int, ...] = (0,)
    cost: str = ""
    """What a seed takes, on the machine that it was made for."""
    published: str = ""
    """What others report for the same text and metric."""
    source: str = ""
    """Where they do."""


@dataclass(frozen=True)
class CharacterRun:
    """A Transformer on tiny Shakespeare, character by character, trained for some seconds on a CPU."""

    seconds: float
    width: int = 128
    layers: int = 6
    heads: int = 2
    time: int = 128
    """How many characters it reads at a time, in training and when it is measured."""
    batch: int = 16
    dropout: float = 0.0
    learning_rate: float = 0.015
    order: int = 0
    """Of the Kneser-Ney model that the network is mixed with. 0: the network alone."""
    tuning: float = 0.05
    """The share of the training text, its end, that the weights of the mixture are fitted on."""

    def config(self) -> TransformerConfig:
        """The network's shape."""
        return TransformerConfig(
            vocab_size=65, context=self.time, width=self.width, layers=self.layers, heads=self.heads,
            mlp="relu2", qk_norm=True, dropout=self.dropout,
        )  # fmt: skip

    def training(self, seed: int) -> TrainConfig:
        """How it is trained."""
        return TrainConfig(
            steps=None, max_seconds=self.seconds, optimizer="muon", learning_rate=self.learning_rate,
            betas=(0.9, 0.95), weight_decay=0.1, schedule="linear", warmup=10, floor=0.0, clip=None,
            log_every=100, seed=seed,
        )  # fmt: skip

    def __call__(self, seed: int) -> float:
        """Nats per character of the validation part: the last tenth of the text, scored whole."""
        corpus = load_corpus("tiny_shakespeare")
        tokenizer = CharTokenizer.train(corpus.text("train") + corpus.text("validation"))
        tokens = tokenizer.encode_array(corpus.text("train")).astype(np.int64)
        held_out = tokenizer.encode_array(corpus.text("validation")).astype(np.int64)
        cut = round(len(tokens) * (1 - self.tuning)) if self.order else len(tokens)
        with seeded(seed, torch.device("cpu")):
            network = Transformer(self.config())
        train(network, WindowBatches(tokens[:cut], self.batch, self.time, seed=seed), self.training(seed))
        model: Transformer | Mixture = network
        if self.order:
            count = functools.partial(NGram.train, order=self.order, vocab_size=65, held_out=0.1)
            weights = fit_weights(network, count(tokens[:cut]), self._windows(tokens[cut:]))
            model = Mixture(network, count(tokens), weights)
        return evaluate(model, self._windows(held_out)).loss

    def _windows(self, tokens: np.ndarray[tuple[int], np.dtype[np.int64]]) -> SlidingWindows:
        return SlidingWindows(tokens, batch=16, time=self.time, stride=self.time // 4)


def _ngram(order: int) -> Callable[[int], float]:
    def run(_seed: int) -> float:
        corpus = load_corpus("tiny_shakespeare")
        tokenizer = CharTokenizer.train(corpus.text("train") + corpus.text("validation"))
        model = NGram.train(
            tokenizer.encode_array(corpus.text("train")), order, tokenizer.vocab_size, held_out=0.1
        )
        return float(model.score(tokenizer.encode_array(corpus.text("validation"))).mean())

    return run


MINUTE = CharacterRun(60.0)
MIXED = CharacterRun(300.0, width=192, heads=3, learning_rate=0.01, dropout=0.05, order=9)

RECIPES = {
    "tiny-shakespeare-ngram": Recipe(
        "tiny Shakespeare, validation part: Kneser-Ney, order 9, with fitted discounts",
        "nats per character",
        _ngram(9),
        "order 9, discounts fitted on the last tenth of the training part",
        cost="a second",
    ),
    "tiny-shakespeare-60s": Recipe(
        "tiny Shakespeare, validation part: a Transformer after a minute on two CPU cores",
        "nats per character",
        MINUTE,
        str(MINUTE),
        seeds=(0, 1, 2),
        cost="75 seconds on two cores",
        published="1.88",
        source="nanoGPT's README: 4 layers, 128 wide, about 3 minutes on a CPU",
    ),
    "tiny-shakespeare-300s-mixed": Recipe(
        "tiny Shakespeare, validation part: a Transformer after five minutes on two CPU cores, mixed with "
        "Kneser-Ney counts",
        "nats per character",
        MIXED,
        str(MIXED),
        cost="six minutes on two cores",
        published="1.4697",
        source="nanoGPT's README: 6 layers, 384 wide, about 3 minutes on an A100",
    ),
}
"""By id, all results that the book states and that this package can make again."""


def reproduce(
    name: str, seeds: tuple[int, ...] | None = None, on_value: Callable[[int, float], None] | None = None
) -> tuple[tuple[float, ...], tuple[int, ...], float]:
    """Run a recipe: its values, their seeds, and the mean seconds that a seed took.

    Raises ValueError for an id that is not in `RECIPES`.
    """
    if name not in RECIPES:
        raise ValueError(f"there is no result {name!r}; there are {', '.join(RECIPES)}")
    recipe, values, begin = RECIPES[name], [], time.perf_counter()
    seeds = recipe.seeds if seeds is None else seeds
    for seed in seeds:
        values.append(recipe.run(seed))
        if on_value:
            on_value(seed, values[-1])
    return tuple(values), seeds, (time.perf_counter() - begin) / len(seeds)


def beside(name: str, stored: Result | None) -> str:
    """One line: what is stored for a result, and what others published."""
    recipe = RECIPES[name]
    found = "not made yet" if stored is None else f"{stored} {recipe.unit} ({stored.device}, {stored.date})"
    return found + (f"; published: {recipe.published} ({recipe.source})" if recipe.published else "")
