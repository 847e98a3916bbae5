"""From a matplotlib figure to SVG or PNG: the same bytes every time, in the colours of the page around it."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from tether.errors import ConfigError
from tether.report.results import Results, fusions

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "GRID",
    "INK",
    "MUTED",
    "PAPER",
    "WARN",
    "Look",
    "drawing",
    "looks",
    "new_figure",
    "to_png",
    "to_svg",
]

INK, MUTED, GRID, PAPER, WARN = "#1b2130", "#5c6675", "#d8dde4", "#fefefe", "#b3261e"
DELTAS = ("#0072b2", "#d55e00", "#009e73", "#8c6d00")
FUSIONS = ("#aa3377", "#4a9fd4", "#7b8494")
NAMES = {
    INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "paper", WARN: "warn",
    **{colour: f"delta-{i}" for i, colour in enumerate(DELTAS)},
    **{colour: f"fusion-{i}" for i, colour in enumerate(FUSIONS)},
}  # fmt: skip
"""CSS custom properties that stand in for the colours; the page sets others where it is dark."""

WIDE, NARROW = 10.2, 3.75
"""Inches: shown at 1000 and at 370 pixels, text has the same size on a desk and on a phone."""

STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": GRID,
    "axes.grid": True,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 8.5,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.unicode_minus": True,
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.color": GRID,
    "ytick.labelcolor": INK,
}


class Look(NamedTuple):
    """How a column is drawn everywhere.

    Attributes:
        colour: distinct for colour-blind readers among deltas and among fusions.
        marker: a circle for a delta, a diamond or a square for a fusion.
    """

    colour: str
    marker: str


def looks(results: Results) -> dict[str, Look]:
    """Give each column its colour and shape.

    Args:
        results: the content of `table.json`.

    Returns:
        One look for each delta and fusion.
    """
    deltas = {name: Look(DELTAS[i % len(DELTAS)], "o") for i, name in enumerate(results["deltas"])}
    added = enumerate(fusions(results))
    return deltas | {name: Look(FUSIONS[min(i, len(FUSIONS) - 1)], "Ds"[min(i, 1)]) for i, name in added}


@contextmanager
def drawing(name: str) -> Iterator[None]:
    """Draw in the report's style, whatever the user's own settings of matplotlib are; they come back after.

    Args:
        name: of the figure; seeds the ids in its SVG.

    Yields:
        Nothing; figures are made and written inside.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib.style
    except ImportError as error:
        raise ConfigError(
            "figures need matplotlib, which is not installed; run pip install 'tether[plot]'"
        ) from error
    with matplotlib.style.context(["default", {**STYLE, "svg.hashsalt": name}]):
        yield


def new_figure(width: float, height: float) -> "Figure":
    """Start a figure that belongs to no window and no global state.

    Args:
        width: inches.
        height: inches.

    Returns:
        The empty figure.
    """
    from matplotlib.figure import Figure

    # At 72 dots an inch, as SVG is written, a layout made before writing is the layout of the file.
    return Figure(figsize=(width, height), dpi=72, layout="constrained")


def panels(count: int, across: int, height: float, *, wide: bool = False) -> tuple["Figure", list["Axes"]]:
    """Start a figure of small multiples.

    Args:
        count: of panels.
        across: panels side by side at most; with 1 the figure is as narrow as a phone.
        height: of one panel, inches.
        wide: whether a single column of panels takes the full width all the same.

    Returns:
        The figure and its panels, row by row.
    """
    width = WIDE if wide or across > 1 else NARROW
    across = min(across, count)
    down = -(-count // across)
    figure = new_figure(width, height * down)
    grid = figure.subplots(down, across, squeeze=False).ravel()
    for axes in grid[count:]:
        axes.remove()
    return figure, list(grid[:count])


def decades(axis: Any) -> None:
    """Label a logarithmic axis at powers of ten, in plain numbers.

    Args:
        axis: x or y of some axes, its scale already set.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(numticks=7))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def to_svg(figure: "Figure", name: str, label: str) -> str:
    """Write a figure as an SVG element that can stand in a page or in a file of its own.

    Args:
        figure: the figure.
        name: prefix of all ids, so that several figures can share a page.
        label: what it shows, for who cannot see it.

    Returns:
        The element; the same for the same figure, with no date and no link.
    """
    _settle(figure)
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    # A hundredth of a point is finer than any screen.
    svg = re.sub(r'\bd="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0].replace(" \n", " ")), svg)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{name}-", svg)
    svg = svg.replace("'DejaVu Sans'", "var(--sans, 'DejaVu Sans', sans-serif)")
    for colour, variable in NAMES.items():
        svg = svg.replace(colour, f"var(--{variable}, {colour})")
    root = re.match(r"<svg[^>]*?viewBox=\"([^\"]+)\"[^>]*>", svg)
    assert root is not None
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    opening = f'<svg {spaces} viewBox="{root[1]}" role="img" aria-label="{_attribute(label)}">'
    return opening + svg[root.end() :].rstrip()


def to_png(figure: "Figure", dpi: int = 160) -> bytes:
    """Write a figure as a PNG on a light ground.

    Args:
        figure: the figure.
        dpi: pixels an inch.

    Returns:
        The file's bytes; the same for the same figure.
    """
    _settle(figure)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=dpi, facecolor=PAPER, metadata={"Software": None})
    return stream.getvalue()


# With a layout still to make, matplotlib would draw everything twice.
def _settle(figure: "Figure") -> None:
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
        figure.set_layout_engine("none")


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
