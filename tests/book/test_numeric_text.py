"""Outputs agree when they differ in white space and last digits only."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from numeric_text import agree

numbers = st.floats(min_value=1e-3, max_value=1e6)
words = st.text(alphabet="abc xyz:,()[]=|\n", max_size=20)


@given(words, st.lists(numbers, max_size=5))
def test_text_agrees_with_itself(text: str, values: list[float]) -> None:
    printed = text + " ".join(f"{value:.4f}" for value in values)
    assert agree(printed, printed)


@given(numbers, st.floats(-0.015, 0.015))
def test_a_change_below_the_tolerance_passes(value: float, change: float) -> None:
    assert agree(f"loss {value:.6f} nats", f"loss {value * (1 + change):.6f} nats")


@given(st.floats(min_value=1.0, max_value=1e6), st.floats(0.05, 5.0))
def test_a_change_above_the_tolerance_fails(value: float, change: float) -> None:
    assert not agree(f"loss {value:.3f}", f"loss {value * (1 + change):.3f}")


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_integers_agree_only_when_equal(one: int, other: int) -> None:
    assert agree(f"step {one} of 9", f"step {other} of 9") == (one == other)


@given(st.text(alphabet="abcd", min_size=1), st.text(alphabet="abcd", min_size=1))
def test_words_agree_only_when_equal(one: str, other: str) -> None:
    assert agree(f"{one} 1.0", f"{other} 1.0") == (one == other)


@given(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3))
def test_agreement_is_symmetric(one: float, other: float) -> None:
    first, second = f"{one:.2f}", f"{other:.2f}"
    assert agree(first, second) == agree(second, first)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("[ 9.99  1.00]", "[10.01  1.00]"),  # columns shift when a number grows a digit
        ("1e-09", "3.1e-08"),  # noise around zero
        ("-0.00", "0.00"),
        ("0.4999", "0.5001"),  # what rounding before comparing gets wrong
        ("0.05", "0.06"),  # one unit of the last of two decimals
        ("5,057,198 bytes", "5,057,198  bytes"),
        ("1.5e+03", "1500.2"),
    ],
)
def test_these_agree(first: str, second: str) -> None:
    assert agree(first, second)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("1 2", "12"),
        ("1.5 2.5", "1.5"),
        ("", "0.1"),
        ("0.5", "0.6"),
        ("nan", "0.1"),
        ("5,057,198 bytes", "5,057,199 bytes"),
        ("-1.0", "1.0"),
        ("token42", "token43"),
        ("word 1.0 end", "word 1.0 and"),
    ],
)
def test_these_do_not(first: str, second: str) -> None:
    assert not agree(first, second)


def test_the_tolerance_is_the_callers() -> None:
    assert agree(f"{math.pi:.6f}", "3.300000", relative=0.06)
    assert not agree(f"{math.pi:.6f}", "3.300000", relative=0.04)
