"""The main table: held-out NLL of every text in every column, and how far each column has moved."""

from typing import NamedTuple

from tether.report.results import BASE, Results, check_results, moved, texts_of, title_of

__all__ = ["Cell", "Group", "Row", "change_text", "main_table", "markdown_table", "nats_text"]

MINUS = "−"


class Cell(NamedTuple):
    """One figure.

    Attributes:
        value: the figure as text.
        note: what is said below it, or nothing.
        best: whether it is the best of its row.
        worse: whether it is worse than the base by more than the interval's width allows for.
    """

    value: str
    note: str = ""
    best: bool = False
    worse: bool = False


class Row(NamedTuple):
    """One text.

    Attributes:
        title: of the text.
        kind: of text, in words.
        cells: one a column.
    """

    title: str
    kind: str
    cells: tuple[Cell, ...]


class Group(NamedTuple):
    """All texts by one measure.

    Attributes:
        title: the measure with its unit.
        about: what it measures, in a few words.
        rows: the texts.
    """

    title: str
    about: str
    rows: tuple[Row, ...]


def nats_text(value: float | int) -> str:
    """Format a drift: two significant digits.

    Args:
        value: nats, >= 0.

    Returns:
        The text; "<1e-6" for what is tiny and not 0.

    Example:
        >>> [nats_text(v) for v in (0, 2e-7, 0.0000821, 0.000821, 0.0497, 3.14, 642.0)]
        ['0', '<1e-6', '8.2e-5', '0.00082', '0.050', '3.1', '640']
    """
    if value == 0:
        return "0"
    if abs(value) < 1e-6:
        return "<1e-6"
    mantissa, exponent = f"{value:.1e}".split("e")
    if int(exponent) < -4:
        return f"{mantissa}e{int(exponent)}"
    return f"{float(f'{value:.1e}'):,.{max(0, 1 - int(exponent))}f}"


def change_text(value: float | int) -> str:
    """Format a change of NLL: three decimals and a sign.

    Args:
        value: nats.

    Returns:
        The text.

    Example:
        >>> [change_text(v) for v in (-0.3124, 0.01, -0.0001)]
        ['−0.312', '+0.010', '0.000']
    """
    if round(value, 3) == 0:
        return "0.000"
    return f"{value:+.3f}".replace("-", MINUS)


def main_table(results: Results) -> tuple[Group, ...]:
    """Lay out the figures of all texts and columns.

    Best is the lowest: for NLL on every text; for the drifts only on base text, since on its own domain a
    delta is meant to move.

    Args:
        results: the content of `table.json`.

    Returns:
        Three groups of rows: NLL, softmax KL and latent drift.
    """
    return (
        Group(
            "NLL, nats per token",
            "how badly each text is predicted; lower is better; below it the change against the base",
            tuple(_nll_row(results, text) for kind in ("domain", "base") for text in texts_of(results, kind)),
        ),
        Group(
            "Softmax KL from the base, nats per token",
            "how far the distribution that is served has moved, measured",
            _drift_rows(results, "softmax_kl"),
        ),
        Group(
            "Latent drift, nats per token",
            "how far the Cauchy law of U has moved: the quantity that the bounds are about",
            _drift_rows(results, "latent_drift"),
        ),
    )


def markdown_table(results: Results) -> str:
    """Give the main figures as a GitHub table that also reads well in a terminal.

    NLL of every text, best in bold; then both drifts on all base text together.

    Args:
        results: the content of `table.json`.

    Returns:
        Lines without a line break at the end.

    Raises:
        ConfigError: keys are missing; all of them are named.
    """  # noqa: DOC502 - raised by check_results
    check_results(results)
    nll, kl, drift = main_table(results)
    lines = [["nats per token", *(title_of(results, column) for column in results["columns"])]]
    rows = [(f"NLL, {row.title}", row) for row in nll.rows]
    rows += [("softmax KL, base text", kl.rows[-1]), ("latent drift, base text", drift.rows[-1])]
    for label, row in rows:
        lines.append([label, *(f"**{cell.value}**" if cell.best else cell.value for cell in row.cells)])
    lines = [[text.replace("|", "\\|").replace("\n", " ") for text in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    aligned = [
        [
            line[0].ljust(widths[0]),
            *(text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True)),
        ]
        for line in (lines[0], rule, *lines[1:])
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in aligned)


def _nll_row(results: Results, text: str) -> Row:
    cells = results["cells"][text]
    values = [f"{cells[column]['nll']:.3f}" for column in results["columns"]]
    best = min(values, key=float)
    row = []
    for column, value in zip(results["columns"], values, strict=True):
        change = cells[column].get("nll_change")
        note = "" if column == BASE else change_text(change["mean"])
        row.append(Cell(value, note, value == best, column != BASE and change["low"] > 0))
    return Row(results["texts"][text]["title"], f"{results['texts'][text]['kind']} text", tuple(row))


def _drift_rows(results: Results, measure: str) -> tuple[Row, ...]:
    rows = []
    for kind in ("domain", "base"):
        for text in texts_of(results, kind):
            values = {column: results["cells"][text][column][measure]["mean"] for column in moved(results)}
            title, words = results["texts"][text]["title"], f"{kind} text"
            rows.append(Row(title, words, _drift_cells(results, values, rank=kind == "base")))
    values = {column: results["base_text"][column][measure] for column in moved(results)}
    return (*rows, Row("all base text", "pooled", _drift_cells(results, values, rank=True)))


def _drift_cells(results: Results, values: dict[str, float], *, rank: bool) -> tuple[Cell, ...]:
    texts = {column: nats_text(value) for column, value in values.items()}
    least = nats_text(min(values.values()))
    return tuple(
        Cell("0") if column == BASE else Cell(texts[column], best=rank and texts[column] == least)
        for column in results["columns"]
    )
