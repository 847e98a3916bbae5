"""What a routing is like: sharpness, balance, information about the task, movement. Definitions are fixed here."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as distributed
from jaxtyping import Float, Int
from scipy.stats import random_table
from torch import Tensor

from tether.errors import ShapeError

__all__ = [
    "RouteStatistics",
    "effective_count",
    "maximal_violation",
    "route_drift",
    "routing_information",
    "task_separation",
]

DEAD = 0.01
"""Share of its fair load below which an expert is dead."""
NULL_DRAWS = 64


def effective_count(weights: Float[Tensor, "*batch experts"]) -> Float[Tensor, "*batch"]:
    r"""How many experts a distribution uses.

    .. math:: \exp H(w)

    Args:
        weights: >= 0, shape (..., E), of any positive sum.

    Returns:
        In [1, E], shape (...); Eff_K of a token's gates, load-effective E of the mean gates.

    Example:
        >>> effective_count(torch.tensor([0.5, 0.5, 0.0]))
        tensor(2.)
    """
    share = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    entropy: Tensor = torch.special.entr(share).sum(-1)
    return entropy.exp()


def maximal_violation(load: Float[Tensor, " experts"]) -> float:
    """How far the busiest expert is above a fair share (MaxVio).

    Args:
        load: >= 0, shape (E,), of any positive sum.

    Returns:
        max share times E, minus 1; 0 when balanced.
    """
    share = load / load.sum()
    return float(share.max() * len(load) - 1)


def task_separation(gates: Float[Tensor, "tasks experts"]) -> float | None:
    r"""How differently tasks are routed (ITJD).

    .. math:: \operatorname{mean}_{a<b} \left(1 - \frac{\sum_e \min(g_a, g_b)}{\sum_e \max(g_a, g_b)}\right)

    Args:
        gates: mean gates of each task, shape (K, E), rows sum to 1.

    Returns:
        In [0, 1]: 0 when all tasks are routed alike, 1 when no two share an expert; None for one task.

    Example:
        >>> task_separation(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        1.0
    """
    first, second = torch.triu_indices(len(gates), len(gates), offset=1)
    if not len(first):
        return None
    low, high = torch.minimum(gates[first], gates[second]), torch.maximum(gates[first], gates[second])
    return float((1 - low.sum(-1) / high.sum(-1)).mean())


def routing_information(
    table: Int[Tensor, "tasks experts"], *, draws: int = NULL_DRAWS, seed: int = 0
) -> tuple[float, float | None]:
    r"""What the first choice of a token tells about its task (RMI), beyond chance.

    .. math:: I(\text{task}; \text{top-1 expert}) - \operatorname{mean}_\pi I(\pi(\text{task}); \text{top-1 expert})

    The second term is what permuted tasks give, drawn as tables with the same margins: with few tokens any
    labels seem to tell something.

    Args:
        table: tokens of each task whose first choice is each expert, shape (K, E), >= 0.
        draws: permutations of the null, >= 1.
        seed: of the permutations.

    Returns:
        RMI in nats, and nRMI = RMI / H(task), which is None for one task.

    Reference:
        Research notes on FARS, section 5.

    Example:
        >>> rmi, share = routing_information(torch.tensor([[500, 0], [0, 500]]))
        >>> round(rmi, 2), round(share, 2)
        (0.69, 1.0)
    """
    counts = table.numpy()
    counts = counts[counts.sum(1) > 0][:, counts.sum(0) > 0].astype(np.int64)
    if counts.shape[0] < 2:
        return 0.0, None
    if counts.shape[1] < 2:
        # Everything goes to one expert. (scipy's tables of one column are wrong, too.)
        return 0.0, 0.0
    rows, columns = counts.sum(1), counts.sum(0)
    null = random_table(rows, columns).rvs(draws, random_state=np.random.default_rng(seed))
    found = _information(counts[None])[0] - _information(null).mean()
    share = rows / rows.sum()
    return float(found), float(found / -(share * np.log(share)).sum())


def _information(tables: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    joint = tables / tables.sum((1, 2), keepdims=True)
    apart = joint.sum(2, keepdims=True) * joint.sum(1, keepdims=True)
    terms = np.where(joint > 0, joint * np.log(np.where(joint > 0, joint, 1) / apart), 0.0)
    return np.asarray(terms.sum((1, 2)))


def route_drift(before: Int[Tensor, " tokens"], after: Int[Tensor, " tokens"]) -> float:
    """Share of tokens whose first choice has changed.

    Args:
        before: first choices by a reference checkpoint, shape (n,).
        after: by the one now, on the same tokens, shape (n,).

    Returns:
        In [0, 1].

    Raises:
        ShapeError: another number of tokens.
    """
    if before.shape != after.shape:
        raise ShapeError(f"{len(before)} tokens before, {len(after)} after: expected the same tokens twice")
    return float((before != after).double().mean())


class RouteStatistics:
    """Counts of one layer's routing from which all metrics follow; counts of batches and processes add up.

    Args:
        tasks: K, >= 1; grows with what is counted.
        experts: E.
    """

    def __init__(self, tasks: int, experts: int) -> None:
        self.gates = torch.zeros(tasks, experts, dtype=torch.float64)
        self.first = torch.zeros(tasks, experts, dtype=torch.int64)
        self.assigned = torch.zeros(experts, dtype=torch.float64)
        self.used = 0.0
        self.tokens = 0

    def add(
        self,
        weights: Float[Tensor, "tokens chosen"],
        chosen: Int[Tensor, "tokens chosen"],
        task_ids: Int[Tensor, " tokens"],
    ) -> None:
        """Count a batch.

        Args:
            weights: gates of the chosen experts, shape (n, k), >= 0; brought to sum 1 a token.
            chosen: which experts these are, shape (n, k).
            task_ids: task of each token, shape (n,), >= 0.

        Raises:
            ShapeError: shapes that do not fit, or a negative task.
        """
        tasks, experts = self.gates.shape
        if weights.shape != chosen.shape or task_ids.shape != weights.shape[:1]:
            raise ShapeError(
                f"weights {tuple(weights.shape)}, chosen {tuple(chosen.shape)}, tasks {tuple(task_ids.shape)}: "
                "expected (n, k), (n, k) and (n,)"
            )
        if not len(task_ids):
            return
        if int(task_ids.min()) < 0:
            raise ShapeError(
                f"task_ids from {task_ids.min()}: expected numbers >= 0; leave padding out by a mask"
            )
        weights, chosen, task_ids = (t.detach().cpu() for t in (weights, chosen, task_ids))
        if (more := int(task_ids.max()) + 1 - tasks) > 0:
            self.gates = torch.cat([self.gates, self.gates.new_zeros(more, experts)])
            self.first = torch.cat([self.first, self.first.new_zeros(more, experts)])
            tasks += more
        share = weights.double() / weights.double().sum(-1, keepdim=True).clamp(min=1e-30)
        full = torch.zeros(len(share), experts, dtype=torch.float64).scatter_add_(1, chosen, share)
        self.gates.index_add_(0, task_ids, full)
        top = chosen.gather(1, share.argmax(-1, keepdim=True)).squeeze(1)
        self.first += torch.bincount(task_ids * experts + top, minlength=tasks * experts).view(tasks, experts)
        if chosen.shape[1] < experts:
            self.assigned += torch.bincount(chosen.flatten(), minlength=experts).double()
        else:
            # Where every token has every expert, only the weights say who works.
            self.assigned += full.sum(0)
        self.used += float(effective_count(full).sum())
        self.tokens += len(share)

    def pool(self, device: torch.device) -> None:
        """Add up the counts of all processes, which call it together and have counted as many tasks each.

        Args:
            device: where the processes can exchange tensors.
        """
        counts = (self.gates, self.first, self.assigned, torch.tensor([self.used, float(self.tokens)]))
        flat = torch.cat([count.double().flatten() for count in counts]).to(device)
        distributed.all_reduce(flat)
        gates, first, self.assigned, rest = flat.cpu().split([count.numel() for count in counts])
        self.gates, self.first = gates.view_as(self.gates), first.view_as(self.first).long()
        self.used, self.tokens = float(rest[0]), int(rest[1])

    def summary(self) -> dict[str, Any]:
        """Compute the metrics.

        Returns:
            eff_k, effective_experts, max_violation, dead (a count), rmi, nrmi, itjd, tokens; `load`, shape (E,),
            and `gates`, shape (K, E), as lists. RMI and ITJD reward sharpness: read them with eff_k and the
            loss beside them. nrmi and itjd are None for one task.
        """
        seen = self.first.sum(1) > 0
        means = self.gates[seen] / self.gates[seen].sum(1, keepdim=True)
        load = self.assigned / self.assigned.sum().clamp(min=1e-30)
        rmi, nrmi = routing_information(self.first)
        return {
            "eff_k": self.used / max(self.tokens, 1),
            "effective_experts": float(effective_count(self.gates.sum(0))),
            "max_violation": maximal_violation(load),
            "dead": int((load < DEAD / len(load)).sum()),
            "rmi": rmi,
            "nrmi": nrmi,
            "itjd": task_separation(means),
            "tokens": self.tokens,
            "load": load.tolist(),
            "gates": means.tolist(),
        }
