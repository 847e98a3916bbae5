"""Three ways to teach the abduction head a domain: LoRA on it, a free residual beside it, a new head on a KL leash.

The second source document calls the first two "completely infeasible" and argues for the third. Here they get the same
states, tokens, passes and batches, the free ones their best of four learning rates on documents kept aside, and are
compared as they were learnt and within the leash: each is shrunk along its ray until the mean softmax KL on base text,
other than that of the fit, is at most the leash's. Domains and base text are those of `benchmarks.evidence`.
"""

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.corpus import states_folder
from benchmarks.evidence import NAMES, Trial
from benchmarks.fresh_texts import split
from tether.causal.softmax import softmax_kl
from tether.delta.head import Reference
from tether.delta.learning import learn_delta
from tether.delta.objective import CandidateSoftmax, mean_probability
from tether.delta.output_head import output_head
from tether.delta.shards import cached
from tether.delta.source import Source
from tether.delta.training import Fit
from tether.delta.windows import window_text
from tether.scale import meet_budget

__all__ = ["rows"]

Row = dict[str, Any]
Move = Callable[[Tensor], Tensor]
"""From the states z at n tokens, shape (n, H), to the change of loc of U there, shape (n, C)."""
RANK = 16
HIDDEN = 64
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
BUDGET = 0.05
LEARNT, LOOKED, TESTED = 10_000, 1_500, 3_000
"""Tokens of a domain to learn from, to choose the rate on, and of each text to measure on."""


class Text(NamedTuple):
    """Tokens to measure on: base quantities, next tokens."""

    at: Reference
    targets: Tensor


class LowRank(nn.Module):
    """LoRA on the location's matrix: A as PEFT draws it, B zero."""

    def __init__(self, size: int, generator: torch.Generator) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(RANK, size))
        nn.init.kaiming_uniform_(self.down, a=5**0.5, generator=generator)
        self.up = nn.Parameter(torch.zeros(size, RANK))

    def forward(self, states: Tensor) -> Tensor:
        return states @ self.down.T @ self.up.T


class Residual(nn.Module):
    """A module beside the head, of one hidden layer: it can bend where a matrix cannot."""

    def __init__(self, size: int, generator: torch.Generator) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(size, HIDDEN), nn.Linear(HIDDEN, size)
        nn.init.kaiming_uniform_(self.down.weight, a=5**0.5, generator=generator)
        for part in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(part)

    def forward(self, states: Tensor) -> Tensor:
        moved: Tensor = self.up(nn.functional.gelu(self.down(states)))
        return moved


FREE: dict[str, type[nn.Module]] = {"LoRA on the head": LowRank, "free residual": Residual}
LEASHED = "new head on a leash"


def rows(*, fast: bool) -> Iterator[Row]:
    """Learn three domains in each way, alone and added up.

    Args:
        fast: a fraction of the text, one seed.

    Yields:
        Rows of case, metric, ours, baseline, ratio, runs; the baseline is the base's loss, or the leash.
    """
    torch.set_num_threads(1)
    domains = (NAMES[1], NAMES[8], NAMES[9])
    with states_folder() as folder:
        for seed in map(int, os.environ.get("TETHER_SEEDS", "0" if fast else "0 1").split()):
            trial = Trial(folder, seed, fast=fast)
            lab = _Lab(trial, fast=fast)
            moves: dict[str, dict[str, Move]] = {}
            for name in domains:
                for way in (*FREE, LEASHED):
                    started = time.process_time()
                    move = lab.leashed(name) if way == LEASHED else lab.free(name, way)
                    spent = time.process_time() - started
                    yield from lab.compared(name, way, move, spent)
                    moves.setdefault(way, {})[name] = lab.shrunk(move)
            for way, each in moves.items():
                yield from lab.added(way, each)


class _Lab:
    """Texts of one seed, and what is learnt from and measured on them."""

    def __init__(self, trial: Trial, *, fast: bool) -> None:
        self.trial, self.model, self.output = trial, trial.model, output_head(trial.model)
        self.learnt, self.tested = (1_500, 600) if fast else (LEARNT, TESTED)
        self.cache = trial.folder.parent / "cache"
        self.base = self.text([text for texts in trial.general.values() for text in texts], "base text")
        self.case = f"seed {trial.seed}"

    def text(self, documents: Sequence[str], name: str) -> Text:
        windows = window_text(documents, self.trial.tokenizer, tokens=self.tested, name=name)
        source = Source(self.model, cached(self.model, windows, self.cache))
        return Text(source.take(torch.arange(len(source))), source.targets)

    def documents(self, name: str) -> tuple[list[str], list[str]]:
        both = split(name, self.trial.seed, self.trial.tokenizer)
        return list(both.train), list(both.held_out)

    def leashed(self, name: str) -> Move:
        """Learn a new W' under the budget, as `tether learn` does, in the chart of the document's matrices."""
        delta = learn_delta(
            self.model, self.trial.tokenizer, self.documents(name)[0], base_texts=self.trial.base, name=name,
            budget=BUDGET, chart="matrix", location_only=True, gate=False, tokens=self.learnt,
            cache_folder=self.cache, seed=self.trial.seed,
        )  # fmt: skip
        return lambda states: states @ delta.second.T

    @torch.enable_grad()
    def free(self, name: str, way: str) -> Move:
        """Learn without any constraint, at the rate that is best on documents kept aside."""
        train = self.documents(name)[0]
        count = max(1, len(train) // 8)
        aside = self.text(train[:count], name)
        windows = window_text(train[count:], self.trial.tokenizer, tokens=self.learnt, name=name)
        source = Source(self.model, cached(self.model, windows, self.cache))
        tried = [self._learnt(source, way, rate) for rate in RATES]
        losses = [self.measured(aside, move)[0] for move in tried]
        return tried[losses.index(min(losses))]

    # The loss, passes, batches and schedule of a delta's fit, without its constraint.
    def _learnt(self, source: Source, way: str, rate: float) -> Move:
        fit, generator = Fit(lr=rate), torch.Generator().manual_seed(self.trial.seed)
        prob = mean_probability(self.output, source.some(fit.probe // 4).loc)
        counts = torch.bincount(source.targets, minlength=len(prob)).to(prob) / len(source)
        loss = CandidateSoftmax(self.output, prob + counts, size=fit.candidates, sampled=fit.sampled)
        module = FREE[way](self.model.abduction.loc.in_features, generator)
        optimizer = torch.optim.Adam(module.parameters(), lr=rate, betas=(0.9, 0.99))
        size = min(fit.batch, max(32, len(source) // 32))
        steps = fit.epochs * -(-len(source) // size)
        warm = max(1, steps // 8)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda n: min((n + 1) / warm, 0.5 * (1 + math.cos(math.pi * n / steps)))
        )
        for _ in range(fit.epochs):
            for batch in source.batches(size, generator):
                at = source.take(batch)
                optimizer.zero_grad()
                loss(at.loc + module(at.states), source.next_tokens(batch), generator).backward()
                optimizer.step()
                schedule.step()
        return module.requires_grad_(False)

    @torch.no_grad()
    def measured(self, text: Text, move: Move | None) -> tuple[float, float]:
        """Give the mean loss and the mean softmax KL from the base."""
        losses, drifts = [], []
        moved = text.at.loc if move is None else text.at.loc + move(text.at.states)
        laws = zip(self.output.log_prob(text.at.loc), self.output.log_prob(moved), strict=True)
        start = 0
        for before, after in laws:
            targets = text.targets[start : start + len(after)]
            losses.append(-after.gather(-1, targets.unsqueeze(-1)))
            drifts.append(softmax_kl(before, after))
            start += len(after)
        return tuple(float(torch.cat(parts).double().mean()) for parts in (losses, drifts))  # type: ignore[return-value]

    def shrunk(self, move: Move) -> Move:
        """Shrink a move along its ray until it drifts on base text no more than the leash allows."""
        met = meet_budget(
            lambda factor: self.measured(self.base, _times(move, factor))[1], BUDGET, ceiling=1.0
        )
        return _times(move, met.scale)

    def compared(self, name: str, way: str, move: Move, spent: float) -> Iterator[Row]:
        """Measure a way as it was learnt, and at the leash's drift."""
        text = self.text(self.documents(name)[1], name)
        base, own = self.measured(text, None)[0], self.measured(self.base, None)[0]
        for said, each in (("as learnt", move), ("within the leash", self.shrunk(move))):
            case = f"{self.case}, {name}, {way}, {said}"
            nll, elsewhere = self.measured(text, each)[0], self.measured(self.base, each)
            yield _row(case, "NLL of the domain", nll, base)
            yield _row(case, "NLL of base text", elsewhere[0], own)
            yield _row(case, "KL on base text", elsewhere[1], BUDGET)
        yield _row(f"{self.case}, {name}, {way}", "CPU seconds", spent, None)

    def added(self, way: str, moves: dict[str, Move]) -> Iterator[Row]:
        """Add up what was learnt alone, each at the leash's drift."""

        def together(states: Tensor) -> Tensor:
            return sum((move(states) for move in moves.values()), torch.zeros(()))

        case = f"{self.case}, three domains added, {way}"
        yield _row(case, "KL on base text", self.measured(self.base, together)[1], BUDGET)
        for name, move in moves.items():
            text = self.text(self.documents(name)[1], name)
            yield _row(
                case, f"NLL {name}, alone", self.measured(text, together)[0], self.measured(text, move)[0]
            )


def _times(move: Move, factor: float) -> Move:
    return lambda states: factor * move(states)


def _row(case: str, metric: str, ours: float, baseline: float | None) -> Row:
    ratio = ours / baseline if baseline else None
    return {"case": case, "metric": metric, "ours": ours, "baseline": baseline, "ratio": ratio, "runs": 1}
