"""From what a shaper has watched to the terms of its loss, one a layer."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tether.errors import ConfigError
from tether.router.attach import Routes
from tether.router.cost import temper_cost
from tether.router.options import COSTLY
from tether.router.shaping import (
    masked_mean,
    meta_entropy,
    prior_divergence,
    route_probability,
    switch_balance,
    tax,
    z_loss,
)
from tether.router.watch import Watch, global_means

__all__ = ["live_logits", "shaping_terms"]


def live_logits(watch: Watch, form: str) -> Tensor:
    """Give the logits of the last forward pass with gradients.

    Args:
        watch: the layer.
        form: one of `tether.router.options.FORMS`.

    Returns:
        Shape (n, E), on the router's graph.

    Raises:
        ConfigError: there was no such pass since the last time, or the logits have no graph where the form needs
            one.
    """
    name = watch.site.name
    if watch.severed:
        raise ConfigError(
            f"{name}: the router ran without gradients inside a pass that has them, as reentrant checkpointing "
            "does, so that shaping would silently do nothing; use activation_checkpointing_kwargs="
            "{'use_reentrant': False}"
        )
    if not watch.live:
        raise ConfigError(
            f"{name}: no forward pass with gradients since the last loss(); expected one call of loss() after each"
        )
    logits = torch.cat([routes.logits for routes in watch.live])
    if not logits.requires_grad and form not in {"none", "bias"}:
        raise ConfigError(
            f"{name}: the router's logits have no gradient, its parameters are frozen by now; unfreeze them, or "
            "use form='none' to measure"
        )
    return logits


def shaping_terms(
    form: str,
    watches: Sequence[Watch],
    logits: Sequence[Tensor],
    mask: Tensor | None,
    task_loss: Tensor | None,
    cap: float,
) -> list[Tensor]:
    """Evaluate a form at every layer, before its strength.

    Args:
        form: one of `tether.router.options.FORMS`.
        watches: the layers; for `bias` their load is counted here.
        logits: of each layer, shape (n, E).
        mask: which tokens count, shape (n,), or None.
        task_loss: of the pass, for `goodness`.
        cap: of tempered costs, for `balance`.

    Returns:
        Scalars on the graph; 0 where there is no cost yet.

    Raises:
        ConfigError: `goodness` without a task loss.
    """  # noqa: DOC502 - raised by _importance
    tokens = float(len(logits[0]) if mask is None else mask.sum())
    pairs = list(zip(watches, logits, strict=True))
    means = global_means([masked_mean(route_probability(z, w.site.gate), mask) for w, z in pairs], tokens)
    loads: list[Tensor] = []
    if form in {"balance", "switch", "bias"}:
        loads = global_means([w.count_load(mask).to(z.device) for w, z in pairs], tokens)
    gradients = _importance(watches, task_loss) if form == "goodness" else []
    terms = []
    for i, (watch, values) in enumerate(pairs):
        term = 0.0 * means[i].sum()
        if form == "switch":
            term = switch_balance(means[i], loads[i])
        elif form == "bias":
            watch.load += loads[i].cpu()
        elif form == "entropy":
            term = meta_entropy(values.float(), None, mask)
        elif form == "z":
            term = z_loss(values, mask)
        elif form in COSTLY and watch.cost is not None:
            cost = watch.cost.to(values.device)
            if form == "tax":
                term = tax(means[i], cost)
            elif form == "balance":
                # Where every token uses every expert, only the probabilities say who works.
                load = means[i].detach() if watch.site.top_k == watch.site.count else loads[i]
                # Loads add up to k, as in Switch: so one lam pushes as hard in both.
                term = load.sum() * tax(means[i], temper_cost(cost, load, cap))
            elif form == "prior":
                term = prior_divergence(means[i], cost)
            else:
                term = meta_entropy(values.float(), _goodness(watch, gradients[i], cost), mask)
        terms.append(term)
    return terms


def _importance(watches: Sequence[Watch], task_loss: Tensor | None) -> list[Tensor]:
    # Importance of an expert is the size of the loss' gradient at its output: its gate times the gradient at the
    # mixture, which is what is computed here, brought to mean 1.
    if task_loss is None:
        raise ConfigError("form='goodness' needs loss(task_loss=...): its importance is that loss' gradient")
    if any(not watch.mixtures for watch in watches):
        raise ConfigError(
            "form='goodness': the module of the experts was not called as a whole; use another form"
        )
    outputs = [output for watch in watches for output in watch.mixtures]
    found = iter(torch.autograd.grad(task_loss, outputs, retain_graph=True))
    sizes = []
    for watch in watches:
        gradients = [next(found) for _ in watch.mixtures]
        size = torch.cat([g.reshape(-1, g.shape[-1]).float().norm(dim=-1) for g in gradients])
        sizes.append(size / size.mean().clamp(min=1e-30))
    return sizes


def _goodness(watch: Watch, gradient: Tensor, cost: Tensor) -> Tensor:
    routes = Routes(*(torch.cat(parts).detach() for parts in zip(*watch.live, strict=True)))
    gates = torch.zeros_like(routes.logits, dtype=torch.float32)
    gates.scatter_(1, routes.chosen, routes.weights.float())
    # The router's own logits are its belief in an expert.
    return gates * gradient.unsqueeze(-1) * (routes.logits.float() - cost)
