"""Observer of a model's routers: its hooks, what it reads of costs after steps, and what it reports of routing."""

import logging
import math
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tether.errors import ConfigError
from tether.router.attach import Routes, Site, find_sites, in_backward
from tether.router.cost import PAPER, normalise_cost
from tether.router.metrics import RouteStatistics, route_drift
from tether.router.shaping import balanced_bias
from tether.router.watch import (
    CORRECTION,
    Watch,
    count_routes,
    first_choice,
    global_means,
    layer_means,
    make_watch,
    needed_routes,
    world,
)

__all__ = ["RouterObserver"]

logger = logging.getLogger(__name__)


class RouterObserver:
    """Watches the routers of a mixture-of-experts model and reads what the last steps of their experts cost.

    Options are taken as they are: `tether.router.RoutingShaper` checks them, and is what to use.

    Args:
        model: with `experts` beside a `gate` or `router`.
        optimizer: that steps the experts, or None.
        form: one of `tether.router.options.FORMS`.
        cost: one of `tether.router.cost.COSTS`.
        lam: strength, for the report.
        every: steps between two readings of the cost.
        sites: layers to watch; None finds them.
        rate: step of the bias, form `bias`.
        cap: largest normalised cost.
        seed: of the permutations of cost `shuffled`.

    Attributes:
        steps: of the optimizer so far.

    Raises:
        ConfigError: no layer with experts, or one where the form would do nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        form: str,
        cost: str,
        lam: float,
        every: int,
        *,
        sites: Sequence[Site] | None,
        rate: float,
        cap: float,
        seed: int,
    ) -> None:
        self.model, self.form, self.cost, self.lam, self.every = model, form, cost, lam, every
        self.rate, self.cap, self.optimizer = rate, cap, optimizer
        self.steps = 0
        self._generator = torch.Generator().manual_seed(seed)
        self._training: bool | None = None
        self._sequences: int | None = None
        self._observed: dict[str, RouteStatistics] = {}
        self._watches: list[Watch] = []
        found = find_sites(model) if sites is None else sites
        # Everything is checked before the first hook is on the model.
        watches = [make_watch(site, form, cost, self.optimizer) for site in found]
        self._handles: list[Any] = [
            model.register_forward_pre_hook(self._begins, with_kwargs=True),
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

    def costs(self) -> dict[str, Tensor]:
        """Read what each expert's last steps cost.

        Returns:
            Normalised costs (mean 1, capped; form `balance` caps what it tempers, so not here) by layer, shape
            (E,); raw for the costs of `paper`.

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

    def state_dict(self) -> dict[str, Any]:
        """Give what steps have taught: running shares and means, costs, the bias on the choice.

        Returns:
            Tensors and plain values by layer; save them beside the optimizer's state.
        """
        draws = self._generator.get_state()
        return {
            "steps": self.steps,
            "draws": draws,
            "layers": {w.site.name: w.state_dict() for w in self._watches},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what was saved, with the same model, form and cost; load the optimizer's state as well.

        Args:
            state: of `state_dict`.

        Raises:
            ConfigError: it is of other layers.
        """
        names = [watch.site.name for watch in self._watches]
        if list(state["layers"]) != names:
            raise ConfigError(f"state of layers {list(state['layers'])}: expected that of {names}")
        self.steps = state["steps"]
        self._generator.set_state(state["draws"])
        for watch in self._watches:
            watch.load_state_dict(state["layers"][watch.site.name])

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
            count_routes(held, needed_routes(watch), task_ids, mask, self._sequences)

    def report(
        self, task_ids: Tensor | None = None, mask: Tensor | None = None, *, pooled: bool = False
    ) -> dict[str, Any]:
        """Describe the routing, of the last forward pass or of all that `observe` counted.

        Args:
            task_ids: task of each sequence, shape (B,), or token, shape (B, T) or (n,), of the last pass; None
                reports what `observe` counted (and begins anew), or else the last pass as one task.
            mask: which tokens of the last pass count.
            pooled: add up the counts of all processes, which ask for it together.

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
                count_routes(held, needed_routes(watch), task_ids, mask, self._sequences)
            if pooled and world() > 1:
                held.pool(next(watch.site.router.parameters()).device)
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

    def _begins(self, _: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        if in_backward():
            return
        inputs = [given.get("input_ids"), given.get("inputs_embeds"), *args[:1]]
        self._sequences = next((len(x) for x in inputs if isinstance(x, Tensor) and x.dim() >= 2), None)
        self._training = torch.is_grad_enabled()
        for watch in self._watches:
            watch.restart(self._training)

    def _ends(self, *_: Any) -> None:
        if not in_backward():
            self._training = None

    def _routed(self, watch: Watch, output: Any) -> Any:
        routes, changed = watch.site.read(output), None
        if watch.bias is not None and CORRECTION not in dict(watch.site.router.named_buffers()):
            if not isinstance(output, tuple):
                raise ConfigError(
                    f"{watch.site.name}: the router gives logits alone and the layer chooses by itself, out of reach "
                    "of form='bias'; use form='switch'"
                )
            watch.check_choice(routes)
            routes = watch.site.choose(routes.logits, watch.bias.to(routes.logits.device))
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
                if self.steps == 1 and not bool(watch.load.any()):
                    raise ConfigError(
                        f"{watch.site.name}: form='bias' counts the load in loss(), which was not called before this "
                        "step; call it after each forward pass, though what it adds is 0"
                    )
                load = global_means([watch.load], 1.0)[0]
                watch.bias = balanced_bias(watch.bias, load.to(watch.bias), self.rate)
                watch.put_bias()
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
            # Nothing new, as where a rate has fallen to 0: the last cost stays.
            if raw is None:
                continue
            if self.cost in PAPER:
                watch.cost = raw.float() if bool(torch.isfinite(raw).all()) else None
            else:
                # Tempered costs are capped once they are tempered.
                watch.cost = normalise_cost(raw, math.inf if self.form == "balance" else self.cap)
            if watch.cost is None and not watch.warned:
                watch.warned = True
                logger.warning(
                    "%s: costs %s have no positive finite mean; this layer is not taxed until they have",
                    watch.site.name,
                    [float(f"{value:.3g}") for value in raw.tolist()],
                )  # fmt: skip
