"""The arms of the benchmark of domains: texts and states, and everything that is learnt and kept."""

import json
import pydoc_data.topics
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.domain_plan import DELTAS, MERGES, OTHER, PIECE, PLANS, Plan
from benchmarks.trial_texts import TRIAL as DOMAINS
from tether.causal.loading import load
from tether.delta.adapter import Adapter
from tether.delta.adapter_learning import fit_adapter, meet_adapter
from tether.delta.adapter_training import AdapterFit
from tether.delta.anchor import anchor_text, feature_layers
from tether.delta.attached import Attached
from tether.delta.background import write_background
from tether.delta.budget import Budget
from tether.delta.cache import StateCache
from tether.delta.delta import Delta
from tether.delta.learning import fit_delta
from tether.delta.shards import cached
from tether.delta.training import Fit
from tether.delta.windows import Windows, window_text
from tether.demo.corpora import BASE_TEXTS, documents
from tether.runs import Usage
from tether.store.reader import CheckpointReader
from tether.store.writer import write_safetensors

__all__ = ["Bench", "learn_in_a_process"]


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
            path = self.folder / "learnt" / f"{arm}-{domain}-{seed}"
            shutil.rmtree(path, ignore_errors=True)  # of a run that was stopped before it was recorded
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

    def arms(self) -> list[str]:
        """List the adapters that are learnt on every seed.

        Returns:
            Names; that of replay has its multiplier.
        """
        return [f"replay-{self.plan.beta:g}" if name == "replay" else name for name in self.plan.adapters]

    def extras(self) -> list[str]:
        """List the adapters that are learnt on the first seed only.

        Returns:
            Names, one for each other multiplier of replay.
        """
        return [*self.plan.once, *(f"replay-{beta:g}" for beta in self.plan.betas)]


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
