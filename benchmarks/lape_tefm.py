"""LAPE-TEFM by its recipes, literal and corrected, every switch alone: two fine-tunes, and a vision-language pair.

The trace of the Hessian is measured before and after, with a verdict on the document's claim, and so is the bound on
generalisation that it draws from it.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from contextlib import chdir
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import lape_vision
from benchmarks.finetune import BASE, SPLITS, FineTune, fine_tuned, losses, windows
from benchmarks.lape_arms import arms, rivals, seeds
from benchmarks.lape_curvature import curvature_rows, linear_weights
from benchmarks.lape_table import Kept
from tether.causal.loading import cache_folder, load_backbone, resolve
from tether.demo.corpora import DOMAINS, documents
from tether.merge.check import load_checkpoint
from tether.merge.observation import observe
from tether.merge.plan import make_plan
from tether.merge.probes import encode_probes, read_probes
from tether.merge.recipe import Recipe, read_recipe
from tether.merge.run import merge
from tether.merge.tefm.observed import parse_encoding
from tether.merge.tefm.trace import Trace, hessian_trace
from tether.store.reader import CheckpointReader

__all__ = ["rows"]

logger = logging.getLogger(__name__)

Row = dict[str, Any]

RECIPE = Path(__file__).parents[1] / "recipes" / "lape-tefm.yaml"
PAIR = ("code", "tables")
ENCODINGS = [parse_encoding("paper"), parse_encoding("position")]
TRACED = ("average", "regression mean", "literal", "corrected")
"""Merges whose Hessian is measured."""
VALIDATION, ROWS = 6, 2
"""Windows of each domain on which rivals are tuned, and windows a pass where a Hessian is measured."""


def rows(*, fast: bool) -> list[Row]:
    """Run both parts on one thread; what an earlier run measured of the fine-tunes is kept in the cache folder.

    Args:
        fast: one seed, both forms without the switches, and fine-tunes of a few steps.

    Returns:
        Rows of case, metric, ours, baseline, ratio, runs.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [*lape_vision.rows(fast=fast), *text_rows(fast=fast)]
    finally:
        torch.set_num_threads(threads)


def text_rows(*, fast: bool) -> list[Row]:
    """Merge two fine-tunes by every arm.

    Args:
        fast: a fraction of the work.

    Returns:
        Rows: mean NLL of both domains against the best tuned rival of each seed, traces, gaps.
    """
    trials = [_Trial(seed, fast).run() for seed in seeds(fast=fast)]
    found = []
    for name in dict.fromkeys(name for trial in trials for name in trial["merges"]):
        here = [trial for trial in trials if name in trial["merges"]]
        mine = [_both(trial["merges"][name]) for trial in here]
        theirs = [_both(trial["merges"][_best(trial)]) for trial in here]
        gap = torch.cat(mine) - torch.cat(theirs)
        row = _row(
            f"two fine-tunes, {name}; baseline: best of average, task arithmetic and TIES",
            "mean NLL of both domains, nats a token",
            [float(each.mean()) for each in mine],
            [float(each.mean()) for each in theirs],
        )
        row["difference"] = [float(gap.mean()), float(gap.std() / len(gap) ** 0.5)]
        texts = torch.tensor(
            [[float(torch.tensor(part).mean()) for part in trial["merges"][name]] for trial in here]
        )
        row["texts"] = dict(zip((*PAIR, "wiki"), texts.mean(0).tolist(), strict=True))
        row["refine"] = [trial["refine"].get(name) for trial in here]
        found.append(row)
    return found + curvature_rows("two fine-tunes", [trial["curvature"] for trial in trials])


def _both(figures: list[list[float]]) -> Tensor:
    return torch.tensor(figures[:2]).flatten()


def _best(trial: dict[str, Any]) -> str:
    names = [name for name in trial["merges"] if name in {"average", "task arithmetic", "TIES"}]
    return min(names, key=lambda name: float(_both(trial["merges"][name]).mean()))


def _row(case: str, metric: str, ours: list[float], baseline: list[float]) -> Row:
    mine, theirs = sum(ours) / len(ours), sum(baseline) / len(baseline)
    return {
        "case": case,
        "metric": metric,
        "ours": mine,
        "baseline": theirs,
        "ratio": mine / theirs,
        "runs": ours,
    }


class _Trial:
    """Two fine-tunes of one seed in a folder of their own, whose figures outlive an interruption."""

    def __init__(self, seed: int, fast: bool) -> None:
        self.seed, self.fast = seed, fast
        self.steps = {"steps": 4} if fast else {}
        self.samples, self.tests = (2, 2) if fast else (8, 16)
        name = FineTune(PAIR[0], seed, **self.steps).name.removeprefix(f"finetune-{BASE}-{PAIR[0]}-")
        cache = cache_folder().absolute()
        self.folder = cache / f"lape-tefm-{'-'.join(PAIR)}-{name}-{self.samples}-{self.tests}"
        self.kept = Kept(self.folder / "table.json")

    def run(self) -> dict[str, Any]:
        """Give all figures of the seed: losses of every merge by window, what refining found, curvatures."""
        tuned = {domain: fine_tuned(FineTune(domain, self.seed, **self.steps)) for domain in PAIR}
        _, tokenizer = load_backbone(BASE)
        self.sets = [windows(domain, "test", tokenizer, self.tests) for domain in PAIR]
        self.sets.append(windows("wiki", "test", tokenizer, max(1, self.tests // 2)))
        few = 2 if self.fast else VALIDATION
        self.validation = [windows(domain, "validation", tokenizer, few) for domain in PAIR]
        self.train = [windows(domain, "train", tokenizer, self.tests, seed=self.seed) for domain in PAIR]
        runs = self.folder / "runs"
        (runs / "observed").mkdir(parents=True, exist_ok=True)
        for domain, folder in tuned.items():
            link = runs / domain
            if not link.is_symlink():
                link.symlink_to(folder.absolute(), target_is_directory=True)
        with chdir(self.folder):
            self._write_texts()
            for domain in PAIR:
                self._observe(domain)
            figures = self._figures()
        shutil.rmtree(runs)
        return figures

    def _write_texts(self) -> None:
        parts = {domain: _split(domain, "probe") for domain in PAIR}
        probes = [text for domain in PAIR for text in parts[domain][: self.samples]]
        _write(Path("runs/probes.jsonl"), probes)
        for domain in PAIR:
            _write(Path(f"runs/{domain}.jsonl"), _split(domain, "validation")[:16])

    def _observe(self, domain: str) -> None:
        model, tokenizer = load_backbone(f"runs/{domain}", dtype=torch.float32)
        probes = encode_probes(read_probes("runs/probes.jsonl"), tokenizer)
        files = CheckpointReader(f"runs/{domain}").fingerprint()
        given = {"seed": self.seed, "checkpoint": files, "encodings": ENCODINGS}
        observe(model, probes, f"runs/observed/{domain}", paths=4 if self.fast else 8, **given)

    def _figures(self) -> dict[str, Any]:
        plain = read_recipe(RECIPE)
        base = resolve(BASE)
        found: dict[str, Any] = {"merges": {}, "refine": {}, "curvature": {}}
        own = {"C": base} | {f"fine-tune {domain}": f"runs/{domain}" for domain in PAIR}
        for name, folder in own.items():
            found["merges"][name] = self.kept.value(f"test {name}", lambda f=folder: self._losses(f))
        for number, domain in enumerate(PAIR):
            found["curvature"][f"fine-tune {domain}"] = self.kept.value(
                f"curvature {domain}", lambda d=domain, n=number: self._curvature(f"runs/{d}", [n])
            )
        made = {}
        for name, recipes in rivals(plain, base, "embed_tokens").items():
            tried = recipes[:1] if self.fast else recipes
            scores = [
                self._value(f"validation {name} {i}", each) for i, each in enumerate(tried[1:] and tried)
            ]
            made[name] = tried[min(range(len(scores)), key=scores.__getitem__, default=0)]
        text = {domain: f"runs/{domain}.jsonl" for domain in PAIR}
        refine = {"probes": "runs/probes.jsonl", "text": text, "window": 128, "tokens": 1024}
        # Every switch on the first seed; the forms on all.
        chosen = arms(fast=self.fast or self.seed > 0, words=True)
        made |= {name: arm.recipe(plain, refine) for name, arm in chosen.items()}
        for name, recipe in made.items():
            if self.fast and (recipe.refine or name in {"task arithmetic", "TIES"}):
                continue
            one = self.kept.value(f"merge {name}", lambda n=name, r=recipe: self._merged(n, r))
            found["merges"][name] = one["losses"]
            for part in ("refine", "curvature"):
                if one[part]:
                    found[part][name] = one[part]
        return found

    # Merges of equal bytes are measured once.
    def _merged(self, name: str, recipe: Recipe) -> dict[str, Any]:
        target = Path("runs/merged")
        report = merge(make_plan(recipe), target, threads=1)
        key = hashlib.sha256(json.dumps(report["tensors"], sort_keys=True).encode()).hexdigest()
        found = {"losses": self.kept.value(f"losses {key}", lambda: self._losses(str(target)))}
        found |= {"refine": report.get("refine"), "curvature": None}
        if name in TRACED[self.fast * 2 :]:
            found["curvature"] = self._curvature(str(target), [0, 1])
        shutil.rmtree(target)
        return found

    def _value(self, name: str, recipe: Recipe) -> float:
        def make() -> float:
            target = Path("runs/merged")
            merge(make_plan(recipe), target, threads=1)
            model = load_checkpoint(target)
            shutil.rmtree(target)
            return float(torch.stack([losses(model, part).mean() for part in self.validation]).mean())

        return self.kept.value(name, make)

    def _losses(self, folder: str) -> list[list[float]]:
        model = load_checkpoint(folder)
        return [losses(model, part).tolist() for part in self.sets]

    # Of a model on its own domain, or of a merge on both.
    def _curvature(self, folder: str, domains: Sequence[int]) -> list[dict[str, Any]]:
        model = load_checkpoint(folder)
        found = []
        for number in domains:
            parts = self.validation[number][: 1 if self.fast else 4].split(ROWS)
            found.append(
                {
                    "domain": PAIR[number],
                    "train": float(losses(model, self.train[number]).mean()),
                    "test": float(losses(model, self.sets[number]).mean()),
                    "samples": FineTune(PAIR[number], self.seed, **self.steps).steps * 2,
                    "trace": list(_trace(model, parts, 2 if self.fast else 8, self.seed).draws),
                }
            )
        return found


def _trace(model: Any, parts: Sequence[Tensor], vectors: int, seed: int) -> Trace:
    weights = linear_weights(model)

    def loss(tokens: Tensor) -> Callable[[], Tensor]:
        return lambda: model(input_ids=tokens, labels=tokens, use_cache=False).loss

    generator = torch.Generator().manual_seed(seed)
    return hessian_trace([loss(part) for part in parts], weights, vectors=vectors, generator=generator)


def _split(domain: str, split: str) -> list[str]:
    texts = documents(DOMAINS[domain])
    low, high = (round(len(texts) * share) for share in SPLITS[split])
    return texts[low:high]


def _write(file: Path, texts: list[str]) -> None:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
