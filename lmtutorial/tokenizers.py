r"""Character, word and BPE tokenizers with one interface: text to token ids and back, and bytes per token.

A tokenizer cuts text into pieces and numbers them; decoding joins the pieces. Three rules hold for all:

- `decode(encode(text)) == text`, and the `token_bytes` of the ids add up to the text's UTF-8 bytes, for every
  text whose pieces are all known. For BPE that is every text; words in the style "wikitext" normalize spaces.
- Special tokens have the last ids (in published models any) and stand for no bytes. Encoding plain text never
  makes them and decoding leaves them out, unless `specials=True` asks to read and to write them by name.
- One is different: `<unk>`, if the tokenizer has it, stands for any unknown piece, and decoding shows it.
  Without it an unknown piece is an error.

This module is not Hugging Face's library `tokenizers`, which `BPETokenizer` uses.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lmtutorial.bpe_library import BPETokenizer
from lmtutorial.bpe_published import PublishedBPE
from lmtutorial.vocabulary import FORMAT, UNK, VERSION, Ids, Tokenizer
from lmtutorial.words import check_text, check_training_text, plain_words, spaced_words

__all__ = ["BPETokenizer", "CharTokenizer", "PublishedBPE", "Tokenizer", "WordTokenizer", "load_tokenizer"]


class CharTokenizer(Tokenizer):
    """One token for each character, numbered in the order of their code points.

    An unknown character raises ValueError, unless `<unk>` is among the special tokens.

    >>> tokenizer = CharTokenizer.train("to be or not to be")
    >>> tokenizer.vocab_size, tokenizer.encode("bet"), tokenizer.decode([1, 2, 6])
    (7, [1, 2, 6], 'bet')
    """

    kind = "char"

    def __init__(self, characters: str, *, specials: Sequence[str] = ()) -> None:
        check_text(characters)
        if len(set(characters)) < len(characters):
            raise ValueError(f"characters must differ from each other, not be {characters[:80]!r}")
        super().__init__([character.encode() for character in characters], specials)
        self.characters = characters
        codes = _code_points(characters)
        unknown = -1 if self.unk is None else self.unk
        self._ids = np.full(int(codes.max(initial=0)) + 2, unknown, dtype=np.int32)  # last: all greater codes
        self._ids[codes] = np.arange(len(codes))

    @classmethod
    def train(cls, text: str, *, unk: bool = False, specials: Sequence[str] = ()) -> CharTokenizer:
        """A token for each character of `text`, and with `unk` one for all others."""
        check_training_text(text)
        return cls("".join(sorted(set(text))), specials=[UNK, *specials] if unk else specials)

    def _encode_plain(self, text: str) -> Ids:
        ids = self._ids[np.minimum(_code_points(text), len(self._ids) - 1)]
        if self.unk is None and ids.size and ids.min() < 0:
            i = int(ids.argmin())
            raise ValueError(
                f"text has {text[i]!r} (U+{ord(text[i]):04X}) at position {i}, which is not one of this "
                f"tokenizer's {len(self.characters)} characters; train with unk=True to encode it as {UNK}"
            )
        return ids.astype(self.dtype)

    def _state(self) -> dict[str, Any]:
        return {"characters": self.characters}


WordStyle = tuple[Callable[[str], list[str]], Sequence[str]]  # how to cut text, and the usual special tokens
WORD_STYLES: dict[str, WordStyle] = {
    "plain": (plain_words, (UNK, "<eos>")),
    "wikitext": (spaced_words, (UNK,)),
}


class WordTokenizer(Tokenizer):
    r"""One token for each frequent word, the most frequent first, and `<unk>` for all others.

    style="plain": words, numbers and signs, each with the one space before it, and newlines. "to" and " to"
    are two tokens, so that the pieces joined are the text again.
    style="wikitext": whatever stands between spaces, for texts that are tokenized already, as WikiText and
    the Penn Treebank are. A line is " word word \n"; other spacing is normalized to this. The line end " \n",
    which the literature writes <eos>, is an ordinary token and is `eos`; a word <unk> is the special token.

    >>> tokenizer = WordTokenizer.train("to be or not to be", vocab_size=7)
    >>> tokenizer.encode("to be to do"), tokenizer.tokens("to be to do")
    ([4, 0, 3, 5], ['to', ' be', ' to', ' <unk>'])
    """

    kind = "word"
    shown_unk = f" {UNK}"

    def __init__(
        self, words: Sequence[str], *, style: str = "plain", specials: Sequence[str] | None = None
    ) -> None:
        self._cut, usual_specials = _word_style(style)
        if isinstance(words, str) or not all(isinstance(word, str) and word for word in words):
            raise TypeError(f"words must be a list of strings, not {str(words)[:80]}")
        if twice := [word for word, count in Counter(words).items() if count > 1]:
            raise ValueError(f"words must differ from each other; {twice[0]!r} comes twice")
        spaced = style == "wikitext"
        pieces = [f" {word}" for word in words] if spaced else words
        super().__init__(
            [piece.encode() for piece in pieces], usual_specials if specials is None else specials
        )
        self.words, self.style = list(words), style
        self._ids = {word: i for i, word in enumerate(words)}
        if spaced:
            self.eos = self._ids.get("\n", self.eos)
            self._ids |= {} if self.unk is None else {UNK: self.unk}

    @classmethod
    def train(
        cls,
        text: str,
        vocab_size: int | None = 10_000,
        *,
        style: str = "plain",
        specials: Sequence[str] | None = None,
    ) -> WordTokenizer:
        """The most frequent words of `text`, to make `vocab_size` tokens in all; None takes every word.

        Equally frequent words come in alphabetical order. In the style "wikitext" the line end is token 0.
        """
        cut, usual_specials = _word_style(style)
        check_training_text(text)
        specials = usual_specials if specials is None else specials
        if vocab_size is not None and vocab_size <= len(specials):
            raise ValueError(
                f"vocab_size is {vocab_size}; it must be over {len(specials)}, the special tokens"
            )
        counts = Counter(cut(text))
        if style == "wikitext":
            counts["\n"] += 0
            if UNK in specials:
                del counts[UNK]
        ranked = sorted(counts, key=lambda word: (style == "plain" or word != "\n", -counts[word], word))
        words = ranked if vocab_size is None else ranked[: vocab_size - len(specials)]
        return cls(words, style=style, specials=specials)

    def _encode_plain(self, text: str) -> Ids:
        words = self._cut(text)
        unknown = -1 if self.unk is None else self.unk
        ids = np.fromiter(map(self._ids.get, words, repeat(unknown)), dtype=np.int64, count=len(words))
        if self.unk is None and ids.size and ids.min() < 0:
            i = int(ids.argmin())
            raise ValueError(
                f"word {i} of the text, {words[i]!r}, is not one of the {len(self.words)} words of this "
                f"tokenizer; with {UNK} among the special tokens it would be encoded as that"
            )
        return ids.astype(self.dtype)

    def _state(self) -> dict[str, Any]:
        return {"words": self.words, "style": self.style}


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Read a tokenizer that was written by `save`. Raises ValueError for any other file, saying why."""
    try:
        state = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)} is not a tokenizer: it is not JSON ({error})") from None
    if not isinstance(state, dict) or state.pop("format", None) != FORMAT:
        raise ValueError(f'{os.fspath(path)} is not a tokenizer: it has no "format": "{FORMAT}"')
    if (version := state.pop("version", None)) != VERSION:
        raise ValueError(
            f"{os.fspath(path)} has version {version!r}; this lmtutorial reads version {VERSION}"
        )
    kinds = {cls.kind: cls for cls in (CharTokenizer, WordTokenizer, BPETokenizer, PublishedBPE)}
    if str(kind := state.pop("kind", None)) not in kinds:
        raise ValueError(f"{os.fspath(path)} is of the kind {kind!r}, which is none of {', '.join(kinds)}")
    try:
        return kinds[kind](specials=state.pop("specials"), **state)
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"{os.fspath(path)} is a damaged tokenizer: {error}") from error


def _word_style(style: str) -> WordStyle:
    if style not in WORD_STYLES:
        raise ValueError(f"style is {style!r}; it must be one of {', '.join(WORD_STYLES)}")
    return WORD_STYLES[style]


def _code_points(text: str) -> npt.NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
