"""A merge from plan to published folder."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, final

from tether.errors import CheckpointError, ConfigError, TetherError
from tether.merge.plan import Plan, make_plan, start_of
from tether.merge.recipe import Check, validated
from tether.merge.report import REPORT, make_report
from tether.merge.result import carry, describe_inputs, published, refine_files, seal
from tether.merge.staging import Staging, staged
from tether.merge.stream import stream
from tether.merge.survey import Survey, check_observed, survey
from tether.merge.tefm.switches import Options
from tether.scale import Met, meet_budget
from tether.store.documents import source_hash
from tether.store.hashing import sha256_file
from tether.store.manifest import Input
from tether.store.reader import CheckpointReader

if TYPE_CHECKING:
    from tether.merge.tefm.refine import Refinement

__all__ = ["REPORT", "check_possible", "merge"]

Reporter = Callable[[str], Callable[[dict[str, float]], None]]
Measure = Callable[[Path], dict[str, Any]]
Texts = dict[str, str]
T = TypeVar("T")


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
        CheckpointError: If an input holds NaN, was changed meanwhile, or the disk is full; if the folder holds the
            result of this merge, and that is damaged.
    """  # noqa: DOC502 - CheckpointError is raised by what it calls
    if threads is not None and threads < 1:
        raise ConfigError(f"threads={threads}: expected at least 1")
    threads = threads or min(4, os.cpu_count() or 1)
    steps = steps or (lambda name: lambda entry: None)
    if (report := published(plan, out, threads)) is not None:
        return report
    wanted = plan.recipe.check
    measure, texts = _measure(plan, wanted, steps) if wanted else (None, {})
    work = _Work(plan, out, threads, steps, texts)
    if plan.recipe.refine:
        return _publish_refined(work, plan, measure)
    if not (wanted and wanted.solve_lambda):
        return work.publish(plan, measure)
    assert measure is not None
    return _publish_scaled(work, plan, wanted, measure)


@final
class _Work:
    """What the merges of one call share: the folder, the threads, the hashes of all that is read."""

    def __init__(self, asked: Plan, out: Path, threads: int, steps: Reporter, texts: Texts) -> None:
        self.asked, self.out, self.threads, self.steps, self.texts = asked, out, threads, steps, texts
        self.found: Survey | None = None

    def publish(
        self, plan: Plan, measure: Measure | None, refined: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        with staged(self.out, plan.digest, _size(plan)) as staging:

            def finish() -> dict[str, Any]:
                report, inputs = self._write(plan, staging)
                if refined is not None:
                    report["refine"] = refined
                if measure:
                    report["check"] = self._measured(plan, staging.model, measure)
                seal(plan, self.asked.recipe, staging.model, report, inputs)
                return report

            report = self._guarded(staging, finish)
            if not measure or report["check"]["accepted"] is not False:
                staging.publish()
            staging.discard()
        return report

    # Write a result without publishing it, and look at it.
    def trial(self, plan: Plan, look: Callable[[Path], T]) -> T:
        with staged(self.out, plan.digest, _size(plan)) as staging:

            def finish() -> T:
                self._write(plan, staging)
                return look(staging.model)

            return self._guarded(staging, finish)

    # The same, where the look is the check: what it loaded has to be what was merged.
    def measured(self, plan: Plan, measure: Measure) -> dict[str, Any]:
        return self.trial(plan, lambda folder: self._measured(plan, folder, measure))

    def _write(self, plan: Plan, staging: Staging) -> tuple[dict[str, Any], tuple[Input, ...]]:
        # What a journal names was made from the bytes that the survey beside it describes, and from no others.
        claims = staging.survey.is_file()
        if self.found is None:
            reading = self.steps("reading inputs")
            self.found = survey(plan.opened, self.asked.extras(), staging.survey, self.threads, reading)
        elif not claims:
            self.found.keep(staging.survey)
        # What a refined merge has made itself is no input.
        self.found = self.found.beside(plan.extras())
        _refuse_untied(plan, self.found)
        for folder, name in sorted(
            {(Path(each.file).parent, each.model) for each in plan.extras() if each.model}
        ):
            check_observed(folder, self.found.fingerprints[name], name)
        merging = self.steps("merging")
        seen = self.found.seen(plan.opened)
        written = stream(plan, staging, seen, claims=claims, threads=self.threads, on_step=merging)
        inputs = describe_inputs(plan, self.found, self.texts, carry(plan, staging.model))
        return make_report(plan, written), inputs

    # The check loads its references from their files once more: they have to be what was merged.
    def _measured(self, plan: Plan, model: Path, measure: Measure) -> dict[str, Any]:
        assert self.found is not None
        assert plan.recipe.check is not None
        figures = measure(model)
        for name in plan.recipe.check.references or plan.recipe.inputs:
            folder = plan.opened[name].folder
            config = sha256_file(folder.weights / "config.json")
            weights = CheckpointReader(folder.weights).fingerprint()
            if (weights, config) != (self.found.fingerprints[name], folder.config_sha256):
                raise CheckpointError(
                    f"{folder.weights} was changed while the result was compared with it. Nothing was published. Start "
                    "the same merge again when nothing writes to its inputs."
                )
        return figures

    def _guarded(self, staging: Staging, work: Callable[[], T]) -> T:
        try:
            return work()
        except TetherError as error:
            # A full disk can be freed and the merge taken up; whatever else it is would come again.
            if not isinstance(error.__cause__, OSError):
                staging.discard()
            raise


# A head that was a copy of its embedding when the merge was planned is left out of the result.
def _refuse_untied(plan: Plan, found: Survey) -> None:
    for name, model in plan.opened.items():
        if copy := model.copied_head:
            digests = found.blocks[name]
            if digests[copy[0]] != digests[copy[1]]:
                raise CheckpointError(
                    f"{model.folder.weights} was changed since the merge was planned: its head was its embedding then. "
                    "Nothing was merged. Start again when nothing writes to it."
                )


def _publish_scaled(work: _Work, plan: Plan, wanted: Check, measure: Measure) -> dict[str, Any]:
    measured: dict[float, dict[str, Any]] = {}

    def drift_at(scale: float) -> float:
        measured[scale] = work.measured(_with_options(plan, {"lambda": scale}), measure)
        drift: float = measured[scale]["worst_mean_kl"]
        return drift

    assert wanted.accept is not None  # read_recipe refuses solve_lambda without it
    # Each try is a whole merge: fewer of them, and a wider band is enough.
    found = meet_budget(drift_at, wanted.accept, start=start_of(plan.recipe), tries=4, enough=0.9, aim=0.97)
    # No factor that was tried keeps the budget: the smallest one shows by how much.
    scale = found.scale or min(measured)
    # The bytes are those that were measured, so nothing needs to be measured again.
    return work.publish(
        _with_options(plan, {"lambda": scale}),
        lambda folder: measured[scale] | {"lambda": _tried(scale, found)},
    )


def _tried(scale: float, found: Met) -> dict[str, Any]:
    return {
        "value": scale,
        "tried": [{"lambda": each, "worst_mean_kl": drift} for each, drift in found.tried],
    }


def _with_options(plan: Plan, options: dict[str, Any]) -> Plan:
    return make_plan(plan.recipe.model_copy(update={"options": plan.recipe.options | options}))


def _publish_refined(work: _Work, plan: Plan, measure: Measure | None) -> dict[str, Any]:
    refinement, files = _refinement(plan)
    folder = work.out.absolute().with_name(f".{work.out.name}.refine")
    key = json.dumps([plan.digest, files], sort_keys=True)
    options, report = refinement.run(
        lambda given, look: work.trial(_with_options(plan, given), look), folder, key
    )
    if refine_files(plan.recipe) != files:
        raise CheckpointError(
            f"{', '.join(files)}: changed while the merge was refined on it. Nothing was published. Start the same "
            "merge again when nothing writes to it."
        )
    written = work.publish(_with_options(plan, options), measure, report)
    shutil.rmtree(folder)
    return written


# What a recipe's refine is measured on, and its hashes.
def _refinement(plan: Plan) -> tuple["Refinement", dict[str, str]]:
    from tether.merge.tefm.refine import Refinement

    recipe, donor = plan.recipe, plan.opened[plan.recipe.tokenizer or plan.recipe.skeleton].folder
    assert recipe.refine is not None
    if not plan.opened[recipe.skeleton].folder.config or not donor.tokenizer:
        raise ConfigError(
            f"refine: {recipe.skeleton} has no config.json or {recipe.tokenizer or recipe.skeleton} no tokenizer, so "
            "the merged model cannot be run"
        )
    options = validated(Options, recipe.options, "recipe: options")
    refinement = Refinement(recipe.refine, options, recipe.base is not None, recipe.seed, donor.weights)
    return refinement, refine_files(recipe)


def check_possible(plan: Plan) -> None:
    """Refuse a plan whose check could not be done, as `merge` does before its long part.

    Args:
        plan: from ``make_plan``.

    Raises:
        ConfigError: If a text cannot be read, or a model has no config or tokenizer.
    """  # noqa: DOC502 - raised by _measure
    if plan.recipe.refine:
        _refinement(plan)
    if plan.recipe.check:
        _measure(plan, plan.recipe.check, lambda name: lambda values: None)


# Make sure that the check can be done; give the function that does it, and the hashes of its texts.
def _measure(plan: Plan, wanted: Check, steps: Reporter) -> tuple[Measure, Texts]:
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

    paths = sorted(set(wanted.text.values()))
    # A text that is missing is said better by its reader.
    before = {path: source_hash(path) for path in paths if Path(path).exists()}
    windows = read_texts(wanted, donor.weights)
    texts = {path: source_hash(path) for path in paths}
    if changed := [path for path in paths if before.get(path) != texts[path]]:
        raise CheckpointError(
            f"{', '.join(changed)} was changed while it was read; start the same merge again"
        )
    references = {name: plan.opened[name].folder.weights for name in names}
    return (
        lambda folder: check(wanted, folder, references, windows, seed=plan.recipe.seed, steps=steps),
        texts,
    )


def _size(plan: Plan) -> int:
    return sum(shard.bytes for shard in plan.shards)
