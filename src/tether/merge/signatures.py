"""LAPE signatures: per neuron phi = [activation, path gradient, length-normalised loss], read from disk by module."""

from pathlib import Path
from typing import Any, Final, NamedTuple, final

import torch
from pydantic import PositiveInt
from torch import Tensor

from tether.errors import CheckpointError, ConfigError
from tether.merge.descriptions import read_description
from tether.reading import Strict
from tether.store.reader import CheckpointReader

__all__ = ["DESCRIPTION", "FIELDS", "Description", "Signature", "Signatures", "mean_over_samples"]

DESCRIPTION: Final = "signatures.json"
FIELDS: Final = ("activation", "gradient", "paper_gradient", "fisher")


class Description(Strict):
    """``signatures.json``: what was encoded, and how."""

    samples: PositiveInt
    chunk: PositiveInt
    weighting: str
    gamma: float | None
    gradients: bool
    reference: str | None
    model: str
    paths: str
    probes: str
    modules: dict[str, PositiveInt]


class Signature(NamedTuple):
    """Statistics of the d neurons (output rows) of one linear layer on n samples.

    Values are averages under normalised weights; the document's unnormalised sums are ``exp(log_mass)`` times
    them (`Signatures.log_mass`).

    Attributes:
        activation: phi[0], mean row output at the positions that predict generated tokens, shape (n, d).
        gradient: phi[1] by backpropagation, ``sum_t y_t dL/dy_t`` a path, averaged over paths, shape (n, d).
        paper_gradient: phi[1] as the document approximates it, ``a(S) (a(S) - a_ref(S))``, shape (n, d).
        fisher: mean over paths of ``||dL_k/dW_i||^2`` restricted to the path's positions, shape (n, d).
    """

    activation: Tensor
    gradient: Tensor
    paper_gradient: Tensor
    fisher: Tensor


def mean_over_samples(phi: Tensor, log_mass: Tensor) -> tuple[Tensor, float]:
    """Average encodings over samples with the masses that the weighting asks for.

    Args:
        phi: of each sample under normalised weights, shape (n, d, c).
        log_mass: logarithm of the sum of the weights of each sample, shape (n,).

    Returns:
        ``v`` of shape (d, c), float64, and ``s`` with the mean ``exp(s) v``.

    Reference:
        LAPE, step 4.
    """
    mass = log_mass.double()
    scale = torch.logsumexp(mass, 0) - torch.log(torch.tensor(float(len(mass))))
    share = torch.exp(mass - scale) / len(mass)
    return torch.einsum("n,ndc->dc", share, phi.double()), float(scale)


@final
class Signatures:
    """Signatures in a folder that `tether.merge.encoding.encode` filled, read a module at a time.

    Args:
        folder: the folder.

    Raises:
        CheckpointError: the folder holds no complete signatures.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        file = self._folder / DESCRIPTION
        if not file.is_file():
            raise CheckpointError(f"{folder}: no {DESCRIPTION} in it; encode the model first")
        self.description: dict[str, Any] = read_description(
            file, "Encode again into another folder.", Description
        )
        self._samples, self._chunk = self.description["samples"], self.description["chunk"]
        count = -(-self._samples // self._chunk)
        there = {each.name for each in self._folder.glob("signatures-*.safetensors")}
        # No list of as many names as a file asks for: at most one more than there are files is looked at.
        names = [f"signatures-{i:05d}.safetensors" for i in range(min(count, len(there) + 1))]
        if missing := [name for name in names if name not in there]:
            raise CheckpointError(
                f"{folder}: {count - len(names) + len(missing)} of {count} files are missing, the first {missing[0]}; "
                "encode again, it goes on where it stopped"
            )
        self._files = [self._folder / name for name in names]

    @property
    def modules(self) -> dict[str, int]:
        """Encoded modules and their numbers of neurons."""
        return dict(self.description["modules"])

    @property
    def loss(self) -> Tensor:
        """phi[2] of each sample, the weighted length-normalised loss, nats, shape (n,)."""
        return self._read("loss", ())

    @property
    def log_mass(self) -> Tensor:
        """Logarithm of the sum of the document's weights, 0 for averages, shape (n,)."""
        return self._read("log_mass", ())

    @property
    def effective(self) -> Tensor:
        """Effective number of paths of each sample, shape (n,)."""
        return self._read("effective", ())

    def signature(self, module: str) -> Signature:
        """Read one module.

        Args:
            module: its full name.

        Returns:
            Its statistics on all samples.

        Raises:
            ConfigError: the module was not encoded.
        """
        if module not in self.description["modules"]:
            raise ConfigError(
                f"{module} was not encoded; expected one of {', '.join(self.description['modules'])}"
            )
        neurons = self.description["modules"][module]
        return Signature(*(self._read(f"{module}.{field}", (neurons,)) for field in FIELDS))

    def phi(self, module: str, gradient: str = "true") -> Tensor:
        """Put the three components together.

        Args:
            module: its full name.
            gradient: `true` (backpropagation) or `paper` (the document's approximation).

        Returns:
            Shape (n, d, 3), under normalised weights.

        Raises:
            ConfigError: another kind of gradient, or true gradients that were not recorded.
        """
        if gradient not in {"true", "paper"}:
            raise ConfigError(f"gradient={gradient!r}: expected 'true' or 'paper'")
        if gradient == "true" and not self.description["gradients"]:
            raise ConfigError(
                "true gradients were not recorded; encode with gradients=True or ask for 'paper'"
            )
        found = self.signature(module)
        second = found.gradient if gradient == "true" else found.paper_gradient
        loss = self.loss.to(second.dtype).unsqueeze(-1).expand_as(second)
        return torch.stack([found.activation, second, loss], dim=-1)

    def mean_phi(self, module: str, gradient: str = "true") -> tuple[Tensor, float]:
        """Average phi over samples with the masses that the weighting asks for.

        Args:
            module: its full name.
            gradient: as for `phi`.

        Returns:
            ``v`` of shape (d, 3), float64, and ``s`` with phi = exp(s) v; s = 0 for averages, and for the
            document's sums the log of the mean mass, which may be far below the smallest float.
        """
        return mean_over_samples(self.phi(module, gradient), self.log_mass)

    def _read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        parts: list[Tensor] = []
        for number, file in enumerate(self._files):
            rows = min(self._chunk, self._samples - number * self._chunk)
            try:
                part = CheckpointReader(file).tensor(name)
            except CheckpointError as error:
                raise CheckpointError(
                    f"{file}: cannot be read ({error}); remove it and encode again"
                ) from error
            if (
                part.shape != (rows, *shape)
                or not part.is_floating_point()
                or part.dtype != (parts or [part])[0].dtype
            ):
                raise CheckpointError(
                    f"{file}: {name} is of {part.dtype} and shape {tuple(part.shape)}, expected floats of shape "
                    f"{(rows, *shape)}; remove it and encode again"
                )
            parts.append(part)
        return torch.cat(parts)
