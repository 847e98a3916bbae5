"""What a shaper remembers of one layer, and sums of it over processes."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor
from torch.optim import Optimizer

from tether.errors import ConfigError, ShapeError
from tether.router.attach import Routes, Site, trainable
from tether.router.metrics import RouteStatistics
from tether.router.options import COSTLY
from tether.router.shaping import expert_load
from tether.router.state import StateReader

__all__ = [
    "CORRECTION",
    "Watch",
    "count_routes",
    "first_choice",
    "global_means",
    "layer_means",
    "make_watch",
    "needed_routes",
    "world",
]


CORRECTION = "e_score_correction_bias"
"""Of DeepSeek's router: the bias on the choice as a buffer of its own."""


class Watch:
    """One layer under observation.

    Args:
        site: the layer.
        reader: of its experts' state in the optimizer, or None where no cost is needed.

    Attributes:
        live: decisions of the last forward pass with gradients, logits with their graph.
        seen: every decision of the last forward pass, detached.
        severed: whether the router ran without gradients inside a pass that has them.
        mixtures: outputs of the experts in that pass, where they are kept.
        cost: normalised costs, shape (E,), or None while there are none.
        bias: on the choice, shape (E,), float32, or None.
        load: assignments since the last step, shape (E,).
        marked: first choices at a reference, shape (n,), or None.
    """

    def __init__(self, site: Site, reader: StateReader | None) -> None:
        self.site, self.reader = site, reader
        self.live: list[Routes] = []
        self.seen: list[Routes] = []
        self.mixtures: list[Tensor] = []
        self.severed = False
        self.cost: Tensor | None = None
        self.warned = False
        self.bias: Tensor | None = None
        self.load = torch.zeros(site.count)
        self.checked = False
        self.marked: Tensor | None = None

    def restart(self, training: bool) -> None:
        """Forget the last pass.

        Args:
            training: whether the pass that begins has gradients; one without leaves what `loss` reads.
        """
        self.seen = []
        if training:
            self.live, self.mixtures, self.severed = [], [], False

    def routes(self) -> Routes | None:
        """Give all decisions of the last pass.

        Returns:
            Them, detached, or None before the first pass.
        """
        if not self.seen:
            return None
        return Routes(*(torch.cat(parts) for parts in zip(*self.seen, strict=True)))

    def put_bias(self) -> None:
        """Give the router its bias, where it has a place for it."""
        buffer = dict(self.site.router.named_buffers()).get(CORRECTION)
        if buffer is not None and self.bias is not None:
            buffer.copy_(self.bias)

    def check_choice(self, routes: Routes) -> None:
        """Check, on the first pass, that a bias of 0 changes nothing: the router chooses as the site says.

        Args:
            routes: its own decision.

        Raises:
            ConfigError: it chooses or weighs in another way.
        """
        if self.checked:
            return
        mine = self.site.choose(routes.logits.detach(), None)
        gates = [
            torch.zeros_like(r.logits).scatter(1, r.chosen, r.weights.to(r.logits)) for r in (mine, routes)
        ]
        # Ties and half precision may change single tokens, another rule changes most.
        if float(((gates[0] - gates[1]).abs().amax(1) > 0.02).float().mean()) > 0.02:
            raise ConfigError(
                f"{self.site.name}: the router does not choose the {self.site.top_k} largest of its "
                f"{self.site.gate} with weights {'brought to sum 1' if self.site.renormalise else 'as they are'}, so "
                "form='bias' would change what the model computes; use form='switch', or register_site with the "
                "gate and renormalise that it has"
            )
        self.checked = True

    def state_dict(self) -> dict[str, Any]:
        """Give what steps have taught.

        Returns:
            Tensors and plain values.
        """
        return {
            "cost": self.cost, "bias": self.bias, "reader": None if self.reader is None else self.reader.state_dict(),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what was saved.

        Args:
            state: of `state_dict`.
        """
        self.cost, self.bias = (
            None if state[key] is None else state[key].clone() for key in ("cost", "bias")
        )
        self.put_bias()
        if self.reader is not None and state["reader"] is not None:
            self.reader.load_state_dict(state["reader"])

    def count_load(self, mask: Tensor | None) -> Tensor:
        """Count the assignments of the last pass with gradients.

        Args:
            mask: which tokens count, shape (n,), or None.

        Returns:
            Assignments a token, shape (E,).
        """
        return expert_load(torch.cat([routes.chosen for routes in self.live]), self.site.count, mask)


def make_watch(site: Site, form: str, cost: str, optimizer: Optimizer | None) -> Watch:
    """Set up the observation of one layer.

    Args:
        site: the layer.
        form: one of `tether.router.options.FORMS`.
        cost: one of `tether.router.cost.COSTS`.
        optimizer: that steps the experts, or None.

    Returns:
        The watch.

    Raises:
        ConfigError: the form would do nothing there, or its cost cannot be read.
    """
    reader = None
    if form not in {"none", "bias"} and not trainable(site):
        raise ConfigError(
            f"{site.name}: the router is frozen, so that form={form!r} would do nothing; unfreeze it, or use "
            "form='none' to measure"
        )
    if form in {"switch", "bias"} and site.top_k == site.count:
        raise ConfigError(
            f"{site.name}: every token uses all {site.count} experts, where form={form!r} is constant; use "
            "form='balance' or 'prior'"
        )
    if form in COSTLY and cost != "uniform":
        if site.experts is None:
            raise ConfigError(site.reason)
        if optimizer is not None:
            reader = StateReader(optimizer, site.experts, site.name, gradients=cost == "gradient")
    watch = Watch(site, reader)
    if cost == "uniform" and form in COSTLY:
        watch.cost = torch.ones(site.count)
    if form == "bias":
        buffers = dict(site.router.named_buffers())
        # The buffer may be of few bits, in which small steps would be lost.
        watch.bias = buffers.get(CORRECTION, torch.zeros(site.count)).detach().float().clone()
    return watch


def world() -> int:
    """Tell how many processes work together.

    Returns:
        1 without torch.distributed.
    """
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def global_means(means: Sequence[Tensor], tokens: float) -> list[Tensor]:
    """Average over the tokens of all processes what each averaged over its own.

    The balance of a small batch of one process must not be enforced on that batch alone. Gradients stay right
    when they are averaged over processes, as data parallelism does: each process' own part is scaled by its
    share of the tokens.

    Args:
        means: over this process' tokens, shape (E_i,) each, with their graph.
        tokens: how many these were.

    Returns:
        Means over all tokens, in value the same everywhere.
    """
    size = world()
    if size == 1 or not means:
        return list(means)
    flat = torch.cat([mean.detach().flatten() * tokens for mean in means] + [means[0].new_tensor([tokens])])
    distributed.all_reduce(flat)
    total = flat[-1].clamp(min=1)
    parts = (flat[:-1] / total).split([mean.numel() for mean in means])
    share = size * tokens / total
    return [
        part.view_as(mean) + share * (mean - mean.detach()) for part, mean in zip(parts, means, strict=True)
    ]


def needed_routes(watch: Watch) -> Routes:
    """Give the decisions of a layer's last pass.

    Args:
        watch: the layer.

    Returns:
        They, detached.

    Raises:
        ConfigError: there was no pass yet.
    """
    routes = watch.routes()
    if routes is None:
        raise ConfigError(
            f"{watch.site.name}: no forward pass yet; expected one before its routing is described"
        )
    return routes


def first_choice(routes: Routes) -> Tensor:
    """Give the expert with the largest gate of each token.

    Args:
        routes: the decisions.

    Returns:
        Shape (n,).
    """
    return routes.chosen.gather(1, routes.weights.argmax(-1, keepdim=True)).squeeze(1)


def count_routes(
    held: RouteStatistics,
    routes: Routes,
    task_ids: Tensor | None,
    mask: Tensor | None,
    sequences: int | None = None,
) -> None:
    """Count decisions by task.

    Args:
        held: where to.
        routes: the decisions.
        task_ids: task of each sequence or token, or None for one task.
        mask: which tokens count, or None.
        sequences: how many the pass had, or None where that is not known.

    Raises:
        ShapeError: ids or a mask for other sequences or tokens.
    """
    n = len(routes.logits)
    if mask is not None and mask.numel() != n:
        raise ShapeError(f"mask of {mask.numel()} tokens, the last pass had {n}: expected that pass' mask")
    ids = (
        torch.zeros(n, dtype=torch.int64)
        if task_ids is None
        else torch.as_tensor(task_ids).reshape(-1).long().cpu()
    )
    counts = {n, sequences} if sequences is not None else {k for k in range(1, n + 1) if n % k == 0}
    if len(ids) not in counts:
        raise ShapeError(
            f"{len(ids)} task ids for {n} tokens{f' of {sequences} sequences' if sequences else ''}: expected one "
            "for each sequence or each token of the last pass"
        )
    ids = ids.repeat_interleave(n // len(ids))
    kept = slice(None) if mask is None else mask.reshape(-1).bool().cpu()
    held.add(routes.weights.cpu()[kept], routes.chosen.cpu()[kept], ids[kept])


def layer_means(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Average the numbers of reports over layers.

    Args:
        rows: one a layer.

    Returns:
        Of each number that all layers have.
    """
    found: dict[str, float] = {}
    for key in rows[0]:
        values = [row.get(key) for row in rows]
        numbers = [float(value) for value in values if isinstance(value, int | float)]
        if numbers and len(numbers) == len(values):
            found[key] = sum(numbers) / len(numbers)
    return found
