"""RoutingShaper: watches a model's routers, reads what experts cost, and gives the term to add to the loss."""

import logging
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tether.errors import ConfigError, ShapeError
from tether.router.attach import Routes, Site, find_sites, in_backward, make_site
from tether.router.cost import CAP, PAPER, normalise_cost
from tether.router.metrics import RouteStatistics, route_drift
from tether.router.options import COSTLY, FORMS, STRONG, check_options, inner_optimizer
from tether.router.shaping import balanced_bias, z_loss
from tether.router.terms import live_logits, shaping_terms
from tether.router.watch import (
    Watch,
    count_routes,
    first_choice,
    global_means,
    layer_means,
    make_watch,
    needed_routes,
)

__all__ = ["FORMS", "RoutingShaper"]

logger = logging.getLogger(__name__)


class RoutingShaper:
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
        lam: strength, finite, >= 0; useful from 0.003 to 0.03 for the tax.
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
        form: str = "tax",
        cost: str = "information",
        lam: float = 0.01,
        every: int = 10,
        *,
        sites: Sequence[Site] | None = None,
        z: float = 0.0,
        rate: float = 1e-3,
        cap: float = CAP,
        seed: int = 0,
    ) -> None:
        check_options(form, cost, lam, every, z, rate, cap)
        self.model, self.form, self.cost, self.lam, self.every = model, form, cost, lam, every
        self.z, self.rate, self.cap = z, rate, cap
        self.optimizer = inner_optimizer(optimizer)
        if self.optimizer is None and (form == "bias" or (form in COSTLY and cost != "uniform")):
            raise ConfigError(f"form={form!r} without an optimizer: expected the one that steps the experts")
        if form == "tax" and lam >= STRONG:
            logger.warning(
                "lam=%g: a tax of 0.05 and more tends to undo specialisation; 0.003 to 0.03 is useful", lam
            )
        self.steps = 0
        self._generator = torch.Generator().manual_seed(seed)
        self._training: bool | None = None
        self._observed: dict[str, RouteStatistics] = {}
        self._watches: list[Watch] = []
        found = find_sites(model) if sites is None else sites
        # Everything is checked before the first hook is on the model.
        watches = [make_watch(site, form, cost, self.optimizer) for site in found]
        self._handles: list[Any] = [
            model.register_forward_pre_hook(self._begins),
            model.register_forward_hook(self._ends, always_call=True),
        ]
        if self.optimizer is not None:
            self._handles += [
                self.optimizer.register_step_pre_hook(self._before_step),
                self.optimizer.register_step_post_hook(self._after_step),
            ]
        for watch in watches:
            self._hook(watch)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Take all hooks off the model and the optimizer."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @property
    def sites(self) -> list[Site]:
        """The layers under observation."""
        return [watch.site for watch in self._watches]

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
        terms = shaping_terms(self.form, self._watches, logits, flat, task_loss)
        total = self.lam * torch.stack(terms).mean()
        if self.z:
            total = total + self.z * torch.stack([z_loss(values, flat) for values in logits]).mean()
        for watch in self._watches:
            watch.live, watch.mixtures = [], []
        return total

    def costs(self) -> dict[str, Tensor]:
        """Read what each expert's last steps cost.

        Returns:
            Normalised costs (mean 1, capped) by layer, shape (E,); raw for the costs of `paper`.

        Raises:
            ConfigError: no step was taken yet, the form was set up without a cost, or costs are not finite.
        """
        self._refresh()
        missing = [watch.site.name for watch in self._watches if watch.cost is None]
        if missing:
            raise ConfigError(
                f"no cost of {', '.join(missing)} after {self.steps} steps: expected at least one step of the "
                "optimizer (two where gradients are the source), finite state, and a form with a cost"
            )
        return {watch.site.name: watch.cost.clone() for watch in self._watches if watch.cost is not None}

    def mark(self) -> None:
        """Take the last forward pass as the reference for drift; send the same tokens again to measure it."""
        for watch in self._watches:
            watch.marked = first_choice(needed_routes(watch))

    def observe(self, task_ids: Tensor | None = None, mask: Tensor | None = None) -> None:
        """Count the last forward pass for the next `report()`.

        Args:
            task_ids: task of each sequence, shape (B,), or token, shape (B, T) or (n,); None is one task.
            mask: which tokens count.
        """
        for watch in self._watches:
            held = self._observed.setdefault(watch.site.name, RouteStatistics(1, watch.site.count))
            count_routes(held, needed_routes(watch), task_ids, mask)

    def report(self, task_ids: Tensor | None = None, mask: Tensor | None = None) -> dict[str, Any]:
        """Describe the routing, of the last forward pass or of all that `observe` counted.

        Args:
            task_ids: task of each sequence, shape (B,), or token, shape (B, T) or (n,), of the last pass; None
                reports what `observe` counted (and begins anew), or else the last pass as one task.
            mask: which tokens of the last pass count.

        Returns:
            `layers` (metrics by layer, see `RouteStatistics.summary`, with `drift` after `mark`), `mean` (of the
            numbers over layers), `form`, `cost`, `lam`, `steps`.
        """
        counted = self._observed if task_ids is None else {}
        layers: dict[str, dict[str, Any]] = {}
        for watch in self._watches:
            held = counted.get(watch.site.name)
            if held is None:
                held = RouteStatistics(1, watch.site.count)
                count_routes(held, needed_routes(watch), task_ids, mask)
            row = held.summary()
            routes = watch.routes()
            if watch.marked is not None and routes is not None and len(watch.marked) == len(routes.logits):
                row["drift"] = route_drift(watch.marked, first_choice(routes))
            if watch.cost is not None:
                row["cost"] = watch.cost.tolist()
            layers[watch.site.name] = row
        if task_ids is None:
            self._observed = {}
        return {
            "layers": layers, "mean": layer_means(list(layers.values())), "form": self.form, "cost": self.cost,
            "lam": self.lam, "steps": self.steps,
        }  # fmt: skip

    # Hooks.

    def _hook(self, watch: Watch) -> None:
        self._watches.append(watch)

        def routed(_: nn.Module, __: Any, output: Any) -> Any:
            return self._routed(watch, output)

        def mixed(_: nn.Module, __: Any, output: Any) -> None:
            if torch.is_grad_enabled() and not in_backward() and isinstance(output, Tensor):
                watch.mixtures.append(output)

        self._handles.append(watch.site.router.register_forward_hook(routed))
        if self.form == "goodness":
            self._handles.append(watch.site.mixture.register_forward_hook(mixed))

    def _begins(self, *_: Any) -> None:
        if in_backward():
            return
        self._training = torch.is_grad_enabled()
        for watch in self._watches:
            watch.restart(self._training)

    def _ends(self, *_: Any) -> None:
        if not in_backward():
            self._training = None

    def _routed(self, watch: Watch, output: Any) -> Any:
        routes, changed = watch.site.read(output), None
        if watch.bias is not None and "e_score_correction_bias" not in dict(
            watch.site.router.named_buffers()
        ):
            routes = watch.site.choose(routes.logits, watch.bias.to(routes.logits.device))
            if not isinstance(output, tuple):
                raise ConfigError(
                    f"{watch.site.name}: the router gives logits alone and the layer chooses by itself, out of reach "
                    "of form='bias'; use form='switch'"
                )
            changed = (output[0], routes.weights.to(output[1].dtype), routes.chosen)
        if in_backward():
            # A checkpoint computes the same tokens again.
            return changed
        if self._training is None:
            # The layer was called by itself, not through the model.
            watch.restart(torch.is_grad_enabled())
        watch.seen.append(Routes(*(part.detach() for part in routes)))
        if torch.is_grad_enabled():
            watch.live.append(routes)
        elif self._training:
            watch.severed = True
        return changed

    def _before_step(self, *_: Any) -> None:
        for watch in self._watches:
            if watch.reader is not None:
                watch.reader.before_step()

    def _after_step(self, *_: Any) -> None:
        self.steps += 1
        for watch in self._watches:
            if watch.reader is not None:
                watch.reader.after_step()
            if watch.bias is not None:
                load = global_means([watch.load], 1.0)[0]
                watch.bias.copy_(balanced_bias(watch.bias, load.to(watch.bias), self.rate))
                watch.load = torch.zeros(watch.site.count)
        self._refresh(only_due=True)

    @torch.no_grad()
    def _refresh(self, only_due: bool = False) -> None:
        for watch in self._watches:
            if watch.reader is None or (only_due and watch.cost is not None and self.steps % self.every):
                continue
            raw = watch.reader.read(
                "information" if self.cost in {"paper", "gradient"} else self.cost, self._generator
            )
            if raw is None:
                watch.cost = None
            elif self.cost in PAPER:
                watch.cost = raw.float() if bool(torch.isfinite(raw).all()) else None
            else:
                watch.cost = normalise_cost(raw, self.cap)
            if raw is not None and watch.cost is None and not watch.warned:
                watch.warned = True
                logger.warning(
                    "%s: costs %s have no positive finite mean; this layer is not taxed until they have",
                    watch.site.name,
                    [float(f"{value:.3g}") for value in raw.tolist()],
                )  # fmt: skip
