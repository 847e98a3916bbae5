"""The randomness of causal sampling, kept apart from the model: who an individual is, whatever the context."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tether.errors import CheckpointError, ConfigError, ShapeError

__all__ = ["Noise", "truncate"]

SMALLEST = 2.0**-25
"""Uniform numbers are kept this far from 0 and 1, where the Cauchy quantile is infinite."""


def truncate(noise: Float[Tensor, "*batch"], density: float) -> Float[Tensor, "*batch"]:
    """Map uniform noise into the part where the Cauchy density is at least `density` times its peak.

    The peak of Cauchy(loc, scale) is 1 / (pi scale), and the density falls to the share q of it at
    |t| = sqrt(1/q - 1), so the draws of the mapped noise have the law restricted to that interval. The map
    is monotone: the same individual, held closer to the median.

    Args:
        noise: uniform in (0, 1), shape (...).
        density: smallest accepted density as a share of the peak, in [0, 1]; 0 keeps everything, 1 only the
            median.

    Returns:
        Noise in the accepted interval, same shape.

    Raises:
        ConfigError: `density` outside [0, 1].

    Reference: spec document 5, section 3.2 (likelihood truncation).
    """
    if not 0 <= density <= 1:
        raise ConfigError(
            f"truncation={density}: expected a share of the peak density in [0, 1]; 0 keeps every cause, 1 only "
            "the most likely"
        )
    if density == 0:
        return noise
    half = torch.atan(torch.tensor(density, dtype=torch.float64).reciprocal().sub(1).sqrt()) / torch.pi
    return 0.5 + (noise - 0.5) * (2 * float(half))


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Uniform noise for a batch of individuals, addressed by position in the text.

    The noise at a position depends on the individual's seed and the position alone, not on the batch, the
    padding, or how the text was cut into calls. Drawn by a counter-based generator (Philox), so nothing has
    to be stored for texts of any length.

    Attributes:
        seeds: one for each individual, shape (B,), int64, >= 0.
        size: dimensions C of U.
        shared: one draw for all positions (spec document 5, section 3.4) instead of one each.
        known: noise that is given instead of drawn, for example abducted, shape (B, P, C) for the first P
            positions, or (B, 1, C) for all of them when shared; None draws everything.

    Raises:
        ConfigError: negative seeds, or known noise outside the open interval (0, 1).
        ShapeError: shapes that do not fit together.

    Example:
        >>> noise = Noise.draw(2, 3, seed=1)
        >>> at = noise.at(torch.tensor([[4, 5], [5, 6]]))
        >>> at.shape, bool((at == Noise.draw(2, 3, seed=1).at(torch.tensor([[4, 5], [5, 6]]))).all())
        (torch.Size([2, 2, 3]), True)
    """

    seeds: Tensor
    size: int
    shared: bool = False
    known: Tensor | None = None

    def __post_init__(self) -> None:
        if self.seeds.dim() != 1 or self.size < 1:
            raise ShapeError(
                f"seeds {tuple(self.seeds.shape)}, size={self.size}: expected shape (B,), size >= 1"
            )
        if len(self.seeds) and int(self.seeds.min()) < 0:
            raise ConfigError(f"a seed of {int(self.seeds.min())}: expected seeds >= 0")
        if self.known is None:
            return
        expected = (len(self.seeds), 1 if self.shared else self.known.shape[1], self.size)
        if self.known.shape != expected:
            raise ShapeError(f"known noise of shape {tuple(self.known.shape)}: expected {expected}")
        if not bool(((self.known > 0) & (self.known < 1)).all()):
            raise ConfigError("known noise outside the open interval (0, 1): expected uniform numbers")

    @classmethod
    def draw(
        cls,
        batch: int,
        size: int,
        *,
        shared: bool = False,
        seed: int | None = None,
        generator: torch.Generator | None = None,
    ) -> "Noise":
        """Draw new individuals.

        Args:
            batch: how many, B >= 1.
            size: dimensions C of U (`model.latent_size`).
            shared: one draw for all positions of a text.
            seed: individual b gets the seed `seed + b`, so that a batch of one repeats the first of many.
            generator: of the seeds where `seed` is None; None takes torch's global state.

        Returns:
            The noise.
        """
        if seed is not None:
            seeds = torch.arange(seed, seed + batch, dtype=torch.int64)
        else:
            seeds = torch.randint(2**62, (batch,), generator=generator, dtype=torch.int64)
        return cls(seeds=seeds, size=size, shared=shared)

    @classmethod
    def of(cls, values: Tensor) -> "Noise":
        """Take given numbers for the noise.

        Args:
            values: uniform numbers in (0, 1), shape (C,) or (B, C) for noise shared by all positions, or
                (B, P, C) for P positions (later ones are drawn from seeds 0, 1, ...).

        Returns:
            The noise.

        Raises:
            ShapeError: another number of dimensions.
        """
        if values.dim() not in {1, 2, 3}:
            raise ShapeError(f"noise of shape {tuple(values.shape)}: expected (C,), (B, C) or (B, P, C)")
        shared = values.dim() < 3
        known = values.reshape(-1, 1, values.shape[-1]) if shared else values
        return cls(seeds=torch.arange(len(known)), size=values.shape[-1], shared=shared, known=known)

    def __len__(self) -> int:
        return len(self.seeds)

    def rows(self, index: Int[Tensor, " rows"] | Sequence[int]) -> "Noise":
        """Pick individuals, also several times.

        Args:
            index: which, shape (b,).

        Returns:
            Their noise.
        """
        index = torch.as_tensor(index, dtype=torch.int64)
        known = None if self.known is None else self.known[index]
        return replace(self, seeds=self.seeds[index], known=known)

    def at(self, positions: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time size"]:
        """Give the noise at some positions.

        Cost: one block of uniform numbers for each individual, from its first to its last position.

        Args:
            positions: place of each token in its text, padding not counted, shape (B, T); what stands at
                padding does not matter.

        Returns:
            Uniform numbers in (0, 1), shape (B, T, C), float32, on the device of `positions`.

        Raises:
            ShapeError: another number of individuals.
        """
        if len(positions) != len(self.seeds):
            raise ShapeError(
                f"noise of {len(self.seeds)} individuals for a batch of {len(positions)}: expected one each; "
                "draw them with Noise.draw(batch, size), or pick them with noise.rows"
            )
        places = (torch.zeros_like(positions) if self.shared else positions.clamp(min=0)).cpu()
        known = 0 if self.known is None else self.known.shape[1]
        drawn = torch.zeros(*positions.shape, self.size)
        if positions.shape[1] and int(places.max()) >= known:
            for row, (seed, wanted) in enumerate(zip(self.seeds.tolist(), places, strict=True)):
                first, last = int(wanted.min()), int(wanted.max())
                block = torch.from_numpy(self._block(seed, first, last + 1 - first))
                drawn[row] = block[wanted - first]
        if self.known is not None and positions.shape[1]:
            given = (
                self.known.float()
                .cpu()
                .gather(1, places.clamp(max=known - 1).unsqueeze(-1).expand(-1, -1, self.size))
            )
            drawn = torch.where((places < known).unsqueeze(-1), given, drawn)
        return drawn.clamp(SMALLEST, 1 - SMALLEST).to(positions.device)

    def _block(self, seed: int, first: int, count: int) -> np.ndarray:
        # A step of Philox's counter yields four numbers, so a position takes a whole number of steps.
        steps = -(-self.size // 4)
        generator = np.random.Generator(np.random.Philox(key=seed).advance(first * steps))
        return generator.random((count, steps * 4))[:, : self.size].astype(np.float32)

    def save(self, path: str | Path) -> None:
        """Write the noise as one safetensors file, whole or not at all.

        Args:
            path: the file.
        """
        from safetensors.torch import save_file

        from tether.store.publish import publish_file

        tensors = {"seeds": self.seeds} | ({} if self.known is None else {"known": self.known.contiguous()})
        about = {"kind": "noise", "size": str(self.size), "shared": json.dumps(self.shared)}
        with publish_file(Path(path)) as target:
            save_file(tensors, target, metadata=about)

    @classmethod
    def load(cls, path: str | Path) -> "Noise":
        """Read what `save` wrote.

        Args:
            path: the file.

        Returns:
            The noise.

        Raises:
            CheckpointError: missing, damaged, or not a file of noise.
        """
        from tether.store.reader import CheckpointReader

        reader = CheckpointReader(Path(path))
        about = reader.metadata()
        if about.get("kind") != "noise":
            raise CheckpointError(
                f"{path}: expected noise written by Noise.save, found {about.get('kind', 'another file')}"
            )
        known = reader.tensor("known") if "known" in reader.names else None
        return cls(
            seeds=reader.tensor("seeds"),
            size=int(about["size"]),
            shared=json.loads(about["shared"]),
            known=known,
        )
