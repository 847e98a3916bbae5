"""Abduction from what was said: the posterior of the individual noise given observed tokens and values."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tether.causal.gibbs import Chain
from tether.causal.observation import Observation
from tether.causal.polytope import Polytope
from tether.causal.speakers import Speakers
from tether.causal.speaking import SpeakingChain
from tether.causal.start import first_point, nobody
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
    speaker: Float[Tensor, "samples chains"] | None = None
    """Where several may speak, the uniform number that decides who does, shape (S, N), float64."""
    expert: Int[Tensor, "samples rows"] | None = None
    """Who spoke at each position, shape (S, R), the base being 0; None where there is one law."""


def sample_posterior(
    loc: Tensor,
    scale: Tensor,
    weight: Tensor,
    *,
    log_weights: Tensor | None = None,
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

    With ``log_weights`` each position has the laws of K experts, one of whom speaks there: who does is drawn
    with the noise (`tether.causal.speaking`). A sweep then takes K more products, and about eight more with shared
    noise; shared noise of which the experts' individuals have nothing in common is not explored as a whole.

    Args:
        loc: locations of U, shape (R, C), R positions; (R, K, C) with ``log_weights``.
        scale: scales of U, of the same shape, > 0.
        weight: of the scores, shape (V, C). Half precision is taken to float32, as the model's scores are.
        log_weights: log probability of each expert to speak at each position, shape (R, K), -inf where it sleeps.
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
    if log_weights is not None:
        Speakers.of(loc, scale, log_weights, len(loc))  # refuses what does not fit together
    given = Observation(
        loc=loc if log_weights is None else loc[:, 0],
        scale=scale if log_weights is None else scale[:, 0],
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
    results, told = [], []
    for part in parts:
        chain, iterations = _begin(
            given,
            everything.rows(part),
            part,
            given.hyperplanes(part[seen[part]], 1 if shared else len(part)),
            None if log_weights is None else (loc[part], scale[part], log_weights[part]),
            candidates=candidates,
            limit=start_limit,
            generator=generator,
        )
        for _ in range(burn_in):
            chain.sweep()
        chain.freeze()
        kept, spoken = [], []
        for _ in range(samples):
            for _ in range(thin):
                chain.sweep()
            kept.append(chain.noise)
            if isinstance(chain, SpeakingChain):
                spoken.append((chain.speaker, chain.expert))
        results.append((torch.stack(kept, 1), *chain.acceptance(), iterations))
        told.append([torch.stack(column) for column in zip(*spoken, strict=True)])
    order = torch.cat(parts).argsort()
    back = torch.zeros(1, dtype=torch.long) if shared else order
    noise, acceptance, value_acceptance, start_iterations = (
        torch.cat(column)[back] for column in zip(*results, strict=True)
    )
    noise = noise.transpose(0, 1)
    found = noise, effective_sample_size(noise), acceptance, value_acceptance, start_iterations
    if log_weights is None:
        return Posterior(*found)
    speaker, expert = (torch.cat(column, dim=1) for column in zip(*told, strict=True))
    return Posterior(*found, speaker[:, back], expert[:, order])


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
    given: Observation,
    polytope: Polytope,
    rows: Tensor,
    hyperplanes: tuple[Tensor, Tensor],
    experts: tuple[Tensor, Tensor, Tensor] | None,
    *,
    candidates: int,
    limit: int,
    generator: torch.Generator,
) -> tuple[Chain | SpeakingChain, Tensor]:
    """Return the chains of some rows, each at a feasible first point, and the projections it took.

    Raises:
        ConfigError: no such point was found.
    """
    if experts is not None:
        speakers = Speakers.of(*experts, chains=len(hyperplanes[0]))
        speaking = SpeakingChain(
            speakers, given, polytope, rows, candidates=candidates, limit=limit, generator=generator
        )
        return speaking, speaking.iterations
    normals, targets = hyperplanes
    replays = given.replay(polytope, rows)
    noise, iterations, failed = first_point(polytope, normals, targets, replays=replays, limit=limit)
    if bool((failed >= 0).any()):
        raise ConfigError(nobody(failed[failed >= 0].tolist(), polytope, rows.tolist(), limit))
    chain = Chain(
        polytope,
        noise,
        normals=normals,
        targets=targets,
        candidates=candidates,
        replays=replays,
        generator=generator,
    )
    return chain, iterations
