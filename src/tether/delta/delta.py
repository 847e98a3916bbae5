"""A domain's delta: the learnt change of the abduction head, its gate and where it came from."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field
from torch import Tensor

from tether.cauchy.charts import NATIVE
from tether.delta.carried import STRENGTHS, check_carried
from tether.delta.gate import Gate, gate_faults
from tether.delta.low_rank import Factors
from tether.errors import CheckpointError, ConfigError
from tether.names import check_name
from tether.processes import writes
from tether.reading import Name, Strict, checked, finite, parse_json
from tether.store.reader import CheckpointReader
from tether.store.writer import write_safetensors

__all__ = ["Delta"]

FORMAT = 3
"""2: may read states of middle layers. 3: heads as factors of low rank."""
DTYPES = ("F16", "BF16", "F32", "F64")
"""In which its tensors may be."""
LARGEST = 2**28
"""Entries of a head that factors may make: a small file must not fill the memory."""


class _Described(Strict):
    """What the header of a delta file says."""

    format: int = Field(ge=1)
    name: Name
    chart: str
    base: str
    record: Any
    layers: list[int] = Field(default_factory=list)
    sample: Any = Field(default_factory=list)


@dataclass(frozen=True, kw_only=True, eq=False)
class Delta:
    """A change of the abduction head, linear in what it reads (the hidden state) in its own chart.

    A delta is compared and hashed by identity, so that it can be the key of a dict of weights.

    Attributes:
        name: domain name.
        chart: one of `tether.cauchy.charts.NATIVE`: the chart whose two coordinates the delta outputs, or `matrix`,
            where it is added to the base's own two heads.
        first: head of the first coordinate (change of log scale), shape (C, H (1 + L)), or None when only
            the location moves.
        second: head of the second coordinate (change of location), shape (C, H (1 + L)).
        gate: one-class gate, or None.
        base: fingerprint of the backbone it was learnt on.
        record: how it was learnt: budget, metric, figures, hashes of the texts, versions.
        path: the file it was read from or saved to.
        layers: the L middle layers it reads beside the last hidden state, see `tether.causal.features`.
        sample: a few documents of the domain that it was not learnt from, see `tether.delta.held_out`; may be
            none.
        factors: of heads of low rank, by `first` and `second`, of which these are the products; the file holds the
            factors. Empty for whole heads.

    Raises:
        ConfigError: the name is none that `tether.names.check_name` takes, or the factors are not of the heads.
    """

    name: str
    chart: str
    first: Tensor | None
    second: Tensor
    gate: Gate | None
    base: str
    record: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None
    layers: tuple[int, ...] = ()
    sample: tuple[str, ...] = ()
    factors: Mapping[str, Factors] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_name(self.name)
        heads = {"second": self.second} | ({} if self.first is None else {"first": self.first})
        if self.factors and (
            self.factors.keys() != heads.keys()
            or not all(_same(self.factors[name].whole(), head) for name, head in heads.items())
        ):
            raise ConfigError(f"delta {self.name!r}: its factors are not those of its heads; leave them out")

    @property
    def strengths(self) -> tuple[float, ...]:
        """Strengths, relative to its heads, at which it takes part where deltas are weighted by evidence.

        Ascending, each in (0, 1]; a half and the whole where the record says nothing.
        """
        return tuple(self.record.get("strengths", STRENGTHS))

    def save(self, path: str | Path) -> "Delta":
        """Write the delta as one safetensors file, whole or not at all; of several processes the main one does.

        Args:
            path: the file, customarily `NAME.delta`.

        Returns:
            The same delta with its path set.
        """
        path = Path(path)
        tensors = {"second": self.second}
        if self.first is not None:
            tensors["first"] = self.first
        if self.factors:
            tensors = {
                f"{name}.{part}": value
                for name, factors in self.factors.items()
                for part, value in factors._asdict().items()
            }
        if self.gate is not None:
            tensors |= {f"gate.{name}": value for name, value in self.gate._asdict().items()}
        described = {
            "format": FORMAT if self.factors else 2 if self.layers else 1,
            "layers": list(self.layers),
            "name": self.name,
            "chart": self.chart,
            "base": self.base,
            "record": finite(self.record),
            "sample": list(self.sample),
        }
        if writes():
            write_safetensors(
                path, {k: v.contiguous() for k, v in tensors.items()}, {"tether.delta": json.dumps(described)}
            )
        return Delta(**{**self.__dict__, "path": path})

    @staticmethod
    def load(path: str | Path) -> "Delta":
        """Read a delta.

        Args:
            path: a file written by `save`.

        Returns:
            The delta.

        Raises:
            CheckpointError: the file is missing, damaged, not a delta, or of a newer format, or its name, its
                strengths or its sample are out of bounds.
        """
        path = Path(path)
        reader = CheckpointReader(path)
        text = reader.metadata().get("tether.delta")
        if text is None:
            raise CheckpointError(
                f"{path}: expected a delta file written by 'tether learn'; this is another safetensors"
            )
        content = parse_json(text, path)
        if (
            isinstance(content, dict)
            and isinstance(content.get("format"), int)
            and content["format"] > FORMAT
        ):
            raise CheckpointError(
                f"{path}: delta format {content['format']}, this tether reads up to {FORMAT}; update tether"
            )
        described = checked(_Described, content, path)
        if described.chart not in NATIVE:
            raise CheckpointError(
                f"{path}: chart {described.chart!a}, expected one of {', '.join(NATIVE)}; take another copy"
            )
        check_carried(path, described.record, described.sample)
        tensors, factors = _tensors(path, reader, len(described.layers))
        gate = None
        if "gate.center" in tensors:
            gate = Gate(**{name: tensors[f"gate.{name}"] for name in Gate._fields})
            if wrong := gate_faults(gate):
                raise CheckpointError(f"{path}: damaged, {wrong}; take another copy, or learn it again")
        return Delta(
            name=described.name,
            chart=described.chart,
            first=tensors.get("first"),
            second=tensors["second"],
            gate=gate,
            base=described.base,
            record=described.record,
            path=path,
            layers=tuple(described.layers),
            sample=tuple(described.sample),
            factors=factors,
        )


def _tensors(
    path: Path, reader: CheckpointReader, layers: int
) -> tuple[dict[str, Tensor], dict[str, Factors]]:
    gate = {f"gate.{name}" for name in Gate._fields}
    parts = {name: tuple(f"{name}.{part}" for part in Factors._fields) for name in ("first", "second")}
    found = set(reader.names)
    thin = {name for name, both in parts.items() if found.issuperset(both)}
    heads = {name: _shape(reader, name, parts[name] if name in thin else None) for name in parts}
    rest = found.difference(*(parts[name] if name in thin else {name} for name in parts))
    second, wrong = heads["second"], None
    if rest not in (set(), gate) or not second or (thin and thin != {name for name in heads if heads[name]}):
        wrong = f"it holds {', '.join(map(ascii, reader.names[:12]))}"
    elif heads["first"] not in ((), second):
        wrong = f"its heads have the shapes {heads['first']} and {second}"
    elif len(second) != 2 or 0 in second or second[1] % (1 + layers):
        wrong = f"its head has the shape {second}, for {1 + layers} states to read"
    elif odd := [name for name in reader.names if reader.dtype(name) not in DTYPES]:
        wrong = f"{', '.join(odd)} is {reader.dtype(odd[0])}, expected one of {', '.join(DTYPES)}"
    else:
        tensors = {name: reader.tensor(name) for name in reader.names}
        factors = {name: Factors(*(tensors.pop(part) for part in parts[name])) for name in sorted(thin)}
        tensors |= {name: both.whole() for name, both in factors.items()}
        odd = [name for name, value in tensors.items() if bool(value.isnan().any())]
        odd += [name for name in parts if name in tensors and bool(tensors[name].isinf().any())]
        if not odd:
            return tensors, factors
        wrong = f"{', '.join(odd)} holds values that are not numbers"
    raise CheckpointError(
        f"{path}: damaged, {wrong}; expected a head second, one of the same shape named first where scales change, "
        "and all of a gate's tensors or none; take another copy, or learn it again"
    )


# The shape of a head, or of the product of its factors; () where there is none.
def _shape(reader: CheckpointReader, name: str, factors: tuple[str, ...] | None) -> tuple[int, ...]:
    if factors is None:
        return reader.shape(name) if name in reader.names else ()
    up, down = map(reader.shape, factors)
    fits = len(up) == len(down) == 2 and up[1] == down[0] and 0 < up[1] <= min(up[0], down[1])
    fits = fits and up[0] * down[1] <= LARGEST
    return (up[0], down[1]) if fits and reader.dtype(factors[0]) == reader.dtype(factors[1]) else (0,)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool((one - other).abs().max() <= 1e-5 * other.abs().max())
