"""Fit the start of the causal head to text: the scale of U, and the one-vs-rest decision."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tether.cauchy.functional import from_noise, log_cdf, log_sf
from tether.errors import ConfigError

__all__ = ["Point", "calibrate", "frontier", "greedy_share", "match_diversity"]

ROWS = 128
"""Contexts whose class scores are held at a time: 128 x 49,152 numbers are 25 MB."""

SIZES = (1.0, 1.4)
"""Sizes of scale_S tried, as multiples of the median class's own, beside none and the largest class's own."""


class Point(NamedTuple):
    """One choice of the decision and what it gives on the calibration text.

    Attributes:
        noise_form: `constant` or `fill`.
        class_noise: see `CausalQwenConfig`.
        threshold_form: `constant` or `context`.
        threshold: in logits.
        agreement: share of positions where argmax P_k is the base's argmax.
        ovr_loss: summed binary cross-entropies, mean over positions, nats.
        normalised_nll: NLL of P_k / sum P, nats.
    """

    noise_form: str
    class_noise: float
    threshold_form: str
    threshold: float
    agreement: float
    ovr_loss: float
    normalised_nll: float


@torch.no_grad()
def greedy_share(action: Any, loc: Tensor, scale: float, noise: Tensor | None) -> float:
    """Share of positions at which a sampled token is the greedy one.

    Args:
        action: the model's action head.
        loc: loc of U, shape (n, C).
        scale: scale of U, the same for all coordinates.
        noise: uniform noise, shape (n, C), for causal sampling; None for softmax at temperature 1, where the
            expectation is taken exactly.

    Returns:
        The share, in [0, 1].
    """
    total = 0.0
    for start in range(0, len(loc), ROWS):
        part = loc[start : start + ROWS]
        logits = action.score_loc(part).float()
        if noise is None:
            total += float(torch.softmax(logits, dim=-1).amax(-1).sum())
        else:
            drawn = from_noise(noise[start : start + ROWS], part, torch.full_like(part, scale))
            total += float((action.linear_scores(drawn).argmax(-1) == logits.argmax(-1)).sum())
    return total / len(loc)


@torch.no_grad()
def match_diversity(action: Any, loc: Tensor, *, generator: torch.Generator, rounds: int = 12) -> float:
    """Find the scale of U at which causal sampling is as diverse as softmax at temperature 1.

    The same noise is used at every trial, so agreement with greedy falls smoothly with the scale; the log
    of the scale is bisected.

    Args:
        action: the model's action head.
        loc: loc of U at some contexts, shape (n, C).
        generator: of the noise.
        rounds: halvings of a range of e^9.

    Returns:
        The scale.
    """
    goal = greedy_share(action, loc, 0.0, None)
    noise = torch.rand(loc.shape, generator=generator).clamp(2**-25, 1 - 2**-25).to(loc.device)
    low, high = -8.0, 1.0
    for _ in range(rounds):
        middle = (low + high) / 2
        more = greedy_share(action, loc, float(torch.tensor(middle).exp()), noise) > goal
        low, high = (middle, high) if more else (low, middle)
    return float(torch.tensor((low + high) / 2).exp())


@torch.no_grad()
def frontier(action: Any, loc: Tensor, scale: float, targets: Tensor) -> list[Point]:
    """Measure many choices of class noise and threshold.

    Cost: two products of the contexts with the (V, C) weight, and n x V elementwise work for each choice.

    Args:
        action: the model's action head.
        loc: loc of U at some contexts, shape (n, C).
        scale: scale of U.
        targets: next tokens, shape (n,).

    Returns:
        All points measured.
    """
    own = action.weight.float().abs().sum(-1) * scale
    middle = float(own.median())
    choices: list[tuple[str, float, str, float]] = []
    for size in (0.0, *(share * middle for share in SIZES), float(own.max())):
        noise = ("fill" if size else "constant", size)
        if action.logit_cap is None:
            choices += [(*noise, "context", level) for level in (-6.0, -2.0, 2.0, 8.0, 100.0)]
        choices += [(*noise, "constant", level) for level in (20.0, 100.0)]
        # Tails of Cauchy laws are heavy: the likelihood of all V decisions peaks where about one class is
        # expected to fire, V scale_S / pi above the scores.
        peak = len(own) * max(size, middle) / torch.pi
        choices += [(*noise, "constant", peak * by) for by in (0.1, 1.0)]
    sums = torch.zeros(len(choices), 3, dtype=torch.float64, device=loc.device)
    for start in range(0, len(loc), ROWS):
        logits = action.linear_scores(loc[start : start + ROWS]).float()
        log_normaliser = logits[:, :1] - torch.log_softmax(logits, dim=-1)[:, :1]
        greedy, chosen = logits.argmax(-1), targets[start : start + ROWS].unsqueeze(-1)
        for row, (form, size, at, level) in enumerate(choices):
            spread = own.clamp(min=size) if form == "fill" else own + size
            spread = spread.expand_as(logits)
            bar = log_normaliser + level if at == "context" else torch.full_like(log_normaliser, level)
            hit, miss = log_sf(bar, logits, spread), log_cdf(bar, logits, spread)
            own_hit, own_miss = hit.gather(1, chosen), miss.gather(1, chosen)
            sums[row, 0] += (hit.argmax(-1) == greedy).sum()
            sums[row, 1] -= (miss.sum(-1, keepdim=True, dtype=torch.float64) - own_miss + own_hit).sum()
            sums[row, 2] -= torch.log_softmax(hit, dim=-1).gather(1, chosen).sum()
    return [Point(*choice, *(row / len(loc)).tolist()) for choice, row in zip(choices, sums, strict=True)]


@torch.no_grad()
def calibrate(
    model: Any,
    input_ids: Sequence[Tensor],
    *,
    agreement: float = 0.98,
    tokens: int = 600,
    generator: torch.Generator | None = None,
) -> dict[str, Any]:
    """Fit latent scale, class noise and threshold of a model to text, in place.

    The scale of U first, so that causal sampling agrees with greedy as often as softmax sampling does; then
    the decision with the lowest one-vs-rest loss among those whose argmax is the base's at enough positions.

    Args:
        model: a CausalQwenForCausalLM at its start; changed in place.
        input_ids: token ids of documents, shape (T,) each.
        agreement: smallest accepted share of positions where argmax P_k is the base's argmax, in [0, 1).
        tokens: positions used for the decision, taken evenly over the text; the scale uses all.
        generator: of the noise; None starts one at 0.

    Returns:
        Figures: `latent_scale`, `softmax_share`, `causal_share`, `chosen` and `frontier` (points as dicts).

    Raises:
        ConfigError: fewer than 100 positions, or no choice agrees often enough.
    """
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    states, nexts = [], []
    for ids in input_ids:
        if len(ids) > 1:
            row = ids.to(model.action.weight.device).unsqueeze(0)
            states.append(model.backbone(row).last_hidden_state[0, :-1])
            nexts.append(row[0, 1:])
    count = sum(map(len, nexts))
    if count < 100:
        raise ConfigError(f"{count} positions of calibration text: expected at least 100; give more text")
    loc, _ = model.abduction(torch.cat(states))
    targets = torch.cat(nexts)
    scale = match_diversity(model.action, loc, generator=generator)
    some = torch.linspace(0, count - 1, min(tokens, count)).long()
    noise = torch.rand(loc.shape, generator=generator).clamp(2**-25, 1 - 2**-25).to(loc.device)
    points = frontier(model.action, loc[some], scale, targets[some])
    # Half the allowance is left to text that was not seen here.
    good = [point for point in points if point.agreement >= (1 + agreement) / 2]
    if not good:
        raise ConfigError(
            f"no choice keeps {agreement:.1%} of the base's choices (best {max(p.agreement for p in points):.1%}): "
            "accept a lower agreement"
        )
    best = min(good, key=lambda point: point.ovr_loss)
    _apply(model, scale, best)
    record = {
        "latent_scale": scale,
        "softmax_share": greedy_share(model.action, loc, scale, None),
        "causal_share": greedy_share(model.action, loc, scale, noise),
        "positions": count,
        "chosen": best._asdict(),
        "frontier": [point._asdict() for point in points],
    }
    model.config.calibration = {name: value for name, value in record.items() if name != "frontier"}
    return record


def _apply(model: Any, scale: float, point: Point) -> None:
    action, config = model.action, model.config
    config.latent_scale, config.preset = scale, "calibrated"
    config.noise_form, config.class_noise = point.noise_form, point.class_noise
    config.threshold_form, config.threshold = point.threshold_form, point.threshold
    model.abduction.latent_scale = scale
    model.abduction.log_scale.bias.fill_(torch.tensor(scale).log().item())
    action.threshold_form = point.threshold_form
    action.threshold = torch.nn.Parameter(action.threshold.new_full((1,), point.threshold))
    filled = point.noise_form == "fill"
    width = len(action.weight) if filled else 1
    action.class_noise = torch.nn.Parameter(action.class_noise.new_full((width,), point.class_noise))
    if filled:
        ones = torch.full((action.weight.shape[1],), scale, device=action.weight.device)
        action.fill_noise(ones, point.class_noise)
