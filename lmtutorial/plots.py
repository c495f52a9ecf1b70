"""The book's figures: one look, alternative text, and a digest of the data that each one shows.

Colors are Okabe and Ito's, which stay apart for readers with any common color blindness; lines also
differ in their dashes. A figure is a light card, so it reads on a dark page too. This module imports
matplotlib: it is for notebooks and scripts, and nothing else in the package needs it.
"""

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.container import BarContainer
from matplotlib.figure import Figure

from lmtutorial.plot_digest import digest

# Okabe and Ito, "Color Universal Design", 2008; the yellow is left out, too pale for lines on white.
BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, BLACK = COLORS = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#222222",
)
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
DOTS_PER_INCH = 160
SIZE = (6.4, 3.9)

_MAP = LinearSegmentedColormap.from_list(
    "lmtutorial", ["#FFFFFF", "#BBD9EC", "#4F9CCB", "#0072B2", "#00304D"]
)
_STYLE: dict[str, Any] = {
    "figure.figsize": SIZE,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "savefig.facecolor": "white",
    "font.size": 13,
    "axes.titlesize": 14,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 13,
    "axes.edgecolor": "#666666",
    "axes.labelcolor": "#222222",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler(color=COLORS, linestyle=DASHES),
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.9,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "lines.linewidth": 2.2,
    "lines.markersize": 7,
    "legend.frameon": False,
    "legend.fontsize": 12,
    "image.cmap": "lmtutorial",
}


def style() -> None:
    """Give every later matplotlib figure the book's look; call once, at the top of a notebook.

    >>> style()
    >>> mpl.rcParams["axes.spines.top"]
    False
    """
    if _MAP.name not in mpl.colormaps:
        mpl.colormaps.register(_MAP)
    for key, value in _STYLE.items():
        mpl.rcParams[key] = value  # type: ignore[index]


def show(figure: Figure, alt: str) -> None:
    """Display `figure` as one PNG whose text is `alt` and a digest of the plotted data; then close it.

    `alt` tells a reader who cannot see the picture what it shows: its kind, its axes, and what to
    notice. The digest makes a changed figure visible to checks that compare text and no pictures.
    The bytes depend on the figure alone: no date and no version is written into them.

    Raises TypeError if `figure` is no matplotlib figure, ValueError if `alt` has fewer than 20
    characters.

    >>> show(curves({"loss": [3.0, 2.0, 1.5]}, x="step", y="nats"), alt="loss")
    Traceback (most recent call last):
    ValueError: alt='loss' has 4 characters; describe the figure in 20 or more
    """
    if not isinstance(figure, Figure):
        raise TypeError(f"figure is a {type(figure).__name__}, not a matplotlib Figure")
    alt = " ".join(alt.split())
    if len(alt) < 20:
        raise ValueError(f"alt={alt!r} has {len(alt)} characters; describe the figure in 20 or more")
    import matplotlib.pyplot as plt
    from IPython.display import display

    picture = base64.b64encode(png(figure)).decode("ascii")
    width = round(figure.get_size_inches()[0] * 100)
    text = f"{alt}\n{digest(figure)}"
    metadata = {"image/png": {"width": width}}
    plt.close(figure)
    display({"image/png": picture, "text/plain": text}, raw=True, metadata=metadata)  # type: ignore[no-untyped-call]


def png(figure: Figure) -> bytes:
    """The figure as PNG bytes, the same bytes for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    return buffer.getvalue()


def axes(*, x: str, y: str, title: str = "", size: tuple[float, float] = SIZE) -> tuple[Figure, Axes]:
    """A figure with one pair of labelled axes, in the book's look; say the units in the labels.

    >>> figure, ax = axes(x="step", y="loss (nats per token)")
    >>> ax.get_xlabel()
    'step'
    """
    import matplotlib.pyplot as plt

    style()
    figure, ax = plt.subplots(figsize=size)
    ax.set(xlabel=x, ylabel=y, title=title)
    return figure, ax


def curves(
    series: Mapping[str, Any],
    *,
    x: str,
    y: str,
    title: str = "",
    log_x: bool = False,
    log_y: bool = False,
) -> Figure:
    """One line for each entry of `series`: its values, or a pair (positions, values).

    >>> digest(curves({"loss": ([0, 10], [2.0, 1.0])}, x="step", y="nats"))
    'axes: x step, y nats\\nline loss: 2 points; x 0.0 10.0; y 2.00 1.00'
    """
    if not series:
        raise ValueError("series is empty; give at least one line to draw")
    figure, ax = axes(x=x, y=y, title=title)
    for name, values in series.items():
        positions, heights = values if isinstance(values, tuple) else (range(len(values)), values)
        few = len(heights) <= 12
        ax.plot(np.asarray(positions), np.asarray(heights), label=name, marker="o" if few else None)
    ax.set_xscale("log" if log_x else "linear")
    ax.set_yscale("log" if log_y else "linear")
    if len(series) > 1:
        ax.legend()
    return figure


def bars(
    values: Mapping[str, float] | Mapping[str, Sequence[float]],
    labels: Iterable[str] = (),
    *,
    x: str,
    y: str,
    title: str = "",
    numbers: str = "",
) -> Figure:
    """Upright bars: one for each entry of `values`, or groups with `labels` below them.

    `numbers` is the format of the figures above the bars, for example ".2f"; empty writes none.

    >>> digest(bars({"unigram": 3.0, "bigram": 2.5}, x="model", y="bits per byte"))
    'axes: x model, y bits per byte\\nticks: unigram bigram\\nbars: 2; heights 3.00 2.50'
    """
    if not values:
        raise ValueError("values is empty; give at least one bar to draw")
    figure, ax = axes(x=x, y=y, title=title)
    ax.grid(axis="x", visible=False)
    names = list(labels)
    if names:
        width = 0.8 / len(values)
        for i, (group, heights) in enumerate(values.items()):
            places = np.arange(len(names)) + (i - (len(values) - 1) / 2) * width
            drawn = ax.bar(
                places, np.asarray(heights), width * 0.92, label=group, color=COLORS[i % len(COLORS)]
            )
            _write_numbers(ax, drawn, numbers)
        ax.legend()
    else:
        names = list(values)
        _write_numbers(ax, ax.bar(range(len(names)), [float(values[n]) for n in names], 0.7), numbers)  # type: ignore[arg-type]
    ax.set_xticks(range(len(names)), names)
    if max(map(len, names)) * len(names) > 60:
        ax.tick_params(axis="x", rotation=35)
    return figure


def _write_numbers(ax: Axes, drawn: BarContainer, numbers: str) -> None:
    if numbers:
        ax.bar_label(drawn, fmt=f"{{:{numbers}}}", padding=2, fontsize=11)


def heatmap(
    matrix: Any,
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    *,
    x: str,
    y: str,
    title: str = "",
    label: str = "",
    numbers: str = "",
) -> Figure:
    """A matrix as colored squares, row 0 at the top; `label` names what the colors measure, with unit.

    `numbers` is the format of the figures in the squares, for example ".2f"; empty writes none.

    >>> print(digest(heatmap([[0.25, 0.75]], ["a"], ["b", "c"], x="next", y="now")))
    axes: x next, y now
    ticks: b c; a
    image 1 x 2: 0.250 0.750
    """
    array = np.asarray(matrix, dtype=float)
    if array.ndim != 2 or not array.size:
        raise ValueError(f"matrix has shape {array.shape}; a heat map needs two dimensions, none empty")
    height = min(8.0, max(2.6, 0.62 * SIZE[0] * array.shape[0] / array.shape[1] + 1.2))
    figure, ax = axes(x=x, y=y, title=title, size=(SIZE[0], height))
    ax.grid(visible=False)
    picture = ax.imshow(array, aspect="auto", cmap=_MAP)
    figure.colorbar(picture, ax=ax, label=label)
    if columns:
        ax.set_xticks(range(len(columns)), columns)
    if rows:
        ax.set_yticks(range(len(rows)), rows)
    low, high = float(np.nanmin(array)), float(np.nanmax(array))
    for (i, j), value in np.ndenumerate(array if numbers else np.empty((0, 0))):
        dark = high > low and (value - low) / (high - low) > 0.5
        if math.isfinite(value):
            shade = "white" if dark else "#222222"
            ax.text(j, i, f"{value:{numbers}}", ha="center", va="center", color=shade, fontsize=11)
    return figure
