"""RoutingShaper: checks what is asked, and gives the term to add to the loss from what it observes."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tether.errors import ConfigError, ShapeError
from tether.router.attach import Site, make_site
from tether.router.cost import CAP, PAPER
from tether.router.observer import RouterObserver
from tether.router.options import COSTLY, EVERY, FORMS, STRONG, check_options, inner_optimizer
from tether.router.shaping import z_loss
from tether.router.terms import live_logits, shaping_terms
from tether.router.watch import make_watch

__all__ = ["FORMS", "RoutingShaper"]

logger = logging.getLogger(__name__)


class RoutingShaper(RouterObserver):
    """Shapes the routers of a mixture-of-experts model by what the last steps of their experts cost.

    The model's outputs are not touched (form `bias` excepted, whose purpose that is). Use it as a context
    manager, or call `close`, to leave the model as it was.

    Args:
        model: Qwen2Moe, Qwen3Moe, Mixtral, OLMoE, DeepSeek-V3, or any model with `experts` beside a `gate` or
            `router`.
        optimizer: that steps the experts; made from the parameters as they are now, after `fully_shard`. None
            where the form needs no cost and no bias.
        form: one of `FORMS`.
        cost: one of `tether.router.cost.COSTS`.
        lam: strength, finite, >= 0; useful from 0.003 to 0.03 for balance and tax. In `balance` it counts as in
            `switch`, whose loads add up to k.
        every: steps between two readings of the cost, >= 1.
        sites: layers to shape; None finds them, () starts with none for `register_site`.
        z: strength of a z-loss added to the form, >= 0.
        rate: step of the bias, form `bias`.
        cap: largest normalised cost, > 1.
        seed: of the permutations of cost `shuffled`.

    Raises:
        ConfigError: unknown form or cost, a number out of range, no layer with experts, a frozen router, experts
            that are frozen, unequal or unknown to the optimizer, or a form without effect: switch or bias where
            every token uses every expert, a tax with one cost for all.

    Example:
        >>> from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
        >>> config = Qwen3MoeConfig(vocab_size=32, hidden_size=16, moe_intermediate_size=8, num_hidden_layers=1,
        ...     num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_experts=4, num_experts_per_tok=2)
        >>> model = Qwen3MoeForCausalLM(config)
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> ids = torch.arange(16).view(2, 8)
        >>> with RoutingShaper(model, optimizer) as shaper:
        ...     for _ in range(2):
        ...         loss = model(input_ids=ids, labels=ids).loss + shaper.loss()
        ...         loss.backward()
        ...         optimizer.step()
        ...     costs = shaper.costs()["model.layers.0.mlp"]
        >>> len(costs), round(float(costs.mean()), 3)
        (4, 1.0)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        form: str = "balance",
        cost: str = "information",
        lam: float = 0.01,
        every: int = EVERY,
        *,
        sites: Sequence[Site] | None = None,
        z: float = 0.0,
        rate: float = 1e-3,
        cap: float = CAP,
        seed: int = 0,
    ) -> None:
        check_options(form, cost, lam, every, z, rate, cap)
        optimizer = inner_optimizer(optimizer)
        if optimizer is None and (form == "bias" or (form in COSTLY and cost != "uniform")):
            raise ConfigError(f"form={form!r} without an optimizer: expected the one that steps the experts")
        if form in {"balance", "tax"} and cost not in PAPER and lam >= STRONG:
            logger.warning(
                "lam=%g: %s of 0.05 and more tends to undo specialisation; 0.003 to 0.03 is useful", lam, form
            )
        self.z = z
        super().__init__(model, optimizer, form, cost, lam, every, sites=sites, rate=rate, cap=cap, seed=seed)

    def register_site(
        self, name: str, router: nn.Module, experts: nn.Module, *, top_k: int, **options: Any
    ) -> Site:
        """Add a layer that is not found by itself.

        Args:
            name: of the layer.
            router: gives logits, shape (n, E), alone or followed by weights and chosen experts.
            experts: list of experts, or module with stacked tensors.
            top_k: experts a token uses.
            options: `parameters`, `count`, `gate`, `renormalise` of `tether.router.attach.make_site`.

        Returns:
            The site.

        Raises:
            ConfigError: a layer of that name is there, or it cannot be shaped, as for the constructor.
        """
        if name in {site.name for site in self.sites}:
            raise ConfigError(f"{name}: under observation already; expected a new name")
        site = make_site(name, router, experts, top_k=top_k, **options)
        self._hook(make_watch(site, self.form, self.cost, self.optimizer))
        return site

    def loss(self, mask: Tensor | None = None, task_loss: Tensor | None = None) -> Tensor:
        """Give the term to add to the loss of the last forward pass.

        Before the first step of the optimizer nothing has cost anything: the term is 0, with a gradient of 0.
        The same where costs are not finite, with one warning.

        Args:
            mask: which tokens count, shape (B, T) or (n,); None counts all.
            task_loss: the loss of that pass, for form `goodness` alone, which differentiates it once more.

        Returns:
            A scalar on the routers' graph.

        Raises:
            ConfigError: no forward pass with gradients since the last call, a router that runs without gradients
                inside one (reentrant checkpointing, a frozen router), or `goodness` without `task_loss`.
            ShapeError: a mask for other tokens.
        """
        if not self._watches:
            raise ConfigError("no layer under observation: expected register_site to be called first")
        logits = [live_logits(watch, self.form) for watch in self._watches]
        flat = None if mask is None else mask.reshape(-1).bool()
        for watch, values in zip(self._watches, logits, strict=True):
            if flat is not None and len(flat) != len(values):
                raise ShapeError(
                    f"mask of {len(flat)} tokens, {watch.site.name} saw {len(values)}: expected this batch's mask"
                )
        flat = None if flat is None else flat.to(logits[0].device)
        terms = shaping_terms(self.form, self._watches, logits, flat, task_loss, self.cap)
        total = self.lam * torch.stack(terms).mean()
        if self.z:
            total = total + self.z * torch.stack([z_loss(values, flat) for values in logits]).mean()
        for watch in self._watches:
            watch.live, watch.mixtures = [], []
        return total
