"""How good a model is on a text, in both modes: likelihoods, calibration, agreement, values."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tether.cauchy.functional import log_cdf
from tether.causal.dataset import make_examples
from tether.causal.losses import IGNORE, gated_cauchy_nll, ovr_log_prob
from tether.causal.modeling import CausalQwenForCausalLM
from tether.causal.pairs import Document

__all__ = ["calibration_error", "evaluate"]

_PAIRS = 2**22
"""Pairs of a token and a class held at once: a few buffers of 16 MB."""
_SHARES = (0.5, 0.8, 0.9)
"""Central intervals whose coverage is measured."""


def calibration_error(probs: Tensor, hits: Tensor, bins: int = 15) -> float:
    """Measure by how much stated probabilities and frequencies differ.

    Positions are sorted by probability and cut into `bins` groups of equal size (give or take one). The
    error is sum_b (n_b / n) |mean probability of b - share of hits in b|.

    Args:
        probs: stated probabilities, shape (n,), in [0, 1].
        hits: whether it happened, shape (n,), bool.
        bins: number of groups, >= 1.

    Returns:
        The error in [0, 1]; nan without positions. Chance alone gives about 0.8 sqrt(p (1 - p) bins / n).

    Reference: Nguyen and O'Connor 2015, Posterior calibration and exploratory analysis for natural language
        processing models (equal-mass bins).

    Example:
        >>> calibration_error(torch.tensor([0.5, 0.5, 1.0, 1.0]), torch.tensor([True, False, True, False]), 2)
        0.25
    """
    if not len(probs):
        return math.nan
    order = probs.argsort(stable=True)
    gap = probs[order].double() - hits[order].double()
    return sum(abs(float(part.sum())) for part in gap.tensor_split(bins)) / len(probs)


@torch.no_grad()
def evaluate(
    model: CausalQwenForCausalLM,
    tokenizer: Any,
    documents: Sequence[Document],
    *,
    window: int = 256,
    batch: int = 8,
    tokens: int | None = None,
    bins: int = 15,
) -> dict[str, Any]:
    """Measure a model on a text.

    Args:
        model: any CausalQwen model.
        tokenizer: its tokenizer; the numeric one is made of a plain one where the model has numbers.
        documents: texts, or pairs, of which the completions are scored.
        window: tokens of context at most; windows lie inside documents.
        batch: windows at a time.
        tokens: stop after about this many tokens; None takes all.
        bins: groups of the calibration errors.

    Returns:
        Means over the scored tokens, nats where likelihoods: `tokens`, their number; `softmax_nll`;
        `ovr_loss`, the one-vs-rest loss; `ovr_nll`, the likelihood under P_k / sum P; `agreement`, how often
        argmax P_k is argmax loc_S; `softmax_accuracy` and `ovr_accuracy`, how often they are the token;
        `ovr_calibration_error` of P_k for the class of largest P_k, against how often it is the token
        (`calibration_error`); likewise `ovr_nll_calibration_error` of P_k / sum P and
        `softmax_calibration_error`. With numbers among them also `value_count`, `value_median_error` (median
        of |value - median of Y|, in the units of the numbers), `value_nll` (gated, with P_NUM of the
        one-vs-rest decision, in the units of the value transform), `value_r2` (1 - sum (value - median of Y)^2
        / sum (value - mean value)^2; nan for one value), and `value_coverage_50`, `_80` and `_90` (share inside
        the central intervals of the predicted Cauchy law); without, 0 and None.

    Raises:
        ConfigError: nothing to score in the text.
    """  # noqa: DOC502 - raised by make_examples
    number = model.config.num_token_id
    if number is not None:
        tokenizer = model.add_numbers(tokenizer)
    examples = make_examples(documents, tokenizer, window=window, tokens=tokens)
    was_training = model.training
    model.eval()
    found: list[dict[str, Tensor]] = []
    values: list[dict[str, Tensor]] = []
    # Long windows together, so that little is padded.
    order = examples.starts.diff().argsort(descending=True, stable=True)
    for rows in order.split(batch):
        inputs = {name: tensor.to(model.device) for name, tensor in examples.collate(rows.tolist()).items()}
        targets = inputs.pop("labels")[:, 1:]
        out = model(**inputs, use_cache=False, return_logits=False)
        kept = targets != IGNORE
        targets, loc = targets[kept], out.latent_loc[:, :-1][kept]
        scale = out.latent_log_scale[:, :-1][kept].exp()
        per = max(1, _PAIRS // model.vocab_size)
        parts = zip(loc.split(per), scale.split(per), targets.split(per), strict=True)
        scores = _join([_score(model, *part) for part in parts])
        found.append(scores)
        if number is not None and "numeric_values" in inputs:
            here = targets == number
            value = {
                "loc": out.value_loc[:, :-1][kept][here],
                "scale": out.value_scale[:, :-1][kept][here],
                "value": inputs["numeric_values"][:, 1:][kept][here],
                "prob": scores["prob"][here],
            }
            values.append(value)
    model.train(was_training)
    return _means(_join(found), bins) | _value_figures(model, _join(values))


def _score(model: CausalQwenForCausalLM, loc: Tensor, scale: Tensor, targets: Tensor) -> dict[str, Tensor]:
    score_loc, score_scale = model.action.scores(loc, scale)
    level = model.action.thresholds(score_loc)
    fires = ovr_log_prob(score_loc, score_scale, level)
    silent = log_cdf(level, score_loc, score_scale)
    chosen = targets.unsqueeze(-1)

    def at(table: Tensor, index: Tensor) -> Tensor:
        return table.gather(-1, index).squeeze(-1).double()

    rest = silent.sum(-1, dtype=torch.float64) - at(silent, chosen)
    softmax, normalised = model.action.capped(score_loc).log_softmax(-1), fires.log_softmax(-1)
    best, first = fires.argmax(-1, keepdim=True), score_loc.argmax(-1, keepdim=True)
    return {
        "softmax_nll": -at(softmax, chosen),
        "ovr_loss": -(at(fires, chosen) + rest),
        "ovr_nll": -at(normalised, chosen),
        "agreement": (best == first).squeeze(-1),
        "softmax_accuracy": (first == chosen).squeeze(-1),
        "ovr_accuracy": (best == chosen).squeeze(-1),
        "ovr": at(fires, best).exp(),
        "ovr_nll_top": at(normalised, best).exp(),
        "softmax": at(softmax, first).exp(),
        # Only read where the target is <NUM>.
        "prob": at(fires, chosen).exp(),
    }


def _join(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in (parts[0] if parts else ())}


def _means(found: dict[str, Tensor], bins: int) -> dict[str, Any]:
    names = ("softmax_nll", "ovr_loss", "ovr_nll", "agreement", "softmax_accuracy", "ovr_accuracy")
    figures: dict[str, Any] = {"tokens": len(found["agreement"])}
    figures |= {name: float(found[name].double().mean()) for name in names}
    for name, probs, hits in (
        ("ovr", "ovr", "ovr_accuracy"),
        ("ovr_nll", "ovr_nll_top", "ovr_accuracy"),
        ("softmax", "softmax", "softmax_accuracy"),
    ):
        figures[f"{name}_calibration_error"] = calibration_error(found[probs], found[hits], bins)
    return figures


def _value_figures(model: CausalQwenForCausalLM, found: dict[str, Tensor]) -> dict[str, Any]:
    count = len(found["value"]) if found else 0
    names = ["value_median_error", "value_nll", "value_r2"]
    names += [f"value_coverage_{round(100 * share)}" for share in _SHARES]
    if not count:
        return {"value_count": 0, **dict.fromkeys(names)}
    loc, scale, value = found["loc"], found["scale"], found["value"]
    wanted = model.action.transform(value)
    error = (model.action.number(loc) - value).abs()
    nll = gated_cauchy_nll(
        loc,
        scale,
        wanted,
        torch.ones_like(loc, dtype=torch.bool),
        found["prob"].to(loc.dtype),
        model.config.gate_alpha,
    )
    distance = (wanted - loc).abs() / scale
    # The central share q of a Cauchy law lies within tan(pi q / 2) scales of its median.
    covered = [float((distance <= math.tan(math.pi * share / 2)).double().mean()) for share in _SHARES]
    spread = float((value - value.mean()).square().sum())
    fit = 1 - float(error.square().sum()) / spread if spread else math.nan
    return {
        "value_count": count,
        **dict(zip(names, (float(error.quantile(0.5)), float(nll), fit, *covered), strict=True)),
    }
