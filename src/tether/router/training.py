"""Teaches the routers of a mixture (and, slowly, its experts) on text, shaped by what experts cost."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tether.delta.windows import Windows
from tether.errors import ConfigError
from tether.router.journal import RouteJournal
from tether.router.shaper import RoutingShaper

__all__ = ["RouterFit", "train_routers"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterFit:
    """How routers are taught.

    Attributes:
        form: of the shaper.
        cost: of the shaper.
        lam: strength.
        every: steps between readings of the cost.
        steps: of the optimizer, >= 1.
        batch: windows a step, >= 1.
        lr: of the routers at the first step, > 0; falls linearly to 0.
        expert_lr: of the experts, >= 0, falls likewise. At 0 they are frozen, and then their steps cost nothing:
            only forms without a cost can be used.
        seed: of the order of windows.
    """

    form: str = "balance"
    cost: str = "information"
    lam: float = 0.01
    every: int = 10
    steps: int = 200
    batch: int = 8
    lr: float = 1e-3
    expert_lr: float = 1e-5
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.batch) < 1 or not self.lr > 0 or not self.expert_lr >= 0:
            raise ConfigError(
                f"steps={self.steps}, batch={self.batch}, lr={self.lr}, expert_lr={self.expert_lr}: expected "
                "positive numbers (expert_lr may be 0)"
            )


def train_routers(
    model: nn.Module,
    texts: Sequence[Windows],
    fit: RouterFit,
    *,
    journal: Path | None = None,
    on_step: Callable[[dict[str, float]], None] | None = None,
) -> dict[str, Any]:
    """Train routers and experts; everything else of the model stays frozen.

    Args:
        model: a mixture of experts with a head, as `upcycle` writes it.
        texts: one for each task; a step takes windows of all of them.
        fit: options.
        journal: file for a report every 20 steps, `.csv` or `.jsonl`.
        on_step: called with step, steps, loss and shaping.

    Returns:
        `curve` (loss at each step), `before` and `after`: routing reports over windows of all tasks.

    Raises:
        ConfigError: no text, options that the shaper refuses, weights in half precision, or a loss that is not finite.
    """
    if not texts:
        raise ConfigError("no text: expected at least one to teach routers on")
    if any(p.dtype not in {torch.float32, torch.float64} for p in model.parameters()):
        # Steps of 1e-5 are below the last place of nearly every weight in bfloat16.
        raise ConfigError(
            "weights in half precision, where small steps round away: load with dtype=torch.float32"
        )
    log = None if journal is None else RouteJournal(journal)
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with RoutingShaper(model, form="none") as watching:
        sites = watching.sites
    routers = [p for site in sites for p in site.router.parameters()]
    experts = [p for site in sites for p in site.mixture.parameters()] if fit.expert_lr else []
    model.requires_grad_(False)
    for parameter in (*routers, *experts):
        parameter.requires_grad_(True)
    groups = [{"params": routers, "lr": fit.lr}]
    if experts:
        groups.append({"params": experts, "lr": fit.expert_lr})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    # Shaping levels loads by oscillation: at a constant rate it depends on the last step which experts are alive.
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=fit.steps)
    generator = torch.Generator().manual_seed(fit.seed)
    curve = []
    try:
        with RoutingShaper(
            model, optimizer, form=fit.form, cost=fit.cost, lam=fit.lam, every=fit.every, seed=fit.seed
        ) as shaper:
            before = _measure(model, shaper, texts, fit.batch)
            model.train()
            for step in range(1, fit.steps + 1):
                ids, mask, tasks = _draw(texts, fit.batch, generator)
                loss = _nats(model, ids, mask)
                term = shaper.loss(mask, task_loss=loss if fit.form == "goodness" else None)
                if log is not None and step % 20 == 0:
                    log.append(step, shaper.report(tasks, mask))
                if not math.isfinite(loss.item()):
                    raise ConfigError(
                        f"step {step}: the loss is {loss.item()}; try a lower lr, or look at the weights"
                    )
                optimizer.zero_grad()
                (loss + term).backward()
                optimizer.step()
                schedule.step()
                curve.append(loss.item())
                if on_step:
                    on_step({"step": step, "steps": fit.steps, "loss": curve[-1], "shaping": term.item()})
            model.eval()
            after = _measure(model, shaper, texts, fit.batch)
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(wanted[name])
    return {"curve": curve, "before": before, "after": after}


def _nats(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    logits = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
    targets = ids[:, 1:].masked_fill(~mask[:, 1:], -100)
    return nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets.flatten())


def _draw(texts: Sequence[Windows], size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    tasks = torch.randint(len(texts), (size,), generator=generator)
    rows = []
    for task in tasks.tolist():
        starts = texts[task].starts
        row = int(torch.randint(len(starts) - 1, (1,), generator=generator))
        rows.append(texts[task].input_ids[starts[row] : starts[row + 1]])
    return *_padded(rows), tasks


def _padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True), mask


@torch.no_grad()
def _measure(model: nn.Module, shaper: RoutingShaper, texts: Sequence[Windows], size: int) -> dict[str, Any]:
    # The same windows before and after: the first of each task.
    losses = []
    for task, text in enumerate(texts):
        count = min(size, len(text.starts) - 1)
        rows = [text.input_ids[text.starts[i] : text.starts[i + 1]] for i in range(count)]
        ids, mask = _padded(rows)
        losses.append(float(_nats(model, ids, mask)))
        shaper.observe(torch.full((count,), task), mask)
    return {**shaper.report(), "losses": losses}
