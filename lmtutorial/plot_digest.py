"""What a figure shows, in a few lines of text: labels, and the plotted values to three digits.

Notebook checks compare text and never pictures. With this digest beside the picture, a figure whose
data changed is noticed.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

Values = np.ndarray[Any, Any]
SHOWN = 9  # values quoted of a long series, evenly spaced, both ends included


def digest(figure: Figure) -> str:
    """Labels and rounded data of every pair of axes of `figure`, one line for each thing drawn.

    Values are rounded to three significant digits of the largest of their series. A series longer than
    nine is sampled evenly and followed by its mean.

    >>> figure = Figure()
    >>> _ = figure.add_subplot().plot([0, 1, 2], [1.0, 4.0, 9.0], label="squares")
    >>> digest(figure)
    'axes:\\nline squares: 3 points; x 0.00 1.00 2.00; y 1.00 4.00 9.00'
    """
    return "\n".join(line for ax in figure.axes for line in _lines(ax))


def _lines(ax: Axes) -> Iterator[str]:
    if ax.get_label() == "<colorbar>":
        if label := ax.get_ylabel() or ax.get_xlabel():
            yield f"colors: {label}"
        return
    names = {"title": ax.get_title(loc="left") or ax.get_title(), "x": ax.get_xlabel(), "y": ax.get_ylabel()}
    yield "axes:" + ",".join(f" {key} {value}" for key, value in names.items() if value)
    ticks = [_fixed_labels(axis) for axis in (ax.xaxis, ax.yaxis)]
    if any(ticks):
        yield "ticks: " + "; ".join(filter(None, ticks))
    for line in ax.lines:
        x, y = (np.asarray(values, dtype=float).ravel() for values in line.get_data())
        yield f"line{_name(line)}: {len(y)} points; x {values_text(x)}; y {values_text(y)}"
    for container in ax.containers:
        if isinstance(container, BarContainer):
            sizes = [
                patch.get_width() if _lies(container) else patch.get_height() for patch in container.patches
            ]
            kind = "lengths" if _lies(container) else "heights"
            yield f"bars{_name(container)}: {len(sizes)}; {kind} {values_text(np.array(sizes))}"
    for collection in ax.collections:
        yield from _collection(collection)
    for image in ax.images:
        array: Values = np.asarray(image.get_array(), dtype=float)
        yield f"image {' x '.join(map(str, array.shape))}: {values_text(array.ravel())}"
    if words := [text.get_text() for text in ax.texts if text.get_text()]:
        yield f"texts: {len(words)}: {' | '.join(words[:60])}"


def _collection(collection: Any) -> Iterator[str]:
    points = np.asarray(collection.get_offsets(), dtype=float)
    paths = collection.get_paths()
    if len(points) > 1 or (len(points) == 1 and points.any()):
        x, y = points.T
        yield f"points{_name(collection)}: {len(points)}; x {values_text(x)}; y {values_text(y)}"
    elif (colors := collection.get_array()) is not None:
        yield f"mesh: {values_text(np.asarray(colors, dtype=float).ravel())}"
    elif paths:
        vertices = np.concatenate([path.vertices for path in paths])
        yield f"area{_name(collection)}: {len(vertices)} corners; y {values_text(vertices[:, 1])}"


def values_text(values: Values) -> str:
    """Up to nine of the values, evenly spaced, and the mean of a longer series.

    >>> values_text(np.array([0.5, 120.0]))
    '0.5 120.0'
    """
    if not len(values):
        return "none"
    finite = values[np.isfinite(values)]
    scale = float(np.abs(finite).max()) if len(finite) else 0.0
    decimals = min(12, max(1, 2 - math.floor(math.log10(scale)))) if scale > 0 else 2
    if len(values) <= SHOWN:
        return " ".join(_number(value, decimals) for value in values)
    shown = values[np.linspace(0, len(values) - 1, SHOWN).round().astype(int)]
    mean = float(finite.mean()) if len(finite) else math.nan
    return " ".join(_number(value, decimals) for value in shown) + f" mean {_number(mean, decimals)}"


def _number(value: float, decimals: int) -> str:
    return f"{value + 0.0:.{decimals}f}" if math.isfinite(value) else str(float(value))


def _name(artist: Any) -> str:
    label = str(artist.get_label())
    return "" if label.startswith("_") or not label else f" {label}"


def _lies(container: BarContainer) -> bool:
    return container.orientation == "horizontal"


def _fixed_labels(axis: Any) -> str:
    """The tick labels that an author set; those that matplotlib chooses follow from the data."""
    locator = axis.get_major_locator()
    if not isinstance(locator, FixedLocator):
        return ""
    return " ".join(map(str, axis.get_major_formatter().format_ticks(locator())))
