"""A run's routing on disk and on paper: reports as CSV or JSON lines, figures of load and tasks, and of a course."""

import csv
import importlib.util
import io
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tether.errors import ConfigError
from tether.reading import finite
from tether.store.publish import publish_file, write_json

__all__ = ["RouteJournal", "loads_png", "routing_png", "write_course"]

logger = logging.getLogger(__name__)

COLUMNS = (
    "step", "layer", "eff_k", "effective_experts", "max_violation", "dead", "rmi", "nrmi", "itjd", "drift", "tokens",
)  # fmt: skip


class RouteJournal:
    """Appends reports to a file, one line a layer and one of the mean.

    Args:
        path: `.csv`, with the numbers, or `.jsonl`, with loads and gates too.

    Raises:
        ConfigError: another suffix, no such folder, or a CSV file with other columns.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.suffix not in {".csv", ".jsonl"}:
            raise ConfigError(f"{path}: expected a name that ends in .csv or .jsonl")
        if not self.path.parent.is_dir():
            raise ConfigError(f"{path}: no folder {self.path.parent}; make it first")
        if self.path.suffix == ".csv" and self.path.is_file():
            with self.path.open(encoding="utf-8", errors="replace") as stream:
                first = stream.readline(4096).strip()
            if first != ",".join(COLUMNS):
                raise ConfigError(
                    f"{path}: columns {first!a:.400}, expected {','.join(COLUMNS)}; name a new file"
                )

    def append(self, step: int, report: dict[str, Any]) -> None:
        """Write one report.

        Args:
            step: of the training.
            report: from `RoutingShaper.report`.
        """
        rows = {**report["layers"], "mean": report["mean"]}
        with self.path.open("a", encoding="utf-8", newline="") as stream:
            if self.path.suffix == ".jsonl":
                for name, row in rows.items():
                    stream.write(json.dumps({"step": step, "layer": name, **row}) + "\n")
                return
            writer = csv.DictWriter(stream, COLUMNS, extrasaction="ignore", lineterminator="\n")
            if stream.tell() == 0:
                writer.writeheader()
            for name, row in rows.items():
                writer.writerow({"step": step, "layer": name, **row})


def routing_png(report: dict[str, Any], tasks: Sequence[str] | None = None) -> bytes:
    """Draw each layer's load and how its tasks are routed.

    Args:
        report: from `RoutingShaper.report` with task ids.
        tasks: names of the tasks, in the order of their ids; None numbers them.

    Returns:
        The image, PNG.

    Raises:
        ConfigError: matplotlib is missing, or another number of names than tasks.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("figures need matplotlib; install 'tether[plot]'") from error
    layers = report["layers"]
    figure = Figure(figsize=(7.0, 2.2 * len(layers) + 0.4), layout="constrained")
    axes = figure.subplots(len(layers), 2, squeeze=False, width_ratios=(2, 3))
    for (bars, heat), (name, row) in zip(axes, layers.items(), strict=True):
        load, gates = np.asarray(row["load"]), np.asarray(row["gates"])
        names = list(tasks) if tasks else [str(i) for i in range(len(gates))]
        if len(names) != len(gates):
            raise ConfigError(f"{len(names)} names for {len(gates)} tasks: expected one for each")
        bars.bar(np.arange(len(load)), load, color="#33658a")
        bars.axhline(1 / len(load), color="#888888", linewidth=0.8)
        bars.set_title(f"{name or 'layer'}: load, {row['dead']} dead", fontsize=8)
        image = heat.imshow(gates, aspect="auto", vmin=0, cmap="viridis")
        heat.set_yticks(range(len(names)), names, fontsize=7)
        shown = ", ".join(
            f"{key} {row[key]:.2f}" for key in ("eff_k", "nrmi", "itjd") if row[key] is not None
        )
        heat.set_title(f"mean gate by task; {shown}", fontsize=8)
        figure.colorbar(image, ax=heat)
        for axis in (bars, heat):
            axis.set_xlabel("expert", fontsize=7)
            axis.tick_params(labelsize=7)
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=110)
    return target.getvalue()


def write_course(folder: Path, report: Mapping[str, Any]) -> list[Path]:
    """Write what became of a training's experts: `routing.json`, and `routing.png` where matplotlib is installed.

    Args:
        folder: exists; files of these names are replaced.
        report: from `RoutingCourse.report`.

    Returns:
        The files.
    """
    written = [folder / "routing.json"]
    write_json(written[0], finite(dict(report)))
    if importlib.util.find_spec("matplotlib") is None:
        logger.warning("no figure of the routing: it needs matplotlib; install 'tether[plot]'")
        return written
    written.append(folder / "routing.png")
    with publish_file(written[1]) as target:
        target.write_bytes(loads_png(report))
    return written


def loads_png(report: Mapping[str, Any]) -> bytes:
    """Draw the load of every expert of every layer at the end of a training, and how many were dead on the way.

    Args:
        report: from `RoutingCourse.report`.

    Returns:
        The image, PNG. A cross marks a dead expert.

    Raises:
        ConfigError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ConfigError("figures need matplotlib; install 'tether[plot]'") from error
    layers = report["layers"]
    experts = max(len(row["load"]) for row in layers.values())
    # Layers of fewer experts leave the rest of their row empty.
    share = np.full((len(layers), experts), np.nan)
    for row, layer in zip(share, layers.values(), strict=True):
        row[: len(layer["load"])] = np.asarray(layer["load"]) * len(layer["load"])
    figure = Figure(figsize=(9.0, max(2.6, 0.22 * len(layers) + 1.2)), layout="constrained")
    heat, line = figure.subplots(1, 2, width_ratios=(3, 2))
    image = heat.imshow(share, aspect="auto", vmin=0, cmap="viridis")
    rows = [(row, expert) for row, layer in enumerate(layers.values()) for expert in layer["dead"]]
    heat.plot([expert for _, expert in rows], [row for row, _ in rows], "x", color="#ffffff", markersize=5)
    heat.set_yticks(range(len(layers)), list(layers), fontsize=6)
    heat.set_xlabel("expert", fontsize=7)
    heat.set_title("load at the end, in fair shares; crosses: dead", fontsize=8)
    figure.colorbar(image, ax=heat).ax.tick_params(labelsize=7)
    history = report["history"]
    line.plot(
        [entry["step"] for entry in history], [entry["dead"] for entry in history], ".-", color="#33658a"
    )
    line.set_ylim(bottom=0)
    line.set_xlabel("step", fontsize=7)
    line.set_title(f"dead experts; {report['form']}, lam {report['lam']:g}", fontsize=8)
    for axis in (heat.xaxis, line.xaxis, line.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    for axis in (heat, line):
        axis.tick_params(labelsize=7)
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=110)
    return target.getvalue()
