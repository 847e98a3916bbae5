"""A domain as a LoRA adapter on the backbone: a folder that PEFT reads, with a gate and a record beside it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field
from torch import Tensor

from tether.delta.carried import check_carried
from tether.delta.gate import Gate, gate_faults
from tether.delta.peft_config import check_ranks, read_lora
from tether.errors import CheckpointError, ConfigError
from tether.names import check_name
from tether.processes import writes
from tether.reading import Name, Strict, checked, finite, read_json
from tether.store.manifest import MANIFEST, Input, Manifest, read_manifest, write_manifest
from tether.store.publish import publish_folder
from tether.store.reader import CheckpointReader
from tether.store.writer import write_safetensors

__all__ = ["Adapter", "is_adapter", "lora_config"]

WEIGHTS, CONFIG, GATE = "adapter_model.safetensors", "adapter_config.json", "gate.safetensors"
"""The first two are PEFT's names."""


class _Recipe(Strict):
    """What the manifest of an adapter's folder says."""

    name: Name
    base: str
    gated: bool
    record: Any
    sample: Any = Field(default_factory=list)


@dataclass(frozen=True, kw_only=True, eq=False)
class Adapter:
    """A LoRA adapter with what makes it a domain: whose backbone it fits, where it acts, how it was learnt.

    Compared and hashed by identity, so that it can be the key of a dict of weights.

    Attributes:
        name: domain name.
        config: PEFT's `LoraConfig`.
        tensors: PEFT's state dict of the adapter.
        gate: one-class gate, which reads the base's hidden state, or None.
        base: fingerprint of the backbone it was learnt on.
        record: how it was learnt: budget, metric, figures, hashes of the texts, versions.
        path: the folder it was read from or saved to.
        sample: a few documents of the domain that it was not learnt from, see `tether.delta.held_out`; may be
            none.

    Raises:
        ConfigError: the name is none that `tether.names.check_name` takes.
    """

    name: str
    config: Any
    tensors: dict[str, Tensor]
    gate: Gate | None
    base: str
    record: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None
    sample: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_name(self.name)

    @property
    def strengths(self) -> tuple[float, ...]:
        """Strengths at which it takes part where domains are weighted by evidence: the whole alone."""
        return tuple(self.record.get("strengths", (1.0,)))

    def save(self, folder: str | Path, *, inputs: Mapping[str, str] | None = None) -> "Adapter":
        """Write the adapter as one folder, whole or not at all; of several processes the main one does.

        `PeftModel.from_pretrained(base, folder)` loads it: it is within its budget as it is, since the factor
        that met the budget is part of the weights. PEFT knows nothing of the gate.

        Args:
            folder: must be absent or empty.
            inputs: sha256 of each file it was learnt from, by role.

        Returns:
            The same adapter with its path set.
        """
        folder = Path(folder)
        if not writes():
            return Adapter(**{**self.__dict__, "path": folder})
        with publish_folder(folder) as target:
            kept = {name: values.detach().cpu().contiguous() for name, values in self.tensors.items()}
            write_safetensors(target / WEIGHTS, kept, {"format": "pt"})
            self.config.save_pretrained(target)
            if self.gate is not None:
                gate = {name: values.contiguous() for name, values in self.gate._asdict().items()}
                write_safetensors(target / GATE, gate)
            listed = tuple(
                Input(role=role, path=role, sha256=sha256) for role, sha256 in (inputs or {}).items()
            )
            recipe = {
                "name": self.name,
                "base": self.base,
                "gated": self.gate is not None,
                "record": finite(self.record),
                "sample": list(self.sample),
            }
            write_manifest(target, Manifest(kind="adapter", inputs=listed, recipe=recipe))
        return Adapter(**{**self.__dict__, "path": folder})

    @staticmethod
    def load(folder: str | Path) -> "Adapter":
        """Read an adapter.

        Args:
            folder: written by `save`.

        Returns:
            The adapter.

        Raises:
            CheckpointError: the folder is missing or damaged, or holds an adapter that tether did not write, or its
                strengths or its sample are out of bounds.
        """
        folder = Path(folder)
        if not is_adapter(folder):
            raise CheckpointError(
                f"{folder}: expected an adapter written by 'tether learn --adapter lora' or 'tether leash' (a folder "
                f"with {CONFIG} and {MANIFEST}); one that was made elsewhere 'tether leash' takes in"
            )
        recipe = checked(_Recipe, read_manifest(folder).recipe, folder / MANIFEST)
        check_carried(folder, recipe.record, recipe.sample)
        config = read_lora(folder / CONFIG)
        reader = CheckpointReader(folder / WEIGHTS)
        tensors = {name: reader.tensor(name) for name in reader.names}
        check_ranks(config, tensors, folder)
        gate = None
        if recipe.gated:
            gates = CheckpointReader(folder / GATE)
            gate = Gate(*(gates.tensor(name) for name in Gate._fields))
            if wrong := gate_faults(gate):
                raise CheckpointError(f"{folder}: damaged, {wrong}; take another copy, or learn it again")
        return Adapter(
            name=recipe.name,
            config=config,
            tensors=tensors,
            gate=gate,
            base=recipe.base,
            record=recipe.record,
            path=folder,
            sample=tuple(recipe.sample),
        )


def is_adapter(path: str | Path) -> bool:
    """Tell whether a path is an adapter's folder.

    Args:
        path: any path.

    Returns:
        Whether PEFT's and tether's files are there.

    Raises:
        CheckpointError: they are, and tether's cannot be read.
    """  # noqa: DOC502 - raised by what it calls
    path = Path(path)
    if not ((path / CONFIG).is_file() and (path / MANIFEST).is_file()):
        return False
    content = read_json(path / MANIFEST)
    return isinstance(content, dict) and content.get("kind") == "adapter"


def lora_config(rank: int, alpha: int) -> Any:
    """Describe a LoRA on every linear layer of the backbone: attention and MLP.

    Args:
        rank: r, >= 1.
        alpha: the update is alpha / r B A.

    Returns:
        PEFT's `LoraConfig`.

    Raises:
        ConfigError: PEFT is not installed.

    Reference:
        Hu et al. 2021 (arXiv:2106.09685), section 4.1.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ConfigError(
            "adapters need the package peft, which is not installed: pip install 'tether[adapters]'"
        ) from error
    return LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
