"""Regular expressions as automata that read UTF-8 byte by byte, and know whether a match is still possible.

A state of the automaton is itself an expression: what the rest of the text must match. Its derivative by a
byte is what must come after that byte. Source: Brzozowski, "Derivatives of regular expressions", JACM 1964.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from re import _constants as codes  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

Ranges = list[tuple[int, int]]
LAST = 0x10FFFF
DIGITS: Ranges = [(48, 57)]
SPACES: Ranges = [(9, 13), (32, 32)]
LETTERS: Ranges = [(48, 57), (65, 90), (95, 95), (97, 122)]


@dataclass(frozen=True)
class Byte:
    """One byte, from `low` to `high`."""

    low: int
    high: int


@dataclass(frozen=True)
class Seq:
    """The parts one after another; without any, the empty text."""

    parts: tuple[Regex, ...]


@dataclass(frozen=True)
class Alt:
    """One of the options; without any, nothing matches."""

    options: frozenset[Regex]


@dataclass(frozen=True)
class Repeat:
    """`part` from `low` to `high` times; None: any number."""

    part: Regex
    low: int
    high: int | None


Regex = Byte | Seq | Alt | Repeat
EMPTY, NEVER = Seq(()), Alt(frozenset())


class Automaton:
    """The states that a text can lead to; 0 is where it begins, None that no match begins with this text.

    Takes Python's syntax without what looks around (anchors, lookaheads, references to groups) or changes
    flags; the whole text must match. `\\d`, `\\s` and `\\w` are ASCII. Raises ValueError for other patterns,
    and for one that matches no text.

    >>> date = Automaton(r"\\d{4}-\\d\\d")
    >>> date.read(0, b"1613-0"), date.read(0, b"16x")
    (6, None)
    >>> [date.is_match(date.read(0, text)) for text in (b"1613-0", b"1613-06")]
    [False, True]
    """

    def __init__(self, pattern: str) -> None:
        start = parse(pattern)
        if start == NEVER:
            raise ValueError(f"no text matches the pattern {pattern!r}")
        self._ids: dict[Regex, int] = {}
        self._matches: list[bool] = []
        self.steps: list[Steps] = []
        """For each state, where each byte leads."""
        self.state_of(start)

    def state_of(self, regex: Regex) -> int | None:
        """The state in which `regex` is what must come: an old one, or the next."""
        if regex != NEVER and regex not in self._ids:
            self._ids[regex] = len(self.steps)
            self._matches.append(nullable(regex))
            self.steps.append(Steps(self, regex))
        return self._ids.get(regex)

    def read(self, state: int | None, text: bytes) -> int | None:
        """The state after a text."""
        for byte in text:
            if state is None:
                return None
            state = self.steps[state][byte]
        return state

    def is_match(self, state: int) -> bool:
        """Whether the text up to here matches as a whole."""
        return self._matches[state]


class Steps(dict[int, int | None]):
    """The state after each byte, worked out when it is first asked for."""

    def __init__(self, automaton: Automaton, regex: Regex) -> None:
        super().__init__()
        self._automaton, self._regex = automaton, regex

    def __missing__(self, byte: int) -> int | None:
        self[byte] = self._automaton.state_of(derivative(self._regex, byte))
        return self[byte]


def nullable(regex: Regex) -> bool:
    """Whether the empty text matches."""
    match regex:
        case Seq(parts):
            return all(map(nullable, parts))
        case Alt(options):
            return any(map(nullable, options))
        case Repeat(part, low, _):
            return low == 0 or nullable(part)
    return False


def derivative(regex: Regex, byte: int) -> Regex:
    """What the rest of a text must match, if the text begins with `byte`."""
    match regex:
        case Byte(low, high):
            return EMPTY if low <= byte <= high else NEVER
        case Alt(options):
            return alt(derivative(option, byte) for option in options)
        case Repeat(part, low, high):
            return seq(derivative(part, byte), repeat(part, max(low - 1, 0), high and high - 1))
        case Seq(parts):
            rests = []
            for i, part in enumerate(parts):
                rests.append(seq(derivative(part, byte), *parts[i + 1 :]))
                if not nullable(part):
                    break
            return alt(rests)


def seq(*parts: Regex) -> Regex:
    """One after another, in the one form that equal sequences share."""
    flat = [inner for part in parts for inner in (part.parts if isinstance(part, Seq) else [part])]
    if NEVER in flat:
        return NEVER
    return flat[0] if len(flat) == 1 else Seq(tuple(flat))


def alt(options: Iterable[Regex]) -> Regex:
    """One of several, each once: else there would be no end of states."""
    flat = frozenset(
        o for option in options for o in (option.options if isinstance(option, Alt) else [option])
    )
    return next(iter(flat)) if len(flat) == 1 else Alt(flat)


def repeat(part: Regex, low: int, high: int | None) -> Regex:
    """`part` several times."""
    if high == 0 or part == EMPTY or (part == NEVER and low == 0):
        return EMPTY
    return part if (low, high) == (1, 1) or part == NEVER else Repeat(part, low, high)


def characters(ranges: Ranges) -> Regex:
    """The UTF-8 of one character whose code point is in one of the ranges."""
    lengths = [(0, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, LAST)]
    pieces = [(max(low, a), min(high, b)) for low, high in ranges for a, b in lengths]
    return alt(_between(chr(low).encode(), chr(high).encode()) for low, high in pieces if low <= high)


def _between(low: bytes, high: bytes) -> Regex:
    """The UTF-8 from `low` to `high`, which are as long as each other."""
    a, b, rest = low[0], high[0], len(low) - 1
    if not rest:
        return Byte(a, b)
    if a == b:
        return seq(Byte(a, a), _between(low[1:], high[1:]))
    least, most = b"\x80" * rest, b"\xbf" * rest
    options = [seq(Byte(a, a), _between(low[1:], most)), seq(Byte(b, b), _between(least, high[1:]))]
    if a + 1 < b:
        options.append(seq(Byte(a + 1, b - 1), _between(least, most)))
    return alt(options)


def outside(ranges: Ranges) -> Ranges:
    """All other characters."""
    gaps, start = [], 0
    for low, high in sorted(ranges):
        gaps.append((start, low - 1))
        start = max(start, high + 1)
    return [(low, high) for low, high in [*gaps, (start, LAST)] if low <= high]


CATEGORIES = {
    codes.CATEGORY_DIGIT: DIGITS,
    codes.CATEGORY_NOT_DIGIT: outside(DIGITS),
    codes.CATEGORY_SPACE: SPACES,
    codes.CATEGORY_NOT_SPACE: outside(SPACES),
    codes.CATEGORY_WORD: LETTERS,
    codes.CATEGORY_NOT_WORD: outside(LETTERS),
}


def parse(pattern: str) -> Regex:
    """The expression that a pattern stands for; read by Python's own parser."""
    try:
        parsed = parser.parse(pattern, re.ASCII)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
    if parsed.state.flags & ~(re.ASCII | re.VERBOSE | re.DOTALL):
        raise ValueError(f"the pattern {pattern!r} sets flags; only (?s) and (?x) can be set")
    try:
        return _sequence(parsed, pattern, bool(parsed.state.flags & re.DOTALL))
    except RecursionError as error:
        raise ValueError(f"the pattern {pattern!r} has too many groups in each other") from error


def _sequence(items: Iterable[tuple[Any, Any]], pattern: str, dotall: bool) -> Regex:
    return seq(*(_item(code, value, pattern, dotall) for code, value in items))


def _item(code: Any, value: Any, pattern: str, dotall: bool) -> Regex:
    if code in (codes.LITERAL, codes.NOT_LITERAL, codes.ANY, codes.IN):
        return characters(_ranges(code, value, dotall))
    if code == codes.BRANCH:
        return alt(_sequence(option, pattern, dotall) for option in value[1])
    if code == codes.SUBPATTERN and not (value[1] or value[2]):
        return _sequence(value[3], pattern, dotall)
    if code in (codes.MAX_REPEAT, codes.MIN_REPEAT):
        low, high, part = value
        return repeat(_sequence(part, pattern, dotall), low, None if high == codes.MAXREPEAT else high)
    raise ValueError(
        f"the pattern {pattern!r} uses {str(code).lower()}; allowed are characters, classes, groups, | and "
        "repetition: the whole text must match, so that it needs no anchors"
    )


def _ranges(code: Any, value: Any, dotall: bool) -> Ranges:
    """The characters of a class."""
    if code == codes.ANY:
        return outside([] if dotall else [(10, 10)])
    if code in (codes.LITERAL, codes.NOT_LITERAL):
        return [(value, value)] if code == codes.LITERAL else outside([(value, value)])
    members: Sequence[tuple[Any, Any]] = value
    ranges: Ranges = []
    for kind, member in members:
        if kind == codes.CATEGORY:
            ranges += CATEGORIES[member]
        elif kind == codes.RANGE:
            ranges.append(member)
        elif kind == codes.LITERAL:
            ranges.append((member, member))
    return outside(ranges) if members[0][0] == codes.NEGATE else ranges
