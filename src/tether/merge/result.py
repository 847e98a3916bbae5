"""A result's folder: what goes beside the weights, and whether a published one still is what was published."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tether.errors import CheckpointError
from tether.merge.companions import TEMPLATES, config_for
from tether.merge.layout import index_json
from tether.merge.opening import few
from tether.merge.plan import Plan
from tether.merge.recipe import Recipe
from tether.merge.report import REPORT, read_report
from tether.merge.staging import refuse_occupied
from tether.merge.survey import Survey, survey
from tether.store.documents import source_hash
from tether.store.hashing import file_chunks, sha256_file
from tether.store.manifest import MANIFEST, Input, Manifest, read_manifest, write_manifest
from tether.store.publish import write_json

__all__ = ["INDEX", "carry", "describe_inputs", "published", "refine_files", "seal"]

INDEX = "model.safetensors.index.json"


def carry(plan: Plan, folder: Path) -> dict[str, str]:
    """Write config, index, tokenizer and processor files beside the weights.

    Args:
        plan: of the merge.
        folder: of the result.

    Returns:
        Path of each file that was carried over to the SHA-256 of the bytes that were written.
    """
    carried = {}
    for file, place in _companions(plan).items():
        content = file.read_bytes()
        (folder / place).parent.mkdir(exist_ok=True)
        (folder / place).write_bytes(content)
        carried[str(file)] = hashlib.sha256(content).hexdigest()
    own = plan.opened[plan.recipe.skeleton]
    if own.folder.config:
        tied = own.tied if own.recognised else None
        write_json(folder / "config.json", config_for(own.folder.config, plan.recipe.dtype, tied))
    if len(plan.shards) > 1:
        write_json(folder / INDEX, index_json(plan.shards, plan.places))
    return carried


# Companion file to its place in the result.
def _companions(plan: Plan) -> dict[Path, str]:
    own = plan.opened[plan.recipe.skeleton].folder
    donor = plan.opened[plan.recipe.tokenizer or plan.recipe.skeleton].folder
    return {
        file: f"{TEMPLATES}/{file.name}" if file.parent.name == TEMPLATES else file.name
        for file in (*donor.tokenizer, *own.model)
    }


def refine_files(recipe: Recipe) -> dict[str, str]:
    """Hash what a recipe's ``refine`` is measured on.

    Args:
        recipe: the recipe.

    Returns:
        Path to SHA-256: probes and texts.
    """
    refine = recipe.refine
    if refine is None:
        return {}
    from tether.merge.probes import METADATA

    probes = Path(refine.probes) if refine.encodes and refine.probes else None
    if probes is not None and probes.is_dir():
        probes = probes / METADATA
    paths = {str(probes)} if probes else set()
    return {
        path: source_hash(path) for path in sorted(paths | set(refine.text.values() if refine.reads else ()))
    }


def describe_inputs(
    plan: Plan, found: Survey, texts: dict[str, str], carried: dict[str, str]
) -> tuple[Input, ...]:
    """List everything that a result rests on, with the hashes of what was read.

    Args:
        plan: of the merge.
        found: the reading of the weights and of tensors beside them.
        texts: path of each text of the check to its SHA-256.
        carried: from `carry`.

    Returns:
        Models first, then configs, statistics, maps, texts and companions.
    """
    inputs = plan.recipe.inputs
    files = [
        ("config", str(model.folder.weights / "config.json"), model.folder.config_sha256)
        for model in plan.opened.values()
        if model.folder.config_sha256
    ]
    files += [("statistics", path, sha256) for path, sha256 in found.files.items()]
    files += [("maps", str(inputs[name].align), each.sha256) for name, each in plan.coordinates.items()]
    files += [("check text", path, sha256) for path, sha256 in texts.items()]
    files += [("refine", path, sha256) for path, sha256 in refine_files(plan.recipe).items()]
    files += [("companion", path, sha256) for path, sha256 in carried.items()]
    return (
        *(Input(role=name, path=inputs[name].path, sha256=each) for name, each in found.fingerprints.items()),
        *(Input(role=role, path=path, sha256=sha256) for role, path, sha256 in files),
    )


def seal(plan: Plan, asked: Recipe, folder: Path, report: dict[str, Any], inputs: tuple[Input, ...]) -> None:
    """Write the report, and the manifest that vouches for it and for all that is no weight.

    The report names the hash of every tensor, so that the manifest vouches for the whole folder.

    Args:
        plan: of the merge.
        asked: the recipe as the user gave it.
        folder: of the result, otherwise complete.
        report: what ``merge.json`` will hold.
        inputs: from `describe_inputs`.
    """
    write_json(folder / REPORT, report)
    outputs = {name: sha256_file(folder / name) for name in _beside(plan)}
    write_manifest(folder, Manifest(kind="merge", inputs=inputs, recipe=_record(asked), outputs=outputs))


def _record(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json", exclude={"out"})


# Files of a result that hold no weights, but for the manifest.
def _beside(plan: Plan) -> list[str]:
    config = ["config.json"] if plan.opened[plan.recipe.skeleton].folder.config else []
    index = [INDEX] if len(plan.shards) > 1 else []
    return sorted({REPORT, *config, *index, *_companions(plan).values()})


def published(plan: Plan, out: Path, threads: int) -> dict[str, Any] | None:
    """Look whether a folder holds the result of this very merge, and compare all of it with its hashes.

    Args:
        plan: of the merge.
        out: the folder.
        threads: how many files and tensors are read at once.

    Returns:
        The report of the published result; None if the folder is new or empty.

    Raises:
        ConfigError: If it holds something else.
        CheckpointError: If it holds the result of this merge, and that is damaged.
    """  # noqa: DOC502 - ConfigError is raised by refuse_occupied
    if not (out / MANIFEST).is_file():
        refuse_occupied(out)
        return None
    manifest = read_manifest(out)
    if manifest.kind != "merge" or manifest.recipe != _record(plan.recipe):
        refuse_occupied(out)
    found = survey(plan.opened, plan.extras(), None, threads)
    texts = sorted(set(plan.recipe.check.text.values())) if plan.recipe.check else ()
    inputs = describe_inputs(
        plan,
        found,
        {path: source_hash(path) for path in texts},
        {str(file): sha256_file(file) for file in _companions(plan)},
    )
    if manifest.inputs != inputs:
        refuse_occupied(out)
    report = read_report(out)
    if problems := _damaged(plan, out, manifest, report, threads):
        raise CheckpointError(
            f"{out} holds the result of this merge, but is damaged: {few(problems)}. Expected the bytes that "
            f"{REPORT} and {MANIFEST} name. Remove the folder, and start the merge again."
        )
    return report


def _damaged(plan: Plan, out: Path, manifest: Manifest, report: dict[str, Any], threads: int) -> list[str]:
    problems = []
    if manifest.changed:
        problems.append(f"{MANIFEST} was changed")
    beside = _beside(plan)
    if sorted(manifest.outputs) != beside:
        problems.append(f"{MANIFEST} names other files than {', '.join(beside)}")
    for name in beside:
        if not (out / name).is_file():
            problems.append(f"{name} is missing")
        elif sha256_file(out / name) != manifest.outputs.get(name):
            problems.append(f"{name} has other bytes")
    shards = [shard.name for shard in plan.shards]
    if surplus := sorted({file.name for file in out.glob("model*.safetensors*")} - {*shards, *beside}):
        problems.append(f"{few(surplus)} does not belong to it")
    if set(report["tensors"]) != set(plan.places):
        return [*problems, f"{REPORT} names other tensors"]
    broken = set()
    for shard in plan.shards:
        file = out / shard.name
        if not file.is_file() or file.stat().st_size != shard.bytes:
            problems.append(f"{shard.name} {'has another length' if file.is_file() else 'is missing'}")
            broken.add(shard.name)
        else:
            with file.open("rb") as stream:
                if stream.read(len(shard.header)) != shard.header:
                    problems.append(f"{shard.name} has another header")
    whole = {name: place for name, place in plan.places.items() if shards[place.shard] not in broken}

    def differs(name: str) -> bool:
        place, digest = whole[name], hashlib.sha256()
        for chunk in file_chunks(out / shards[place.shard], place.start, place.start + place.bytes):
            digest.update(chunk)
        return bool(digest.hexdigest() != report["tensors"][name])

    with ThreadPoolExecutor(threads) as pool:
        problems += [
            f"tensor {name} has other bytes"
            for name, wrong in zip(whole, pool.map(differs, whole), strict=True)
            if wrong
        ]
    return problems
