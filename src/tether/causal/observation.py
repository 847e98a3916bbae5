"""What was observed and by which law: the request for a posterior, checked and taken to float64."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from tether.cauchy.functional import from_noise
from tether.causal.losses import IGNORE
from tether.causal.polytope import Polytope
from tether.errors import ConfigError, ShapeError

__all__ = ["Observation"]

_ROUNDING = 8.0
"""Slack that counts, in units of eps * |W_j| * |U|: a product rounds by less, whatever its blocking."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Observation:
    """Positions, their laws of U, and what was seen there; `tether.causal.posterior` describes each field.

    Attributes:
        loc: locations of U, shape (R, C).
        scale: scales of U, shape (R, C), > 0.
        weight: of the scores, shape (V, C).
        tokens: the observed argmax, shape (R,), or None.
        fired: the classes that fired, shape (R, V), or None.
        bias: added to the scores, or None.
        threshold: subtracted from the scores, or None.
        values: observed values, shape (R,), or None.
        value_mask: positions whose value was observed, shape (R,); all where None.
        value_weight: w, C numbers; with ``values``.
        value_bias: b, one number.
    """

    loc: Tensor
    scale: Tensor
    weight: Tensor
    tokens: Tensor | None = None
    fired: Tensor | None = None
    bias: Tensor | None = None
    threshold: Tensor | float | None = None
    values: Tensor | None = None
    value_mask: Tensor | None = None
    value_weight: Tensor | None = None
    value_bias: Tensor | float = 0.0

    def seen(self) -> Tensor:
        """Return the positions whose value was observed, boolean (R,)."""
        if self.values is None:
            return torch.zeros(len(self.loc), dtype=torch.bool, device=self.loc.device)
        return torch.ones_like(self.values, dtype=torch.bool) if self.value_mask is None else self.value_mask

    def head(self) -> Tensor:
        """Return the weight in the precision the model scores in: float32, or float64 where it has it."""
        return self.weight.detach().to(torch.float64 if self.weight.dtype == torch.float64 else torch.float32)

    def offset(self) -> Tensor:
        """Add up what shifts the scores.

        Returns:
            bias - threshold, shape (V,) or (R, V), in the dtype of `head`.

        Raises:
            ShapeError: one of them does not broadcast.
        """
        head, rows = self.head(), len(self.loc)
        offset = head.new_zeros(len(head))
        for name, part, sign in (("bias", self.bias, 1), ("threshold", self.threshold, -1)):
            if part is None:
                continue
            term = torch.as_tensor(part, dtype=head.dtype, device=head.device).detach()
            try:
                term = term.expand((rows, len(head)) if term.ndim == 2 else (len(head),))
            except RuntimeError:
                raise ShapeError(
                    f"{name} has shape {tuple(term.shape)}: expected one number, ({len(head)},), or something"
                    f" that broadcasts to ({rows}, {len(head)})"
                ) from None
            offset = offset + sign * term
        return offset

    def polytope(self) -> Polytope:
        """Return the half spaces of all positions, in float64; holds the weight once more, transposed."""
        head = self.head()
        return Polytope(
            loc=self.loc.detach().double(),
            scale=self.scale.detach().double(),
            columns=head.double().T.contiguous(),
            offset=self.offset().double(),
            margin=_ROUNDING * torch.finfo(head.dtype).eps * float(head.norm(dim=-1).max()),
            tokens=self.tokens,
            fired=self.fired,
        )

    def replay(self, polytope: Polytope, rows: Tensor) -> Callable[[Tensor], Tensor]:
        """Make the check of noise by the model's own product, in its own precision.

        Args:
            polytope: of these rows.
            rows: some positions, shape (P,).

        Returns:
            A function of noise, shape (N, C), that tells which of the rows act as observed, shape (P,).
        """
        head, loc, scale = self.head(), self.loc.detach()[rows], self.scale.detach()[rows]
        offset = self.offset() if self.offset().ndim == 1 else self.offset()[rows]

        def replays(noise: Tensor) -> Tensor:
            latent = from_noise(noise.repeat_interleave(len(rows) // len(noise), 0), loc, scale)
            return polytope.observed(linear(latent.to(head.dtype), head) + offset)

        return replays

    def hyperplanes(self, rows: Tensor, chains: int) -> tuple[Tensor, Tensor]:
        """Return what the observed values ask of the standardised noise.

        Args:
            rows: positions with a value, shape (N * m,), m for each chain.
            chains: N.

        Returns:
            Normals (N, m, C) and targets (N, m), float64, with ``normals @ t = targets``.

        Raises:
            ConfigError: the values leave the noise no freedom, or do not depend on it.
        """
        size, each = self.loc.shape[1], len(rows) // chains
        if self.values is None or self.value_weight is None:
            empty = torch.zeros(chains, 0, size, dtype=torch.float64, device=self.loc.device)
            return empty, empty[..., 0]
        flat = self.value_weight.detach().double().reshape(-1)
        normals = (self.scale.detach()[rows].double() * flat).view(chains, each, size)
        targets = (
            self.values[rows].double() - self.value_bias - self.loc.detach()[rows].double() @ flat
        ).detach()
        if each and (each >= size or bool((torch.linalg.matrix_rank(normals) < each).any())):
            raise ConfigError(
                f"{each} observed value(s) for one noise of {size} coordinates with value_weight of norm"
                f" {float(flat.norm()):.3g}: no set of individuals is left; expected fewer values than"
                " coordinates, each depending on U in its own way; mask some out"
            )
        return normals, targets.view(chains, each)

    def check(self) -> None:
        """Refuse what does not fit together, or is no number.

        Raises:
            ConfigError: parts that belong together or exclude each other, numbers out of range.
            ShapeError: a shape or a dtype that does not fit.
        """  # noqa: DOC502 - raised by what it calls
        self._check_shapes()
        if self.tokens is not None and self.fired is not None:
            raise ConfigError("tokens and fired are both given: expected one; the argmax, or what fired")
        if (self.values is None) != (self.value_weight is None):
            raise ConfigError("one of values and value_weight is missing: give both or neither")
        if self.value_mask is not None and self.values is None:
            raise ConfigError("value_mask is given without values: give the values it selects")
        if self.tokens is None and self.fired is None and self.values is None:
            raise ConfigError("nothing was observed: give tokens, fired or values")
        numbers = {
            "loc": self.loc,
            "scale": self.scale,
            "weight": self.weight,
            "bias, threshold": self.offset(),
        }
        if self.values is not None and self.value_weight is not None:
            numbers |= {"values": self.values[self.seen()], "value_weight": self.value_weight}
            numbers["value_bias"] = torch.as_tensor(self.value_bias)
        wrong = [name for name, tensor in numbers.items() if not bool(torch.isfinite(tensor).all())]
        if wrong:
            raise ConfigError(
                f"nan or infinity in {'; '.join(wrong)}: expected finite numbers; mask out the rest"
            )
        if not bool((self.scale > 0).all()):
            raise ConfigError(
                f"the smallest scale is {float(self.scale.min())}: expected scales above 0; take exp of a log scale"
            )
        tokens, vocab = self.tokens, len(self.weight)
        if tokens is not None and not bool(((tokens >= 0) & (tokens < vocab) | (tokens == IGNORE)).all()):
            raise ConfigError(
                f"tokens run from {int(tokens.min())} to {int(tokens.max())}: expected 0 to {vocab - 1}, or"
                f" {IGNORE} where none was observed"
            )

    def _check_shapes(self) -> None:
        if self.loc.ndim != 2 or 0 in self.loc.shape or self.weight.ndim != 2:
            raise ShapeError(
                f"loc has shape {tuple(self.loc.shape)} and weight {tuple(self.weight.shape)}: expected (R, C)"
                " and (V, C) with at least one position; flatten the positions"
            )
        rows, (vocab, size) = len(self.loc), self.weight.shape
        boolean, integer = (torch.bool,), (torch.long,)
        floating = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        for name, shape, dtypes in (
            ("loc", (rows, size), floating),
            ("scale", (rows, size), floating),
            ("weight", (vocab, size), floating),
            ("tokens", (rows,), integer),
            ("fired", (rows, vocab), boolean),
            ("values", (rows,), floating),
            ("value_mask", (rows,), boolean),
        ):
            given = getattr(self, name)
            if given is not None and (given.shape != shape or given.dtype not in dtypes):
                raise ShapeError(
                    f"{name} is {given.dtype} of shape {tuple(given.shape)}: expected {dtypes[0]} of shape {shape},"
                    f" for {rows} positions, {vocab} classes and {size} coordinates"
                )
        if self.value_weight is not None and self.value_weight.numel() != size:
            raise ShapeError(
                f"value_weight has shape {tuple(self.value_weight.shape)}: expected ({size},) or (1, {size})"
            )
