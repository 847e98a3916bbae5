"""The figures of a report, column by column: NLL change, drift on base text, learning curves, bounds."""

import textwrap
from typing import TYPE_CHECKING, Any

from tether.report.bound_figure import drift_against_bound
from tether.report.results import Results, moved, texts_of, title_of
from tether.report.svg import (
    GRID,
    INK,
    MUTED,
    NARROW,
    WARN,
    decades,
    drawing,
    looks,
    new_figure,
    panels,
    to_png,
    to_svg,
)
from tether.report.table import change_text, nats_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["base_drift", "drift_against_bound", "learning_curves", "nll_change", "overview_png"]

LEAST = 1e-7
"""Where drifts below it, and 0, stand on a logarithmic axis."""


def nll_change(results: Results, *, across: int = 3) -> str:
    """Draw the change of held-out NLL against the base, one panel a domain text.

    Args:
        results: the content of `table.json`.
        across: panels side by side; 1 for the narrow form.

    Returns:
        SVG.
    """
    texts = texts_of(results, "domain")
    name = f"change-{across}"
    with drawing(name):
        figure, grid = panels(len(texts), across, 0.75 + 0.3 * len(moved(results)))
        for i, (axes, text) in enumerate(zip(grid, texts, strict=True)):
            _draw_change(axes, results, text, named=i % across == 0)
        return to_svg(figure, name, "Change of held-out NLL against the base, per domain text and column")


def base_drift(results: Results, *, across: int = 3) -> str:
    """Draw the mean softmax KL on base text of every column, with the budget.

    Args:
        results: the content of `table.json`.
        across: 1 for the narrow form.

    Returns:
        SVG.
    """
    name = f"drift-{across}"
    with drawing(name):
        figure, grid = panels(1, 1, 0.85 + 0.3 * len(moved(results)), wide=across > 1)
        _draw_drift(grid[0], results, named=True)
        return to_svg(figure, name, "Mean softmax KL from the base on base text, per column, logarithmic")


def learning_curves(results: Results, *, across: int = 2) -> str:
    """Draw the training NLL and the drift on base text against the step, one line a delta.

    Args:
        results: the content of `table.json`.
        across: panels side by side; 1 for the narrow form.

    Returns:
        SVG.
    """
    name = f"curves-{across}"
    with drawing(name):
        figure, (left, right) = panels(2, across, 2.6)
        look = looks(results)
        budgets = [record["budget"] for record in results["deltas"].values() if record["budget"] is not None]
        for delta, record in results["deltas"].items():
            curve = record["curve"]
            steps = [point["step"] for point in curve]
            line: dict[str, Any] = {
                "color": look[delta].colour,
                "linewidth": 1.6,
                "label": title_of(results, delta),
            }
            left.plot(steps, [point["nll"] for point in curve], **line)
            right.plot(steps, [max(point["drift"], LEAST) for point in curve], **line)
            if record["budget"] is not None:
                right.plot(
                    steps[-1], max(record["drift_base"], LEAST), "o", color=line["color"], markersize=6
                )
        for budget in sorted(set(budgets)):
            right.axhline(budget, color=WARN, linestyle=(0, (4, 2)), linewidth=1.2)
            at = (0.01, budget)
            right.annotate(
                f"budget {budget:g}", at, (2, 3), ("axes fraction", "data"), "offset points", color=WARN
            )
        left.set(title="NLL on the domain's training batches", xlabel="step", ylabel="nats per token")
        right.set(title="Drift on base text", xlabel="step", ylabel="nats per token")
        if right.get_ylim()[1] > 6 * max(budgets, default=0.0):
            right.set_yscale("log")
            decades(right.yaxis)
        else:
            right.set_ylim(bottom=0)
        for axes in (left, right):
            axes.set_xlim(left=0)
            axes.tick_params(axis="y", labelcolor=MUTED)
        figure.legend(
            *left.get_legend_handles_labels(), loc="outside upper left", ncols=4 if across > 1 else 2
        )
        return to_svg(
            figure, name, "NLL on the domain and drift on base text against the training step, per delta"
        )


def overview_png(results: Results) -> bytes:
    """Draw NLL change and drift on base text side by side, for a page that takes pictures only.

    Args:
        results: the content of `table.json`.

    Returns:
        PNG.
    """
    texts = texts_of(results, "domain")
    with drawing("overview"):
        count = len(texts) + 1
        figure = new_figure(3.2 * count, 1.0 + 0.3 * len(moved(results)))
        grid = figure.subplots(1, count, squeeze=False, width_ratios=[1] * len(texts) + [1.15])[0]
        for i, (axes, text) in enumerate(zip(grid, texts, strict=False)):
            _draw_change(axes, results, text, named=i == 0)
            axes.set_title(results["texts"][text]["title"], pad=14)
        _draw_drift(grid[-1], results, named=False)
        return to_png(figure)


def _draw_change(axes: "Axes", results: Results, text: str, *, named: bool) -> None:
    look = looks(results)
    axes.axvline(0, color=INK, linewidth=1)
    for row, column in enumerate(moved(results)):
        change = results["cells"][text][column]["nll_change"]
        colour, marker = look[column]
        axes.plot(
            [change["low"], change["high"]], [row, row], "|-", color=colour, linewidth=1.8, markersize=9
        )
        axes.plot(change["mean"], row, marker, color=colour, markersize=5.5)
        _value(axes, row, change_text(change["mean"]), bold=column == text)
    axes.margins(x=0.08)
    _rows(axes, results, named=named)
    axes.set_title(results["texts"][text]["title"])
    axes.set_xlabel("NLL change, nats per token (← better)")


def _draw_drift(axes: "Axes", results: Results, *, named: bool) -> None:
    look = looks(results)
    drifts = {column: results["base_text"][column]["softmax_kl"] for column in moved(results)}
    budget = results["budget"]["value"] if results["budget"]["metric"] == "softmax" else None
    seen = [value for value in (*drifts.values(), budget) if value]
    least = max(LEAST, min(seen, default=LEAST) / 3)
    for row, (column, value) in enumerate(drifts.items()):
        colour, marker = look[column]
        axes.plot([least / 2, max(value, least)], [row, row], color=colour, linewidth=1.8, alpha=0.45)
        axes.plot(max(value, least), row, marker, color=colour, markersize=7)
        _value(axes, row, nats_text(value), bold=budget is not None and value > budget)
    if budget is not None:
        axes.axvline(budget, color=WARN, linestyle=(0, (4, 2)), linewidth=1.2)
        at = (budget, 1.0)
        axes.annotate(
            f"budget {budget:g} ",
            at,
            (-2, 3),
            ("data", "axes fraction"),
            "offset points",
            color=WARN,
            ha="right",
        )
    axes.set_xscale("log")
    axes.set_xlim(least / 1.3, 2 * max(seen, default=1.0))
    decades(axes.xaxis)
    _rows(axes, results, named=named)
    axes.set_title("Base text", pad=14)
    axes.set_xlabel("softmax KL, nats per token (← better)")


def _rows(axes: "Axes", results: Results, *, named: bool) -> None:
    columns = moved(results)
    figure = axes.get_figure(root=True)
    assert figure is not None
    width = 18 if figure.get_figwidth() <= NARROW else 26
    titles = [_wrapped(title_of(results, column), width) if named else "" for column in columns]
    axes.set_yticks(range(len(columns)), titles)
    axes.set_ylim(len(columns) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    border = len(results["deltas"]) - 0.5
    if columns[: len(results["deltas"])] == list(results["deltas"]):
        axes.axhline(border, color=GRID, linewidth=1)


def _value(axes: "Axes", row: int, text: str, *, bold: bool) -> None:
    weight = "bold" if bold else "normal"
    axes.text(
        1.02,
        row,
        text,
        transform=axes.get_yaxis_transform(),
        va="center",
        color=INK,
        fontsize=8,
        weight=weight,
    )


def _wrapped(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width))
