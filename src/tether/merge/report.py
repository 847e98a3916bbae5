"""``merge.json``, the report of a merge: its fields, written and read strictly."""

from math import sqrt
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import Field

from tether.merge.descriptions import read_description
from tether.merge.journal import Written
from tether.merge.plan import Plan
from tether.reading import Strict

__all__ = ["REPORT", "make_report", "read_report"]

REPORT: Final = "merge.json"
"""The file in a merged model's folder: what rounding lost, each tensor's hash, how it was checked."""
REPORT_BYTES: Final = 256 * 2**20
"""Size of a report at most: a million tensors have less."""

_Count = Annotated[int, Field(ge=0)]
_Positive = Annotated[float, Field(ge=0)]


class _Plan(Strict):
    operator: str
    models: dict[str, str]
    into: str
    tokenizer: str
    merged: _Count
    kept: dict[str, _Count]
    tied: bool
    dtypes: dict[str, _Count]
    files: list[str]
    bytes_read: _Count
    bytes_written: _Count
    notes: list[str]


class _Worst(Strict):
    tensor: str
    share_of_change: _Positive


class _Rounding(Strict):
    share_of_change: _Positive
    worst: _Worst | None


class _Divergence(Strict):
    mean: float
    p99: float
    max: float
    standard_error: _Positive | None


class _Comparison(Strict):
    tokens: _Count
    nll_reference: float
    nll_merged: float
    kl: _Divergence


class _Try(Strict):
    factor: float = Field(alias="lambda")
    worst_mean_kl: float


class _Search(Strict):
    value: float
    tried: list[_Try]


class _Check(Strict):
    references: dict[str, dict[str, _Comparison]]
    worst_mean_kl: float
    budget: _Positive | None
    accepted: bool | None
    search: _Search | None = Field(alias="lambda", default=None)


class _Tried(Strict):
    factor: float = Field(alias="lambda")
    log_variance: float | None = None
    loss: float | None = None


class _LastStep(Strict):
    form: str
    eta: _Positive
    neurons: _Count | None = None
    largest: _Positive | None = None
    mean: _Positive | None = None
    before: float | None = None
    after: float | None = None
    sharpness: float | None = None


class _Refined(Strict):
    criterion: str | None = None
    factor: float | None = Field(alias="lambda", default=None)
    tried: list[_Tried] | None = None
    step: _LastStep | None = None
    probes: str | None = None


class _Report(Strict):
    plan: _Plan
    rounding: _Rounding
    tensors: dict[str, Annotated[str, Field(pattern="^[0-9a-f]{64}$")]]
    check: _Check | None = None
    refine: _Refined | None = None


def make_report(plan: Plan, written: dict[str, Written]) -> dict[str, Any]:
    """Give the report of a merge that was not checked.

    Args:
        plan: what was done.
        written: tensor name to its record.

    Returns:
        JSON: the plan, the share of the change that rounding took away (over all tensors and in the worst one),
        and the SHA-256 of each tensor's bytes.
    """
    shares = {name: sqrt(entry.lost / entry.changed) for name, entry in written.items() if entry.changed > 0}
    lost = sum(entry.lost for entry in written.values())
    changed = sum(entry.changed for entry in written.values())
    worst = max(shares, key=lambda name: shares[name], default=None)
    summary = plan.summary()
    return {
        "plan": {name: summary[name] for name in _Plan.model_fields},
        "rounding": {
            "share_of_change": sqrt(lost / changed) if changed else 0.0,
            "worst": None if worst is None else {"tensor": worst, "share_of_change": shares[worst]},
        },
        "tensors": {name: entry.sha256 for name, entry in written.items()},
    }


def read_report(folder: Path) -> dict[str, Any]:
    """Read the report of a published merge.

    Args:
        folder: of the result.

    Returns:
        The report, as `make_report` and the check gave it.

    Raises:
        CheckpointError: If it is missing, is no JSON, or has a field that is missing, unknown or wrong.
    """  # noqa: DOC502 - raised by read_description
    again = f"Expected the report of a merge: remove {folder}, and do the merge again."
    return read_description(folder / REPORT, again, _Report, REPORT_BYTES)
