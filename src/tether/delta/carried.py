"""What a delta or an adapter carries beside its weights: strengths, and a sample of the documents kept aside."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from tether.errors import CheckpointError
from tether.reading import Strict, checked

__all__ = ["SAMPLE_BYTES", "SAMPLE_DOCUMENTS", "STRENGTHS", "check_carried", "declared_drift"]

STRENGTHS = (1.0,)
"""Strengths, relative to the saved heads, at which a delta takes part in a fusion that weights by evidence."""
SAMPLE_DOCUMENTS, SAMPLE_BYTES = 16, 32_768
"""What a delta carries of the documents kept aside, at most."""


class _Record(Strict):
    """The figures of a record that are used again; others are kept as they are."""

    model_config = ConfigDict(extra="allow")

    metric: Annotated[str, Field(max_length=64)] | None = None
    budget: Annotated[float, Field(ge=0)] | None = None
    latent_base: Annotated[float, Field(ge=0)] | None = None
    latent: Annotated[str, Field(max_length=256)] | None = None
    quantile: Annotated[float, Field(gt=0, lt=1)] | None = None
    text: Annotated[str, Field(max_length=256)] | None = None
    texts: dict[str, Annotated[str, Field(max_length=256)]] | None = None


def check_carried(path: Path, record: Any, sample: Any) -> None:
    """Check what a delta or an adapter says of its strengths and carries of its domain.

    Args:
        path: where it was read from.
        record: its record.
        sample: its sample.

    Raises:
        CheckpointError: the record is no mapping, figures in it are none, its strengths are no ascending numbers in
            (0, 1], or the sample is no list of texts within `SAMPLE_DOCUMENTS` and `SAMPLE_BYTES`.
    """
    wrong = None
    if not isinstance(record, dict):
        wrong = "its record is no mapping"
    elif not _ascending(record.get("strengths", list(STRENGTHS))):
        wrong = (
            f"strengths {ascii(record['strengths'])[:80]} in its record are no ascending numbers in (0, 1]"
        )
    elif not (isinstance(sample, list) and all(isinstance(text, str) for text in sample)):
        wrong = "its sample is no list of texts"
    elif len(sample) > SAMPLE_DOCUMENTS or sum(_bytes(text) for text in sample) > SAMPLE_BYTES:
        wrong = f"its sample is above {SAMPLE_DOCUMENTS} texts or {SAMPLE_BYTES} bytes"
    if wrong:
        raise CheckpointError(f"{path}: damaged, {wrong}; take another copy, or learn it again")
    checked(_Record, record, f"{path}: record")


def declared_drift(record: dict[str, Any]) -> dict[str, Any]:
    """Give what a delta or an adapter declares of its drift, for the description of a fusion.

    Args:
        record: of the delta or adapter.

    Returns:
        metric, budget and latent_base, None where the record has none; quantile, where that is limited and not the
        mean; and text, the hash of the base text on which they were met, where it is known.
    """
    found = {key: record.get(key) for key in ("metric", "budget", "latent_base")}
    text = record.get("text") or (record.get("texts") or {}).get("base")
    more = {"quantile": record.get("quantile"), "text": text}
    return found | {key: value for key, value in more.items() if value is not None}


def _bytes(text: str) -> int:
    return len(text.encode(errors="surrogatepass"))


def _ascending(strengths: Any) -> bool:
    if not isinstance(strengths, list) or not strengths:
        return False
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in strengths):
        return False
    return all(0 < value <= 1 for value in strengths) and strengths == sorted(set(strengths))
