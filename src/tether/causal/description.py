"""The schema of `CausalQwenConfig.fusion`, which a checkpoint's `config.json` carries."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tether.cauchy.charts import NATIVE
from tether.errors import ConfigError
from tether.reading import Name, Strict, checked

__all__ = ["check_description"]

MOST = 65_536
"""Domains, layers, or sizes of a gate at most."""
LARGEST = 3.4e38
"""Weights are numbers of 32 bits."""

_Size = Annotated[int, Field(ge=1, le=MOST)]
_Nats = Annotated[float, Field(gt=0)]
_Weight = Annotated[float, Field(ge=-LARGEST, le=LARGEST)]
_Metric = Literal["softmax", "latent"]


class _Leash(Strict):
    nats: _Nats
    metric: _Metric


class _Allowance(_Leash):
    text: str | None = None


class _Budget(Strict):
    metric: Annotated[str, Field(max_length=64)] | None = None
    budget: Annotated[float, Field(ge=0)] | None = None
    latent_base: Annotated[float, Field(ge=0)] | None = None
    quantile: Annotated[float, Field(gt=0, lt=1)] | None = None
    text: Annotated[str, Field(max_length=256)] | None = None


class _Router(Strict):
    window: _Size
    null: bool
    top_k: Annotated[int, Field(ge=0, le=MOST)]
    record: dict[str, Any] = Field(default_factory=dict)


class _Description(Strict):
    """Everything that a fusion of deltas or adapters, added or weighted by evidence, may say of itself."""

    kind: Literal["adapters"] | None = None
    by: Literal["evidence", "sum"] | None = None
    chart: str | None = None
    domains: Annotated[list[Name], Field(min_length=1, max_length=MOST)]
    native: list[str]
    weights: list[_Weight]
    gated: bool
    location_only: bool
    layers: list[Annotated[int, Field(ge=0, le=MOST)]] = Field(default_factory=list)
    budgets: list[_Budget] | None = None
    gate: str | None = None
    gate_window: _Size | None = None
    gate_rank: _Size | None = None
    gate_stages: _Size | None = None
    leash: _Leash | None = None
    allowance: _Allowance | None = None
    router: _Router | None = None
    strengths: list[Annotated[list[_Weight], Field(min_length=1)]] | None = None
    prior: Annotated[float, Field(gt=0, lt=1)] | None = None
    restarts: (
        Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=1, max_length=64)] | None
    ) = None
    floor: Annotated[float, Field(ge=0, lt=1)] | None = None
    choice: bool | None = None
    hold: Annotated[int, Field(ge=0, le=2**31)] | None = None
    grace: Annotated[int, Field(ge=0, le=2**31)] | None = None
    stay: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = None
    whole: bool = False

    @model_validator(mode="after")
    def _fits_together(self) -> "_Description":
        count = len(self.domains)
        if len(set(self.domains)) < count:
            raise ValueError(f"domains: {', '.join(self.domains[:12])}: expected distinct names")
        for field in ("native", "weights", "budgets", "strengths"):
            given = getattr(self, field)
            if given is not None and len(given) != count:
                raise ValueError(f"{field}: {len(given)} for {count} domains")
        needed = ["strengths", "prior", "restarts", "floor"] if self.by == "evidence" else ["chart"]
        if self.gated:
            needed += ["gate_window", "gate_rank"]
        if missing := [field for field in needed if getattr(self, field) is None]:
            raise ValueError(f"{', '.join(missing)}: missing")
        charts = self.native if self.chart is None else [self.chart, *self.native]
        if unknown := [chart for chart in charts if chart not in NATIVE]:
            raise ValueError(f"chart {ascii(unknown[0])[:80]}: expected one of {', '.join(NATIVE)}")
        if self.chart == "matrix" and set(self.native) != {"matrix"}:
            native = ", ".join(self.native[:12])
            raise ValueError(f"chart matrix of deltas in {native}: expected deltas of chart matrix alone")
        return self


def check_description(description: dict[str, Any]) -> None:
    """Check what a checkpoint says of its fusion before anything is made of it.

    Args:
        description: `CausalQwenConfig.fusion`.

    Raises:
        ConfigError: a field is missing, unknown, of another type or out of range; all such are named.
    """  # noqa: DOC502 - raised by what it calls
    checked(_Description, description, "fusion", error=ConfigError)
