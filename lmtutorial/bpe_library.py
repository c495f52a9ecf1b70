"""Byte-level BPE by Hugging Face's library `tokenizers`, with the token ids of `lmtutorial.bpe`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from lmtutorial.bpe import BPE, FIRST_MERGE, Pair
from lmtutorial.vocabulary import END_OF_TEXT, Ids, Tokenizer
from lmtutorial.words import check_training_text, chunks


class BPETokenizer(Tokenizer):
    """Byte-level BPE, trained by the library on all cores; ids 0 to 255 are bytes, 256 + i is merge i.

    Encoding is that of `lmtutorial.bpe.BPE(merges)`, whose word cache outruns the library on a few cores.
    `to_library` gives the library's tokenizer, which encodes alike: every character that the Unicode tables
    of Python and of the library both know.

    >>> tokenizer = BPETokenizer.train("low low low lower lower new new", vocab_size=259)
    >>> tokenizer.encode("slow"), tokenizer.tokens("slow"), tokenizer.specials
    ([115, 257], ['s', 'low'], {'<|endoftext|>': 258})
    """

    kind = "bpe"

    def __init__(self, merges: Sequence[Sequence[int]], *, specials: Sequence[str] = (END_OF_TEXT,)) -> None:
        self._bpe = BPE(merges)
        super().__init__(self._bpe.pieces, specials)
        self.merges = self._bpe.merges

    @classmethod
    def from_merges(
        cls, merges: Sequence[Sequence[int]], *, specials: Sequence[str] = (END_OF_TEXT,)
    ) -> BPETokenizer:
        """The tokenizer with the given merges, for example those of `lmtutorial.bpe.BPE.train`."""
        return cls(merges, specials=specials)

    @classmethod
    def train(
        cls,
        text: str,
        vocab_size: int = 8_000,
        *,
        min_count: int = 2,
        specials: Sequence[str] = (END_OF_TEXT,),
    ) -> BPETokenizer:
        """Learn merges to make `vocab_size` tokens in all, the 256 bytes and the special tokens included.

        There are fewer if no pair is left that occurs `min_count` times. Training twice gives the same; of
        equally frequent pairs the library may merge another one first than `lmtutorial.bpe` does.
        """
        from tokenizers.models import BPE as LibraryBPE
        from tokenizers.trainers import BpeTrainer

        check_training_text(text)
        least = FIRST_MERGE + len(specials)
        if vocab_size < least:
            raise ValueError(f"vocab_size is {vocab_size}; the bytes and special tokens alone are {least}")
        letters = byte_letters()
        library = library_tokenizer(LibraryBPE())
        trainer = BpeTrainer(
            vocab_size=vocab_size - len(specials),
            min_frequency=min_count,
            initial_alphabet=letters,
            show_progress=False,
        )
        library.train_from_iterator(chunks(text), trainer)
        ids = {letter: byte for byte, letter in enumerate(letters)}
        merges: list[Pair] = []
        for left, right in json.loads(library.to_str())["model"]["merges"]:
            ids[left + right] = FIRST_MERGE + len(merges)
            merges.append((ids[left], ids[right]))
        return cls(merges, specials=specials)

    def to_library(self) -> Any:
        """The same merges as a `tokenizers.Tokenizer`, for what that library does; without special tokens."""
        from tokenizers.models import BPE as LibraryBPE

        letters = byte_letters()
        names = ["".join(letters[byte] for byte in piece) for piece in self._bpe.pieces]
        merges = [(names[left], names[right]) for left, right in self.merges]
        return library_tokenizer(LibraryBPE(vocab={name: i for i, name in enumerate(names)}, merges=merges))

    def _encode_plain(self, text: str) -> Ids:
        return np.fromiter(self._bpe.iterate(text), dtype=self.dtype)

    def _state(self) -> dict[str, Any]:
        return {"merges": self.merges}


def byte_letters() -> list[str]:
    """The character that stands for each byte in the library: itself where it prints, else 256, 257, ..."""
    printing = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printing else next(others)) for byte in range(256)]


def library_tokenizer(model: Any) -> Any:
    """A `tokenizers.Tokenizer` that cuts text into words and bytes as GPT-2 does."""
    import tokenizers
    from tokenizers import decoders, pre_tokenizers

    library = tokenizers.Tokenizer(model)
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    return library
