"""A merge from plan to published folder."""

import json
import os
from collections.abc import Callable
from math import sqrt
from pathlib import Path
from typing import Any, final

from tether.errors import CheckpointError, ConfigError, TetherError
from tether.merge.companions import TEMPLATES, config_for
from tether.merge.journal import Written
from tether.merge.layout import index_json
from tether.merge.plan import Plan, make_plan, start_of
from tether.merge.recipe import Check, Recipe
from tether.merge.scaling import Scaled, scale_to_budget
from tether.merge.staging import Staging, refuse_occupied, staged
from tether.merge.stream import stream
from tether.merge.survey import check_observed, survey
from tether.store.hashing import sha256_file
from tether.store.manifest import Input, Manifest, read_manifest, write_manifest
from tether.store.publish import write_json

__all__ = ["REPORT", "check_possible", "merge"]

REPORT = "merge.json"
"""The file in a merged model's folder: what rounding lost, each tensor's hash, how it was checked."""

Reporter = Callable[[str], Callable[[dict[str, float]], None]]
Measure = Callable[[Path], dict[str, Any]]


def merge(
    plan: Plan, out: Path, *, threads: int | None = None, steps: Reporter | None = None
) -> dict[str, Any]:
    """Do a planned merge, measure it where the recipe asks for it, and publish it.

    A merge that was interrupted, even by ``kill -9``, is taken up where it stopped by the same call. Where
    the check exceeds its budget, nothing is published and nothing stays on the disk.

    Args:
        plan: from ``make_plan``.
        out: the folder to publish; new or empty, or the published result of this very merge.
        threads: how many tensors at once; None for the processors, at most four.
        steps: gives a callback for each part of the work.

    Returns:
        The report, as in ``merge.json``; ``check.accepted`` is false where nothing was published.

    Raises:
        ConfigError: If the folder is taken, threads is not positive, or the check cannot be done.
        CheckpointError: If an input holds NaN, was changed meanwhile, or the disk is full.
    """  # noqa: DOC502 - CheckpointError is raised by what it calls
    if threads is not None and threads < 1:
        raise ConfigError(f"threads={threads}: expected at least 1")
    threads = threads or min(4, os.cpu_count() or 1)
    steps = steps or (lambda name: lambda entry: None)
    if (published := _published(plan, out, threads)) is not None:
        return published
    work = _Work(plan, out, threads, steps)
    wanted = plan.recipe.check
    if wanted is None:
        return work.publish(plan, None)
    measure = _measure(plan, wanted, steps)
    if not wanted.solve_lambda:
        return work.publish(plan, measure)
    return _publish_scaled(work, plan, wanted, measure)


@final
class _Work:
    """What the merges of one call share: the folder, the threads, the inputs' fingerprints."""

    def __init__(self, asked: Plan, out: Path, threads: int, steps: Reporter) -> None:
        self.asked, self.out, self.threads, self.steps = asked, out, threads, steps
        self.fingerprints: dict[str, str] = {}

    def publish(self, plan: Plan, measure: Measure | None) -> dict[str, Any]:
        with staged(self.out, plan.digest, _size(plan)) as staging:
            report = self.write(plan, staging)
            if measure:
                report["check"] = self._guarded(staging, lambda: measure(staging.model))
                write_json(staging.model / REPORT, report)
            if not measure or report["check"]["accepted"] is not False:
                staging.publish()
            staging.discard()
        return report

    # Write a result without publishing it, and measure it.
    def trial(self, plan: Plan, measure: Measure) -> dict[str, Any]:
        with staged(self.out, plan.digest, _size(plan)) as staging:
            self.write(plan, staging)
            return self._guarded(staging, lambda: measure(staging.model))

    def write(self, plan: Plan, staging: Staging) -> dict[str, Any]:
        return self._guarded(staging, lambda: self._write(plan, staging))

    def _write(self, plan: Plan, staging: Staging) -> dict[str, Any]:
        self.fingerprints = self.fingerprints or survey(
            plan.opened, staging.survey, self.threads, self.steps("reading inputs")
        )
        extras = (extra for tensor in plan.tensors for extra in (tensor.extras or {}).values())
        for folder, name in sorted(
            {(Path(extra.file).parent, extra.model) for extra in extras if extra.model}
        ):
            check_observed(folder, self.fingerprints[name], name)
        written = stream(plan, staging, threads=self.threads, on_step=self.steps("merging"))
        if len(plan.shards) > 1:
            write_json(staging.model / "model.safetensors.index.json", index_json(plan.shards, plan.places))
        _carry(plan, staging.model)
        inputs = _inputs(plan, self.fingerprints)
        write_manifest(
            staging.model, Manifest(kind="merge", inputs=inputs, recipe=_record(self.asked.recipe))
        )
        report = _report(plan, written)
        write_json(staging.model / REPORT, report)
        return report

    def _guarded(self, staging: Staging, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        try:
            return work()
        except TetherError as error:
            # A full disk can be freed and the merge taken up; whatever else it is would come again.
            if not isinstance(error.__cause__, OSError):
                staging.discard()
            raise


def _publish_scaled(work: _Work, plan: Plan, wanted: Check, measure: Measure) -> dict[str, Any]:
    measured: dict[float, dict[str, Any]] = {}

    def drift_at(scale: float) -> float:
        measured[scale] = work.trial(_with_lambda(plan, scale), measure)
        drift: float = measured[scale]["worst_mean_kl"]
        return drift

    assert wanted.accept is not None  # read_recipe refuses solve_lambda without it
    found = scale_to_budget(drift_at, wanted.accept, start=start_of(plan.recipe))
    # No factor that was tried keeps the budget: the smallest one shows by how much.
    scale = min(measured) if found.scale is None else found.scale
    # The bytes are those that were measured, so nothing needs to be measured again.
    return work.publish(
        _with_lambda(plan, scale), lambda folder: measured[scale] | {"lambda": _tried(scale, found)}
    )


def _tried(scale: float, found: Scaled) -> dict[str, Any]:
    return {
        "value": scale,
        "tried": [{"lambda": each, "worst_mean_kl": drift} for each, drift in found.tried],
    }


def _with_lambda(plan: Plan, scale: float) -> Plan:
    return make_plan(plan.recipe.model_copy(update={"options": plan.recipe.options | {"lambda": scale}}))


def check_possible(plan: Plan) -> None:
    """Refuse a plan whose check could not be done, as `merge` does before its long part.

    Args:
        plan: from ``make_plan``.

    Raises:
        ConfigError: If a text cannot be read, or a model has no config or tokenizer.
    """  # noqa: DOC502 - raised by _measure
    if plan.recipe.check:
        _measure(plan, plan.recipe.check, lambda name: lambda values: None)


# Make sure that the check can be done, and give the function that does it.
def _measure(plan: Plan, wanted: Check, steps: Reporter) -> Measure:
    names = wanted.references or tuple(plan.recipe.inputs)
    own, donor = (
        plan.opened[name].folder
        for name in (plan.recipe.skeleton, plan.recipe.tokenizer or plan.recipe.skeleton)
    )
    problems = [
        f"{name} has no config.json, so no model can be made of it"
        for name in dict.fromkeys((plan.recipe.skeleton, *names))
        if not plan.opened[name].folder.config
    ]
    if own.config and not donor.tokenizer:
        problems.append(
            f"{plan.recipe.tokenizer or plan.recipe.skeleton} has no tokenizer to read the texts with"
        )
    if problems:
        raise ConfigError(f"the check cannot be done: {'; '.join(problems)}")
    from tether.merge.check import check, read_texts

    windows = read_texts(wanted, donor.weights)
    references = {name: plan.opened[name].folder.weights for name in names}
    return lambda folder: check(wanted, folder, references, windows, seed=plan.recipe.seed, steps=steps)


# The report of a folder that holds the result of this very merge already; any other content is refused.
def _published(plan: Plan, out: Path, threads: int) -> dict[str, Any] | None:
    try:
        manifest = read_manifest(out)
        if manifest.recipe == _record(plan.recipe) and manifest.inputs == _inputs(
            plan, survey(plan.opened, None, threads)
        ):
            report: dict[str, Any] = json.loads((out / REPORT).read_bytes())
            return report
    except (CheckpointError, OSError, ValueError):
        pass
    refuse_occupied(out)
    return None


def _size(plan: Plan) -> int:
    return sum(shard.bytes for shard in plan.shards)


def _record(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json", exclude={"out"})


def _inputs(plan: Plan, fingerprints: dict[str, str]) -> tuple[Input, ...]:
    models = [
        Input(role=name, path=plan.recipe.inputs[name].path, sha256=fingerprint)
        for name, fingerprint in fingerprints.items()
    ]
    # Whatever else the result rests on: another Gram matrix or another check text makes another merge.
    files = {
        str(extra.file): "statistics" for tensor in plan.tensors for extra in (tensor.extras or {}).values()
    }
    files |= {model.align: "maps" for model in plan.recipe.inputs.values() if model.align}
    files |= dict.fromkeys((plan.recipe.check.text if plan.recipe.check else {}).values(), "check text")
    donor = plan.opened[plan.recipe.tokenizer or plan.recipe.skeleton].folder
    own = plan.opened[plan.recipe.skeleton].folder
    files |= {str(file): "companion" for file in (*donor.tokenizer, *own.model)}
    return (*models, *(Input(role=role, path=path, sha256=sha256_file(path)) for path, role in files.items()))


def _carry(plan: Plan, folder: Path) -> None:
    own = plan.opened[plan.recipe.skeleton].folder
    donor = plan.opened[plan.recipe.tokenizer or plan.recipe.skeleton].folder
    for file in (*donor.tokenizer, *own.model):
        place = folder / TEMPLATES / file.name if file.parent.name == TEMPLATES else folder / file.name
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(file.read_bytes())
    if own.config:
        write_json(folder / "config.json", config_for(own.config, plan.recipe.dtype))


def _report(plan: Plan, written: dict[str, Written]) -> dict[str, Any]:
    shares = {name: sqrt(entry.lost / entry.changed) for name, entry in written.items() if entry.changed > 0}
    lost = sum(entry.lost for entry in written.values())
    changed = sum(entry.changed for entry in written.values())
    worst = max(shares, key=lambda name: shares[name], default=None)
    summary = plan.summary()
    return {
        "plan": {
            key: summary[key] for key in summary if key not in {"models", "memory_per_thread", "digest"}
        },
        "rounding": {
            "share_of_change": sqrt(lost / changed) if changed else 0.0,
            "worst": None if worst is None else {"tensor": worst, "share_of_change": shares[worst]},
        },
        "tensors": {name: entry.sha256 for name, entry in written.items()},
    }
