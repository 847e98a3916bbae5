"""A domain's delta: the learnt change of the abduction head, its gate and where it came from."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field
from torch import Tensor

from tether.cauchy.charts import NATIVE
from tether.delta.carried import STRENGTHS, check_carried
from tether.delta.gate import Gate, gate_faults
from tether.errors import CheckpointError
from tether.names import check_name
from tether.reading import Name, Strict, checked, finite, parse_json
from tether.store.reader import CheckpointReader
from tether.store.writer import write_safetensors

__all__ = ["Delta"]

FORMAT = 2
"""2: may read states of middle layers."""
DTYPES = ("F16", "BF16", "F32", "F64")
"""In which its tensors may be."""


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

    Raises:
        ConfigError: the name is none that `tether.names.check_name` takes.
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

    def __post_init__(self) -> None:
        check_name(self.name)

    @property
    def strengths(self) -> tuple[float, ...]:
        """Strengths, relative to its heads, at which it takes part where deltas are weighted by evidence.

        Ascending, each in (0, 1]; a half and the whole where the record says nothing.
        """
        return tuple(self.record.get("strengths", STRENGTHS))

    def save(self, path: str | Path) -> "Delta":
        """Write the delta as one safetensors file, whole or not at all.

        Args:
            path: the file, customarily `NAME.delta`.

        Returns:
            The same delta with its path set.
        """
        path = Path(path)
        tensors = {"second": self.second}
        if self.first is not None:
            tensors["first"] = self.first
        if self.gate is not None:
            tensors |= {f"gate.{name}": value for name, value in self.gate._asdict().items()}
        described = {
            "format": FORMAT if self.layers else 1,
            "layers": list(self.layers),
            "name": self.name,
            "chart": self.chart,
            "base": self.base,
            "record": finite(self.record),
            "sample": list(self.sample),
        }
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
        tensors = _tensors(path, reader, len(described.layers))
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
        )


def _tensors(path: Path, reader: CheckpointReader, layers: int) -> dict[str, Tensor]:
    gate = {f"gate.{name}" for name in Gate._fields}
    found, second = set(reader.names), reader.shape("second") if "second" in reader.names else ()
    wrong = None
    if found - {"first"} not in ({"second"}, {"second"} | gate):
        wrong = f"it holds {', '.join(map(ascii, reader.names[:12]))}"
    elif "first" in found and reader.shape("first") != second:
        wrong = f"its heads have the shapes {reader.shape('first')} and {second}"
    elif len(second) != 2 or 0 in second or second[1] % (1 + layers):
        wrong = f"its head has the shape {second}, for {1 + layers} states to read"
    elif odd := [name for name in reader.names if reader.dtype(name) not in DTYPES]:
        wrong = f"{', '.join(odd)} is {reader.dtype(odd[0])}, expected one of {', '.join(DTYPES)}"
    else:
        tensors = {name: reader.tensor(name) for name in reader.names}
        heads = [name for name in tensors if name in ("first", "second")]
        odd = [name for name, value in tensors.items() if bool(value.isnan().any())]
        odd += [name for name in heads if bool(tensors[name].isinf().any())]
        if not odd:
            return tensors
        wrong = f"{', '.join(odd)} holds values that are not numbers"
    raise CheckpointError(
        f"{path}: damaged, {wrong}; expected a head second, one of the same shape named first where scales change, "
        "and all of a gate's tensors or none; take another copy, or learn it again"
    )
