"""Cutting text into words: the first step of every tokenizer that is not made of single characters.

The words of `gpt2_pattern` and of `plain_words` are the text again when they are joined.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from functools import cache

# A word, number or sign with the space before it; a run of spaces but the last; any other space; a newline.
PLAIN = re.compile(r" ?\w+(?:['’-]\w+)*| ?(?:-+|\.+|[^\w\s])| +(?= )|\s")


BETWEEN_WORDS = re.compile(r"(?<=\S)(?=[ \n])")


@cache
def gpt2_pattern() -> re.Pattern[str]:
    r"""GPT-2's pattern for the standard library's `re`: letters, numbers or signs, with one space before.

    GPT-2 writes it with Unicode classes that `re` lacks:
    `'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`. Here a letter is what `\w`
    matches but for `_`, digits and the numerals listed below. Every character that this Python's Unicode
    tables know falls into the same class as there.

    Source: Radford et al., "Language models are unsupervised multitask learners", 2019, and its code.

    >>> gpt2_pattern().findall("We'll meet at 10, not ½ past.")
    ['We', "'ll", ' meet', ' at', ' 10', ',', ' not', ' ½', ' past', '.']
    """
    numerals = _numerals()
    other = r"(?=[^\x00-\x7f])"  # keeps ASCII, most of the text, away from the long classes
    letters = rf"(?:[A-Za-z]+|{other}[^\W\d_{numerals}])+"
    numbers = rf"(?:[0-9]+|{other}[\d{numerals}])+"
    space = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # \s of `re` adds 0x1c-0x1f
    signs = rf"(?:[^\w{space}]|_)+"
    return re.compile(
        rf"'(?:[sdmt]|ll|ve|re)| ?{letters}| ?{numbers}| ?{signs}|[{space}]+(?![^{space}])|[{space}]+"
    )


@cache
def digit_pattern() -> re.Pattern[str]:
    r"""Each digit or numeral (`\p{N}`) alone, and the stretches between them.

    Cut so first, and then by `gpt2_pattern`, no token holds two digits (Singh and Strouse, 2024).

    >>> digit_pattern().findall("in 10½ days")
    ['in ', '1', '0', '½', ' days']
    """
    return re.compile(rf"[\d{_numerals()}]|[^\d{_numerals()}]+")


@cache
def _numerals() -> str:
    """The numerals that `\\d` of `re` does not match: letters as numbers, fractions, superscripts."""
    return "".join(c for c in map(chr, range(0x20000)) if unicodedata.category(c) in ("Nl", "No"))


def plain_words(text: str) -> list[str]:
    r"""Words, numbers and signs, each with the one space before it, and newlines.

    >>> plain_words("What, ho!\nCome -- let's go.")
    ['What', ',', ' ho', '!', '\n', 'Come', ' --', " let's", ' go', '.']
    """
    return PLAIN.findall(text)


def spaced_words(text: str) -> list[str]:
    r"""What stands between spaces, and newlines: for texts that are tokenized already.

    >>> spaced_words(" the role @-@ playing game . \n")
    ['the', 'role', '@-@', 'playing', 'game', '.', '\n']
    """
    words: list[str] = []
    for line in text.split("\n"):
        words += line.split()
        words.append("\n")
    return words[:-1]


def chunks(text: str, size: int = 1 << 15) -> Iterator[str]:
    """The text in parts of at least `size` characters, cut where no word of `gpt2_pattern` is cut.

    >>> list(chunks("to be or not to be", size=8))
    ['to be or', ' not to be']
    """
    start = 0
    while start < len(text):
        cut = BETWEEN_WORDS.search(text, start + size)
        end = cut.start() if cut else len(text)
        yield text[start:end]
        start = end


def check_text(text: str) -> None:
    """Raise TypeError for what is not a string, ValueError for a lone surrogate, naming its place."""
    if not isinstance(text, str):
        raise TypeError(f"text must be a str, not {type(text).__name__}")
    try:
        _ = text.isascii() or text.encode("utf-8")
    except UnicodeEncodeError as error:
        found = f"the lone surrogate {text[error.start]!r} at position {error.start}"
        raise ValueError(f"text has {found}, which is half a character and has no UTF-8 bytes") from None


def check_training_text(text: str) -> None:
    """`check_text`, and ValueError for an empty text."""
    check_text(text)
    if not text:
        raise ValueError("text is empty; a tokenizer is trained on at least one character")
