"""The demo: learn three domains under a budget, fuse them, measure, certify, report. Resumable by stage."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tether.causal.checkpoint import save_checkpoint
from tether.causal.loading import load
from tether.delta.account import account
from tether.delta.budget import Budget
from tether.delta.certificate import Settings, compose
from tether.delta.delta import Delta
from tether.delta.fusion import fuse
from tether.delta.learning import Anchor, anchor_text, fit_delta
from tether.delta.measure import Variant, measure
from tether.delta.regret import account_figures
from tether.delta.shards import cache_shards, load_shards
from tether.delta.summary import summarise
from tether.delta.training import Fit
from tether.delta.windows import window_text
from tether.demo.corpora import BASE_TEXTS, DOMAINS, documents
from tether.demo.plan import FUSIONS, PIECE, PROMPTS, TITLES, Plan
from tether.errors import ConfigError
from tether.report.html import write_report
from tether.runs import Run
from tether.store.documents import read_documents, write_documents
from tether.store.manifest import versions
from tether.store.publish import write_json
from tether.store.writer import write_safetensors

__all__ = ["run_demo"]

Reporter = Callable[[str], Callable[[dict[str, float]], None]]


def run_demo(folder: str | Path, plan: Plan, report_steps: Reporter) -> dict[str, Any]:
    """Run the demo, or what is left of it.

    Args:
        folder: a new folder, or one of an interrupted demo with the same plan.
        plan: how much to do.
        report_steps: gives a progress callback for each piece of work.

    Returns:
        The results, as in `table.json`.

    Raises:
        ConfigError: the folder holds something else, or a package with a text is missing.
        CheckpointError: the base cannot be loaded.
    """  # noqa: DOC502 - raised below
    with Run(Path(folder), {"demo": asdict(plan)}) as run:
        return _Demo(run, Path(folder), plan, report_steps).results()


class _Demo:
    """The stages in order; each is skipped when its outputs are there."""

    def __init__(self, run: Run, folder: Path, plan: Plan, report_steps: Reporter) -> None:
        self.run, self.folder, self.plan, self.report_steps = run, folder, plan, report_steps
        self.columns = [*DOMAINS, *FUSIONS]

    # Loading takes seconds and a gigabyte, so it waits for the first stage that needs it.
    @cached_property
    def loaded(self) -> tuple[Any, Any]:
        return load(self.plan.base)

    @cached_property
    def deltas(self) -> dict[Delta, float]:
        return {Delta.load(self.delta_file(name)): 1.0 for name in DOMAINS}

    @cached_property
    def anchor(self) -> Anchor:
        return anchor_text(
            self.loaded[0], *(load_shards(self.states(part)) for part in ("base", "base-held-out"))
        )

    def text(self, name: str) -> Path:
        return self.folder / "texts" / f"{name}.jsonl"

    def states(self, name: str) -> Path:
        return self.folder / "states" / name

    def delta_file(self, name: str) -> Path:
        return self.folder / "deltas" / f"{name}.delta"

    def usage(self) -> dict[str, Any]:
        stages = {
            path.stem: self.run.record(path.stem) for path in sorted((self.folder / "stages").glob("*.json"))
        }
        kept = {"cpu_seconds": "cpu_seconds", "wall_seconds": "wall_seconds", "peak_rss": "peak_rss_bytes"}
        return {
            name: {key: record[of] for key, of in kept.items()} for name, record in stages.items() if record
        }

    def results(self) -> dict[str, Any]:
        run = self.run
        texts = run.stage("texts", self.write_texts)
        general = ["base", "base-held-out"]
        for name in [*DOMAINS, *general]:
            run.stage(f"states-{name}", partial(self.cache, name), [self.text(f"{name}-train")])
        learnt = {}
        for name in DOMAINS:
            learnt[name] = run.stage(
                f"learn-{name}", partial(self.learn, name), map(self.states, [name, *general])
            )
        deltas = [self.delta_file(name) for name in DOMAINS]
        run.stage("fuse", self.fuse, deltas)
        cells = {}
        for name in TITLES:
            cells[name] = run.stage(
                f"measure-{name}", partial(self.measure, name), [self.text(name), *deltas]
            )
        run.stage(
            "certificate", partial(self.certify, cells), [self.folder / "fused", *map(self.text, TITLES)]
        )
        samples = run.stage("samples", self.sample, deltas)
        results = self.assemble(texts, learnt, cells, samples["samples"])
        run.stage("report", partial(self.report, results), [self.folder / "certificate.json"])
        return results

    def write_texts(self) -> tuple[list[Path], dict[str, Any]]:
        tokenizer, plan = self.loaded[1], self.plan
        written: dict[str, list[str]] = {}
        for name, recipe in DOMAINS.items():
            test, rest = _take(documents(recipe), tokenizer, plan.test_tokens)
            train, _ = _take(rest, tokenizer, plan.train_tokens)
            written |= {name: test, f"{name}-train": train}
        general: list[str] = []
        for name, recipe in BASE_TEXTS.items():
            # One context a document for the test, so that certified figures rest on many documents; fits take
            # more of each, as much of every kind, so that their mix is the test's.
            every = documents(recipe)
            written[name] = [document[:PIECE] for document in every[: plan.base_test_documents]]
            rest = every[plan.base_test_documents :]
            pieces = [
                document[start : start + PIECE] for document in rest for start in range(0, 3 * PIECE, PIECE)
            ]
            general += [piece for piece in pieces if len(piece) > PIECE // 2][
                : plan.base_documents // len(BASE_TEXTS)
            ]
        spread = documents(lambda: general)
        cut = round(0.6 * len(spread))
        written |= {"base-train": spread[:cut], "base-held-out-train": spread[cut:]}
        for name, content in written.items():
            write_documents(self.text(name), content)
        counted = {name: {"documents": len(content)} for name, content in written.items()}
        return [self.text(name) for name in written], counted

    def cache(self, name: str) -> tuple[list[Path], dict[str, Any]]:
        model, tokenizer = self.loaded
        path = self.states(name)
        windows = window_text(read_documents(self.text(f"{name}-train")), tokenizer, length=self.plan.window)
        cache_shards(model, windows, path, on_step=self.report_steps(f"reading {name}"))
        return [path], {"tokens": len(windows.input_ids)}

    def learn(self, name: str) -> tuple[list[Path], dict[str, Any]]:
        fit = Fit(budget=Budget(value=self.plan.budget, metric=self.plan.metric))
        domain = load_shards(self.states(name))
        delta = fit_delta(
            self.loaded[0], domain, self.anchor, name, fit, self.report_steps(f"learning {name}")
        )
        delta.save(self.delta_file(name))
        return [self.delta_file(name)], delta.record

    def fuse(self) -> tuple[list[Path], dict[str, Any]]:
        model, tokenizer = self.loaded
        inputs = {name: self.delta_file(name) for name in DOMAINS}
        target = self.folder / "fused"
        fused = fuse(model, self.deltas)
        save_checkpoint(fused, tokenizer, target, inputs=inputs, replace=True)
        return [target], {"fusion": fused.config.fusion}

    def measure(self, name: str) -> tuple[list[Path], dict[str, Any]]:
        model, tokenizer = self.loaded
        fusion = fuse(model, self.deltas, by="sum", gated=False).fusion
        if fusion is None:
            raise ConfigError("no deltas to measure: expected the demo's learn stages to have run")
        alone = torch.eye(len(DOMAINS)).tolist()
        variants = [Variant(tuple(weights), "symmetric", False) for weights in alone]
        variants += [Variant((1.0,) * len(DOMAINS), chart, False) for chart in FUSIONS[1:]]
        windows = window_text(read_documents(self.text(name)), tokenizer, length=self.plan.window)
        steps = self.report_steps(f"measuring {name}")
        result = measure(model, fusion, windows, variants, on_step=steps)
        served = fuse(model, self.deltas)
        (heard,) = account([served], windows, on_step=steps)
        path = self.folder / "measurements" / f"{name}.safetensors"
        arrays = {
            field: getattr(result, field).contiguous() for field in ("softmax_kl", "latent_drift", "bound")
        }
        columns = [column for column in self.columns if column != "evidence"]
        # By evidence the measured figure is itself a weighted mean of drifts: no bound to stand beside it.
        at = self.columns.index("evidence")
        for field, values in arrays.items():
            own = heard.softmax_kl if field == "softmax_kl" else torch.zeros_like(heard.softmax_kl)
            arrays[field] = torch.cat([values[:at], own.unsqueeze(0), values[at:]]).contiguous()
        write_safetensors(path, arrays, {"columns": json.dumps(self.columns)})
        rows = {column: summarise(result, row) for row, column in enumerate(columns)}
        rows["evidence"] = account_figures(served.fusion, heard)
        return [path], {column: rows[column] for column in self.columns}

    def certify(self, cells: dict[str, dict[str, Any]]) -> tuple[list[Path], dict[str, Any]]:
        fused, _ = load(str(self.folder / "fused"))
        figures = {name: cells[name]["evidence"] for name in TITLES}
        texts = {name: self.text(name) for name in TITLES}
        path = compose(fused, texts, figures, Settings(window=self.plan.window)).save(
            self.folder / "certificate.json"
        )
        return [path], {}

    def sample(self) -> tuple[list[Path], dict[str, Any]]:
        model, tokenizer = self.loaded
        fused = fuse(model, self.deltas)
        on_step = self.report_steps("writing samples")
        samples = []
        for done, (name, prompt) in enumerate(PROMPTS.items(), start=1):
            encoded = tokenizer(prompt, return_tensors="pt")
            texts = [
                tokenizer.decode(
                    writer.generate(
                        **encoded,
                        do_sample=False,
                        repetition_penalty=1.15,  # a small model's greedy text soon goes round in circles
                        max_new_tokens=self.plan.new_tokens,
                        pad_token_id=tokenizer.pad_token_id,
                    )[0, encoded["input_ids"].shape[1] :],
                    skip_special_tokens=True,
                )
                for writer in (model, fused)
            ]
            samples.append({"domain": name, "prompt": prompt, "base": texts[0], "fused": texts[1]})
            on_step({"done": done, "total": len(PROMPTS)})
        return [], {"samples": samples}

    def assemble(
        self,
        texts: dict[str, Any],
        learnt: dict[str, Any],
        cells: dict[str, Any],
        samples: list[dict[str, str]],
    ) -> dict[str, Any]:
        pooled: dict[str, dict[str, float]] = {}
        for column in self.columns:
            rows = [cells[name][column] for name in BASE_TEXTS]
            tokens = [row["tokens"] for row in rows]
            pooled[column] = {
                key: float(np.average([row[key]["mean"] for row in rows], weights=tokens))
                for key in ("softmax_kl", "latent_drift")
            }
        described = {
            name: {
                "kind": "domain" if name in DOMAINS else "base",
                "title": title,
                "documents": texts[name]["documents"],
                "tokens": cells[name]["evidence"]["tokens"],
                "seen": "held-out documents",
            }
            for name, title in TITLES.items()
        }
        columns = ["base", *self.columns]
        return {
            "title": "Three domains on a KL leash",
            "base": self.plan.base,
            "budget": {"value": self.plan.budget, "metric": self.plan.metric},
            "texts": described,
            "columns": columns,
            "column_titles": {
                "base": "base",
                **{name: f"delta {name}" for name in DOMAINS},
                "evidence": "fused by evidence",
                "symmetric": "sum, symmetric chart",
                "linear": "sum, linear chart",
            },
            "cells": {
                name: {"base": {"nll": cells[name]["evidence"]["nll_base"]}, **cells[name]} for name in TITLES
            },
            "base_text": pooled,
            "deltas": learnt,
            "samples": samples,
            "bounds": {
                key: sum(
                    cells[name][column]["bound"][key]
                    for name in TITLES
                    for column in self.columns
                    if column != "evidence"
                )
                for key in ("contexts", "violations")
            },
            "certificate": "certificate.json",
            "verify": f"tether verify {self.folder / 'certificate.json'}",
            "usage": self.usage(),
            "versions": versions(),
        }

    def report(self, results: dict[str, Any]) -> tuple[list[Path], dict[str, Any]]:
        from tether.report.figures import overview_png
        from tether.store.publish import publish_file
        from tether.store.reader import CheckpointReader

        arrays = {}
        for name in TITLES:
            reader = CheckpointReader(self.folder / "measurements" / f"{name}.safetensors")
            arrays[name] = {key: reader.tensor(key).numpy() for key in reader.names}
        paths = [self.folder / "table.json", self.folder / "overview.png"]
        write_json(paths[0], results)
        with publish_file(paths[1]) as target:
            target.write_bytes(overview_png(results))
        return [*paths, write_report(self.folder / "report.html", results, arrays)], {}


def _take(documents: Sequence[str], tokenizer: Any, tokens: int) -> tuple[list[str], list[str]]:
    # The first documents, at least two, that hold this many tokens, and the others: an interval needs documents.
    counted = 0
    for number, document in enumerate(documents):
        counted += len(tokenizer(document, verbose=False)["input_ids"])
        if counted >= tokens and number > 0:
            return list(documents[: number + 1]), list(documents[number + 1 :])
    return list(documents), []
