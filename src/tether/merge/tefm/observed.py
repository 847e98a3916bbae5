"""What was observed of neurons, on disk: a file a decoder layer, so that a merge reads a layer and no more."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from torch import Tensor

from tether.errors import CheckpointError, ConfigError
from tether.merge.axes import layer_of
from tether.merge.descriptions import read_description
from tether.merge.signatures import FIELDS, Description, Signatures
from tether.merge.weighting import GAMMA, WEIGHTINGS
from tether.store.publish import write_json
from tether.store.writer import write_safetensors

__all__ = ["Encoding", "Located", "is_complete", "locate", "parse_encoding", "write_layers"]

_OF_SAMPLES: Final = ("loss", "log_mass", "effective")
_PREFIXES: Final = ("model.", "model.language_model.", "language_model.model.", "")
"""What comes before ``layers.N.`` in the names of the models' modules."""


class Encoding(NamedTuple):
    """A weighting of sampled paths.

    Attributes:
        weighting: one of `tether.merge.weighting.WEIGHTINGS`.
        gamma: its discount, in (0, 1].
    """

    weighting: str
    gamma: float

    @property
    def name(self) -> str:
        """What its files are called."""
        return f"neurons-{self.weighting}-{self.gamma:g}"

    @property
    def spelt(self) -> str:
        """How a command spells it."""
        own = GAMMA[self.weighting] == self.gamma
        return self.weighting if own else f"{self.weighting}:{self.gamma:g}"


class Located(NamedTuple):
    """Where the neurons of a module lie.

    Attributes:
        file: of its layer.
        module: its full name in that model.
        samples: how many.
    """

    file: Path
    module: str
    samples: int


def parse_encoding(text: str) -> Encoding:
    """Read a weighting as a command spells it.

    Args:
        text: ``paper``, or ``paper:0.95`` for another discount.

    Returns:
        The encoding.

    Raises:
        ConfigError: There is no such weighting, or the discount is no number in (0, 1].

    Example:
        >>> parse_encoding("position:0.95")
        Encoding(weighting='position', gamma=0.95)
    """
    weighting, colon, number = text.partition(":")
    try:
        gamma = float(number) if colon else GAMMA.get(weighting, 1.0)
    except ValueError:
        gamma = 0.0
    if weighting not in WEIGHTINGS or not 0 < gamma <= 1:
        raise ConfigError(
            f"{text!r}: expected a weighting ({', '.join(WEIGHTINGS)}), or one with a discount in (0, 1], as in "
            "paper:0.95"
        )
    return Encoding(weighting, gamma)


def is_complete(folder: Path, encoding: Encoding) -> bool:
    """Say whether all layers were written; the description comes last.

    Args:
        folder: of the observation.
        encoding: which.

    Returns:
        Whether they were.
    """
    return (folder / f"{encoding.name}.json").is_file()


def write_layers(
    folder: Path, encoding: Encoding, signatures: Signatures, layers: Iterable[Sequence[str]]
) -> None:
    """Turn signatures, which come sample by sample, into a file a layer.

    Args:
        folder: of the observation.
        encoding: theirs.
        signatures: of all samples.
        layers: names of the modules of each layer.
    """
    shared = {name: getattr(signatures, name) for name in _OF_SAMPLES}
    for number, modules in enumerate(layers):
        tensors: dict[str, Tensor] = dict(shared)
        for module in modules:
            found = signatures.signature(module)
            tensors |= {f"{module}.{field}": getattr(found, field) for field in FIELDS}
        write_safetensors(_file(folder, encoding, number), tensors)
    write_json(folder / f"{encoding.name}.json", signatures.description)


def _file(folder: Path, encoding: Encoding, layer: int) -> Path:
    return folder / f"{encoding.name}-{layer:05d}.safetensors"


def locate(folder: Path, encoding: Encoding, canonical: str) -> Located:
    """Find what was observed of the neurons of a module.

    Args:
        folder: of the observation.
        encoding: which.
        canonical: the module's name inside the language tower: ``layers.3.mlp.up_proj``.

    Returns:
        Where it lies.

    Raises:
        CheckpointError: The folder has no such encoding, or not of this module; the message has the command.
    """
    file = folder / f"{encoding.name}.json"
    if not file.is_file():
        known = sorted(each.stem.removeprefix("neurons-") for each in folder.glob("neurons-*.json"))
        raise CheckpointError(
            f"{folder} has no neurons under weighting {encoding.weighting}, gamma {encoding.gamma:g} (it has "
            f"{', '.join(known) or 'none'}); expected what 'tether merge observe MODEL --probes FILE --out {folder} "
            f"--signatures {encoding.spelt}' writes"
        )
    description = read_description(file, "Observe the model again into another folder.", Description)
    layer = layer_of(f"{canonical}.")
    for prefix in _PREFIXES:
        if layer is not None and f"{prefix}{canonical}" in description["modules"]:
            return Located(_file(folder, encoding, layer), f"{prefix}{canonical}", description["samples"])
    raise CheckpointError(
        f"{file}: {canonical} was not observed; observe the model again into another folder"
    )
