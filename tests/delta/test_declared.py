"""What deltas declare of their drift comes with a measurement, and an edit of it is found."""

import json
import shutil
from itertools import pairwise

import pytest
import torch

import tiny
from tether.causal.checkpoint import save_checkpoint
from tether.causal.loading import load
from tether.causal.modeling import CausalQwenForCausalLM
from tether.delta.certificate import certify, read
from tether.delta.declared import BEYOND, BEYOND_ALONE, alone_figures, broken
from tether.delta.delta import Delta
from tether.delta.fusion import fuse, unfuse
from tether.delta.gate import Gate
from tether.delta.record import Certificate
from tether.delta.verification import not_checked, verify
from tether.delta.windows import window_text
from tether.store.documents import text_hash, write_documents

GENERAL = tiny.documents("words", 6, 3)
WINDOW = 48
CLOSED = Gate(torch.zeros(32), torch.eye(32)[:4], torch.zeros(6))
"""A gate that never opens: deltas are measured without it, as their budgets were."""


def delta_of(base, name, size, **record):
    heads = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(len(name)))
    return Delta(
        name=name,
        chart="symmetric",
        first=heads[0] * size / 2,
        second=heads[1] * size,
        gate=CLOSED,
        base=base.config.base_fingerprint,
        record={"metric": "softmax", "texts": {"base": text_hash(GENERAL), "domain": "x"}} | record,
    )


@pytest.fixture(scope="module")
def base():
    return CausalQwenForCausalLM.from_backbone(tiny.backbone())


@pytest.fixture(scope="module")
def windows():
    return window_text(GENERAL, tiny.tokenizer(), length=WINDOW)


def kl_at_each_token(base, delta, windows):
    """Oracle: KL of the softmax in float64, from two forward passes of each window."""
    return drifts_at_each_token(base, delta, windows)[0]


def drifts_alone(base, delta, windows):
    """Oracle: means of both drifts."""
    return tuple(float(each.mean()) for each in drifts_at_each_token(base, delta, windows))


def drifts_at_each_token(base, delta, windows):
    """Oracle: KL of the softmax in float64, and drift of U, from two forward passes of each window."""
    single = fuse(base, {delta: 1.0}, by="sum", gated=False)
    kl, latent = [], []
    ends = windows.starts.tolist()
    for first, last in pairwise(ends):
        ids = windows.input_ids[first:last].unsqueeze(0)
        with torch.no_grad():
            before, after = (
                each(input_ids=ids).logits.double().log_softmax(-1)[0] for each in (base, single)
            )
            states = base.backbone(ids).last_hidden_state[0]
            x, y = (part[0].double() for part in single.fusion.deltas(states))
        kl.append((before.exp() * (before - after)).sum(-1))
        # KL of Cauchy laws, log(((s1 + s2)^2 + (l1 - l2)^2) / (4 s1 s2)), with s1 = 1, l1 = 0, s2 = e^x, l2 = y.
        latent.append((((1 + x.exp()).square() + y.square()) / (4 * x.exp())).log().sum(-1))
    return torch.cat(kl), torch.cat(latent)


@pytest.mark.parametrize("by", ["evidence", "sum"])
def test_each_delta_is_measured_alone_on_the_text_of_its_budget(base, windows, by):
    deltas = {
        delta_of(base, "law", 0.02, budget=0.5, latent_base=3.0): 0.5,
        delta_of(base, "elsewhere", 0.02, budget=0.5, texts={"base": "sha256:1"}): 1.0,
        delta_of(base, "rare", 0.03, budget=0.5, quantile=0.95): 1.0,
        delta_of(base, "latent", 0.01, budget=2.0, metric="latent"): 1.0,
    }
    fused = fuse(base, deltas, by=by)
    found = alone_figures(fused, windows, text_hash(GENERAL), 0.95)
    law, _, rare, latent = deltas
    kl, drift = drifts_alone(base, law, windows)
    assert found.keys() == {"law", "rare", "latent"}
    assert found["rare"].keys() == {"budget"}
    assert found["rare"]["budget"]["quantile"] == 0.95
    at = kl_at_each_token(base, rare, windows)
    assert found["rare"]["budget"]["mean"] == pytest.approx(
        float(at.quantile(0.95, interpolation="higher")), rel=1e-4
    )
    assert found["rare"]["budget"]["low"] < found["rare"]["budget"]["mean"] < found["rare"]["budget"]["high"]
    assert found["law"]["budget"]["mean"] == pytest.approx(kl, rel=1e-4)
    assert found["law"]["latent_base"]["mean"] == pytest.approx(drift, rel=1e-4)
    assert found["law"]["budget"]["low"] < kl < found["law"]["budget"]["high"]
    assert found["latent"]["budget"]["mean"] == pytest.approx(
        drifts_alone(base, latent, windows)[1], rel=1e-4
    )
    assert [found["law"][name]["declared"] for name in ("budget", "latent_base")] == [0.5, 3.0]
    assert alone_figures(fused, windows, "sha256:another text", 0.95) == {}
    # What is declared survives when a fusion is taken apart and made again.
    again = fuse(*unfuse(fused), by=by)
    assert again.config.fusion["budgets"] == fused.config.fusion["budgets"]


@pytest.mark.parametrize(
    ("low", "mean", "wrong"),
    [
        (1.001 * BEYOND, 9.0, True),
        (0.999 * BEYOND, 9.0, False),
        (None, 1.001 * BEYOND_ALONE, True),
        (None, 0.999 * BEYOND_ALONE, False),
    ],
)
def test_only_a_drift_clearly_beyond_what_is_declared_breaks_it(low, mean, wrong):
    found = {"metric": "softmax", "declared": 0.1, "mean": 0.1 * mean, "low": low and 0.1 * low, "high": 1.0}
    figures = {"general": {"alone": {"law": {"budget": found}}}}
    lines = broken({"allowance": None}, {}, figures)
    assert [line.startswith("general: budget of law is declared as 0.1 nats") for line in lines] == [
        True
    ] * wrong


@pytest.fixture(scope="module")
def made(base, windows, tmp_path_factory):
    """A folder with a delta within its budget, another one without base text, their fusion and its certificate."""
    folder = tmp_path_factory.mktemp("declared")
    write_documents(folder / "general.jsonl", GENERAL)
    kl, drift = drifts_alone(base, delta_of(base, "law", 0.02), windows)
    law = delta_of(base, "law", 0.02, budget=kl, latent_base=drift).save(folder / "law.delta")
    code = delta_of(base, "code", 0.01, budget=0.5, texts=None)
    limit = {"nats": 2 * kl, "metric": "softmax", "text": text_hash(GENERAL)}
    fused = fuse(base, {law: 1.0, code: 1.0}, by="sum", gated=False, allowance=limit)
    save_checkpoint(fused, tiny.tokenizer(), folder / "fused")
    certify(base, fused, tiny.tokenizer(), folder / "general.jsonl", window=WINDOW).save(folder / "cert.json")
    return folder


@pytest.fixture
def copy(made, tmp_path):
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


def test_an_honest_budget_holds_and_one_without_its_text_is_said_to_be_open(copy):
    assert verify(copy / "cert.json") == []
    (said,) = not_checked(copy / "cert.json", base=True, key=True)
    assert said == "the declared drift of code (no text is the base text that it was met on)"


def lower(budgets, key):
    budgets[0][key] /= 10


@pytest.mark.parametrize("key", ["budget", "latent_base"])
def test_an_edited_budget_in_the_checkpoint_is_found_by_measuring(copy, key):
    path = copy / "fused" / "config.json"
    content = json.loads(path.read_text())
    lower(content["fusion"]["budgets"], key)
    path.write_text(json.dumps(content))
    assert any("config.json has changed" in line for line in verify(copy / "cert.json"))
    # And where the certificate is made after the edit.
    fused, tokenizer = load(str(copy / "fused"))
    certify(unfuse(fused)[0], fused, tokenizer, copy / "general.jsonl", window=WINDOW).save(
        copy / "cert.json"
    )
    (wrong,) = verify(copy / "cert.json")
    what = {"budget": "budget of law", "latent_base": "latent drift of law"}[key]
    assert wrong.startswith(f"general: {what} is declared as")


@pytest.mark.parametrize("quantile", [None, 0.9])
def test_an_edited_budget_in_a_delta_is_found_by_measuring(copy, base, windows, quantile):
    law = Delta.load(copy / "law.delta")
    if quantile is not None:
        at = kl_at_each_token(base, law, windows)
        law.record.update(quantile=quantile, budget=float(at.quantile(quantile)))
    law.record["budget"] /= 10
    law.save(copy / "law.delta")
    fused = fuse(base, {Delta.load(copy / "law.delta"): 1.0})
    shutil.rmtree(copy / "fused")
    save_checkpoint(fused, tiny.tokenizer(), copy / "fused")
    certify(base, fused, tiny.tokenizer(), copy / "general.jsonl", window=WINDOW).save(copy / "cert.json")
    (wrong,) = verify(copy / "cert.json")
    assert wrong.startswith("general: budget of law is declared as")


@pytest.mark.parametrize("where", ["fusion", "figures", "allowance"])
def test_an_edited_budget_in_the_certificate_is_found(copy, where):
    content = json.loads((copy / "cert.json").read_text())
    if where == "fusion":
        lower(content["fusion"]["budgets"], "budget")
    elif where == "allowance":
        content["fusion"]["allowance"]["nats"] /= 10
    else:
        content["figures"]["general"]["alone"]["law"]["budget"]["declared"] /= 10
    (copy / "cert.json").write_text(json.dumps(Certificate(**content).sealed().model_dump(mode="json")))
    assert len(verify(copy / "cert.json")) == 1


def test_an_edited_budget_of_the_fusion_is_found_by_measuring(copy):
    path = copy / "fused" / "config.json"
    content = json.loads(path.read_text())
    content["fusion"]["allowance"]["nats"] /= 10
    path.write_text(json.dumps(content))
    fused, tokenizer = load(str(copy / "fused"))
    certify(unfuse(fused)[0], fused, tokenizer, copy / "general.jsonl", window=WINDOW).save(
        copy / "cert.json"
    )
    (wrong,) = verify(copy / "cert.json")
    assert wrong.startswith("general: budget of the fusion is declared as")
    assert read(copy / "cert.json").fusion["allowance"]["nats"] == content["fusion"]["allowance"]["nats"]
