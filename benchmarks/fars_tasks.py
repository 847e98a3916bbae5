"""Mixtures that overfit: twenty of them side by side, on noisy regression and on pictures of digits."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.router_tasks import EXPERTS, NOISY, SHARES, Arm
from tether.router import RoutingShaper

__all__ = ["DIGITS", "REGRESSION", "Cell", "Task", "train"]

TOP_K, BATCH, RATE = 2, 128, 3e-3
TESTED = 2048
"""Fresh samples of the regression that the test loss is taken on."""
HELD_OUT = 797
"""Pictures that the test loss is taken on; the other 1,000 are there to be trained on."""


class Task(NamedTuple):
    """What is learnt.

    Attributes:
        name: of the task.
        draw: gives for a seed and a number of training samples these and the test samples.
        loss: of predictions (S, n, outputs) for targets, of each of S mixtures.
        outputs: numbers that a mixture gives for a sample.
        widths: of an expert, narrow to wide.
        sizes: training samples, few to many.
        steps: of Adam.
    """

    name: str
    draw: Callable[[int, int], tuple[Tensor, Tensor, Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]
    outputs: int
    widths: tuple[int, ...]
    sizes: tuple[int, ...]
    steps: int


class Cell(NamedTuple):
    """One size of expert and of data.

    Attributes:
        task: what is learnt.
        width: hidden units of an expert.
        size: training samples.
    """

    task: Task
    width: int
    size: int


class Router(nn.Module):
    """A router whose decisions the cohort computes for all at once; it hands them to who listens."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight, self.top_k = nn.Parameter(weight), TOP_K

    def forward(self, routes: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        return routes


class Bank(nn.Module):
    """Two-layer experts, stacked, whose mixture the cohort computes for all at once."""

    def __init__(self, up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(up), nn.Parameter(down)

    def forward(self, mixture: Tensor) -> Tensor:
        return mixture


class Mixture(nn.Module):
    """Eight experts and their router; the router's last input is 1."""

    def __init__(self, seed: int, inputs: int, width: int, outputs: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator) / shape[-2 if len(shape) == 3 else -1] ** 0.5

        self.gate = Router(torch.cat([normal(EXPERTS, inputs), torch.zeros(EXPERTS, 1)], dim=1))
        self.experts = Bank(normal(EXPERTS, inputs, width), normal(EXPERTS, width, outputs))


class Cohort(nn.Module):
    """Mixtures that share nothing but the time they are computed in: one seed each.

    Each is a layer of its own to a shaper, so that costs, loads and terms are those of one mixture alone.
    """

    def __init__(self, seeds: Sequence[int], inputs: int, width: int, outputs: int) -> None:
        super().__init__()
        self.mixtures = nn.ModuleList(Mixture(seed, inputs, width, outputs) for seed in seeds)

    def forward(self, x: Tensor) -> Tensor:
        """Compute all mixtures, (S, n, inputs) to (S, n, outputs)."""
        members: list[Any] = list(self.mixtures)
        routers = torch.stack([member.gate.weight for member in members])
        logits = torch.baddbmm(routers[:, None, :, -1], x, routers[:, :, :-1].transpose(1, 2))
        weights, chosen = logits.softmax(-1).topk(TOP_K, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        routes = [member.gate((logits[i], weights[i], chosen[i])) for i, member in enumerate(members)]
        gates = torch.zeros_like(logits).scatter(
            2, torch.stack([r[2] for r in routes]), torch.stack([r[1] for r in routes])
        )
        up = torch.stack([member.experts.up for member in members])
        down = torch.stack([member.experts.down for member in members])
        seeds, experts, inputs, width = up.shape
        # All experts' units side by side: one product of matrices a mixture.
        inner = torch.relu(torch.bmm(x, up.transpose(1, 2).reshape(seeds, inputs, experts * width)))
        inner = inner.unflatten(2, (experts, width)) * gates.unsqueeze(-1)
        mixed = torch.bmm(inner.flatten(2), down.flatten(1, 2))
        return torch.stack([member.experts(mixed[i]) for i, member in enumerate(members)])


def train(cell: Cell, arm: Arm, seeds: Sequence[int], steps: int | None = None) -> dict[str, list[float]]:
    """Train a cohort on fixed data; start, data and batches depend on the cell and the seed, not on the arm.

    Args:
        cell: task, width of an expert, training samples.
        arm: how to shape.
        seeds: one mixture each.
        steps: of Adam; None takes the task's.

    Returns:
        Of each seed, at the end: `train` and `test` loss, `effective_experts` and `dead` on the test samples.
    """
    task = cell.task
    x, y, test_x, test_y = (
        torch.stack(part) for part in zip(*(task.draw(seed, cell.size) for seed in seeds), strict=True)
    )
    model = Cohort(seeds, x.shape[-1], cell.width, task.outputs)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    generator = torch.Generator().manual_seed(seeds[0])
    each = torch.arange(len(seeds))[:, None]
    with RoutingShaper(model, optimizer, **arm.options(seeds[0])) as shaper:
        for _ in range(steps or task.steps):
            batch = (slice(None), slice(None))
            if cell.size > BATCH:
                batch = (each, torch.randint(cell.size, (len(seeds), BATCH), generator=generator))
            loss = task.loss(model(x[batch]), y[batch]).sum()
            # The shaper takes the mean over layers, which are mixtures here: each gets its own term in full.
            term = len(seeds) * shaper.loss(task_loss=loss if arm.form == "goodness" else None)
            optimizer.zero_grad()
            (loss + term).backward()
            optimizer.step()
        with torch.no_grad():
            ends = {
                "train": task.loss(model(x), y).tolist(),
                "test": task.loss(model(test_x), test_y).tolist(),
            }
        layers = list(shaper.report()["layers"].values())
        return ends | {key: [float(row[key]) for row in layers] for key in ("effective_experts", "dead")}


def regress(seed: int, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw four regression tasks of unequal shares, one with noise of size 1, as `benchmarks.router_tasks` has them."""
    generator = torch.Generator().manual_seed(10_000 + seed)
    inputs, count = 16, size + TESTED
    centers = torch.randn(len(SHARES), inputs, generator=generator)
    first = torch.randn(len(SHARES), inputs, 12, generator=generator) * 2 / inputs**0.5
    second = torch.randn(len(SHARES), 12, generator=generator) / 12**0.5
    task = torch.multinomial(torch.tensor(SHARES), count, replacement=True, generator=generator)
    x = centers[task] + torch.randn(count, inputs, generator=generator)
    y = (torch.tanh(torch.einsum("ni,nih->nh", x, first[task])) * second[task]).sum(1)
    y = y + torch.randn(count, generator=generator) * (task == NOISY)
    return x[:size], y[:size, None], x[size:], y[size:, None]


def recognise(seed: int, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Split the 1,797 pictures of handwritten digits of scikit-learn at random."""
    pictures = load_digits()
    x = torch.from_numpy(pictures.data).float()
    x = (x - x.mean(0)) / x.std()
    y = torch.from_numpy(pictures.target).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(10_000 + seed))
    here, there = order[:size], order[-HELD_OUT:]
    return x[here], y[here], x[there], y[there]


def squared(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each mixture, shape (S,)."""
    return (predicted - target).square().mean((1, 2))


def surprise(predicted: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of each mixture, nats a picture, shape (S,)."""
    return functional.cross_entropy(predicted.transpose(1, 2), target, reduction="none").mean(1)


REGRESSION = Task("regression", regress, squared, 1, (6, 24, 96), (256, 768, 2304), 400)
DIGITS = Task("digits", recognise, surprise, 10, (4, 16, 64), (100, 300, 900), 300)
