"""How `pytest --nbval` compares outputs in this book: text exactly, numbers up to their last digits.

Imported by the conftest.py beside the notebooks. nbval compares with `!=` what its `sanitize` returns,
so `sanitize` returns text that knows when it says the same as another.
"""

import os
from typing import Any

import pytest

from notebook_run import KERNEL_ENVIRONMENT
from numeric_text import agree


class NumericText(str):
    """Text that equals another whose numbers differ in the last digits only."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and agree(str(self), str(other))

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return super().__hash__()


def pytest_configure(config: pytest.Config) -> None:
    """Make nbval's comparison numeric, and its kernels run as the notebooks' script runs them."""
    if not config.pluginmanager.hasplugin("nbval"):
        return
    from nbval.plugin import IPyNbCell

    os.environ.update(KERNEL_ENVIRONMENT)
    plain = IPyNbCell.sanitize
    if getattr(plain, "is_numeric", False):
        return

    def sanitize(self: Any, value: Any) -> Any:
        clean = plain(self, value)
        return NumericText(clean) if isinstance(clean, str) else clean

    sanitize.is_numeric = True  # type: ignore[attr-defined]
    IPyNbCell.sanitize = sanitize
