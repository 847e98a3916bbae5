"""Results of a benchmark on disk, stamped with machine and versions."""

import os
import platform
from pathlib import Path
from typing import Any

import torch

from tether.store.manifest import versions
from tether.store.publish import write_json

__all__ = ["write_rows"]


def write_rows(path: Path, name: str, rows: list[dict[str, Any]]) -> None:
    """Write rows.

    Args:
        path: the file, published whole.
        name: of the benchmark.
        rows: of case, metric, ours, baseline, ratio, runs.
    """
    machine = {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    write_json(path, {"benchmark": name, "machine": machine, "versions": versions(), "rows": rows})
