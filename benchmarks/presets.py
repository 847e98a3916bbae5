"""What equals the base at the start, under each preset and mode, on held-out text of two kinds."""

from typing import Any

import torch
from torch import Tensor

from tether.causal.calibration import greedy_share
from tether.causal.loading import load
from tether.causal.losses import normalised_ovr_nll, ovr_loss
from tether.delta.windows import window_text
from tether.demo.corpora import BASE_TEXTS, DOMAINS, documents

__all__ = ["rows"]

Row = dict[str, Any]


@torch.no_grad()
def rows(*, fast: bool) -> list[Row]:
    """Measure; the baseline is the base's own softmax on the same tokens.

    Args:
        fast: a quarter of the text.

    Returns:
        Rows of case, metric, ours, baseline, ratio, runs.
    """
    found: list[Row] = []
    count = 250 if fast else 1000
    for preset in ("paper", "calibrated"):
        model, tokenizer = load("smollm2-135m", preset=preset)
        scale = model.config.latent_scale
        for kind, recipe in (("news", BASE_TEXTS["news"]), ("code", DOMAINS["code"])):
            # Documents that the calibrated preset was not chosen on.
            windows = window_text(
                documents(recipe)[160:], tokenizer, length=128, tokens=2 * count, per_document=1
            )
            loc, targets = _contexts(model, windows, count)
            logits = torch.cat([model.action.score_loc(part) for part in loc.split(125)])
            nll = float(torch.nn.functional.cross_entropy(logits, targets))
            greedy = logits.argmax(-1)
            scales = torch.full_like(loc, scale)
            log_prob = [
                model.action.log_prob(part, s)
                for part, s in zip(loc.split(125), scales.split(125), strict=True)
            ]
            agree = float((torch.cat([part.argmax(-1) for part in log_prob]) == greedy).float().mean())
            normalised = float(normalised_ovr_nll(torch.cat(log_prob), targets))
            del log_prob
            loss = float(
                ovr_loss(
                    loc,
                    scales[:1],
                    model.action.weight,
                    targets,
                    threshold=model.action.threshold.squeeze(),
                    class_noise=model.action.noise_scale.expand(len(model.action.weight)),
                    impl="chunked",
                )
            )
            noise = torch.rand(loc.shape, generator=torch.Generator().manual_seed(0))
            shares = [
                greedy_share(model.action, loc, scale, n) for n in (None, noise.clamp(2**-24, 1 - 2**-24))
            ]
            case = f"{preset}, {count} tokens of {kind}"
            found += [
                _row(case, "deterministic argmax = base's argmax", agree, 1.0),
                _row(case, "one-vs-rest loss, nats; baseline: softmax NLL", loss, nll),
                _row(case, "NLL of P_k / sum P, nats; baseline: softmax NLL", normalised, nll),
                _row(
                    case, "sampled token = greedy; baseline: softmax at temperature 1", shares[1], shares[0]
                ),
            ]
    return found


def _contexts(model: Any, windows: Any, count: int) -> tuple[Tensor, Tensor]:
    states, nexts = [], []
    for batch in windows.batches(8):
        hidden = model.backbone(input_ids=batch.input_ids).last_hidden_state
        targets = windows.targets[windows.positions(batch)]
        states.append(hidden[batch.mask][targets >= 0])
        nexts.append(targets[targets >= 0])
    picked = torch.linspace(0, sum(map(len, nexts)) - 1, count).long()
    return model.abduction(torch.cat(states)[picked])[0], torch.cat(nexts)[picked]


def _row(case: str, metric: str, ours: float, baseline: float) -> Row:
    return {
        "case": case,
        "metric": metric,
        "ours": ours,
        "baseline": baseline,
        "ratio": ours / baseline,
        "runs": [ours],
    }
