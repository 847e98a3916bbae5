"""What the commands of the theory lab print as text."""

from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["experiments_told", "finding_told", "table"]


def experiments_told(record: dict[str, Any]) -> str:
    """Return the table of the six experiments and what it shows."""
    lines = [
        [
            str(row["experiment"]),
            row["case"],
            f"{row['held_document']:.0%} of {row['samples_document']}",
            f"{row['violations']} of {row['samples']:,}",
            f"{row['worst_sampled']:.4f}",
            f"{row['worst']:.4f}" if row["worst"] > 1 else "1 (proved)",
            f"{row['mean_ratio']:.4f}",
            f"{row['sqrt_violations']:.1e}",
        ]
        for row in record["rows"]
    ]
    columns = (
        "",
        "case",
        "holds, document's size",
        "fails, more samples",
        "worst sampled",
        "worst there is",
        "mean ratio",
        "above sqrt(N)",
    )
    fits = {name: f"{fit[0]:.4f} N^{fit[1]:.4f}" for name, fit in record["fit"].items()}
    exact, where = record["exact"], record["where"]
    text = [
        table(columns, lines),
        "",
        f"Fit of the mean ratio: {fits['ours_document_size']} at the document's size, {fits['ours']} with more"
        f" samples; the document's: {fits['document']}.",
        f"Exact, whatever is sampled: u = {exact['deltas'][0]['u']}, y = {exact['deltas'][0]['y']} twice gives"
        f" k = {exact['k_fused']} > ({exact['k_single'][0]})^4, ratio {exact['ratio']:.4f}.",
    ]
    if where["violations"]:
        text.append(
            f"Where: {where['violations']} of {where['samples']:,} pairs fail; in {where['both_sharpen']:.1%} of them"
            f" both deltas sharpen, in {where['same_side']:.1%} both shift to one side; 95 % lie within"
            f" {where['size_95']:.2f}, a box that holds {where['box_share']:.1e} of the samples. 100 samples meet one"
            f" with probability {where['chance_in_100']:.2%}."
        )
    return "\n".join([*text, f"{record['cpu_seconds']} CPU seconds."])


def finding_told(record: dict[str, Any]) -> str:
    """Return what a search found, in sentences."""
    deltas = record["deltas"]
    lines = [
        f"{record['statement']}: {record['text']}",
        f"worst ratio of drift to bound {record['ratio']:.12g}: "
        + ("the statement FAILS" if record["violated"] else "no violation found")
        + (" (at the border of the search)" if record["at_border"] else ""),
    ]
    if record["precise_ratio"]:
        lines.append(f"to 40 digits {record['precise_ratio']}")
    for delta, weight in list(zip(deltas, record["weights"], strict=True))[:4]:
        x, y = (", ".join(f"{v:.9g}" for v in delta[key][:4]) for key in ("x", "y"))
        lines.append(f"  x = {x}   y = {y}   weight {weight:g}")
    if len(deltas) > 4:
        lines.append(f"  and {len(deltas) - 4} more")
    if exact := record["witness"]:
        first = exact["deltas"][0]
        lines.append(
            f"exact: {len(exact['deltas'])} x (u = {first['u']}, y = {first['y']}, weight {first['weight']}): k of the"
            f" fusion {exact['k_fused']}, of each {exact['k_single'][0]}, exponent {exact['exponent']}; holds with"
            f" integers: {exact['holds']}"
        )
    effort = record["effort"]
    lines.append(f"{effort['evaluations']} evaluations of the search, {effort['cpu_seconds']} CPU seconds")
    if swept := record["sweep"]:
        lines.append(
            f"{swept['violations']} violations in {swept['points']} random points, worst ratio {swept['worst']:.9g},"
            f" {swept['cpu_seconds']:.1f} CPU seconds"
        )
    return "\n".join(lines)


def table(columns: tuple[str, ...], rows: list[list[Any]]) -> str:
    """Return rows under their headings, as text."""
    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    console = Console(width=200, color_system=None)  # no sequences for a terminal
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())
