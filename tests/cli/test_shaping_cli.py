"""`tether train --form` and `tether route --moe --experts` as a user meets them."""

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import tiny
from tether.store.documents import write_documents


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shaping")
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**tiny.SIZES, tie_word_embeddings=True)).save_pretrained(
            folder / "dense"
        )
    tiny.tokenizer().save_pretrained(folder / "dense")
    write_documents(folder / "digits.jsonl", tiny.documents("digits", 8, 1))
    (folder / "quick.yaml").write_text("batch: 4\nlr: 3e-3\nwindow: 48\n")
    (folder / "whole.yaml").write_text("batch: 4\nlr: 3e-3\nwindow: 48\npart: all\n")
    return folder


@pytest.fixture
def mixture(work, tether, monkeypatch):
    monkeypatch.chdir(work)
    if not (work / "moe").is_dir():
        code, out, err = tether("route", "dense", "--moe", "--experts", "4", "--out", "moe")
        assert code == 0, err
        assert "moe: a mixture of 4 experts" in out
    return work


TRAIN = ("train", "moe", "--text", "digits.jsonl", "--steps", "20")


def test_copies_of_the_base_compute_what_the_base_does(mixture):
    dense, moe = (AutoModelForCausalLM.from_pretrained(name) for name in ("dense", "moe"))
    assert (moe.config.model_type, moe.config.num_local_experts, moe.config.num_experts_per_tok) == (
        "mixtral",
        4,
        2,
    )
    ids = AutoTokenizer.from_pretrained("moe")(tiny.documents("words", 1)[0], return_tensors="pt")[
        "input_ids"
    ]
    with torch.no_grad():
        torch.testing.assert_close(moe(input_ids=ids).logits, dense(input_ids=ids).logits, rtol=0, atol=1e-5)
    # Each expert is the base's own MLP; the routers tell tokens apart.
    name = "model.layers.0.mlp.experts.down_proj"
    for expert in dict(moe.named_parameters())[name]:
        assert torch.equal(expert, dense.model.layers[0].mlp.down_proj.weight)
    assert float(moe.model.layers[0].mlp.gate.weight.detach().std()) > 0.01


def test_a_training_names_the_dead_and_draws_the_loads(mixture, tether):
    with torch.no_grad():
        moe = AutoModelForCausalLM.from_pretrained("moe")
        moe.model.embed_tokens.weight[:, 0] = 1.0
        moe.model.layers[1].mlp.gate.weight[2, 0] = -30.0
        moe.save_pretrained("starved")
        AutoTokenizer.from_pretrained("moe").save_pretrained("starved")
    asked = ("train", "starved", *TRAIN[2:], "--options", "whole.yaml", "--form", "none", "--out", "measured")
    code, out, err = tether(*asked)
    assert code == 0, err
    report = json.loads((mixture / "measured" / "routing.json").read_text())
    dead = {name: row["dead"] for name, row in report["layers"].items()}
    assert 2 in dead["backbone.layers.1.mlp"]
    (line,) = [line for line in err.splitlines() if line.startswith("step 20: ")]
    assert re.match(r"step 20: \d of 8 experts (is|are) dead: ", line)
    assert f"backbone.layers.1.mlp {', '.join(map(str, dead['backbone.layers.1.mlp']))}" in line
    assert "dead experts (under 1 % of a fair share): " in out
    assert "measured/routing.png" in out
    assert (mixture / "measured" / "routing.png").read_bytes()[:4] == b"\x89PNG"


def test_a_training_is_shaped_and_prints_json(mixture, tether):
    asked = (*TRAIN, "--part", "all", "--options", "quick.yaml")
    code, out, err = tether(
        *asked, "--form", "tax", "--cost", "snr", "--lam", "0.02", "--out", "taxed", "--json"
    )
    assert code == 0, err
    record = json.loads(out)
    assert {key: record["term"][key] for key in ("form", "cost", "lam", "steps")} == {
        "form": "tax", "cost": "snr", "lam": 0.02, "steps": 20,
    }  # fmt: skip
    assert record["term"] == json.loads((mixture / "taxed" / "routing.json").read_text())
    code, out, _ = tether(*asked, "--out", "bare", "--json")
    assert code == 0
    bare = json.loads(out)
    assert "term" not in bare
    assert not (mixture / "bare" / "routing.json").exists()
    assert bare["curve"] != record["curve"]
    code, _, err = tether(
        "train", "dense", *asked[2:], "--form", "balance", "--out", "none", "--options", "quick.yaml"
    )
    assert code == 2
    assert "no layer with 'experts'" in err
    assert not (mixture / "none").exists()


BAD = {
    "no form": (["--lam", "0.1"], "--lam: no meaning without --form"),
    "no form, cost": (["--cost", "paper"], "--cost: no meaning without --form"),
    "unknown form": (["--form", "fars"], "form='fars'"),
    "unknown cost": (["--form", "tax", "--cost", "nats"], "cost='nats'"),
    "negative": (["--form", "tax", "--lam", "-1"], "lam=-1.0"),
    "bias": (["--form", "bias", "--part", "all"], "choose without it"),
    "no cost": (
        ["--form", "switch", "--cost", "snr", "--part", "all"],
        "--cost: no meaning with --form switch",
    ),
    "frozen": (["--form", "balance"], "give --part all"),
    "constant": (["--form", "tax", "--cost", "uniform", "--part", "all"], "without a gradient"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_shaping_is_one_message_before_the_model_is_loaded(mixture, tether, monkeypatch, case):
    monkeypatch.setattr("tether.causal.loading.load", lambda *_, **__: pytest.fail("loaded"))
    arguments, message = BAD[case]
    code, out, err = tether(*TRAIN, "--out", "bad", *arguments)
    assert (code, out) == (2, "")
    assert message in " ".join(err.split())
    assert err.count("tether:") == 1
    assert not (mixture / "bad").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--experts", "4"), "--experts: no meaning without --moe"),
        (("--out", "odd"), "no parts"),
        (("--moe",), "no parts"),
        (("dense", "--moe", "--experts", "3"), "--experts: no meaning with --moe"),
        (("--moe", "--experts", "4", "--text", "digits.jsonl"), "--text: no meaning with --experts"),
        (("--moe", "--experts", "4", "--form", "prior"), "--form: no meaning with --experts"),
        (("--moe", "--experts", "1"), "--experts"),
    ],
)
def test_unusable_copies_are_refused_with_one_message(mixture, tether, arguments, message):
    code, _, err = tether("route", "dense", "--out", "odd", *arguments)
    assert code == 2
    assert message in " ".join(err.split())
    assert not (mixture / "odd").exists()
