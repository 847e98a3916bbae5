import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import tiny
from tether.cli.app import app
from tether.errors import ConfigError
from tether.merge.axes import find_tower, sizes
from tether.merge.maps import bring, read_maps
from tether.merge.pairing import align_checkpoints
from tether.store.documents import write_documents


@pytest.fixture
def pair(tmp_path):
    """A model, and the same with its hidden units in another order."""
    model = tiny.backbone("llama")
    for name in "ab":
        model.save_pretrained(tmp_path / name)
        tiny.tokenizer().save_pretrained(tmp_path / name)
        state = model.state_dict()
        tower = find_tower(state)
        shapes = {short: tuple(state[full].shape) for short, full in tower.names.items()}
        size = sizes(model.config.to_dict(), shapes, "it")
        order = {"layers.1.mlp": np.random.default_rng(0).permutation(size.mlp)}
        for short, full in tower.names.items():
            values = state[full].numpy().copy()
            state[full].copy_(torch.from_numpy(bring(short, values, values, order, size, size).copy()))
    return order["layers.1.mlp"]


# Documents of up to 150 tokens, and documents that are all shorter than a window of 64.
@pytest.mark.parametrize("longest", [150, 40])
def test_the_order_of_units_is_found(tmp_path, pair, longest):
    texts = [
        text[: longest - n] for n, text in enumerate(tiny.documents("words", 9) + tiny.documents("digits", 9))
    ]
    texts = [text for text in texts if len(text) >= 22]
    write_documents(tmp_path / "text.jsonl", texts)
    found = align_checkpoints(
        str(tmp_path / "a"), str(tmp_path / "b"), tmp_path / "text.jsonl", tmp_path / "maps"
    )
    maps, _ = read_maps(tmp_path / "maps")
    assert list(maps) == ["layers.1.mlp"]
    np.testing.assert_array_equal(maps["layers.1.mlp"], np.argsort(pair))
    assert found["tokens"] > 300
    assert found["unmatched"]["layers.1.mlp"] == 0


def test_the_command_writes_maps(tmp_path, pair):
    write_documents(tmp_path / "text.jsonl", tiny.documents("words", 9))
    arguments = [str(tmp_path / "a"), str(tmp_path / "b"), "--text", str(tmp_path / "text.jsonl")]
    ran = CliRunner().invoke(app, ["merge", "align", *arguments, "--out", str(tmp_path / "maps"), "--json"])
    assert ran.exit_code == 0, ran.output
    assert json.loads(ran.stdout)["similarity"]["layers.1.mlp"] == pytest.approx(1, abs=1e-5)
    assert list(read_maps(tmp_path / "maps")[0]) == ["layers.1.mlp"]


def test_other_vocabularies_are_refused(tmp_path, pair):
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["zzz"])
    tokenizer.save_pretrained(tmp_path / "b")
    write_documents(tmp_path / "text.jsonl", tiny.documents("words", 3))
    with pytest.raises(ConfigError, match="vocabularies"):
        align_checkpoints(
            str(tmp_path / "a"), str(tmp_path / "b"), tmp_path / "text.jsonl", tmp_path / "maps"
        )
    assert not (tmp_path / "maps").exists()
