"""What all tokenizers share: numbered pieces of text, and the special tokens after them."""

from __future__ import annotations

import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from lmtutorial.bpe import check_ids
from lmtutorial.words import check_text

FORMAT, VERSION = "lmtutorial tokenizer", 1
UNK = "<unk>"
END_OF_TEXT = "<|endoftext|>"
ENDS = (END_OF_TEXT, "<eos>")  # the special tokens that can be `eos`

Ids = npt.NDArray[np.unsignedinteger[Any]]


class Tokenizer(ABC):
    """Text to token ids and back. The attributes:

    kind: its name in files, "char", "word" or "bpe".
    vocab_size: the number of tokens, special ones included; ids are 0 .. vocab_size - 1.
    specials: the special tokens and their ids, in this order.
    unk: the id of `<unk>`, or None.
    eos: the id at which generation ends, or None.
    token_bytes: (vocab_size,) int64, the UTF-8 bytes that each token stands for; 0 for special tokens.
    dtype: of `encode_array`, the smaller one of uint16 and uint32 that holds every id.
    """

    kind: ClassVar[str]
    shown_unk: ClassVar[str] = "\ufffd"  # what decoding writes for `<unk>`

    def __init__(self, pieces: Sequence[bytes], specials: Sequence[str]) -> None:
        if isinstance(specials, str) or not all(isinstance(name, str) and name for name in specials):
            raise TypeError(f"specials must be a list of names, not {specials!r}")
        if len(set(specials)) < len(specials):
            raise ValueError(f"specials must differ from each other, not be {list(specials)!r}")
        for name in specials:
            check_text(name)
        self.specials = {name: len(pieces) + i for i, name in enumerate(specials)}
        self.vocab_size = len(pieces) + len(specials)
        self.unk = self.specials.get(UNK)
        self.eos = next((self.specials[name] for name in ENDS if name in self.specials), None)
        self.token_bytes = np.array([len(piece) for piece in pieces] + [0] * len(specials), dtype=np.int64)
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)
        self._plain = [*pieces, *(self.shown_unk.encode() if name == UNK else b"" for name in specials)]
        self._named = [*pieces, *(name.encode() for name in specials)]
        names = sorted(specials, key=len, reverse=True)  # where one begins with another, the longer wins
        self._special = re.compile("(" + "|".join(map(re.escape, names)) + ")")

    @abstractmethod
    def _encode_plain(self, text: str) -> Ids:
        """The ids of a text without special tokens."""

    @abstractmethod
    def _state(self) -> dict[str, Any]:
        """The arguments of `__init__` but `specials`, as JSON holds them."""

    def encode(self, text: str, *, specials: bool = False) -> list[int]:
        """The token ids of `text`; with `specials`, each name of a special token in it becomes that token."""
        ids: list[int] = self.encode_array(text, specials=specials).tolist()
        return ids

    def encode_array(self, text: str, *, specials: bool = False) -> Ids:
        """The same ids as an array (time,) of `dtype`: fast and small, for whole corpora."""
        check_text(text)
        if not (specials and self.specials):
            return self._encode_plain(text)
        parts = self._special.split(text)  # plain, special, plain, ..., plain
        ids = [
            np.array([self.specials[part]], self.dtype) if i % 2 else self._encode_plain(part)
            for i, part in enumerate(parts)
        ]
        return np.concatenate(ids)

    def decode(self, ids: Iterable[int], *, specials: bool = False) -> str:
        """The text of `ids`; with `specials`, special tokens are written by name.

        Bytes that are not UTF-8 become U+FFFD. Raises ValueError for an id out of range.
        """
        return self.decode_bytes(ids, specials=specials).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int], *, specials: bool = False) -> bytes:
        """The bytes of that text; a token of byte-level BPE may hold a part of a character."""
        pieces = self._named if specials else self._plain
        return b"".join([pieces[i] for i in check_ids(ids, self.vocab_size)])

    def tokens(self, text: str) -> list[str]:
        """The text of each token of `text`, to look at."""
        return [self.decode([i]) for i in self.encode(text)]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON that `load_tokenizer` reads; the file is there whole, or not at all."""
        head = {"format": FORMAT, "version": VERSION, "kind": self.kind, "specials": list(self.specials)}
        part = Path(f"{os.fspath(path)}.part")
        part.write_text(json.dumps(head | self._state(), ensure_ascii=False), encoding="utf-8")
        os.replace(part, path)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(vocab_size={self.vocab_size}, specials={list(self.specials)})"
