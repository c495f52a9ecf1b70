"""Whether two printed outputs say the same, when the last digits of their numbers may differ.

Floating-point results differ in the last digits between processors, thread counts and library
versions. Rounding them with a regular expression has edges (0.4999 and 0.5001 round apart), so the
numbers are read and compared as numbers, and everything between them as text.
"""

import re

NUMBER = re.compile(r"(?<![\w.])[-+−]?\d+(?:[,_]\d{3})*(?:\.\d+)?(?:[eE][-+]?\d+)?(?!\w)")
RELATIVE = 0.02
ABSOLUTE = 1e-6


def agree(first: str, second: str, relative: float = RELATIVE) -> bool:
    """Whether two texts are equal up to white space and the last digits of their decimal fractions.

    Integers (no point, no exponent) must be equal. Decimal fractions may differ by `relative`, by
    `ABSOLUTE`, or, where two or more decimals are printed, by one unit of the last decimal.

    >>> agree("loss 1.2345 after 200 steps", "loss 1.2346 after 200 steps")
    True
    >>> agree("loss 1.2345 after 200 steps", "loss 1.2345 after 201 steps")
    False
    >>> agree("loss 1.23", "loss 1.43"), agree("loss 1.23", "gain 1.23")
    (False, False)
    """
    if first == second:
        return True
    texts, others = ([_squeeze(part) for part in NUMBER.split(text)] for text in (first, second))
    numbers = zip(NUMBER.findall(first), NUMBER.findall(second), strict=False)
    return texts == others and all(_close(one, other, relative) for one, other in numbers)


def _squeeze(text: str) -> str:
    return " ".join(text.split())


def _close(first: str, second: str, relative: float) -> bool:
    if first == second:
        return True
    if not (_is_fraction(first) or _is_fraction(second)):
        return False
    one, other = _value(first), _value(second)
    unit = min(_unit(first), _unit(second))
    allowed = max(relative * max(abs(one), abs(other)), ABSOLUTE, unit if unit <= 0.01 else 0.0)
    return abs(one - other) <= allowed * (1 + 1e-9)


def _is_fraction(number: str) -> bool:
    return any(mark in number for mark in ".eE")


def _value(number: str) -> float:
    return float(number.replace("−", "-").replace(",", "").replace("_", ""))


def _unit(number: str) -> float:
    """One unit of the last printed decimal: 0.01 for "3.14"; infinite for "314" and "3e5"."""
    decimals = re.search(r"\.(\d+)$", number)
    return 10.0 ** -len(decimals.group(1)) if decimals else float("inf")
