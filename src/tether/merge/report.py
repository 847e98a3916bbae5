"""``merge.json``, the report of a merge: its fields, written and read strictly."""

from math import sqrt
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field

from tether.errors import CheckpointError
from tether.merge.descriptions import damage
from tether.merge.journal import Written
from tether.merge.plan import Plan

__all__ = ["REPORT", "make_report", "read_report"]

REPORT: Final = "merge.json"
"""The file in a merged model's folder: what rounding lost, each tensor's hash, how it was checked."""

_Count = Annotated[int, Field(ge=0)]
_Figure = Annotated[float, Field(allow_inf_nan=False)]
_Positive = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Plan(_Strict):
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


class _Worst(_Strict):
    tensor: str
    share_of_change: _Positive


class _Rounding(_Strict):
    share_of_change: _Positive
    worst: _Worst | None


class _Divergence(_Strict):
    mean: _Figure
    p99: _Figure
    max: _Figure
    standard_error: _Positive | None


class _Comparison(_Strict):
    tokens: _Count
    nll_reference: _Figure
    nll_merged: _Figure
    kl: _Divergence


class _Try(_Strict):
    factor: _Figure = Field(alias="lambda")
    worst_mean_kl: _Figure


class _Search(_Strict):
    value: _Figure
    tried: list[_Try]


class _Check(_Strict):
    references: dict[str, dict[str, _Comparison]]
    worst_mean_kl: _Figure
    budget: _Positive | None
    accepted: bool | None
    search: _Search | None = Field(alias="lambda", default=None)


class _Report(_Strict):
    plan: _Plan
    rounding: _Rounding
    tensors: dict[str, Annotated[str, Field(pattern="^[0-9a-f]{64}$")]]
    check: _Check | None = None


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
    """
    file = folder / REPORT
    try:
        report = _Report.model_validate_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file} is damaged ({damage(error)}); expected the report of a merge. Remove {folder}, "
            "and do the merge again."
        ) from error
    return report.model_dump(by_alias=True, exclude_unset=True)
