"""Leash, ledger, removal and budgets as a user meets them."""

import json

import pytest
import torch

import tiny
from tether.causal.checkpoint import save_checkpoint
from tether.causal.loading import load
from tether.causal.modeling import CausalQwenForCausalLM
from tether.delta.delta import Delta
from tether.delta.gate import Gate
from tether.store.documents import write_documents


@pytest.fixture
def tether(tether, monkeypatch, work):
    monkeypatch.chdir(work)
    return tether


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a base, three deltas and two texts."""
    folder = tmp_path_factory.mktemp("work")
    model = CausalQwenForCausalLM.from_backbone(tiny.backbone())
    save_checkpoint(model, tiny.tokenizer(), folder / "model")
    for seed, name in enumerate(("law", "code", "tables")):
        generator = torch.Generator().manual_seed(seed)
        gate = Gate(torch.zeros(32), torch.randn(3, 32, generator=generator), torch.full((4,), 90.0))
        heads = torch.randn(2, 32, 32, generator=generator) / 32
        Delta(
            name=name,
            chart="symmetric",
            first=heads[0],
            second=heads[1],
            gate=gate,
            base=model.config.base_fingerprint,
            record={"budget": 0.1, "metric": "softmax", "latent_base": 0.4},
        ).save(folder / f"{name}.delta")
    for name, kind in (("general", "words"), ("other", "digits")):
        write_documents(folder / f"{name}.jsonl", tiny.documents(kind, 12))
    return folder


def test_a_domain_is_removed_and_added_again(tether, work):
    assert tether("fuse", "model", "law.delta", "code.delta=0.5", "--leash", 0.3, "--out", "both")[0] == 0
    code, out, _ = tether("fuse", "both", "--remove", "law", "--out", "one", "--json")
    assert code == 0
    assert json.loads(out)["leash"] == {"nats": 0.3, "metric": "softmax"}
    assert tether("fuse", "model", "code.delta=0.5", "--leash", 0.3, "--out", "never")[0] == 0
    for name in ("model.safetensors", "config.json"):
        assert (work / "one" / name).read_bytes() == (work / "never" / name).read_bytes()
    code, out, _ = tether("fuse", "one", "law.delta", "--leash", 0, "--out", "again", "--json")
    assert json.loads(out)["domains"] == ["code", "law"]
    assert json.loads(out)["leash"] is None


def test_softmax_gates_are_chosen_and_kept(tether, work):
    def gate(*arguments):
        code, out, err = tether("fuse", *arguments, "--json")
        assert code == 0, err
        described = json.loads(out)
        return described.get("gate") if described["gated"] else None

    assert (
        gate("model", "law.delta", "code.delta=0.5", "tables.delta", "--gate", "softmax", "--out", "sm")
        == "softmax"
    )
    # Taking out and adding keep the kind, bit for bit; both can be changed.
    assert gate("sm", "--remove", "law", "--out", "sm-two") == "softmax"
    assert (
        gate("model", "code.delta=0.5", "tables.delta", "--gate", "softmax", "--out", "sm-never") == "softmax"
    )
    for name in ("model.safetensors", "config.json"):
        assert (work / "sm-two" / name).read_bytes() == (work / "sm-never" / name).read_bytes()
    assert gate("sm-two", "law.delta", "--out", "sm-added") == "softmax"
    assert gate("sm-added", "--gate", "one-class", "--out", "sm-one") == "one-class"
    assert gate("sm-one", "--no-gate", "--out", "sm-none") is None
    assert gate("model", "law.delta", "--by", "sum", "--out", "sm-plain") == "one-class"
    _, out, _ = tether("fuse", "model", "law.delta", "--gate", "softmax", "--out", "sm-told")
    assert "softmax gates" in out
    # What is served differs, so the choice is no mere label.
    z, mask = (
        torch.randn(1, 12, 32, generator=torch.Generator().manual_seed(5)),
        torch.ones(1, 12, dtype=torch.bool),
    )
    shared, single = (load(str(work / name))[0].fusion.gates(z, mask)[0] for name in ("sm-added", "sm-one"))
    assert bool((single.sum(0) > 1).any())
    torch.testing.assert_close(shared.sum(0), single.amax(0))


def test_the_ledger_prints_what_it_gives_as_json(tether):
    tether("fuse", "model", "law.delta", "code.delta=0.5", "--no-gate", "--leash", 0.4, "--leash-metric", "latent",
           "--out", "held")  # fmt: skip
    asked = ["ledger", "held", "--text", "general.jsonl", "--next", 0.2]
    code, out, _ = tether(*asked, "--json")
    figures = json.loads(out)
    assert code == 0
    assert figures["total"]["leashed"] <= 0.4 * (1 + 1e-5) < figures["total"]["measured"]
    assert figures["room"] == 0
    # A weight of 0.5 never adds drift, so what two budgets of 0.4 allow is that of unit weights: (2 sqrt 0.4)^2.
    assert figures["budgets"]["allowed"] == pytest.approx(1.6)
    code, out, _ = tether(*asked)
    assert code == 0
    for words in (
        "law",
        "code",
        "allowed",
        "measured",
        "ratio",
        "in rootkl",
        "from the budgets alone: allowed 1.6, measured",
        "leash 0.4 nats",
        "another delta of drift 0.2",
    ):
        assert words in out
    assert f"{figures['domains']['law']['share']:.5g}" in out


def test_an_addition_that_breaks_the_budget_is_refused(tether, work):
    def drift(*arguments):
        return json.loads(tether("ledger", *arguments, "--text", "general.jsonl", "--json")[1])["total"][
            "measured"
        ]

    tether("fuse", "model", "law.delta", "--by", "sum", "--no-gate", "--out", "first")
    tether("fuse", "model", "law.delta", "code.delta", "--by", "sum", "--no-gate", "--out", "second")
    between = (drift("first") + drift("second")) / 2
    budget = ["--budget", between, "--budget-metric", "latent", "--text", "general.jsonl"]
    code, out, _ = tether(
        "fuse", "model", "law.delta", "--by", "sum", "--no-gate", *budget, "--out", "within"
    )
    assert code == 0
    assert "mean drift" in out
    code, out, err = tether("fuse", "within", "code.delta", "--text", "general.jsonl", "--out", "beyond")
    assert code == 1
    assert "allowed" in err
    assert not (work / "beyond").exists()
    # The budget can be neither forgotten nor checked on another text.
    for text, said in (([], "no --text"), (["--text", "other.jsonl"], "another text")):
        code, _, err = tether("fuse", "within", "code.delta", *text, "--out", "beyond")
        assert code == 2
        assert said in err
    code, out, _ = tether("fuse", "within", "code.delta=0.01", "--text", "general.jsonl", "--out", "small")
    assert code == 0
    # A removal can add drift where deltas cancelled; a tighter leash cannot.
    for change in (["--remove", "code"], ["--chart", "linear"], ["--gate", "one-class"]):
        assert "no --text" in tether("fuse", "small", *change, "--out", "less")[2]
    assert tether("fuse", "small", "--leash", "0.5", "--out", "tighter")[0] == 0
    assert "no --text" in tether("fuse", "tighter", "--leash", "0", "--out", "looser")[2]
    code, out, _ = tether(
        "fuse", "small", "--remove", "code", "--text", "general.jsonl", "--out", "less", "--json"
    )
    assert json.loads(out)["allowance"]["metric"] == "latent"


BAD = {
    "leash of nothing": (["law.delta", "--leash", "-1"], "positive finite"),
    "leash metric": (["law.delta", "--leash", "1", "--leash-metric", "kl"], "latent, softmax"),
    "unknown domain": (["--remove", "law"], "the model has none"),
    "budget without text": (["law.delta", "--budget", "1"], "--text"),
    "budget of nothing": (["law.delta", "--budget", "0", "--text", "general.jsonl"], "nats > 0"),
    "budget metric": (
        ["law.delta", "--budget", "1", "--budget-metric", "kl", "--text", "general.jsonl"],
        "latent",
    ),
    "no deltas": ([], "no deltas"),
    "gate kind": (["law.delta", "--gate", "loudest"], "one-class, softmax"),
    "gate and none": (["law.delta", "--gate", "softmax", "--no-gate"], "or --no-gate"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_message_and_nothing_written(tether, work, case):
    arguments, message = BAD[case]
    code, out, err = tether("fuse", "model", *arguments, "--out", "result")
    assert (code, out) == (2, "")
    assert message in err
    assert not (work / "result").exists()
    assert tether("ledger", "model", "--text", "general.jsonl")[0] == 2
