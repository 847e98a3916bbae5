"""The picture of a calibration: one-vs-rest loss against agreement with the base's choices."""

from pathlib import Path
from typing import Any

__all__ = ["frontier_png"]


def frontier_png(record: dict[str, Any], path: Path) -> None:
    """Draw every choice of class noise and threshold that was measured, and the one taken.

    Args:
        record: what `tether.causal.calibration.calibrate` returned.
        path: the PNG to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    markers = {"context": "o", "constant": "s"}
    sizes = sorted({point["class_noise"] for point in record["frontier"]})
    for form, marker in markers.items():
        for number, size in enumerate(sizes):
            points = [
                p for p in record["frontier"] if p["threshold_form"] == form and p["class_noise"] == size
            ]
            points.sort(key=lambda point: point["threshold"])
            axes.plot(
                [point["agreement"] for point in points],
                [point["ovr_loss"] for point in points],
                marker=marker,
                markersize=4,
                linewidth=0.8,
                color=f"C{number}",
                label=f"{form} threshold, scale_S >= {size:.2f}"
                if size
                else f"{form} threshold, no class noise",
            )
    chosen = record["chosen"]
    axes.plot([chosen["agreement"]], [chosen["ovr_loss"]], "*", color="black", markersize=14, label="chosen")
    axes.axvline(0.98, color="grey", linewidth=0.8, linestyle=":")
    axes.set(
        yscale="log",
        xlabel="share of positions where argmax P_k is the base's choice",
        ylabel="one-vs-rest loss, nats",
    )
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=130, format="png")
