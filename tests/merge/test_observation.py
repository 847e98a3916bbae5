import json
from pathlib import Path

import pytest
import torch
import typer
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch.testing import assert_close
from transformers import CLIPImageProcessor, LlavaProcessor
from typer.testing import CliRunner

import tiny
from checkpoints import plan
from merge import lape
from processes import run_two
from tether.cli.observe import observe as command
from tether.errors import CheckpointError, ConfigError
from tether.merge.gram import load_grams, stream_grams
from tether.merge.observation import observe
from tether.merge.packing import pack_bank
from tether.merge.paths import load_bank
from tether.merge.probes import load_reader
from tether.merge.run import merge
from tether.merge.tefm.observed import parse_encoding
from tether.processes import Group, joined

SCRIPT = """
import sys
sys.path[:0] = {paths!r}
import torch
import test_observation as here
from pathlib import Path
here.observe_all(Path(sys.argv[1]))
torch.distributed.destroy_process_group()
"""
app = typer.Typer()
app.command()(command)


@pytest.fixture(scope="module")
def model():
    return tiny.backbone("llama")


def test_folder_holds_the_models_own_paths_and_their_matrices(model, tmp_path):
    stages = []

    def stage(name):
        stages.append(name)
        return lambda values: None

    observe(model, lape.probes(), tmp_path, paths=3, longest=8, on_step=stage)
    bank = load_bank(tmp_path / "paths.safetensors")
    expected = list(stream_grams(model, pack_bank(bank, model), head=True))
    for layer, grams in expected:
        found = load_grams(tmp_path, layer).grams
        assert found.keys() == grams.keys()
        for name, gram in grams.items():
            assert_close(found[name], gram)
    assert stages == ["sampling paths", "observing layers"]
    observe(model, lape.probes(), tmp_path, paths=3, longest=8, on_step=stage)
    assert len(stages) == 2


def test_goes_on_after_an_interruption_with_the_same_bytes(model, tmp_path):
    observe(model, lape.probes(), tmp_path, paths=2, longest=6)
    content = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    (tmp_path / "gram-00001.safetensors").unlink()
    (tmp_path / "gram-00002.safetensors").unlink()
    observe(model, lape.probes(), tmp_path, paths=2, longest=6)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == content


def test_another_observation_is_refused(model, tmp_path):
    observe(model, lape.probes(1), tmp_path, paths=2, longest=4)
    with pytest.raises(ConfigError, match="another seed"):
        observe(model, lape.probes(1), tmp_path, paths=2, longest=4, seed=1)
    with pytest.raises(ConfigError, match="another model"):
        observe(tiny.backbone("llama", seed=1), lape.probes(1), tmp_path, paths=2, longest=4)


def test_command_reads_images_with_the_models_processor(tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    model = lape.llava()
    model.config.image_token_index = tokenizer.convert_tokens_to_ids("<image>")
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "model")
    LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}),
        tokenizer=tokenizer, patch_size=4, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, image_token="<image>",
    ).save_pretrained(tmp_path / "model")  # fmt: skip
    Image.new("RGB", (8, 8), (9, 200, 30)).save(tmp_path / "a.png")
    lines = [{"text": "What colour?", "image": "a.png"}, {"text": "Go on"}]
    (tmp_path / "probes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = [
        str(tmp_path / "model"),
        "--probes",
        str(tmp_path / "probes.jsonl"),
        "--out",
        str(tmp_path / "g"),
    ]
    ran = CliRunner().invoke(app, [*arguments, "--json"])
    assert ran.exit_code == 0, ran.output
    bank = load_bank(tmp_path / "g" / "paths.safetensors")
    assert bank.probes[0].extras["pixel_values"].shape == (1, 3, 8, 8)
    grams = load_grams(tmp_path / "g", 0).grams
    assert all(bool(torch.isfinite(gram).all()) for gram in grams.values())
    assert next(iter(grams)).startswith("model.language_model.layers.0.")


def test_a_text_model_cannot_read_images(tmp_path):
    tiny.backbone("llama").save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="no vision-language model"):
        load_reader(str(tmp_path), images=True)
    loaded, tokenizer, processor = load_reader(str(tmp_path), images=False)
    assert processor is None
    assert loaded.config.vocab_size == len(tokenizer)


def test_matrices_of_another_checkpoint_are_refused_by_a_merge(tmp_path):
    for seed, name in enumerate("ab"):
        tiny.backbone("llama", seed=seed).save_pretrained(tmp_path / name)
        tiny.tokenizer().save_pretrained(tmp_path / name)
    (tmp_path / "probes.jsonl").write_text('{"text": "Go on"}\n{"text": "What colour?"}\n')

    for name in "ab":
        arguments = (tmp_path / name, "--probes", tmp_path / "probes.jsonl", "--out", tmp_path / f"g-{name}")
        ran = CliRunner().invoke(app, list(map(str, arguments)))
        assert ran.exit_code == 0, ran.output

    def merged(out, first, second):
        models = {
            name: {"path": str(tmp_path / name), "grams": str(tmp_path / f"g-{grams}")}
            for name, grams in (("a", first), ("b", second))
        }
        merge(plan(tmp_path, operator="regression_mean", models=models), tmp_path / out, threads=1)

    with pytest.raises(CheckpointError, match="observed on another checkpoint"):
        merged("wrong", "b", "a")
    assert not (tmp_path / "wrong").exists()
    merged("right", "a", "b")
    assert (tmp_path / "right" / "model.safetensors").is_file()
    # What nothing is known of is taken at its word.
    (tmp_path / "g-b" / "observation.json").unlink()
    merged("plain", "a", "b")
    (tmp_path / "g-b" / "observation.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"observation\.json is damaged: all of it"):
        merged("odd", "a", "b")
    (tmp_path / "g-b" / "observation.json").unlink()
    file = tmp_path / "g-b" / "gram-00000.safetensors"
    with safe_open(str(file), framework="pt") as opened:
        tensors, aliases = {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()  # noqa: SIM118
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, file, aliases)
    with pytest.raises(CheckpointError, match="holds NaN or infinity"):
        merged("odd", "a", "b")
    assert not (tmp_path / "odd").exists()


def observe_all(folder):
    options = {"paths": 3, "longest": 8, "encodings": [parse_encoding("position")]}
    observe(tiny.backbone("llama"), lape.probes(5), folder / "observed", **options)
    with joined() as group:
        group.wait()


def test_two_processes_observe_what_one_does_and_one_writes(tmp_path):
    here = Path(__file__).parent
    observe_all(tmp_path / "one")
    run_two(SCRIPT.format(paths=[str(here), str(here.parent)]), tmp_path, tmp_path / "two")
    one, two = (
        {
            path.relative_to(tmp_path / name): path
            for path in sorted((tmp_path / name).rglob("*"))
            if path.is_file()
        }
        for name in ("one", "two")
    )
    assert one.keys() == two.keys()
    for name, path in one.items():
        if path.suffix != ".safetensors":
            assert path.read_bytes() == two[name].read_bytes(), name
            continue
        with safe_open(path, "pt") as expected, safe_open(two[name], "pt") as found:
            assert set(expected.keys()) == set(found.keys())
            for key in expected.keys():  # noqa: SIM118 - it is no dict
                own, its = expected.get_tensor(key), found.get_tensor(key)
                assert_close(its, own, rtol=1e-5, atol=1e-6 * max(1.0, float(own.abs().max())))


def test_more_processes_than_samples_are_refused(model, tmp_path, monkeypatch):
    monkeypatch.setattr("tether.merge.observation.current", lambda: Group(9, 0))
    monkeypatch.setattr(Group, "agree", lambda self, **told: None)
    with pytest.raises(ConfigError, match="samples for 9 processes"):
        observe(model, lape.probes(2), tmp_path / "observed")
