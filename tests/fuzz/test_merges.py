"""What a merge reads: recipes, models, maps, statistics, and what an earlier process left of it."""

import contextlib
import json

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from checkpoints import LLAMA, family, write_recipe
from fuzzing import Reader, devices, equal, refuse_devices, survive
from tether.errors import CheckpointError
from tether.merge.axes import Sizes
from tether.merge.files import read_extra
from tether.merge.gram import LayerGrams, gram_location, load_grams, save_grams
from tether.merge.journal import Journal, Written
from tether.merge.maps import check_maps, read_maps
from tether.merge.paths import PathBank, load_bank, save_bank
from tether.merge.plan import make_plan
from tether.merge.probes import EncodedProbe, probes_hash
from tether.merge.recipe import read_recipe
from tether.merge.report import read_report
from tether.merge.result import published
from tether.merge.run import merge
from tether.merge.signatures import FIELDS, Signatures
from tether.merge.survey import Survey, read_observation, survey
from tether.store.publish import write_json
from tether.store.writer import write_safetensors

SIZES = Sizes(vocab=4, residual=6, mlp=5, group=2, query=1, value=2, rope=2)


# Paths in a recipe are relative to the current folder, and so the damaged files are those that are read.
def _plan(folder):
    with contextlib.chdir(folder):
        return make_plan(read_recipe("recipe.yaml"))


def _surveyed(folder):
    with contextlib.chdir(folder):
        plan = make_plan(read_recipe("recipe.yaml"))
        return survey(plan.opened, plan.extras(), None, 1)


def _published(folder):
    with contextlib.chdir(folder):
        found = published(make_plan(read_recipe("recipe.yaml")), folder / "out", 1)
    if found is None:
        raise CheckpointError("nothing published")  # the merge is done again, and finds the folder taken
    return found


def _journal(folder):
    journal = Journal(folder / "journal.jsonl")
    try:
        return set(journal.entries().values())
    finally:
        journal.close()


def _grams(folder):
    read_observation(folder)
    grams = load_grams(folder, 0).grams
    for name in grams:
        read_extra(*map(str, gram_location(folder, 0, name)))
    return grams


def _maps(folder):
    check_maps(read_maps(folder / "maps")[0], SIZES, SIZES, (2, 2), "maps")


def _signatures(folder):
    found = Signatures(folder)
    for module in found.modules:
        found.mean_phi(module)
    return found.effective


READERS = {
    "recipe": Reader(_plan, {"recipe.yaml": "json"}, 0.6),
    "plain recipe": Reader(lambda folder: read_recipe(folder / "recipe.yaml"), {"recipe.yaml": "text"}, 0.2),
    "models": Reader(
        _surveyed, {"a/config.json": "json", "a/tokenizer.json": "json", "a/model.safetensors": "safetensors"}, 0.4
    ),
    "published": Reader(
        _published,
        {
            "out/merge.json": "json", "out/tether.json": "json", "out/config.json": "json",
            "out/tokenizer.json": "json", "out/model.safetensors": "safetensors",
        },
        0.95,
        equal,
    ),
    "report": Reader(lambda folder: read_report(folder), {"merge.json": "json"}, 0.5),
    "journal": Reader(_journal, {"journal.jsonl": "lines"}, 0.3, lambda found, whole: found <= whole),
    "survey": Reader(lambda folder: survey({}, (), folder / "survey.json", 1), {"survey.json": "json"}, 0.8, equal),
    "grams": Reader(_grams, {"gram-00000.safetensors": "safetensors", "observation.json": "json"}, 0.4),
    "maps": Reader(_maps, {"maps": "safetensors"}, 0.5),
    "bank": Reader(lambda folder: probes_hash(load_bank(folder / "bank").probes), {"bank": "safetensors"}, 0.4),
    "signatures": Reader(
        _signatures, {"signatures.json": "json", "signatures-00000.safetensors": "safetensors"}, 0.4
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One folder a reader with undamaged files, written by tether where it writes such files."""
    top = tmp_path_factory.mktemp("whole")
    folders = {name: top / name for name in READERS}
    for folder in folders.values():
        folder.mkdir()
    tokens = list("abcdefghij")
    for name in ("recipe", "models", "published"):
        fields = family(folders[name], LLAMA, tokens)
        text = json.dumps(fields | {"seed": 1, "overrides": [{"match": "*.mlp.*", "keep": "a"}]})
        (folders[name] / "recipe.yaml").write_text(text.replace(f"{folders[name]}/", ""))
    made = family(top / "plain", LLAMA, tokens) | {"check": {"text": {"words": "words.jsonl"}, "accept": 0.1}}
    write_recipe(folders["plain recipe"] / "recipe.yaml", **made)
    with contextlib.chdir(folders["published"]):
        merge(make_plan(read_recipe("recipe.yaml")), folders["published"] / "out", threads=1)
    (folders["report"] / "merge.json").write_bytes((folders["published"] / "out" / "merge.json").read_bytes())
    journal = Journal(folders["journal"] / "journal.jsonl")
    for number in range(4):
        journal.append(Written(f"layers.{number}", "0" * 64, 0.25 * number, 2.0))
    journal.close()
    hashes = {"a": {"w": bytes(range(64)), "v": bytes(32)}}
    found = Survey(
        fingerprints={"a": "0" * 64}, blocks=hashes, files={"x": "1" * 64}, extras={"x": {"w": bytes(32)}}
    )
    found.keep(folders["survey"] / "survey.json")
    generator = torch.Generator().manual_seed(0)
    gram = torch.randn(6, 6, generator=generator)
    save_grams(folders["grams"], [LayerGrams(0, {"q": gram, "k": gram, "o": gram @ gram})])
    write_json(
        folders["grams"] / "observation.json", {"model": "m", "samples": 3, "top_p": 0.9, "checkpoint": "c"}
    )
    maps = {"residual": np.arange(6)[::-1].copy(), "layers.0.mlp": np.array([0, 1, 2, -1, 4])}
    save_file(maps, folders["maps"] / "maps")
    _write_bank(folders["bank"] / "bank", generator)
    _write_signatures(folders["signatures"], generator)
    return folders


def _write_bank(path, generator):
    probes = [EncodedProbe(torch.arange(3) + n, {"pixel_values": torch.ones(1, 2)}) for n in range(2)]
    tokens = torch.randint(9, (2, 2, 3), generator=generator)
    save_bank(
        path, PathBank(probes, tokens, -torch.rand(2, 2, 3, generator=generator), torch.full((2, 2), 3))
    )


def _write_signatures(folder, generator):
    description = {
        "samples": 3, "chunk": 2, "weighting": "mean", "gamma": None, "gradients": True, "reference": None,
        "model": "m", "paths": "p", "probes": "q", "modules": {"up": 4},
    }  # fmt: skip
    write_json(folder / "signatures.json", description)
    for number, rows in enumerate((2, 1)):
        tensors = {f"up.{field}": torch.randn(rows, 4, generator=generator) for field in FIELDS}
        tensors |= {name: torch.rand(rows, generator=generator) for name in ("loss", "log_mass", "effective")}
        write_safetensors(folder / f"signatures-{number:05d}.safetensors", tensors)


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_refused_or_read_and_never_a_fault(name, whole, tmp_path):
    survive(name, READERS[name], whole[name], tmp_path)


@devices
@pytest.mark.parametrize("name", READERS)
def test_devices_and_pipes_are_refused(name, whole, tmp_path):
    refuse_devices(READERS[name], whole[name], tmp_path)
