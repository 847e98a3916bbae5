"""The results that a report is made of: what must be in them, and who is who among their columns."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tether.errors import ConfigError, ShapeError

__all__ = [
    "BASE",
    "Arrays",
    "Results",
    "check_arrays",
    "check_results",
    "fusions",
    "moved",
    "sample_size",
    "texts_of",
    "title_of",
]

Results = Mapping[str, Any]
"""The content of `table.json`: title, base, budget, texts, columns, cells, base_text, deltas and so on."""

Arrays = Mapping[str, Mapping[str, npt.NDArray[Any]]]
"""Per text `latent_drift` and `bound`, shape (columns without the base, tokens), nats."""

BASE = "base"
KINDS = ("domain", "base")

_Path = tuple[str | int, ...]
_TOP = (
    *(
        "title",
        "base",
        "budget",
        "texts",
        "columns",
        "column_titles",
        "cells",
        "base_text",
        "deltas",
        "samples",
    ),
    *("bounds", "certificate", "verify", "usage", "versions"),
)
_TEXT = ("kind", "title", "documents", "tokens", "seen")
_CELL: tuple[_Path, ...] = (
    ("nll",),
    *(("nll_change", end) for end in ("mean", "low", "high")),
    ("softmax_kl", "mean"),
    ("latent_drift", "mean"),
    *(("softmax_kl", "documents", key) for key in ("quantile", "confidence", "n", "at_most")),
    ("latent_drift", "documents", "at_most"),
)
_CURVE = ("step", "nll", "drift")
_SAMPLE = ("domain", "prompt", "base", "fused")
_USAGE = ("cpu_seconds", "wall_seconds", "peak_rss")
_ABSENT = object()


def check_results(results: Results) -> None:
    """Find everything that a report needs and does not have, before any of it is drawn.

    Args:
        results: the content of `table.json`.

    Raises:
        ConfigError: keys are missing, or what they hold cannot be reported; all of them are named.
    """
    missing = [key for key in _TOP if key not in results]
    paths = [] if missing else list(_needed(results))
    missing += [_name(path) for path in paths if _at(results, path) is _ABSENT]
    if missing:
        raise ConfigError(
            f"results lack {', '.join(missing)}: expected everything that 'tether demo' writes to "
            "table.json; make them again with this version"
        )
    found = ((path, _at(results, path)) for path in paths)
    wrong = [
        f"{_name(p)}={value}" for p, value in found if isinstance(value, float) and not math.isfinite(value)
    ]
    kinds = {name: text["kind"] for name, text in results["texts"].items()}
    wrong += [f"texts.{name}.kind={kind!r}" for name, kind in kinds.items() if kind not in KINDS]
    wrong += [f"no text of kind {kind!r}" for kind in KINDS if kind not in kinds.values()]
    wrong += [
        f"no curve for delta {name!r}" for name, delta in results["deltas"].items() if not delta["curve"]
    ]
    wrong += [f"no column {name!r}" for name in (BASE, *results["deltas"]) if name not in results["columns"]]
    wrong += [] if fusions(results) else ["no column of a fusion"]
    if wrong:
        raise ConfigError(
            f"results hold {', '.join(wrong)}: expected finite figures, texts of the kinds "
            f"{', '.join(KINDS)}, and columns for {BASE!r}, each delta and a fusion; measure again"
        )


def check_arrays(results: Results, arrays: Arrays) -> None:
    """See that the per-token arrays belong to the results.

    Args:
        results: the content of `table.json`, checked.
        arrays: per text `latent_drift` and `bound`.

    Raises:
        ConfigError: arrays are missing, or hold what is not a finite number; all of them are named.
        ShapeError: an array has not one row for each column but the base's.
    """
    needed = [(text, key) for text in results["texts"] for key in ("latent_drift", "bound")]
    missing = [f"{text}.{key}" for text, key in needed if key not in arrays.get(text, {})]
    if missing:
        raise ConfigError(
            f"arrays lack {', '.join(missing)}: expected latent_drift and bound of every text in the "
            "results; pass what 'measure' returned"
        )
    rows = len(results["columns"]) - 1
    for text in results["texts"]:
        drift, bound = (np.shape(arrays[text][key]) for key in ("latent_drift", "bound"))
        if drift != bound or len(drift) != 2 or drift[0] != rows:
            raise ShapeError(
                f"arrays of {text}: latent_drift {drift}, bound {bound}; expected ({rows}, tokens) for both, "
                "one row for each column but the base's; pass the variants in the order of the columns"
            )
    broken = [f"{text}.{key}" for text, key in needed if not np.isfinite(arrays[text][key]).all()]
    if broken:
        raise ConfigError(
            f"arrays hold numbers that are not finite in {', '.join(broken)}: expected drifts in nats; "
            "measure again"
        )


def title_of(results: Results, column: str) -> str:
    """Name a column for a reader.

    Args:
        results: the content of `table.json`.
        column: its key.

    Returns:
        Its title.
    """
    return str(results["column_titles"][column])


def moved(results: Results) -> list[str]:
    """List the columns that differ from the base.

    Args:
        results: the content of `table.json`.

    Returns:
        Every column but the base, in order: the rows of per-token arrays.
    """
    return [column for column in results["columns"] if column != BASE]


def fusions(results: Results) -> list[str]:
    """List the columns that add several deltas; the first is the one on show, the others are for comparison.

    Args:
        results: the content of `table.json`.

    Returns:
        Columns that are neither the base nor a delta, in order.
    """
    return [column for column in moved(results) if column not in results["deltas"]]


def texts_of(results: Results, kind: str) -> list[str]:
    """List the texts of a kind.

    Args:
        results: the content of `table.json`.
        kind: `domain` or `base`.

    Returns:
        Keys of the texts, in order.
    """
    return [name for name, text in results["texts"].items() if text["kind"] == kind]


def sample_size(results: Results, texts: Sequence[str]) -> str:
    """Say how much text a figure stands on.

    Args:
        results: the content of `table.json`.
        texts: keys of texts, taken together.

    Returns:
        For example "16 documents, 10,000 tokens".
    """
    documents, tokens = (
        sum(int(results["texts"][text][key]) for text in texts) for key in ("documents", "tokens")
    )
    return f"{documents:,} documents, {tokens:,} tokens"


def _needed(results: Results) -> Iterator[_Path]:
    yield from (("budget", key) for key in ("value", "metric"))
    yield from (("bounds", key) for key in ("contexts", "violations"))
    yield from (("column_titles", column) for column in results["columns"])
    for text in results["texts"]:
        yield from (("texts", text, key) for key in _TEXT)
        yield ("cells", text, BASE, "nll")
        yield from (("cells", text, column, *key) for column in moved(results) for key in _CELL)
    yield from (
        ("base_text", column, key) for column in moved(results) for key in ("softmax_kl", "latent_drift")
    )
    for name, delta in results["deltas"].items():
        yield from (("deltas", name, key) for key in ("budget", "metric", "tokens", "curve"))
        if delta.get("budget") is not None:
            yield from (("deltas", name, key) for key in ("drift_base", "drift_tokens"))
        yield from (
            ("deltas", name, "curve", i, key) for i in range(len(delta.get("curve", ()))) for key in _CURVE
        )
    yield from (("samples", i, key) for i in range(len(results["samples"])) for key in _SAMPLE)
    yield from (("usage", stage, key) for stage in results["usage"] for key in _USAGE)


def _name(path: _Path) -> str:
    return ".".join(map(str, path))


def _at(results: Results, path: _Path) -> Any:
    value: Any = results
    for key in path:
        named = isinstance(value, Mapping) and key in value
        counted = isinstance(value, Sequence) and isinstance(key, int)
        if not (named or counted):
            return _ABSENT
        value = value[key]
    return value
