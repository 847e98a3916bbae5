"""The randomness of causal sampling, kept apart from the model: who an individual is, whatever the context."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from tether.errors import CheckpointError, ConfigError, ShapeError
from tether.reading import Strict, checked, parse_json

__all__ = ["Noise", "truncate"]

LARGEST = 2**24
"""Dimensions of U at most in a file."""
SMALLEST = 2.0**-24
"""Uniform numbers are kept this far from 0 and 1, where the Cauchy quantile is infinite; float32 names no
number nearer to 1."""


def check_share(density: float) -> None:
    """Check what `truncate` takes as a share of the peak.

    Args:
        density: the share.

    Raises:
        ConfigError: it is outside [0, 1].
    """
    if not 0 <= density <= 1:
        raise ConfigError(
            f"truncation={density}: expected a share of the peak density in [0, 1]; 0 keeps every cause, 1 only "
            "the most likely"
        )


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

    Example:
        >>> truncate(torch.tensor([1e-6, 0.5, 1 - 1e-6]), 0.5)  # tan(pi (1/4 - 1/2)) = -1, at half the peak
        tensor([0.2500, 0.5000, 0.7500])
    """  # noqa: DOC502 - raised by check_share
    check_share(density)
    if density == 0:
        return noise
    half = math.atan(math.sqrt(1 / density - 1)) / math.pi
    return 0.5 + (noise - 0.5) * (2 * half)


class _About(Strict):
    """What the header of a file of noise says."""

    size: int = Field(ge=1, le=LARGEST)
    shared: bool
    common: float = Field(default=0.0, ge=0, lt=1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Noise:
    """Uniform noise for a batch of individuals, addressed by position in the text.

    The noise at a position depends on the individual's seed and the position alone, not on the batch, the
    padding, or how the text was cut into calls. Drawn by a counter-based generator (Philox), so nothing has
    to be stored for texts of any length.

    Attributes:
        seeds: one for each individual, shape (B,), int64, >= 0.
        size: dimensions C of U.
        shared: one draw for all positions (spec document 5, section 3.4) instead of one each.
        common: the individual's part of each position's draw, in [0, 1): the standard Cauchy variable of a position is
            (1 - common) times one of its own plus common times one of the whole text, and by stability standard Cauchy
            again. What one draw for everything does to a text, and why this is there: docs/shared-noise.md.
        known: noise that is given instead of drawn, for example abducted, shape (B, P, C) for the first P
            positions, or (B, 1, C) for all of them when shared; None draws everything.
        known_speaker: the uniform number that decides which expert of a fusion by evidence speaks, given instead
            of drawn, shape (B, P), or (B, 1) when shared.

    Raises:
        ConfigError: negative seeds, known noise outside the open interval (0, 1), or a part outside [0, 1).
        ShapeError: shapes that do not fit together, or seeds that are no whole numbers.

    Example:
        >>> noise = Noise.draw(2, 3, seed=1)
        >>> at = noise.at(torch.tensor([[4, 5], [5, 6]]))
        >>> at.shape, bool((at == Noise.draw(2, 3, seed=1).at(torch.tensor([[4, 5], [5, 6]]))).all())
        (torch.Size([2, 2, 3]), True)
    """

    seeds: Tensor
    size: int
    shared: bool = False
    common: float = 0.0
    known: Tensor | None = None
    known_speaker: Tensor | None = None

    def __post_init__(self) -> None:
        if self.seeds.dim() != 1 or self.seeds.dtype != torch.int64 or self.size < 1:
            raise ShapeError(
                f"seeds {tuple(self.seeds.shape)} of {self.seeds.dtype}, size={self.size}: expected shape (B,) of "
                "torch.int64, size >= 1"
            )
        if len(self.seeds) and int(self.seeds.min()) < 0:
            raise ConfigError(f"a seed of {int(self.seeds.min())}: expected seeds >= 0")
        if not 0 <= self.common < 1 or (self.shared and self.common):
            raise ConfigError(
                f"common={self.common}, shared={self.shared}: expected a part in [0, 1), and with one draw for all "
                "positions none beside it"
            )
        self._check_speaker()
        if self.known is None:
            return
        given = tuple(self.known.shape)
        places = 1 if self.shared or len(given) < 2 else max(given[1], 1)
        if given != (len(self.seeds), places, self.size) or not self.known.is_floating_point():
            raise ShapeError(
                f"known noise of shape {given}, {self.known.dtype}: expected (B, P, C) = "
                f"{(len(self.seeds), places, self.size)}, floating point"
            )
        if not bool(((self.known > 0) & (self.known < 1)).all()):
            raise ConfigError("known noise outside the open interval (0, 1): expected uniform numbers")

    def _check_speaker(self) -> None:
        told = self.known_speaker
        if told is None:
            return
        places = 1 if self.shared or told.dim() < 2 else max(told.shape[1], 1)
        if tuple(told.shape) != (len(self.seeds), places) or not told.is_floating_point():
            raise ShapeError(
                f"known speakers of shape {tuple(told.shape)}, {told.dtype}: expected (B, P) = "
                f"{(len(self.seeds), places)}, floating point"
            )
        if not bool(((told > 0) & (told < 1)).all()):
            raise ConfigError("known speakers outside the open interval (0, 1): expected uniform numbers")

    @classmethod
    def draw(
        cls,
        batch: int,
        size: int,
        *,
        shared: bool = False,
        common: float = 0.0,
        seed: int | None = None,
        generator: torch.Generator | None = None,
    ) -> "Noise":
        """Draw new individuals.

        Args:
            batch: how many, B >= 1.
            size: dimensions C of U (`model.latent_size`).
            shared: one draw for all positions of a text.
            common: what all positions have in common instead, in [0, 1).
            seed: individual b gets the seed `seed + b`, so that a batch of one repeats the first of many.
            generator: of the seeds where `seed` is None; None takes torch's global state.

        Returns:
            The noise.

        Raises:
            ConfigError: no individual, a seed that is negative or does not fit into 63 bits, or a part outside [0, 1).
        """
        if batch < 1 or (seed is not None and not 0 <= seed <= 2**63 - 1 - batch):
            raise ConfigError(
                f"batch={batch}, seed={seed}: expected at least one individual, and a seed from 0 to below 2^63"
            )
        if seed is not None:
            seeds = torch.arange(seed, seed + batch, dtype=torch.int64)
        else:
            seeds = torch.randint(2**62, (batch,), generator=generator, dtype=torch.int64)
        return cls(seeds=seeds, size=size, shared=shared, common=common)

    @classmethod
    def of(cls, values: Tensor) -> "Noise":
        """Take given numbers for the noise.

        Args:
            values: uniform numbers in (0, 1), shape (C,) or (B, C) for noise shared by all positions, or
                (B, P, C) for P positions (later ones are drawn from seeds 0, 1, ...).

        Returns:
            The noise.

        Raises:
            ConfigError: numbers outside the open interval (0, 1).
            ShapeError: not a tensor of one to three dimensions.
        """  # noqa: DOC502 - ConfigError is raised by __post_init__
        shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        if not isinstance(values, Tensor) or values.dim() not in {1, 2, 3}:
            raise ShapeError(
                f"noise of shape {shape}: expected a tensor of shape (C,), (B, C) or (B, P, C), or a Noise"
            )
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

        Raises:
            ShapeError: there is no such individual.
        """
        index = torch.as_tensor(index, dtype=torch.int64)
        if index.dim() != 1 or bool((index.abs() >= len(self) + (index < 0).long()).any()):
            raise ShapeError(
                f"rows {index.tolist()} of {len(self)} individuals: expected a list of indices below {len(self)}"
            )
        known = None if self.known is None else self.known[index.to(self.known.device)]
        told = self.known_speaker
        told = None if told is None else told[index.to(told.device)]
        return replace(self, seeds=self.seeds[index], known=known, known_speaker=told)

    def at(self, positions: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time size"]:
        """Give the noise at some positions.

        Cost: one block of uniform numbers for each individual, from its first to its last position.

        Args:
            positions: place of each token in its text, padding not counted, shape (B, T); what stands at
                padding does not matter.

        Returns:
            Uniform numbers in (0, 1), shape (B, T, C), on the device of `positions`; float32, or float64
            where known noise is: abducted noise near 1 does not survive float32.

        Raises:
            ShapeError: another number of individuals.
        """  # noqa: DOC502 - raised by what it calls
        places = self._places(positions)
        given = None if self.known is None else self.known.detach().cpu()
        dtype = torch.float64 if given is not None and given.dtype == torch.float64 else torch.float32
        known = 0 if given is None else given.shape[1]
        drawn = torch.zeros(*positions.shape, self.size)
        if places.numel() and int(places.max()) >= known:
            for row, (seed, wanted) in enumerate(zip(self.seeds.tolist(), places, strict=True)):
                first, last = int(wanted.min()), int(wanted.max())
                block = torch.from_numpy(self._block(seed, first, last + 1 - first))
                drawn[row] = self._mixed(block[wanted - first], seed)
        drawn = drawn.clamp(SMALLEST, 1 - SMALLEST).to(dtype)
        if given is not None:
            index = places.clamp(max=known - 1).unsqueeze(-1).expand(-1, -1, self.size)
            # What half precision rounds to an end is moved back; float64 is taken as it is.
            kept = given if dtype == torch.float64 else given.float().clamp(SMALLEST, 1 - SMALLEST)
            drawn = torch.where((places < known).unsqueeze(-1), kept.gather(1, index), drawn)
        return drawn.to(positions.device)

    def speaker(self, positions: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time"]:
        """Give the number that decides who speaks at some positions; it is part of the individual as its noise is.

        Args:
            positions: as of `at`.

        Returns:
            Uniform numbers in (0, 1), shape (B, T), float64, on the device of `positions`.

        Raises:
            ShapeError: another number of individuals.
        """  # noqa: DOC502 - raised by what it calls
        places = self._places(positions)
        told = self.known_speaker
        known = 0 if told is None else told.shape[1]
        found = torch.zeros(places.shape, dtype=torch.float64)
        if places.numel() and int(places.max()) >= known:
            for row, (seed, wanted) in enumerate(zip(self.seeds.tolist(), places, strict=True)):
                first, last = int(wanted.min()), int(wanted.max())
                # A second key: a stream of its own, four numbers a step of the counter of which one is taken.
                stream = np.random.Generator(np.random.Philox(key=[seed, 1]).advance(first))
                block = torch.from_numpy(stream.random((last + 1 - first, 4))[:, 0].copy())
                found[row] = block[wanted - first]
        found = found.clamp(SMALLEST, 1 - SMALLEST)
        if told is not None:
            kept = told.detach().cpu().double().gather(1, places.clamp(max=known - 1))
            found = torch.where(places < known, kept, found)
        return found.to(positions.device)

    def _places(self, positions: Tensor) -> Tensor:
        if len(positions) != len(self.seeds):
            raise ShapeError(
                f"noise of {len(self.seeds)} individuals for a batch of {len(positions)}: expected one each; "
                "draw them with Noise.draw(batch, size), or pick them with noise.rows"
            )
        return (torch.zeros_like(positions) if self.shared else positions.clamp(min=0)).cpu()

    def _block(self, seed: int, first: int, count: int) -> np.ndarray:
        # A step of Philox's counter yields four numbers, so a position takes a whole number of steps.
        steps = -(-self.size // 4)
        generator = np.random.Generator(np.random.Philox(key=seed).advance(first * steps))
        return generator.random((count, steps * 4))[:, : self.size].astype(np.float32)

    # Each position's own draw with the part that the whole text has in common.
    def _mixed(self, own: Tensor, seed: int) -> Tensor:
        if not self.common:
            return own
        # A third key: a stream of its own.
        stream = np.random.Generator(np.random.Philox(key=[seed, 2]))
        text = torch.from_numpy(stream.random(self.size).astype(np.float32))
        one, whole = (
            torch.tan(math.pi * (part.double().clamp(SMALLEST, 1 - SMALLEST) - 0.5)) for part in (own, text)
        )
        return (0.5 + torch.atan((1 - self.common) * one + self.common * whole) / math.pi).float()

    def save(self, path: str | Path) -> None:
        """Write the noise as one safetensors file, whole or not at all.

        Args:
            path: the file.
        """
        from safetensors.torch import save_file

        from tether.store.publish import publish_file

        tensors = {"seeds": self.seeds.contiguous()}
        if self.known is not None:
            tensors["known"] = self.known.detach().contiguous()
        if self.known_speaker is not None:
            tensors["speaker"] = self.known_speaker.detach().contiguous()
        about = {"kind": "noise", "size": str(self.size), "shared": json.dumps(self.shared)}
        if self.common:
            about["common"] = json.dumps(self.common)
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
        said = {key: value for key, value in about.items() if key not in ("kind", "format")}
        read = {key: parse_json(value, f"{path}: {key}") for key, value in said.items()}
        fields = checked(_About, read, path)
        if wrong := set(reader.names) - {"seeds", "known", "speaker"} or {"seeds"} - set(reader.names):
            raise CheckpointError(
                f"{path}: {', '.join(map(ascii, sorted(wrong)))}: expected seeds, and known and speaker or neither; "
                "take another copy"
            )
        try:
            return cls(
                seeds=reader.tensor("seeds"),
                size=fields.size,
                shared=fields.shared,
                common=fields.common,
                known=reader.tensor("known") if "known" in reader.names else None,
                known_speaker=reader.tensor("speaker") if "speaker" in reader.names else None,
            )
        except (ConfigError, ShapeError) as error:
            raise CheckpointError(f"{path}: damaged, {error}; take another copy") from error
