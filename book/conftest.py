"""`pytest --nbval book` runs every chapter and compares its outputs with the stored ones."""

from nbval_numeric import pytest_configure

__all__ = ["pytest_configure"]
