"""Abduction from what was said: the posterior of the individual noise given observed tokens and values."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tether.causal.gibbs import Chain, settle
from tether.causal.observation import Observation
from tether.causal.polytope import Polytope, feasible_start
from tether.errors import ConfigError, ShapeError

__all__ = ["Posterior", "effective_sample_size", "sample_posterior"]


class Posterior(NamedTuple):
    """Draws of the noise of the individuals who act as observed, and how well they were drawn.

    N is the number of chains: one per position, or one alone where the noise is shared. The individual of
    draw s at position i is ``from_noise(noise[s, i], loc[i], scale[i])``; take it in float64, since float32
    names no number between 1 and 1 - 6e-8.
    """

    noise: Float[Tensor, "samples chains latent"]
    """Uniform noise in (0, 1), shape (S, N, C), float64. Every draw was replayed and acts as observed."""
    effective_sample_size: Float[Tensor, "chains latent"]
    """Number of independent draws each noise coordinate is worth, in [1, S], shape (N, C)."""
    acceptance: Float[Tensor, " chains"]
    """Share of the blocks of coordinates accepted by all constraints after the burn-in, shape (N,)."""
    value_acceptance: Float[Tensor, " chains"]
    """Share of the proposals along the observed values accepted, shape (N,); nan where no value was."""
    start_iterations: Float[Tensor, " chains"]
    """Projections it took to find the first point, shape (N,); 0 where loc itself acts as observed."""


def sample_posterior(
    loc: Tensor,
    scale: Tensor,
    weight: Tensor,
    *,
    tokens: Tensor | None = None,
    fired: Tensor | None = None,
    bias: Tensor | None = None,
    threshold: Tensor | float | None = None,
    values: Tensor | None = None,
    value_mask: Tensor | None = None,
    value_weight: Tensor | None = None,
    value_bias: Tensor | float = 0.0,
    shared: bool = False,
    samples: int,
    burn_in: int = 50,
    thin: int = 1,
    candidates: int = 512,
    start_limit: int = 1000,
    generator: torch.Generator,
) -> Posterior:
    """Draw the individual noise from its posterior given decisions, values, or both.

    ``U = loc + scale * t``, ``t = tan(pi (noise - 1/2))``, acts by ``argmax_k (W_k U + bias_k - threshold_k)``
    and ``y = w U + b``. `tether.causal.gibbs` holds the chain and why it is exact. One sweep costs two
    products of the R individuals with the (V, C) weight and O(R * M * C) elementwise work in float64;
    memory is the transposed weight in float64 and a few (R, V) buffers.

    Args:
        loc: locations of U, shape (R, C), R positions.
        scale: scales of U, shape (R, C), > 0.
        weight: of the scores, shape (V, C). Half precision is taken to float32, as the model's scores are.
        tokens: the observed argmax, shape (R,), in 0..V-1, or -100 where none was observed.
        fired: instead of ``tokens``, which classes exceeded their threshold, boolean (R, V).
        bias: added to the scores, shape (V,), in logits.
        threshold: subtracted from the scores, a number or broadcastable to (R, V), in logits.
        values: observed values, shape (R,), in the units of ``value_bias``.
        value_mask: positions whose value was observed, boolean (R,); all where None.
        value_weight: w, shape (C,) or (1, C); needed with ``values``.
        value_bias: b, one number.
        shared: one noise for all positions instead of one for each.
        samples: S, at least 1.
        burn_in: sweeps thrown away first, during which the candidates adapt.
        thin: sweeps per sample, at least 1.
        candidates: M, constraints per position that the Gibbs steps know of.
        start_limit: projections allowed to find the first point.
        generator: source of randomness, on the CPU or where ``loc`` is.

    Returns:
        Draws with diagnostics.

    Raises:
        ConfigError: options out of range, numbers that are not finite, or an observation that no individual
            was found for: the position and its token are named.
        ShapeError: shapes that do not fit together.

    Reference:
        Spec document 5, sections 1 and 3.4.

    Example:
        >>> import torch
        >>> from tether.cauchy.functional import from_noise
        >>> weight = torch.tensor([[1.0], [-1.0]])
        >>> law = torch.tensor([[-3.0]]), torch.tensor([[1.0]])
        >>> draws = sample_posterior(
        ...     *law, weight, tokens=torch.tensor([0]), samples=9, generator=torch.Generator().manual_seed(0)
        ... )
        >>> bool((from_noise(draws.noise, *law) > 0).all())
        True
    """  # noqa: DOC502 - raised by what it calls
    for name, number, least in (
        ("samples", samples, 1),
        ("burn_in", burn_in, 0),
        ("thin", thin, 1),
        ("candidates", candidates, 2),
        ("start_limit", start_limit, 0),
    ):
        if number < least:
            raise ConfigError(f"{name}={number}: expected a whole number of at least {least}")
    given = Observation(
        loc=loc,
        scale=scale,
        weight=weight,
        tokens=tokens,
        fired=fired,
        bias=bias,
        threshold=threshold,
        values=values,
        value_mask=value_mask,
        value_weight=value_weight,
        value_bias=value_bias,
    )
    given.check()
    seen, everything = given.seen(), given.polytope()
    rows = torch.arange(len(loc), device=loc.device)
    # Chains move in step: those with a value along it, the others freely.
    parts = [rows] if shared else [part for part in (rows[seen], rows[~seen]) if len(part)]
    results = []
    for part in parts:
        polytope = everything.rows(part)
        chain, iterations = _begin(
            polytope,
            *given.hyperplanes(part[seen[part]], 1 if shared else len(part)),
            names=part.tolist(),
            replays=given.replay(polytope, part),
            candidates=candidates,
            limit=start_limit,
            generator=generator,
        )
        for _ in range(burn_in):
            chain.sweep()
        chain.freeze()
        kept = []
        for _ in range(samples):
            for _ in range(thin):
                chain.sweep()
            kept.append(chain.noise)
        results.append((torch.stack(kept, 1), *chain.acceptance(), iterations))
    back = torch.zeros(1, dtype=torch.long) if shared else torch.cat(parts).argsort()
    noise, acceptance, value_acceptance, start_iterations = (
        torch.cat(column)[back] for column in zip(*results, strict=True)
    )
    noise = noise.transpose(0, 1)
    return Posterior(noise, effective_sample_size(noise), acceptance, value_acceptance, start_iterations)


def effective_sample_size(draws: Float[Tensor, "samples *batch"]) -> Float[Tensor, "*batch"]:
    """Number of independent draws with the variance of the chain's mean, for each quantity recorded.

    ``S / (1 + 2 sum of autocorrelations)``, the sum cut where the sums of neighbouring pairs, made
    decreasing, turn negative: Geyer's initial monotone sequence, which overestimates no reversible chain's
    worth in the long run. Meant for bounded quantities, such as noise: a Cauchy draw has no variance.

    Args:
        draws: one chain per column, shape (S, ...), any units.

    Returns:
        Effective sample sizes in [1, S], shape (...); 1 where the chain never moved.

    Raises:
        ShapeError: there are no draws.

    Reference:
        Geyer 1992, Practical Markov chain Monte Carlo, section 3.3.

    Example:
        >>> import torch
        >>> effective_sample_size(torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0])[:, None])
        tensor([3.2000])
    """
    if draws.ndim == 0 or len(draws) == 0:
        raise ShapeError(f"draws of shape {tuple(draws.shape)}: expected (S, ...) with at least one draw")
    count = len(draws)
    flat = draws.reshape(count, -1)
    worth = [_worth(part) for part in flat.split(1024, 1)]  # the transform holds a few copies
    return torch.cat(worth).reshape(draws.shape[1:])


def _worth(draws: Tensor) -> Tensor:
    """Return effective sample sizes of the columns of (S, P) draws."""
    count = len(draws)
    spectrum = torch.fft.rfft(draws - draws.mean(0), n=2 * count, dim=0)
    covariance = torch.fft.irfft(spectrum.abs().square(), n=2 * count, dim=0)[:count]
    still = covariance[0] <= torch.finfo(draws.dtype).eps * draws.square().sum(0)
    correlation = covariance / covariance[0].masked_fill(still, 1.0)
    pairs = correlation[: count // 2 * 2].unflatten(0, (count // 2, 2)).sum(1)
    pairs = pairs.cummin(0).values.clamp(min=0) if len(pairs) else pairs
    worth = count / (2 * pairs.sum(0) - 1).clamp(min=1.0)
    return torch.where(still, torch.ones_like(worth), worth)


def _begin(
    polytope: Polytope,
    normals: Tensor,
    targets: Tensor,
    *,
    names: list[int],
    replays: Callable[[Tensor], Tensor],
    candidates: int,
    limit: int,
    generator: torch.Generator,
) -> tuple[Chain, Tensor]:
    """Return the chains, each at a feasible first point, and the projections it took.

    Raises:
        ConfigError: no such point was found.
    """
    chains, each = len(normals), len(names) // len(normals)
    first = torch.zeros(chains, polytope.loc.shape[1], dtype=torch.float64, device=polytope.loc.device)
    basis = normals
    if normals.shape[1]:
        first = (torch.linalg.pinv(normals) @ targets.unsqueeze(-1)).squeeze(-1)
        basis = torch.linalg.qr(normals.mT).Q.mT
    start = feasible_start(polytope, first, basis=basis, limit=limit)
    noise, t = settle(start.t, normals, targets)
    latent = polytope.latent(t)
    fine = polytope.worst(polytope.scores(latent))[0] > polytope.margin * latent.norm(dim=-1)
    lost = ~(fine & replays(noise)).view(chains, each)
    row = torch.arange(chains, device=t.device) * each + lost.int().argmax(-1)
    failed = torch.where(start.failed >= 0, start.failed, row.masked_fill(~lost.any(-1), -1))
    if bool((failed >= 0).any()):
        raise ConfigError(_nobody(failed[failed >= 0].tolist(), polytope, names, limit))
    chain = Chain(
        polytope,
        noise,
        normals=normals,
        targets=targets,
        candidates=candidates,
        replays=replays,
        generator=generator,
    )
    return chain, start.iterations


def _nobody(failed: list[int], polytope: Polytope, names: list[int], limit: int) -> str:
    """Return the message for observations that no individual was found for."""
    places = [
        f"position {names[row]}"
        + ("" if polytope.tokens is None else f" (token {int(polytope.tokens[row])})")
        for row in failed[:8]
    ]
    more = f" and {len(failed) - 8} more" if len(failed) > 8 else ""
    return (
        f"no individual acts as observed at {', '.join(places)}{more}: {limit} projections found none. A token"
        " that is never the argmax cannot be abducted, nor can positions that no one noise explains together;"
        " leave the position out (token -100), take shared=False, or raise start_limit"
    )
