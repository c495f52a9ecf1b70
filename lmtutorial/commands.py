"""What the command line can be asked for: each command a dataclass whose fields are its flags."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lmtutorial.corpora import list_corpora
from lmtutorial.decoders import Decoding
from lmtutorial.train_config import TrainConfig

ModelKind = Literal["lstm", "gpt2", "modern"]
TRAINING = TrainConfig(
    steps=None, max_seconds=60.0, learning_rate=1e-2, eval_every=500, out=Path("runs/demo")
)

WRITING = Decoding(temperature=0.8)


@dataclass(frozen=True)
class Size:
    """The size of a model, whatever its kind."""

    vocab_size: int = 2000
    """How many tokens the tokenizer may have."""
    width: int = 256
    """The size of the embedding and of each layer's state."""
    layers: int = 1
    """How many layers lie on each other."""
    heads: int = 4
    """How many attention heads a layer of a Transformer has."""
    kv_heads: int | None = None
    """How many key-value heads they share (modern only). None: each head has its own."""
    dropout: float = 0.0
    """The share of activations dropped in training."""


@dataclass(frozen=True)
class Train:
    """Train a language model on a text, and keep it in a folder.

    Without flags: a minute on Shakespeare. Ctrl-C saves and says how to go on. The defaults of size and
    training are those that suit the kind of model.
    """

    corpus: str = "shakespeare"
    """The text: a name that `lmtutorial corpora` lists, or the path of your own UTF-8 file."""
    tokenizer: Literal["char", "word", "bpe"] = "bpe"
    """How to cut the text into tokens: characters, words, or pieces of words learned from it."""
    model: ModelKind = "lstm"
    """The kind of model: an LSTM, GPT-2's Transformer, or one with rotary positions, RMSNorm and SwiGLU."""
    size: Size = Size()
    """The size of the model."""
    batch: int = 32
    """How many places of the text to read side by side."""
    time: int = 32
    """How many tokens to read before each update; the context of a Transformer."""
    training: TrainConfig = TRAINING
    """How to train it."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda, cuda:1, mps."""
    resume: Path | None = None
    """The folder of a run to go on with; its flags are kept where none are given."""
    overwrite: bool = False
    """Replace a run that is in the folder already."""


LSTM_DEFAULTS = Train()
MODERN_DEFAULTS = dataclasses.replace(
    LSTM_DEFAULTS,
    model="modern",
    size=Size(width=128, layers=6, heads=2),
    batch=16,
    time=128,
    training=dataclasses.replace(
        LSTM_DEFAULTS.training,
        optimizer="muon",
        learning_rate=1.5e-2,
        betas=(0.9, 0.95),
        schedule="linear",
        warmup=10,
        floor=0.0,
        weight_decay=0.1,
        clip=None,
    ),
)
GPT2_DEFAULTS = dataclasses.replace(
    MODERN_DEFAULTS,
    model="gpt2",
    training=dataclasses.replace(MODERN_DEFAULTS.training, optimizer="adamw", learning_rate=3e-3, clip=1.0),
)
DEFAULTS = {command.model: command for command in (LSTM_DEFAULTS, GPT2_DEFAULTS, MODERN_DEFAULTS)}
"""By kind of model: what `train` does where no flag says otherwise."""


@dataclass(frozen=True)
class Evaluate:
    """Measure how well a trained model predicts a text: loss, perplexity, bits per byte."""

    checkpoint: str = "runs/demo"
    """The folder of a run (its best weights are taken), a checkpoint in it, or a name, as shakespeare."""
    split: Literal["train", "validation", "test"] = "validation"
    """Which part of the text."""
    corpus: str | None = None
    """Another text than the model was trained on: a name, or the path of a UTF-8 file."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda, cuda:1, mps."""


@dataclass(frozen=True)
class Generate:
    """Write text with a trained model."""

    checkpoint: str = "runs/demo"
    """The folder of a run (its best weights are taken), a checkpoint in it, or a name, as shakespeare."""
    prompt: str = "\n"
    """What the text begins with."""
    samples: int = 3
    """How many texts to write."""
    max_new_tokens: int = 200
    """How long each text gets, in tokens; with the prompt at most the model's context."""
    decoding: Decoding = WRITING
    """How to choose tokens."""
    draft: str = "lookup"
    """speculative: what proposes tokens, a model (as in checkpoint) or `lookup`, the text so far."""
    reward: str | None = None
    """best_of, mcts: FILE.py:FUNCTION, a function of the text that gives a number, the higher the better."""
    bits: Literal[4, 8] | None = None
    """Round the weights of a Transformer to so many bits. None: as they are."""
    fast: bool = False
    """Compile a Transformer's steps when they first run: C++ on a CPU, CUDA graphs on a GPU."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda, cuda:1, mps."""


@dataclass(frozen=True)
class Serve:
    """Answer OpenAI's clients with a trained model: /v1/completions, /v1/models, /health.

    Ctrl-C stops it, after what is on its way is written. Needs fastapi and uvicorn: the extra "serve".
    """

    checkpoint: str = "runs/demo"
    """The folder of a run (its best weights are taken), a checkpoint in it, or a name, as shakespeare."""
    name: str | None = None
    """What clients call the model. None: the last part of `checkpoint`."""
    host: str = "127.0.0.1"
    """The address to listen at. The default is this machine alone; 0.0.0.0 lets anyone on the network in."""
    port: int = 8000
    """The port to listen at; 0 takes one that is free."""
    rows: int = 16
    """How many texts are written side by side. Each step computes as many rows, taken or not."""
    queue: int = 256
    """How many more texts may wait; beyond that the answer is 429."""
    max_len: int | None = None
    """The longest text, prompt included, in tokens. None: the model's context, 1024 where it has none."""
    keep: int = 4096
    """How many tokens of earlier texts are kept, so that texts that begin alike need not be read again."""
    max_body: int = 1 << 20
    """The longest body of a request, in bytes; beyond that the answer is 413."""
    grace: float = 10.0
    """How many seconds after Ctrl-C texts on their way may take to end; the rest get an error."""
    draft: str = "lookup"
    """For the decoder speculative: what proposes tokens, a model (as in checkpoint) or `lookup`."""
    reward: str | None = None
    """For the decoders best_of and mcts: FILE.py:FUNCTION, a function of the text that gives a number."""
    bits: Literal[4, 8] | None = None
    """Round the weights of a Transformer to so many bits. None: as they are."""
    fast: bool = False
    """Compile a Transformer's steps when they first run: C++ on a CPU, CUDA graphs on a GPU."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda, cuda:1, mps."""


@dataclass(frozen=True)
class Corpora:
    """List the texts that can be had by name."""


@dataclass(frozen=True)
class Repro:
    """Make a result that the book states again, beside the stored one and what others published.

    Without an id: list all results.
    """

    id: Annotated[str | None, tyro.conf.Positional] = None
    """Which result."""
    seeds: tuple[int, ...] | None = None
    """The seeds to run. None: those of the stored result."""
    record: bool = False
    """Append what came out to the ledger."""


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
        flags |= {"size": Size(**flags["size"]), "training": TrainConfig(**training)}
        return dataclasses.replace(Train(**flags), resume=folder)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not hold the flags of a run: {error}") from error
