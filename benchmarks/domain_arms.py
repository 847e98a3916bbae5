"""The work of the benchmark of domains: learn one arm, and measure many at once on a text."""

import json
import pydoc_data.topics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tether.causal.loading import load
from tether.delta.adapter import Adapter, Attached
from tether.delta.adapter_drift import logits
from tether.delta.adapter_learning import fit_adapter, meet_adapter
from tether.delta.adapter_serving import serve
from tether.delta.adapter_training import AdapterFit
from tether.delta.anchor import anchor_text, feature_layers
from tether.delta.background import write_background
from tether.delta.budget import Budget
from tether.delta.cache import StateCache, cached, hidden_states
from tether.delta.delta import Delta
from tether.delta.fusion import fuse
from tether.delta.learning import fit_delta
from tether.delta.measure import Measurement, Variant, measure
from tether.delta.objective import chunk_rows, softmax_shift
from tether.delta.training import Fit
from tether.delta.weights import optimise_weights
from tether.delta.windows import Windows, window_text
from tether.demo.corpora import BASE_TEXTS, DOMAINS, documents
from tether.runs import Usage
from tether.store.reader import CheckpointReader
from tether.store.writer import write_safetensors

__all__ = ["ADAPTERS", "DELTAS", "MERGES", "OTHER", "PLANS", "Bench", "Plan", "learn_in_a_process"]

OTHER = "manual"
"""Python's language reference: general prose for no calibration, near to the domain of code in subject."""
PIECE = 1200
DELTAS = {"delta": ("last", False), "delta-multi": ("multi", False), "delta-free": ("last", True)}
ADAPTERS = ("lora", "lora-3", "replay", "leashed")
MERGES = {
    "cat": {"combination_type": "cat"},
    "linear": {"combination_type": "linear"},
    "ties": {"combination_type": "ties", "density": 0.5},
    "dare_ties": {"combination_type": "dare_ties", "density": 0.5},
    "average": {"combination_type": "cat"},
}
CHARTS = ("linear", "symmetric", "geodesic", "rootkl")


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How much is done; a folder holds the results of one plan.

    Attributes:
        train: domain tokens learnt from.
        test: tokens measured on, each text.
        base: base documents, of both kinds together, of which 40 % are held out to meet budgets on.
        probe: base tokens on which an adapter meets its budget.
        budget: mean softmax KL on base text, nats.
        betas: multipliers tried for KL replay; the best at the budget is what a user would tune by hand.
        adapters: which of `ADAPTERS`.
        deltas: which of `DELTAS`, `delta` among them.
        seeds: how many.
    """

    train: int = 30_000
    test: int = 5_000
    base: int = 150
    probe: int = 2048
    budget: float = 0.05
    betas: tuple[float, ...] = (0.3, 1.0, 3.0)
    adapters: tuple[str, ...] = ADAPTERS
    deltas: tuple[str, ...] = tuple(DELTAS)
    seeds: int = 3


PLANS = {
    "full": Plan(),
    "reduced": Plan(
        train=2_500,
        test=320,
        base=40,
        probe=320,
        betas=(1.0,),
        adapters=("lora", "replay", "leashed"),
        seeds=1,
    ),
    "fast": Plan(
        train=1_100,
        test=256,
        base=24,
        probe=256,
        betas=(1.0,),
        adapters=("lora", "leashed"),
        deltas=("delta",),
        seeds=1,
    ),
}


class Bench:
    """Texts, states and artifacts of one plan in one folder.

    Args:
        plan: how much.
        folder: where everything is kept.
    """

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan, self.folder = plan, folder
        self.model, self.tokenizer = load("smollm2-135m")
        self.texts, self.base_parts = self._split()

    def _split(self) -> tuple[dict[str, dict[str, list[str]]], list[list[str]]]:
        texts: dict[str, dict[str, list[str]]] = {}
        for name, recipe in DOMAINS.items():
            every = documents(recipe)
            test = self._first(every, self.plan.test)
            texts[name] = {"test": test, "train": self._first(every[len(test) :], self.plan.train)}
        general: list[str] = []
        for name, recipe in BASE_TEXTS.items():
            # One piece a document: base documents are then independent of each other.
            every = [text[:PIECE] for text in documents(recipe)]
            test = self._first(every, self.plan.test)
            texts[name] = {"test": test}
            general += every[len(test) : len(test) + self.plan.base // len(BASE_TEXTS)]
        topics = [text[:PIECE] for text in pydoc_data.topics.topics.values() if len(text) > PIECE]
        texts[OTHER] = {"test": self._first(documents(lambda: topics), self.plan.test)}
        spread = documents(lambda: general)
        cut = round(0.6 * len(spread))
        return texts, [spread[:cut], spread[cut:]]

    def _first(self, every: list[str], tokens: int) -> list[str]:
        counted = 0
        for number, text in enumerate(every, start=1):
            counted += len(self.tokenizer(text, verbose=False)["input_ids"])
            if counted >= tokens:
                return every[:number]
        return every

    def states(self, part: str, layers: tuple[int, ...] = ()) -> StateCache:
        """Give states of a domain's training text, of `base`, or of `held-out`; computed once, then read.

        Args:
            part: which text.
            layers: middle layers beside the last.

        Returns:
            The cache.
        """
        of = {"base": 0, "held-out": 1}
        text = self.base_parts[of[part]] if part in of else self.texts[part]["train"]
        tokens = None if part in of else self.plan.train
        windows = window_text(text, self.tokenizer, tokens=tokens, name=part)
        (self.folder / "states").mkdir(exist_ok=True, parents=True)
        return cached(self.model, windows, self.folder / "states", layers=layers)

    def read(self, part: str, features: str) -> dict[str, Any]:
        """Compute states of a text, so that fits find them.

        Args:
            part: as of `states`.
            features: `last` or `multi`.

        Returns:
            Tokens, and CPU seconds.
        """
        self.background()
        started = time.process_time()
        cache = self.states(part, feature_layers(self.model, features))
        return {"cpu": time.process_time() - started, "tokens": len(cache.windows.input_ids)}

    def background(self) -> Tensor:
        """Give what the base writes of itself, written once: gates are told apart from it.

        Returns:
            States, see `tether.delta.background`.
        """
        path = self.folder / "background.safetensors"
        if not path.is_file():
            write_safetensors(path, {"states": write_background(self.model)})
        return CheckpointReader(path).tensor("states")

    def test(self, text: str) -> Windows:
        """Give a text to measure on.

        Args:
            text: a domain, a base text, or `OTHER`.

        Returns:
            Its windows.
        """
        return window_text(self.texts[text]["test"], self.tokenizer, tokens=self.plan.test, name=text)

    def learn(self, arm: str, domain: str, seed: int) -> dict[str, Any]:
        """Learn one arm and keep it.

        Args:
            arm: of `DELTAS` or `ADAPTERS`, for replay with its multiplier: `replay-1`.
            domain: which.
            seed: of the fit.

        Returns:
            What it cost, and its record without the curve.
        """
        kind, _, beta = arm.partition("-")
        budget = Budget(value=self.plan.budget)
        started = time.process_time()
        if kind == "delta":
            features, free = DELTAS[arm]
            layers = feature_layers(self.model, features)
            caches = [self.states(part, layers) for part in (domain, "base", "held-out")]
            anchor = anchor_text(self.model, *caches[1:], background=self.background())
            ready = time.process_time()
            limit = Budget(value=None, penalty=0.0) if free else budget
            made = fit_delta(self.model, caches[0], anchor, domain, Fit(budget=limit, seed=seed))
            spent = time.process_time() - ready
            path = self.folder / "learnt" / f"{arm}-{domain}-{seed}.delta"
            path.parent.mkdir(exist_ok=True)
            made.save(path)
            size = path.stat().st_size
        else:
            fit = AdapterFit(budget=budget if kind == "leashed" else None, probe=self.plan.probe, seed=seed)
            if kind == "replay":
                fit = replace(fit, replay=float(beta))
            elif arm == "lora-3":
                fit = replace(fit, epochs=3)
            caches = [self.states(part) for part in (domain, "base", "held-out")]
            background = self.background()
            ready = time.process_time()
            learnt = fit_adapter(self.model, *caches, domain, fit, background=background)
            spent = time.process_time() - ready
            made = learnt
            if kind != "leashed":
                attached = Attached.of(self.model, {domain: learnt})
                strict = replace(budget, stretch=1.0)
                met = meet_adapter(self.model, attached, domain, caches[2], strict, probe=self.plan.probe)
                learnt.record["shrunk"] = met
            path = self.folder / "learnt" / f"{arm}-{domain}-{seed}"
            learnt.save(path)
            size = (path / "adapter_model.safetensors").stat().st_size
        record = {key: value for key, value in made.record.items() if key != "curve"}
        return {"cpu_fit": spent, "cpu_ready": ready - started, "bytes": size, "record": record}

    def adapter(self, arm: str, domain: str, seed: int) -> Adapter:
        """Read a learnt adapter.

        Args:
            arm: as of `learn`.
            domain: which.
            seed: which.

        Returns:
            The adapter.
        """
        return Adapter.load(self.folder / "learnt" / f"{arm}-{domain}-{seed}")

    def deltas(self, arm: str, seed: int) -> list[Delta]:
        """Read the deltas of all domains.

        Args:
            arm: as of `learn`.
            seed: which.

        Returns:
            One a domain.
        """
        return [Delta.load(self.folder / "learnt" / f"{arm}-{name}-{seed}.delta") for name in DOMAINS]

    def merged(self, seed: int) -> tuple[Attached, list[str]]:
        """Put the plain LoRAs of all domains, and PEFT's merges of them, into one twin of the backbone.

        Args:
            seed: which.

        Returns:
            The twin, and the merges' names.
        """
        attached = Attached.of(self.model, {name: self.adapter("lora", name, seed) for name in DOMAINS})
        slots = [attached.slot(name) for name in DOMAINS]
        for merge, options in MERGES.items():
            weight = 1 / len(DOMAINS) if merge == "average" else 1.0
            with torch.random.fork_rng(devices=[]):
                torch.random.manual_seed(seed)
                attached.peft.add_weighted_adapter(
                    slots, [weight] * len(slots), adapter_name=attached.slot(merge), **options
                )
        attached.peft.eval().requires_grad_(False)
        return attached, list(MERGES)

    def shrink(self, seed: int) -> dict[str, Any]:
        """Find the factor at which each merge is at the budget.

        Args:
            seed: which.

        Returns:
            For each merge what `meet_adapter` gives.
        """
        attached, names = self.merged(seed)
        budget = Budget(value=self.plan.budget, stretch=1.0)
        held_out = self.states("held-out")
        return {
            name: meet_adapter(self.model, attached, name, held_out, budget, probe=self.plan.probe)
            for name in names
        }

    def weigh(self, seed: int) -> dict[str, Any]:
        """Optimise the weights of the deltas on their training text.

        Args:
            seed: which.

        Returns:
            Weights by domain, and the record.
        """
        deltas = self.deltas("delta", seed)
        domains = {name: self.states(name) for name in DOMAINS}
        found = optimise_weights(
            self.model, deltas, domains, self.states("base"), budget=Budget(value=self.plan.budget), seed=seed
        )
        return {"weights": {d.name: w for d, w in found.weights.items()}, "record": found.record}

    def runs(self, seed: int, shrunk: Mapping[str, Any]) -> dict[str, Callable[[Tensor], Tensor]]:
        """List the arms that change the backbone, as functions from ids to hidden states.

        Args:
            seed: which.
            shrunk: of `shrink`.

        Returns:
            By the name of the arm: `lora:code`, `lora*s:code`, `merge ties`, `merge*s ties`.
        """
        found: dict[str, Callable[[Tensor], Tensor]] = {}

        def run(attached: Attached, name: str, factor: float) -> Callable[[Tensor], Tensor]:
            def states(ids: Tensor) -> Tensor:
                attached.rescale(name, factor)
                made: Tensor = attached.states(name, ids).last_hidden_state
                return made

            return states

        for arm in self.arms():
            learnt = {name: self.adapter(arm, name, seed) for name in DOMAINS}
            attached = Attached.of(self.model, learnt)
            for name in DOMAINS:
                found[f"{arm}:{name}"] = run(attached, name, 1.0)
                if "shrunk" in learnt[name].record:
                    found[f"{arm}*s:{name}"] = run(attached, name, learnt[name].record["shrunk"]["factor"])
        attached, merges = self.merged(seed)
        for name in merges:
            found[f"merge {name}"] = run(attached, name, 1.0)
            found[f"merge*s {name}"] = run(attached, name, shrunk[name]["factor"])
        return found

    def arms(self) -> list[str]:
        """List the adapters that are learnt.

        Returns:
            Names, one for each multiplier of replay.
        """
        betas = [f"replay-{beta:g}" for beta in self.plan.betas]
        return [arm for name in self.plan.adapters for arm in (betas if name == "replay" else [name])]

    @torch.no_grad()
    def measure_runs(self, text: str, runs: Mapping[str, Callable[[Tensor], Tensor]]) -> dict[str, Any]:
        """Measure arms that change the backbone, in one pass over a text that shares the base's side.

        Args:
            text: which.
            runs: of `runs`.

        Returns:
            A cell for each arm.
        """
        windows = self.test(text)
        count = len(windows.input_ids)
        base_nll = torch.zeros(count)
        nll, kl = torch.zeros(len(runs), count), torch.zeros(len(runs), count)
        for batch in windows.batches(4):
            where = windows.positions(batch)
            target = windows.targets[where].clamp(min=0).unsqueeze(-1)
            before = hidden_states(self.model, batch)[batch.mask]
            after = [run(batch.input_ids)[batch.mask] for run in runs.values()]
            for index in torch.arange(len(before)).split(chunk_rows(self.model.action.weight)):
                base = logits(self.model, before[index])
                log_prob = base.log_softmax(-1)
                base_nll[where[index]] = -log_prob.gather(-1, target[index]).squeeze(-1)
                for row, states in enumerate(after):
                    shift = logits(self.model, states[index]) - base
                    moved = shift.gather(-1, target[index]).squeeze(-1)
                    distance, normaliser = softmax_shift(log_prob, shift)
                    kl[row, where[index]] = distance
                    nll[row, where[index]] = base_nll[where[index]] - moved + normaliser
        cells = {
            arm: _cell(windows.documents, windows.targets >= 0, nll[i], kl[i]) for i, arm in enumerate(runs)
        }
        return {"base": _cell(windows.documents, windows.targets >= 0, base_nll, torch.zeros(count)), **cells}

    def measure_deltas(self, text: str, seed: int, optimised: Mapping[str, float]) -> dict[str, Any]:
        """Measure the deltas: each alone, added in each chart, with optimised weights, gated.

        Args:
            text: which.
            seed: which.
            optimised: weight by domain.

        Returns:
            A cell for each arm.
        """
        windows, cells = self.test(text), {}
        for arm in self.plan.deltas:
            variants = {f"{arm}:{name}": Variant(row, "symmetric", False) for name, row in _alone()}
            ones = (1.0,) * len(DOMAINS)
            if arm == "delta":
                variants |= {f"{arm}, sum {chart}": Variant(ones, chart, False) for chart in CHARTS}
                chosen = tuple(optimised[name] for name in DOMAINS)
                variants[f"{arm}, optimised weights"] = Variant(chosen, "symmetric", False)
            else:
                variants[f"{arm}, sum symmetric"] = Variant(ones, "symmetric", False)
            variants[f"{arm}, gated"] = Variant(ones, "symmetric", True)
            fused = fuse(self.model, dict.fromkeys(self.deltas(arm, seed), 1.0), gated=True)
            cells |= _cells(
                windows, measure(self.model, fused.fusion, windows, list(variants.values())), variants
            )
        return cells

    def measure_gated(self, text: str, seed: int) -> dict[str, Any]:
        """Measure the leashed adapters behind their gates.

        Args:
            text: which.
            seed: which.

        Returns:
            A cell.
        """
        windows = self.test(text)
        served = serve(self.model, {self.adapter("leashed", name, seed): 1.0 for name in DOMAINS}, gated=True)
        variants = {"leashed, gated": Variant((1.0,) * len(DOMAINS), "symmetric", True)}
        return _cells(windows, measure(served, served.fusion, windows, list(variants.values())), variants)


def _alone() -> Iterator[tuple[str, tuple[float, ...]]]:
    for name, row in zip(DOMAINS, torch.eye(len(DOMAINS)).tolist(), strict=True):
        yield name, tuple(row)


def _cells(windows: Windows, result: Measurement, variants: Mapping[str, Variant]) -> dict[str, Any]:
    cells = {}
    for row, arm in enumerate(variants):
        nll = torch.zeros(len(result.documents))
        nll[result.scored] = result.nll[row]
        cells[arm] = _cell(windows.documents, result.scored, nll, result.softmax_kl[row])
        cells[arm]["gates"] = [float(rate) for rate in result.gates.mean(-1)] if variants[arm].gated else None
    return cells


# Sums by document, so that arms can be compared pair by pair.
def _cell(numbers: Tensor, scored: Tensor, nll: Tensor, kl: Tensor) -> dict[str, Any]:
    rank = torch.unique(numbers, return_inverse=True)[1]

    def sums(values: Tensor) -> list[float]:
        return torch.zeros(int(rank.max()) + 1).double().index_add(0, rank, values.double()).tolist()

    return {
        "nll": sums(nll * scored),
        "scored": sums(scored),
        "kl": sums(kl),
        "tokens": sums(torch.ones(len(kl))),
        "kl_p99": float(kl.quantile(0.99)),
        "kl_max": float(kl.max()),
    }


def learn_in_a_process(plan: str, folder: str, arm: str, domain: str, seed: int) -> str:
    """Learn one arm, for a process of its own: its peak memory is then the arm's.

    Args:
        plan: name of the plan.
        folder: of the results.
        arm: which.
        domain: which.
        seed: which.

    Returns:
        JSON of what `Bench.learn` gives, with peak memory.
    """
    torch.set_num_threads(1)
    bench = Bench(PLANS[plan], Path(folder))
    with Usage() as usage:
        found = bench.learn(arm, domain, seed)
    return json.dumps(found | {"peak_rss": usage.peak_rss_bytes})
