"""The figures of the page "How drift adds up": where the source's inequality fails, and what replaces it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tether.cauchy.charts import CHARTS, fuse
from tether.cauchy.divergence import drift
from tether.report.svg import DELTAS, INK, MUTED, PAPER, WARN, decades, drawing, new_figure, to_png
from tether.store.publish import publish_file
from tether.theory.constants import equal_constant, many_constant, shrinking_threshold
from tether.theory.experiments import DOCUMENT_DELTA, ratio_map

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["FIGURES", "write_figures"]

FAR = (6.0, 1000.0)
"""A delta whose drift rises when it is shrunk in the linear chart."""


def write_figures(folder: Path) -> list[Path]:
    """Draw all figures of the page.

    Args:
        folder: where they go, as PNG.

    Returns:
        The files.
    """
    written = []
    for name, draw in FIGURES.items():
        with drawing(name):
            figure = draw()
            path = folder / f"{name}.png"
            with publish_file(path) as temporary:
                temporary.write_bytes(to_png(figure))
        written.append(path)
    return written


def _violations() -> Any:
    """Return the picture of where two deltas exceed N times the sum of their drifts."""
    figure = new_figure(10.2, 3.7)
    axes = figure.subplots(1, 3)
    at = equal_constant(2)
    _equal_map(axes[0])
    axes[0].set_title("Two equal deltas (x, y)")
    axes[0].plot([at.x, at.x], [at.y, -at.y], "+", color=INK, markersize=8)
    _second_map(axes[1], at.x, at.y)
    axes[1].set_title(f"First delta ({at.x:.3f}, {at.y:.3f})")
    _second_map(axes[2], *DOCUMENT_DELTA)
    axes[2].set_title(f"First delta ({DOCUMENT_DELTA[0]:g}, {DOCUMENT_DELTA[1]:g}), the document's")
    for panel in axes[1:]:
        panel.set(xlabel="x of the second delta", ylabel="y of the second delta")
    axes[0].set(xlabel="x, change of the log scale", ylabel="y, shift over base scale")
    return figure


def _equal_map(axes: "Axes") -> None:
    axis = torch.linspace(-2, 2, 401, dtype=torch.float64)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    single = drift(x, y)
    ratio = torch.where(single > 0, drift(2 * x, 2 * y) / (4 * single).clamp(min=1e-300), 1)
    _draw_map(axes, axis, ratio)


def _second_map(axes: "Axes", x: float, y: float) -> None:
    axis, ratio = ratio_map(x, y, reach=2.0 if x < 0 else 5.0, side=401)
    _draw_map(axes, axis, ratio)
    axes.plot([x], [y], "+", color=INK, markersize=8)


def _draw_map(axes: "Axes", axis: torch.Tensor, ratio: torch.Tensor) -> None:
    ticks = axis.numpy()
    levels = [0.2, 0.4, 0.6, 0.8, 0.9]
    lines = axes.contour(ticks, ticks, ratio.numpy(), levels=levels, colors=MUTED, linewidths=0.7)
    axes.clabel(lines, fontsize=7)
    # Ratios at the base and of two deltas that cancel are 1 and 0 to rounding: they are no violations.
    if (ratio > 1 + 1e-9).any():
        axes.contourf(ticks, ticks, ratio.numpy(), levels=[1 + 1e-9, 2], colors=WARN, alpha=0.35)
        axes.contour(ticks, ticks, ratio.numpy(), levels=[1.05, 1.1], colors=WARN, linewidths=0.9)
        note = f"red: the inequality fails, up to {ratio.max():.4f}"
    else:
        note = f"holds everywhere, at most {ratio.max():.3f}"
    axes.annotate(note, (0.03, 0.03), xycoords="axes fraction", color=INK, backgroundcolor=PAPER)
    axes.set_box_aspect(1)


def _constants() -> Any:
    """Return the picture of the sharp constant against N, and of the drift of equal deltas in the four charts."""
    figure = new_figure(10.2, 3.4)
    left, right = figure.subplots(1, 2)
    counts = list(range(1, 101))
    left.plot(counts, [equal_constant(n).value for n in counts], color=DELTAS[0], linewidth=1.6)
    limit = many_constant().value
    left.axhline(limit, color=WARN, linestyle=(0, (4, 2)), linewidth=1.2)
    left.annotate(
        f"K_inf = {limit:.6f}", (0.98, limit), xycoords=("axes fraction", "data"), ha="right", va="bottom"
    )
    left.set(xscale="log", xlabel="N, equal deltas", ylabel="C_N", ylim=(0.98, 1.4))
    left.set_title("Linear chart: sharp constant for N deltas")
    decades(left.xaxis)
    at = equal_constant(2)
    alone = drift(torch.tensor(at.x).double(), torch.tensor(at.y).double()).item()
    copies = list(range(1, 21))
    for chart, colour in zip(CHARTS, DELTAS, strict=True):
        ratio = [_of_copies(n, at.x, at.y, chart) / (n * n * alone) for n in copies]
        right.plot(copies, ratio, "o-", color=colour, markersize=3, linewidth=1.3, label=chart)
    right.axhline(1, color=WARN, linestyle=(0, (4, 2)), linewidth=1.2)
    right.set(
        xlabel="N copies of one delta", ylabel="drift over N^2 D", ylim=(0, 1.2), xticks=(1, 5, 10, 15, 20)
    )
    right.set_title(f"The same delta ({at.x:.3f}, {at.y:.3f}) in the four charts")
    right.legend()
    return figure


def _of_copies(count: int, x: float, y: float, chart: str) -> float:
    wide, far = (torch.full((count, 1), value, dtype=torch.float64) for value in (x, y))
    return drift(*fuse(wide, far, torch.ones(count), chart)).item()


def _shrinking() -> Any:
    """Return the picture of drift along the ray from a far delta to the base, chart by chart, and where it can rise."""
    figure = new_figure(10.2, 3.4)
    left, right = figure.subplots(1, 2)
    weights = torch.linspace(0, 1, 401, dtype=torch.float64)
    for chart, colour in zip(CHARTS, DELTAS, strict=True):
        left.plot(weights, _along(FAR, weights, chart), color=colour, linewidth=1.6, label=chart)
    left.set(xlabel="weight a", ylabel="drift of a p, nats")
    left.set_title(f"Shrinking one delta p = ({FAR[0]:g}, {FAR[1]:g})")
    left.legend()
    edge = shrinking_threshold()
    for stretch, colour in zip((0.5, 1.0, 4.0, 16.0), DELTAS, strict=True):
        nats = _along((edge.x, edge.y * stretch), weights, "linear")
        right.plot(
            weights, nats, color=colour, linewidth=1.6, label=f"p = ({edge.x:.2f}, {edge.y * stretch:.1f})"
        )
    right.axhline(edge.value, color=WARN, linestyle=(0, (4, 2)), linewidth=1.2)
    right.annotate(
        f"{edge.value:.4f} nats", (0.02, edge.value), xycoords=("axes fraction", "data"), va="bottom"
    )
    right.set(xlabel="weight a", ylabel="drift of a p, nats", ylim=(0, 12))
    right.set_title("Linear chart: below this drift, shrinking never raises it")
    right.legend(ncols=2, loc="upper left")
    return figure


def _along(delta: tuple[float, float], weights: torch.Tensor, chart: str) -> torch.Tensor:
    x, y = (torch.full((1, len(weights), 1), value, dtype=torch.float64) for value in delta)
    return drift(*fuse(x, y, weights[None], chart)).squeeze(-1)


FIGURES = {
    "drift-violations": _violations,
    "drift-constants": _constants,
    "drift-shrinking": _shrinking,
}
"""File names without their ending, and what draws them."""
