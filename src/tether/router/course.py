"""Routing over a whole training: the term of each step, who is dead meanwhile, and what became of the experts."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor, nn
from torch.optim import Optimizer

from tether.errors import CheckpointError, ConfigError
from tether.router.attach import find_sites
from tether.router.metrics import DEAD
from tether.router.options import Shaping
from tether.router.shaper import RoutingShaper
from tether.router.watch import make_watch, world

__all__ = ["STRETCH", "RoutingCourse", "dead_experts", "describe"]

logger = logging.getLogger(__name__)

STRETCH = 20
"""Steps whose tokens are counted before experts are called dead: one batch leaves some out by chance."""
SHOWN = ("eff_k", "effective_experts", "max_violation", "tokens", "load", "cost")
"""Of a layer's metrics those that mean something where all tokens are one task."""


class RoutingCourse:
    """Shapes the routers of a training that somebody else runs, and names the experts that are dead.

    It is begun once model and optimizer are there, asked for its term after every forward pass and told of every step.
    `tether train` and `tether.router.RoutingCallback` do that; it is the `term` of `tether.causal.training.train`.

    Args:
        shaping: form, cost and strength.
        say: what to do with a line that names dead experts; in the first of several processes alone.

    Attributes:
        settings: the shaping, as JSON.
    """

    def __init__(self, shaping: Shaping, say: Callable[[str], None] = logger.warning) -> None:
        self.settings: dict[str, Any] = asdict(shaping)
        self.say = say
        self._shaping = shaping
        self._shaper: RoutingShaper | None = None
        self._dead: dict[str, list[int]] | None = None
        self._history: list[dict[str, int]] = []
        self._report: dict[str, Any] = {}

    def check(self, model: nn.Module) -> None:
        """Refuse, before anything takes long, a model whose routers cannot be shaped in this way.

        Args:
            model: with `requires_grad` as it will be trained.

        Raises:
            ConfigError: no layer of experts, a frozen router, experts without a cost, or a form without effect.
        """  # noqa: DOC502 - raised by find_sites and make_watch
        for site in find_sites(model):
            make_watch(site, self._shaping.form, self._shaping.cost, None)

    def begin(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Attach to a training.

        Args:
            model: a mixture of experts.
            optimizer: that steps it.

        Raises:
            ConfigError: as `check`, or an optimizer that does not know the experts.
        """  # noqa: DOC502 - raised by RoutingShaper
        self.close()
        shaping = self._shaping
        self._shaper = RoutingShaper(model, optimizer, shaping.form, shaping.cost, shaping.lam)

    def loss(self, mask: Tensor | None = None, task_loss: Tensor | None = None) -> Tensor:
        """Give the term of the last forward pass, and count who was used in it.

        Args:
            mask: which tokens count, shape (B, T); None counts all.
            task_loss: the loss of that pass, which form `goodness` differentiates once more.

        Returns:
            A scalar on the routers' graph.

        Raises:
            ConfigError: not begun, or see `RoutingShaper.loss`.
        """  # noqa: DOC502 - raised by _begun and RoutingShaper
        shaper = self._begun()
        term = shaper.loss(mask, task_loss if self._shaping.form == "goodness" else None)
        shaper.observe(mask=mask)
        return term

    def after_step(self, step: int, last: bool = False) -> None:
        """Note that the optimizer has taken a step; every `STRETCH` steps, say who is dead if that has changed.

        All processes of a training call it together.

        Args:
            step: from 1.
            last: whether it was the last, after which `report` is complete.

        Raises:
            ConfigError: not begun.
        """  # noqa: DOC502 - raised by _begun
        if step % STRETCH and not last:
            return
        found = self._begun().report(pooled=True)
        dead = dead_experts(found)
        number = sum(map(len, dead.values()))
        self._history.append({"step": step, "dead": number})
        layers = {
            name: {"dead": dead[name], **{key: row[key] for key in SHOWN if key in row}}
            for name, row in found["layers"].items()
        }
        mean = {key: found["mean"][key] for key in (*SHOWN[:3], "dead")}
        self._report = {
            **self.settings, "steps": step, "layers": layers, "mean": mean, "history": list(self._history),
        }  # fmt: skip
        if dead != self._dead and (world() == 1 or distributed.get_rank() == 0):
            count = sum(len(row["load"]) for row in layers.values())
            verb = "is" if number == 1 else "are"
            who = (
                f"{number} of {count} experts {verb} dead: {_names(dead)}" if number else "no expert is dead"
            )
            self.say(f"step {step}: {who}")
        self._dead = dead

    def report(self) -> dict[str, Any]:
        """Say what became of the experts.

        Returns:
            form, cost, lam, steps; `layers`, of each the numbers of its dead experts and, over the tokens of the last
            stretch of steps, eff_k, effective_experts, max_violation, load (E,) and normalised cost (E,) where there
            is one, see `tether.router.metrics`; `mean` over layers, of `dead` the count; `history`, the dead of all
            layers every `STRETCH` steps. JSON. Empty before the first stretch is over.
        """
        return self._report

    def state_dict(self) -> dict[str, Any]:
        """Give what is needed to go on: what the shaper has learnt, and who was dead.

        What was counted since the last stretch is not in it: after a resume in mid-stretch the next one is shorter.

        Returns:
            JSON.

        Raises:
            ConfigError: not begun.
        """  # noqa: DOC502 - raised by _begun
        return {
            "shaper": _plain(self._begun().state_dict()), "dead": self._dead, "history": list(self._history),
            "report": self._report,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what was saved, once begun.

        Args:
            state: of `state_dict`.

        Raises:
            ConfigError: not begun.
            CheckpointError: it is damaged, or of another model or shaping.
        """  # noqa: DOC502 - ConfigError is raised by _begun
        shaper = self._begun()
        try:
            shaper.load_state_dict(_revived(state["shaper"]))
            self._dead, self._history, self._report = state["dead"], list(state["history"]), state["report"]
        except (ConfigError, AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"the saved state of the routing does not fit ({error}); expected that of this model and shaping: "
                "train anew in another folder"
            ) from error

    def close(self) -> None:
        """Take all hooks off model and optimizer."""
        if self._shaper is not None:
            self._shaper.close()
            self._shaper = None

    def _begun(self) -> RoutingShaper:
        if self._shaper is None:
            raise ConfigError(
                "the routing of no training is observed: expected begin(model, optimizer) first"
            )
        return self._shaper


def dead_experts(report: Mapping[str, Any]) -> dict[str, list[int]]:
    """Name the experts that have under 1 % of a fair share of the load.

    Args:
        report: from `RoutingShaper.report`.

    Returns:
        Their numbers by layer.

    Example:
        >>> dead_experts({"layers": {"mlp": {"load": [0.5, 0.0, 0.5]}}})
        {'mlp': [1]}
    """
    return {
        name: [expert for expert, share in enumerate(row["load"]) if share < DEAD / len(row["load"])]
        for name, row in report["layers"].items()
    }


def describe(report: Mapping[str, Any]) -> str:
    """Put the end of a course into words.

    Args:
        report: from `RoutingCourse.report`.

    Returns:
        Two lines.
    """
    mean, layers = report["mean"], report["layers"]
    experts = max(len(row["load"]) for row in layers.values())
    used = (
        f"routing at the end, mean of {len(layers)} layers: {mean['effective_experts']:.2f} of {experts} experts carry "
        f"the load, the busiest has {1 + mean['max_violation']:.2f} times its share"
    )
    dead = {name: row["dead"] for name, row in layers.items()}
    who = _names(dead) if any(dead.values()) else "none"
    return f"{used}\ndead experts (under {100 * DEAD:.0f} % of a fair share): {who}"


def _names(dead: Mapping[str, list[int]]) -> str:
    return "; ".join(f"{name} {', '.join(map(str, own))}" for name, own in dead.items() if own)


def _plain(value: Any) -> Any:
    # JSON keeps every bit of a float.
    if isinstance(value, Tensor):
        return {"tensor": value.tolist(), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return value


def _revived(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if value.keys() == {"tensor", "dtype"}:
        return torch.tensor(value["tensor"], dtype=getattr(torch, value["dtype"]))
    return {key: _revived(entry) for key, entry in value.items()}
