"""Learns a router over domain deltas from cached states: which delta acts at which token, and where none does."""

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tether.causal.routed import RoutedFusion, route_shares
from tether.causal.softmax import softmax_kl
from tether.causal.summed import Sum
from tether.delta.cache import StateCache
from tether.delta.delta import Delta
from tether.delta.fusion import fuse
from tether.delta.head import Reference
from tether.delta.objective import (
    CandidateSoftmax,
    mean_probability,
    output_fisher,
)
from tether.delta.output_head import chunk_rows, output_head
from tether.delta.source import spread
from tether.errors import CheckpointError, ConfigError
from tether.router.tokens import Tokens, token_features
from tether.scale import DualAscent, meet_budget

__all__ = ["DeltaRouterFit", "route_deltas"]

PACE = 4
"""Steps between two steps of the dual."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeltaRouterFit:
    """How a router over deltas is learnt.

    Attributes:
        budget: mean drift on base text, softmax nats a token, > 0.
        null: whether the base is an option.
        top_k: options kept a token; 0 keeps all.
        gated: whether each delta's own one-class gate acts too, so that nothing acts on unfamiliar text.
        chart: in which deltas are added.
        window: tokens of the mean state that is read beside the token's own.
        tokens: of each text to learn from at most.
        epochs: passes over them.
        batch: domain tokens a step; half as many of base text.
        lr: peak rate of Adam.
        candidates: classes kept exactly in the loss.
        sampled: other classes drawn each step.
        probe: held-out base tokens on which the budget is met.
        seed: of shuffles and draws.
    """

    budget: float = 0.01
    null: bool = True
    top_k: int = 0
    gated: bool = False
    chart: str = "symmetric"
    window: int = 32
    tokens: int = 6_000
    epochs: int = 2
    batch: int = 512
    lr: float = 2e-2
    candidates: int = 2048
    sampled: int = 512
    probe: int = 768
    seed: int = 0

    def __post_init__(self) -> None:
        if not all(math.isfinite(value) and value > 0 for value in (self.budget, self.lr)):
            raise ConfigError(f"budget={self.budget}, lr={self.lr}: expected finite numbers > 0")
        if (
            min(self.window, self.tokens, self.epochs, self.candidates, self.probe) < 1
            or self.batch < 2
            or self.sampled < 0
        ):
            raise ConfigError(
                f"window={self.window}, tokens={self.tokens}, epochs={self.epochs}, batch={self.batch}, "
                f"candidates={self.candidates}, sampled={self.sampled}, probe={self.probe}: expected positive numbers, "
                "batch >= 2 (sampled may be 0)"
            )


def route_deltas(
    model: Any,
    deltas: Sequence[Delta],
    domains: Mapping[str, StateCache],
    base: StateCache,
    held_out: StateCache,
    fit: DeltaRouterFit,
    on_step: Callable[[dict[str, float]], None] | None = None,
) -> Any:
    """Learn which delta acts at which token; base and deltas are not touched.

    Minimises the domains' NLL under the routed deltas subject to mean drift on base text at most the budget:
    dual ascent on a multiplier of the Fisher form in the fit, then one factor on all weights so that the softmax
    KL measured on held-out base text is within the budget.

    Cost: tokens x domains x epochs x (candidates + sampled) x C, and `probe` products with the whole head.

    Args:
        model: the base, without a fusion.
        deltas: N >= 1 deltas learnt on it.
        domains: states of each delta's domain text, by the delta's name.
        base: states of base text for the constraint.
        held_out: states of other base text on which the budget is met.
        fit: options.
        on_step: called with step, steps, nll, drift and multiplier.

    Returns:
        The routed model, a CausalQwenForCausalLM whose `config.fusion["router"]` holds the record.

    Raises:
        ConfigError: a domain's text is missing, or what `fuse` refuses.
        CheckpointError: cached states of another backbone or of other layers.
    """
    started = time.process_time()
    names = [delta.name for delta in deltas]
    if missing := [name for name in names if name not in domains]:
        raise ConfigError(f"no text of {', '.join(missing)}: expected the text of each delta's domain")
    routed = _routed_model(model, deltas, fit)
    fusion = routed.fusion
    for cache in (*(domains[name] for name in names), base, held_out):
        if cache.base != model.config.base_fingerprint or cache.layers != fusion.layers:
            raise CheckpointError(
                f"cached states are of backbone {cache.base[:19]}... with layers {list(cache.layers)}, the deltas' is "
                f"{str(model.config.base_fingerprint)[:19]}... with {list(fusion.layers)}: cache them again"
            )
    parts = [token_features(model, fusion, domains[name], fit.tokens) for name in names]
    text = Tokens(
        torch.cat([p.features for p in parts]),
        Reference(*(torch.cat(v) for v in zip(*(p.at for p in parts), strict=True))),
        torch.cat([p.targets for p in parts]),
        torch.cat([p.opened for p in parts], 1),
    )
    anchor = token_features(model, fusion, base, fit.tokens)
    record = _Router(model, fusion, fit).run(text, anchor, on_step)
    probe = token_features(model, fusion, held_out, fit.probe)
    met = meet_budget(
        lambda factor: float(_served_drift(model, fusion, probe, factor).mean()), fit.budget, ceiling=1.0
    )
    _set_weights(routed, [met.scale] * len(deltas))
    with torch.no_grad():
        shares = {
            name: _shares(fusion, part).mean(1).tolist()
            for name, part in zip([*names, "base text"], [*parts, probe], strict=True)
        }
    record |= {
        "budget": fit.budget, "factor": met.scale, "drift_base": met.drift, "shares": shares,
        "cpu_seconds": time.process_time() - started,
    }  # fmt: skip
    routed.config.fusion["router"] |= {"record": record}
    return routed


def _routed_model(model: Any, deltas: Sequence[Delta], fit: DeltaRouterFit) -> Any:
    routed = fuse(model, dict.fromkeys(deltas, 1.0), chart=fit.chart, gated=fit.gated)
    plain = routed.fusion
    if plain is None:
        raise ConfigError("no deltas: expected at least one to route among")
    described = copy.deepcopy(routed.config.fusion)
    described["router"] = {"window": fit.window, "null": fit.null, "top_k": fit.top_k}
    fusion = RoutedFusion(plain.hidden_size, plain.second.shape[1], described).to(plain.second.device)
    fusion.load_state_dict(plain.state_dict(), strict=False)
    routed.config.fusion, routed.fusion = described, fusion
    return routed


def _set_weights(routed: Any, weights: list[float]) -> None:
    routed.config.fusion["weights"] = weights
    routed.fusion.weights = tuple(weights)


def _shares(fusion: RoutedFusion, at: Tokens) -> Tensor:
    shares = route_shares(
        at.features, fusion.router_weight, fusion.router_bias, null=fusion.null, top_k=fusion.top_k
    )
    return shares * at.opened


def _moved(fusion: RoutedFusion, at: Tokens, shares: Tensor) -> Tensor:
    # How far the shares move loc of U, shape (n, C).
    x, y = fusion.deltas(at.at.states, at.at.scale.log())
    added = Sum(weights=(1.0,) * len(fusion.domains), chart=fusion.chart)
    moved: Tensor = at.at.scale * added.add(x, y, shares)[1]
    return moved


@torch.no_grad()
def _served_drift(model: Any, fusion: RoutedFusion, at: Tokens, factor: float) -> Tensor:
    added = Sum(weights=(factor,) * len(fusion.domains), chart=fusion.chart)
    x, y = fusion.deltas(at.at.states, at.at.scale.log())
    served = added.law(at.at.loc, at.at.scale.log(), x, y, _shares(fusion, at)).loc
    rows, score = chunk_rows(model.action.weight), model.action.score_loc
    laws = (
        [score(loc).float().log_softmax(-1) for loc in pair]
        for pair in zip(at.at.loc.split(rows), served.split(rows), strict=True)
    )
    return torch.cat([softmax_kl(*pair) for pair in laws])


class _Router:
    """The loop: Adam on the router, dual ascent on the multiplier of the drift."""

    def __init__(self, model: Any, fusion: RoutedFusion, fit: DeltaRouterFit) -> None:
        self.model, self.fusion, self.fit = model, fusion, fit
        self.generator = torch.Generator().manual_seed(fit.seed)
        self.dual = DualAscent(0.05 / fit.budget, budget=fit.budget)

    def run(
        self, text: Tokens, anchor: Tokens, on_step: Callable[[dict[str, float]], None] | None
    ) -> dict[str, Any]:
        model, fusion, fit = self.model, self.fusion, self.fit
        output = output_head(model)
        prob = mean_probability(output, text.at.some(fit.probe // 2).loc)
        counts = torch.bincount(text.targets, minlength=len(prob)).to(prob) / len(text.targets)
        loss = CandidateSoftmax(output, prob + counts, size=fit.candidates, sampled=fit.sampled)
        fisher = output_fisher(output, anchor.at.some(fit.probe).loc)
        parameters = [fusion.router_weight, fusion.router_bias]
        for parameter in parameters:
            parameter.requires_grad_(True)
        # Features have size 1 an entry: a step of each entry moves the logits by the root of their number.
        width = math.sqrt(fusion.router_weight.shape[1])
        optimizer = torch.optim.Adam(
            [{"params": parameters[:1], "lr": fit.lr / width * 4}, {"params": parameters[1:], "lr": fit.lr}]
        )
        steps = fit.epochs * math.ceil(len(text.targets) / fit.batch)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda n: min(1.0, (n + 1) / 8) * 0.5 * (1 + math.cos(math.pi * n / steps))
        )
        curve, step, drift = [], 0, 0.0
        for _ in range(fit.epochs):
            for rows in torch.randperm(len(text.targets), generator=self.generator).split(fit.batch):
                step += 1
                part = text.take(rows)
                drawn = torch.randint(len(anchor.targets), (fit.batch // 2,), generator=self.generator)
                nll = loss(
                    part.at.loc + _moved(fusion, part, _shares(fusion, part)), part.targets, self.generator
                )
                moved = self._drift(anchor.take(drawn), fisher).mean()
                optimizer.zero_grad()
                (nll + self.dual.multiplier * moved).backward()
                optimizer.step()
                schedule.step()
                # Batches are noisy; the dual follows a running mean.
                drift = moved.item() if step == 1 else 0.7 * drift + 0.3 * moved.item()
                if step % PACE == 0:
                    self.dual.step(drift)
                entry = {"step": step, "nll": nll.item(), "drift": drift, "multiplier": self.dual.multiplier}
                if step % PACE == 0 or step == steps:
                    curve.append(entry)
                if on_step:
                    on_step({**entry, "steps": steps})
        for parameter in parameters:
            parameter.requires_grad_(False)
        # What each delta alone costs on base text: a diagnostic, not a measure of its quality.
        alone = torch.eye(len(fusion.domains), device=fisher.device)
        with torch.no_grad():
            some = anchor.take(spread(len(anchor.targets), fit.probe))
            static = [
                float(
                    self._quadratic(
                        _moved(fusion, some, row[:, None].expand(-1, len(some.targets))), fisher
                    ).mean()
                )
                for row in alone
            ]
        return {"curve": curve, "static_costs": static, "tokens": len(text.targets)}

    def _drift(self, at: Tokens, fisher: Tensor) -> Tensor:
        return self._quadratic(_moved(self.fusion, at, _shares(self.fusion, at)), fisher)

    @staticmethod
    def _quadratic(move: Tensor, fisher: Tensor) -> Tensor:
        return 0.5 * ((move @ fisher) * move).sum(-1)
