"""One HTML page that needs nothing else: results, figures, certificate, samples, costs."""

from importlib.resources import files
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from tether.report import figures
from tether.report.bound_figure import bound_points
from tether.report.results import (
    Arrays,
    Results,
    check_arrays,
    check_results,
    fusions,
    sample_size,
    texts_of,
    title_of,
)
from tether.report.table import main_table, markdown_table, nats_text
from tether.report.verdict import budget_lines, checks, sentence
from tether.store.publish import publish_file

__all__ = ["markdown_table", "render", "write_report"]

FEW = 30
"""Documents below which a bootstrap interval tends to be too narrow."""


class Drawn(NamedTuple):
    """A figure on the page.

    Attributes:
        title: its heading.
        wide: SVG for a desk or paper.
        narrow: SVG for a phone.
        caption: what is measured, and on how much text.
    """

    title: str
    wide: str
    narrow: str
    caption: str


class Covered(NamedTuple):
    """What the certificate says of one text.

    Attributes:
        title: of the text.
        documents: how many were measured.
        softmax: bound on the documents' mean softmax KL, or why there is none.
        latent: the same of the latent drift.
    """

    title: str
    documents: int
    softmax: str
    latent: str


def write_report(path: str | PathLike[str], results: Results, arrays: Arrays) -> Path:
    """Write the report, whole or not at all.

    Args:
        path: the HTML file; an existing one is replaced.
        results: the content of `table.json`.
        arrays: per text `latent_drift` and `bound`, shape (columns without the base, tokens), nats.

    Returns:
        The path.

    Raises:
        ConfigError: keys or arrays are missing (all of them are named), matplotlib is not installed, or the
            file cannot be made.
        ShapeError: the arrays do not belong to the results.
        CheckpointError: the disk is full.
    """  # noqa: DOC502 - raised by render and publish_file
    page = render(results, arrays).encode()
    with publish_file(path, needed=len(page)) as temporary:
        temporary.write_bytes(page)
    return Path(path)


def render(results: Results, arrays: Arrays) -> str:
    """Make the page.

    Args:
        results: the content of `table.json`.
        arrays: per text `latent_drift` and `bound`.

    Returns:
        HTML with styles and pictures inside; the same for the same input.

    Raises:
        ConfigError: keys or arrays are missing (all of them are named), or matplotlib is not installed.
        ShapeError: the arrays do not belong to the results.
    """  # noqa: DOC502 - raised by check_results, check_arrays and drawing
    from jinja2 import Environment, StrictUndefined

    check_results(results)
    check_arrays(results, arrays)
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"nats": nats_text, "figure3": _figure3, "seconds": _seconds, "bytes": _bytes}
    template = environment.from_string(
        files("tether.report").joinpath("report.html.j2").read_text(encoding="utf-8")
    )
    shown = fusions(results)[0]
    return template.render(
        results=results,
        sentence=sentence(results),
        checks=checks(results),
        columns=[title_of(results, column) for column in results["columns"]],
        fused_from=2 + len(results["deltas"]),
        groups=main_table(results),
        confidence=_confidence(results),
        few=_few(results),
        few_below=FEW,
        budgets=budget_lines(results),
        fused=[
            (title_of(results, column), results["base_text"][column]["softmax_kl"])
            for column in fusions(results)
        ],
        base_size=sample_size(results, texts_of(results, "base")),
        figures=_figures(results, arrays),
        shown=title_of(results, shown),
        covered=_covered(results, shown),
        quantile=results["cells"][next(iter(results["texts"]))][shown]["softmax_kl"]["documents"]["quantile"],
        total={
            key: sum(used[key] for used in results["usage"].values())
            for key in ("cpu_seconds", "wall_seconds")
        },
        peak=max((used["peak_rss"] for used in results["usage"].values()), default=0),
    )


def _figures(results: Results, arrays: Arrays) -> list[Drawn]:
    from markupsafe import Markup

    interval = f"{_confidence(results):.0%} interval"
    learnt = "; ".join(
        f"{title_of(results, n)}, {d['tokens']:,} tokens" for n, d in results["deltas"].items()
    )
    moved = {column: bound_points(results, arrays, column) for column in fusions(results)}
    still = "; ".join(f"{title_of(results, column)}: {count:,}" for column, (_, _, count) in moved.items())
    drawn = [
        (
            "Change of NLL on the domains",
            [figures.nll_change(results, across=across) for across in (3, 1)],
            f"Mean change of NLL against the base, with the {interval} of a bootstrap over documents; left "
            "of 0 is better than the base. Each panel has its own scale. Bold: the text's own delta. "
            f"Text: {_sizes(results, texts_of(results, 'domain'))}.",
        ),
        (
            "Drift on base text",
            [figures.base_drift(results, across=across) for across in (3, 1)],
            "Mean KL(base || column) of the served softmax per token on text that belongs to no domain; "
            "logarithmic axis. The budget is each delta's own; a fusion has none. Bold: above it. "
            f"Text: {_sizes(results, texts_of(results, 'base'))}.",
        ),
        (
            "Learning",
            [figures.learning_curves(results, across=across) for across in (2, 1)],
            "NLL on the training batch at hand, over candidate classes: noisy, and not the held-out figure. "
            "Drift on base text is a running estimate in the budget's metric; the dot is the drift measured "
            f"after the delta was brought to its budget. Learnt from: {learnt}.",
        ),
        (
            "Drift and its bound",
            [figures.drift_against_bound(results, arrays, across=across) for across in (3, 1)],
            "Measured latent drift of the fusion against the bound computed from each delta's own drift in "
            "the same context; stronger colour means more contexts, and a cell above the line would be red. "
            "Contexts that did not move at all have no place on logarithmic axes and are left out: "
            f"{still}. Text: all, {sample_size(results, list(results['texts']))}.",
        ),
    ]
    return [Drawn(title, Markup(wide), Markup(narrow), caption) for title, (wide, narrow), caption in drawn]


def _covered(results: Results, shown: str) -> list[Covered]:
    lines = []
    for name, text in results["texts"].items():
        cell = results["cells"][name][shown]
        said = []
        for measure in ("softmax_kl", "latent_drift"):
            documents = cell[measure]["documents"]
            bound = documents["at_most"]
            said.append(
                documents.get("reason", "too few documents")
                if bound is None
                else f"at most {nats_text(bound)}"
            )
        lines.append(Covered(text["title"], cell["softmax_kl"]["documents"]["n"], *said))
    return lines


def _few(results: Results) -> str:
    named = [text["title"] for text in results["texts"].values() if text["documents"] < FEW]
    if len(named) == len(results["texts"]):
        return "Every text has"
    return f"{', '.join(named)} {'has' if len(named) == 1 else 'have'}" if named else ""


def _confidence(results: Results) -> float:
    text, column = next(iter(results["texts"])), fusions(results)[0]
    return float(results["cells"][text][column]["softmax_kl"]["documents"]["confidence"])


def _sizes(results: Results, texts: list[str]) -> str:
    return "; ".join(f"{results['texts'][text]['title']}, {sample_size(results, [text])}" for text in texts)


def _figure3(value: float | None) -> str:
    if value is None:
        return "not measured"
    return nats_text(value) if 0 < abs(value) < 1e-4 else f"{value:.3g}"


def _seconds(value: float) -> str:
    return f"{value:,.1f}"


def _bytes(value: Any) -> str:
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"
