"""The picture of measured drift against its bound, in which nothing below the bound seems to lie above."""

import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np

from tether.report.results import Arrays, Results, fusions, moved, title_of
from tether.report.svg import INK, MUTED, WARN, decades, drawing, looks, panels, to_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["bound_points", "drift_against_bound"]

TOLERANCE = 1e-5
"""Relative rounding of a float32 drift that meets its bound."""

LEAST = 1e-9
"""Absolute rounding of the same."""

CELL = 0.1
"""Side of a cell in the picture of drift against bound, decades."""


def drift_against_bound(results: Results, arrays: Arrays, *, across: int = 3) -> str:
    """Draw measured latent drift against its a-priori bound, one panel a fusion, all texts together.

    Args:
        results: the content of `table.json`.
        arrays: per-token `latent_drift` and `bound` of each text.
        across: panels side by side; 1 for the narrow form.

    Returns:
        SVG.
    """
    shown = fusions(results)
    name = f"bound-{across}"
    with drawing(name):
        figure, grid = panels(len(shown), across, 3.1)
        points = {column: bound_points(results, arrays, column) for column in shown}
        every = np.concatenate([np.ravel(points[column][:2]) for column in shown])
        ends = (every.min() / 1.5, every.max() * 1.5) if every.size else (0.1, 10.0)
        for i, (axes, column) in enumerate(zip(grid, shown, strict=True)):
            _draw_bound(axes, *points[column], ends, looks(results)[column].colour)
            axes.set_title("\n".join(textwrap.wrap(title_of(results, column), 34)))
            axes.set(xlabel="a-priori bound, nats", ylabel="measured drift, nats" if i % across == 0 else "")
        return to_svg(
            figure, name, "Measured latent drift against its bound for every context of each fusion"
        )


def bound_points(results: Results, arrays: Arrays, column: str) -> tuple[Any, Any, int]:
    """Gather the contexts of a column that have moved, from all texts.

    Args:
        results: the content of `table.json`.
        arrays: per-token `latent_drift` and `bound` of each text.
        column: a delta or fusion.

    Returns:
        Bound and drift of each context that moved, nats, shape (n,) each; and how many had not moved.
    """
    row = moved(results).index(column)
    bound, drift = (
        np.concatenate([np.asarray(arrays[text][key][row], dtype=np.float64) for text in results["texts"]])
        for key in ("bound", "latent_drift")
    )
    kept = drift > 0
    bound, drift = bound[kept], drift[kept]
    positive = np.concatenate([bound[bound > 0], drift])
    # A drift whose bound is 0 violates it and must be seen, at the left edge.
    return np.where(bound > 0, bound, positive.min(initial=np.inf)), drift, int((~kept).sum())


def _draw_bound(
    axes: "Axes", bound: Any, drift: Any, still: int, ends: tuple[float, float], colour: str
) -> None:
    from matplotlib.colors import to_rgba
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    for shade, cells in _cells(bound, drift):
        above = cells[:, 2, 1] - cells[:, 2, 0] > CELL / 2
        for part, filled in ((cells[~above], colour), (cells[above], WARN)):
            if len(part):
                path = Path.make_compound_path_from_polys(10**part)
                axes.add_patch(PathPatch(path, facecolor=to_rgba(filled, shade), linewidth=0))
    axes.plot(ends, ends, color=INK, linewidth=1)
    axes.annotate(
        "drift = bound", (0.74, 0.79), xycoords="axes fraction", rotation=45, ha="center", va="center"
    )
    said = f"{len(drift):,} contexts moved\n{still:,} did not"
    axes.annotate(said, (0.03, 0.97), xycoords="axes fraction", va="top", color=MUTED)
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends, box_aspect=1)
    for axis in (axes.xaxis, axes.yaxis):
        decades(axis)
    axes.tick_params(axis="y", labelcolor=MUTED)


# Cells with edges along the diagonal: one that holds no violation does not reach above it.
def _cells(bound: Any, drift: Any) -> list[tuple[float, Any]]:
    if not len(bound):
        return []
    rounding = (drift > bound) & (drift <= bound * (1 + TOLERANCE) + LEAST)
    ratio = np.where(rounding, 0.0, np.log10(drift) - np.log10(bound))
    steps = np.stack([np.floor(np.log10(bound) / CELL), np.ceil(ratio / CELL)], axis=-1)
    places, counts = np.unique(steps, axis=0, return_counts=True)
    left, top = (places * CELL).T
    right, low = left + CELL, top - CELL
    corners = np.stack(
        [np.stack([x, x + r], axis=-1) for x, r in ((left, low), (right, low), (right, top), (left, top))],
        axis=1,
    )
    # Shades of one colour, by the logarithm of the count, are read on light and on dark paper alike.
    # 5 x / x can be more than 5 in the last bit, so the fullest cell needs the limit.
    level = np.minimum(np.ceil(5 * np.log1p(counts) / np.log1p(counts.max())) / 5, 1.0)
    return [(float(shade), corners[level == shade]) for shade in np.unique(level)]
