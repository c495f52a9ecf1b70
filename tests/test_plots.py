"""Figures: the same bytes for the same data, a digest that notices a change, alternative text on each."""

import base64
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from lmtutorial.plot_digest import digest, values_text
from lmtutorial.plots import COLORS, axes, bars, curves, heatmap, png, show

ALT = "Line chart of the loss by step; it falls from 3 to 1"
FIGURES: dict[str, Callable[[float], Figure]] = {
    "curves": lambda v: curves({"a": [1.0, 2.0, v], "b": ([0, 5], [1.0, 2.0])}, x="step", y="nats"),
    "bars": lambda v: bars({"one": 1.0, "two": v}, x="model", y="bits", numbers=".2f"),
    "groups": lambda v: bars({"one": [1.0, v], "two": [2.0, 3.0]}, ["x", "y"], x="model", y="bits"),
    "heatmap": lambda v: heatmap([[1.0, 2.0], [3.0, v]], x="next", y="now", label="probability"),
    "points": lambda v: scatter([1.0, 2.0, v]),
    "area": lambda v: area([1.0, 2.0, v]),
    "text": lambda v: annotated(f"{v:.3f}"),
}


@pytest.fixture(autouse=True)
def _no_figure_stays_open() -> Iterator[None]:
    yield
    plt.close("all")


def scatter(values: list[float]) -> Figure:
    figure, ax = axes(x="x", y="y")
    ax.scatter([0, 1, 2], values, label="words")
    return figure


def area(values: list[float]) -> Figure:
    figure, ax = axes(x="x", y="y")
    ax.fill_between([0, 1, 2], values)
    return figure


def annotated(text: str) -> Figure:
    figure, ax = axes(x="x", y="y")
    ax.text(0.5, 0.5, text)
    return figure


@pytest.mark.parametrize("name", FIGURES)
def test_the_same_data_gives_the_same_bytes_and_digest(name: str) -> None:
    one, other = FIGURES[name](4.0), FIGURES[name](4.0)
    assert png(one) == png(other)
    assert digest(one) == digest(other)


@pytest.mark.parametrize("name", FIGURES)
def test_changed_data_changes_the_digest(name: str) -> None:
    assert digest(FIGURES[name](4.0)) != digest(FIGURES[name](4.5))


@given(st.lists(st.floats(-1e6, 1e6), min_size=10, max_size=60), st.integers(0, 59), st.floats(0.5, 2.0))
def test_a_value_between_the_quoted_ones_is_noticed_by_the_mean(
    values: list[float], place: int, change: float
) -> None:
    one = np.asarray(values)
    other = one.copy()
    other[place % len(one)] += change * len(one) * max(1.0, np.abs(one).max())
    assert values_text(one) != values_text(other)


def test_labels_are_in_the_digest() -> None:
    figure = curves({"train": [2.0, 1.0], "validation": [2.5, 2.0]}, x="step", y="nats", title="Losses")
    assert digest(figure).startswith("axes: title Losses, x step, y nats\nline train: 2 points")


def test_tick_labels_may_be_numbers() -> None:
    figure, ax = axes(x="size", y="nats")
    ax.set_xticks([4, 16], [4, 16])
    assert "ticks: 4 16" in digest(figure)


def test_missing_values_are_said_and_do_not_spoil_the_rest() -> None:
    assert values_text(np.array([1.0, np.nan, 3.0])) == "1.00 nan 3.00"
    assert values_text(np.array([])) == "none"
    assert values_text(np.zeros(3)) == "0.00 0.00 0.00"


def test_show_displays_one_picture_with_its_alternative_and_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[dict[str, str]] = []
    monkeypatch.setattr("IPython.display.display", lambda data, **options: shown.append(data))
    show(curves({"loss": [3.0, 1.0]}, x="step", y="nats"), alt=ALT)
    (data,) = shown
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG")
    first, *rest = data["text/plain"].split("\n")
    assert first == ALT
    assert rest == ["axes: x step, y nats", "line loss: 2 points; x 0.00 1.00; y 3.00 1.00"]
    assert plt.get_fignums() == []


def test_no_date_and_no_version_is_written_into_the_picture() -> None:
    content = png(curves({"loss": [3.0, 1.0]}, x="step", y="nats"))
    assert b"Software" not in content
    assert b"tIME" not in content


@pytest.mark.parametrize("alt", ["", "a curve", " " * 40])
def test_a_figure_without_a_description_is_refused(alt: str) -> None:
    with pytest.raises(ValueError, match="describe the figure"):
        show(curves({"loss": [3.0, 1.0]}, x="step", y="nats"), alt=alt)


def test_bad_input_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="list, not a matplotlib Figure"):
        show([1, 2], alt=ALT)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="series is empty"):
        curves({}, x="step", y="nats")
    with pytest.raises(ValueError, match="values is empty"):
        bars({}, x="model", y="bits")
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        heatmap([1.0, 2.0, 3.0], x="next", y="now")


def luminance(color: str) -> float:
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


@pytest.mark.parametrize("color", COLORS)
def test_lines_stand_out_on_white(color: str) -> None:
    assert 1.05 / (luminance(color) + 0.05) >= 2.0
