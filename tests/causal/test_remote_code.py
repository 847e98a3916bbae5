"""Code that a checkpoint brings is not run, and nobody is asked whether it may, from Python either."""

import builtins
import json

import pytest

import tiny
from tether.causal.loading import load
from tether.causal.modeling import CausalQwenForCausalLM
from tether.causal.numbers import NumericTokenizer
from tether.errors import CheckpointError

PARTS = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
LOADERS = {
    "from_pretrained": CausalQwenForCausalLM.from_pretrained,
    "from_backbone": CausalQwenForCausalLM.from_backbone,
    "load": load,
}


@pytest.mark.parametrize("name", LOADERS)
def test_code_of_a_checkpoint_is_refused_without_a_question(name, tmp_path, monkeypatch):
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "its_own", "auto_map": PARTS}))
    (tmp_path / "base" / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    asked = []
    monkeypatch.setattr(builtins, "input", lambda *question: asked.append(question) or "y")
    with pytest.raises((ValueError, CheckpointError), match="custom code"):
        LOADERS[name](str(tmp_path / "base"))
    assert asked == []
    assert not (tmp_path / "ran").exists()


def test_neither_is_that_of_a_tokenizer(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    config = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "its_own", "auto_map": PARTS}))
    asked = []
    monkeypatch.setattr(builtins, "input", lambda *question: asked.append(question) or "y")
    with pytest.raises(CheckpointError, match="no tokenizer could be loaded"):
        NumericTokenizer.from_pretrained(tmp_path)
    assert asked == []
    assert not (tmp_path / "ran").exists()
