"""Plain text files: reading them as UTF-8, and finding a good place to cut."""

from __future__ import annotations

import re
from pathlib import Path


def read_utf8(path: Path) -> str:
    """The text of a UTF-8 file, without a byte order mark and with "\\n" for every line end.

    Raises ValueError, with the offset of the first wrong byte, where the file is not UTF-8.
    """
    content = path.read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        guess = " (it looks like UTF-16)" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise ValueError(
            f"{path} is not UTF-8: byte 0x{content[error.start]:02x} at offset {error.start}{guess}. Save it "
            "as UTF-8 in an editor, or read it with its own encoding and write it back"
        ) from error
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def cut_near(text: str, share: float) -> int:
    """Where to cut `text` near this share of it, at most 2% of its length away.

    After the nearest blank line; where there is none so near, after a line; else after a word; else exactly
    at the share.

    >>> text = "one two three\\n\\nfour " + "five " * 40
    >>> text[: cut_near(text, 0.07)], text[cut_near(text, 0.07) :][:9]
    ('one two three\\n\\n', 'four five')
    """
    target, slack = int(len(text) * share), len(text) // 50
    for mark in (r"\n[^\S\n]*\n", r"\n", r"\s"):
        matches = re.compile(mark).finditer(text, max(target - slack, 0), target + slack)
        if ends := [match.end() for match in matches]:
            return min(ends, key=lambda end: abs(end - target))
    return target
