"""What the command line can be asked for: each command a dataclass whose fields are its flags."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lmtutorial.corpora import list_corpora
from lmtutorial.models.lstm import LSTMConfig
from lmtutorial.train import TrainConfig

MODEL = LSTMConfig(vocab_size=2000, width=256)
TRAINING = TrainConfig(
    steps=None, max_seconds=60.0, learning_rate=1e-2, eval_every=500, out=Path("runs/demo")
)


@dataclass(frozen=True)
class Train:
    """Train a language model on a text, and keep it in a folder.

    Without flags: a minute on Shakespeare. Ctrl-C saves and says how to go on.
    """

    corpus: str = "shakespeare"
    """The text: a name that `lmtutorial corpora` lists, or the path of your own UTF-8 file."""
    tokenizer: Literal["char", "word", "bpe"] = "bpe"
    """How to cut the text into tokens: characters, words, or pieces of words learned from it."""
    model: Literal["lstm"] = "lstm"
    """The kind of model."""
    lstm: LSTMConfig = MODEL
    """The size of the model."""
    batch: int = 32
    """How many places of the text to read side by side."""
    time: int = 32
    """How many tokens to read before each update."""
    training: TrainConfig = TRAINING
    """How to train it."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda, cuda:1, mps."""
    resume: Path | None = None
    """The folder of a run to go on with; its flags are kept where none are given."""
    overwrite: bool = False
    """Replace a run that is in the folder already."""


@dataclass(frozen=True)
class Evaluate:
    """Measure how well a trained model predicts a text: loss, perplexity, bits per byte."""

    checkpoint: Path = Path("runs/demo")
    """The folder of a run (its best weights are taken), or a checkpoint in it."""
    split: Literal["train", "validation", "test"] = "validation"
    """Which part of the text."""
    corpus: str | None = None
    """Another text than the model was trained on: a name, or the path of a UTF-8 file."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda, cuda:1, mps."""


@dataclass(frozen=True)
class Generate:
    """Write text with a trained model."""

    checkpoint: Path = Path("runs/demo")
    """The folder of a run (its best weights are taken), or a checkpoint in it."""
    prompt: str = "\n"
    """What the text begins with."""
    samples: int = 3
    """How many texts to write."""
    max_new_tokens: int = 200
    """How long each text gets, in tokens."""
    temperature: float = 0.8
    """Below 1 safer, above 1 bolder, 0 always the likeliest token."""
    top_k: int | None = None
    """Choose only among this many of the likeliest tokens."""
    top_p: float | None = None
    """Choose only among the likeliest tokens that together have this probability."""
    min_p: float | None = None
    """Choose only among tokens at least this share as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Above 1: tokens that were used already become less likely."""
    seed: int | None = None
    """The same seed writes the same texts. None: new ones each time."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda, cuda:1, mps."""


@dataclass(frozen=True)
class Corpora:
    """List the texts that can be had by name."""


def store(command: Train, folder: Path) -> None:
    """Write the flags of a run beside its checkpoints, so that it can go on with them from anywhere."""
    named = command.corpus in {info.name for info in list_corpora()}
    corpus = command.corpus if named else str(Path(command.corpus).resolve())
    command = dataclasses.replace(command, corpus=corpus, resume=None, overwrite=False)
    (folder / "command.json").write_text(json.dumps(dataclasses.asdict(command), default=str, indent=1))


def stored(folder: Path) -> Train:
    """The flags of the run in `folder`; going on keeps them.

    Raises FileNotFoundError where no run began, ValueError for a file that is not one.
    """
    path = folder / "command.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no run: there is no {path.name}")
    try:
        flags = json.loads(path.read_text())
        training = {**flags["training"], "betas": tuple(flags["training"]["betas"]), "out": folder}
        flags |= {"lstm": LSTMConfig(**flags["lstm"]), "training": TrainConfig(**training)}
        return dataclasses.replace(Train(**flags), resume=folder)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not hold the flags of a run: {error}") from error
