"""Adapters made elsewhere: what they amount to is what PEFT serves, at every strength, and their budget is met."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import foreign_adapters
import tiny
from foreign_adapters import REFUSED, TAKEN, at_share, merged, write
from tether.causal.modeling import CausalQwenForCausalLM
from tether.delta import leashing
from tether.delta.adapter import Adapter
from tether.delta.adapter_passes import Passes, Text
from tether.delta.adapter_serving import save_adapted, serve
from tether.delta.attached import Attached
from tether.delta.budget import Budget
from tether.delta.certificate import certify
from tether.delta.held_out import HELD_OUT, hold_out
from tether.delta.leashing import leash_adapter
from tether.delta.material import states_of
from tether.delta.verification import verify
from tether.delta.windows import window_text
from tether.errors import CheckpointError, ConfigError
from tether.store.documents import read_documents, write_documents

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # by PEFT itself
BUDGET = 0.02


@pytest.fixture(scope="module")
def model():
    return CausalQwenForCausalLM.from_backbone(foreign_adapters.plain())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base and texts on disk."""
    folder = tmp_path_factory.mktemp("leashing")
    for part in (foreign_adapters.plain(), tiny.tokenizer()):
        part.save_pretrained(folder / "base")
    write_documents(folder / "general.jsonl", tiny.documents("words", 12, 3))
    write_documents(folder / "digits.jsonl", tiny.documents("digits", 12, 1))
    return folder


@pytest.fixture(autouse=True)
def no_background(monkeypatch):
    monkeypatch.setattr(leashing, "write_background", lambda model: tiny.BACKGROUND)


def leashed(model, path, folder, **options):
    return leash_adapter(
        model, tiny.tokenizer(), path, base_texts=read_documents(folder / "general.jsonl"),
        **{"budget": BUDGET, "window": 48, "tokens": 100_000, "name": "a", **options},
    )  # fmt: skip


def law(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits.double().log_softmax(-1)


def general_kl(model, other, folder):
    """Mean KL of two models' laws over all of the base text, in its windows."""
    kl = []
    for document in read_documents(folder / "general.jsonl"):
        ids = tiny.tokenizer()(document, return_tensors="pt")["input_ids"]
        for some in ids.split(48, dim=1):
            if some.shape[1] >= 32:
                before, after = (law(each, some)[0] for each in (model, other))
                kl.append((before.exp() * (before - after)).sum(-1))
    return float(torch.cat(kl).mean())


@pytest.mark.parametrize("kind", TAKEN)
def test_every_kind_is_shrunk_and_served_as_peft_serves_it(model, folder, tmp_path, generator, kind):
    write(TAKEN[kind], tmp_path / "theirs")
    made = leashed(model, tmp_path / "theirs", folder)
    share = made.record["factor"]
    assert 0.05 < share < 1
    assert 0.95 * BUDGET <= made.record["drift_base"] <= BUDGET
    theirs = at_share(tmp_path / "theirs", share)
    assert general_kl(foreign_adapters.plain(), theirs, folder) == pytest.approx(
        made.record["drift_base"], rel=1e-3
    )
    assert made.record["softmax_kl"]["after"]["mean"] == pytest.approx(made.record["drift_base"])
    ids = torch.randint(256, (2, 30), generator=generator)
    expected = law(theirs, ids)
    made.save(tmp_path / "a")
    again = Adapter.load(tmp_path / "a")
    served = serve(model, {again: 1.0}, by="sum", gated=False)
    assert_close(law(served, ids).exp(), expected.exp(), rtol=0, atol=1e-5)
    assert float((expected - law(model, ids)).abs().max()) > 0.05
    # By evidence, where rows of several adapters are in one batch.
    passes = Passes(Attached.of(model, {"a": again, "b": again}), ["b", "a"], model.numeric)
    adapted = torch.zeros(2, 30, 2, 32)
    passes.fill(
        adapted,
        Text(ids, torch.ones(2, 30, dtype=torch.bool)),
        torch.ones(2, 30, 2, dtype=torch.bool),
        0,
        None,
    )
    for number in range(2):
        scores = model.action.score_loc(model.abduction(adapted[:, :, number])[0]).detach()
        assert_close(scores.double().softmax(-1), expected.exp(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", TAKEN)
def test_at_its_whole_strength_it_is_what_peft_reads_from_the_folder(
    model, folder, tmp_path, generator, kind
):
    write(TAKEN[kind], tmp_path / "theirs")
    made = leashed(model, tmp_path / "theirs", folder, budget=1e3)
    assert made.record["factor"] == 1
    assert made.record["budget_why"] == "It is within its budget as it is."
    ids = torch.randint(256, (2, 30), generator=generator)
    theirs = at_share(tmp_path / "theirs", 1.0)
    served = serve(model, {made: 1.0}, by="sum", gated=False)
    assert_close(law(served, ids).exp(), law(theirs, ids).exp(), rtol=0, atol=1e-5)


def test_at_strength_0_a_dora_is_the_base_where_peft_leaves_it_elsewhere(model, folder, tmp_path, generator):
    write(TAKEN["DoRA"], tmp_path / "theirs")
    made = leashed(model, tmp_path / "theirs", folder, budget=1e3)
    ids = torch.randint(256, (2, 30), generator=generator)
    attached = Attached.of(model, {"a": made})
    states = {}
    with torch.no_grad():
        base = model.backbone(ids).last_hidden_state
        for share in (0.0, 0.5, 1.0, 0.0):
            attached.rescale("a", share)
            states[share] = attached.states("a", ids).last_hidden_state
        assert_close(states[0.0], base, rtol=0, atol=1e-4)
        attached.rescale("a", 1.0)
        for module in attached.peft.modules():
            if attached.slot("a") in getattr(module, "lora_B", {}):
                module.set_scale(attached.slot("a"), 0.0)
        theirs = attached.states("a", ids).last_hidden_state
    assert float((theirs - base).abs().max()) > 0.05


@pytest.mark.parametrize("kind", REFUSED)
def test_other_kinds_are_refused_with_the_reason(model, folder, tmp_path, kind):
    config, reason = REFUSED[kind]
    write(config, tmp_path / "theirs")
    with pytest.raises(CheckpointError, match=reason) as refused:
        leashed(model, tmp_path / "theirs", folder)
    assert str(tmp_path / "theirs") in str(refused.value) or kind == "DoRA with biases"


def test_what_was_saved_beside_it_but_not_trained_changes_nothing(model, folder, tmp_path):
    """PEFT saves embeddings beside adapters that may have changed them, and all biases with bias='all'."""
    write(TAKEN["LoRA"], tmp_path / "theirs")
    expected = leashed(model, tmp_path / "theirs", folder)
    path = tmp_path / "theirs" / "adapter_model.safetensors"
    own = foreign_adapters.plain().state_dict()
    beside = {
        f"base_model.model.{name}": own[name]
        for name in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj.bias")
    }
    save_file(load_file(path) | beside, path)
    made = leashed(model, tmp_path / "theirs", folder)
    assert made.record["factor"] == expected.record["factor"]
    assert made.tensors.keys() == expected.tensors.keys()


@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "bias of all", "PiSSA", "patterns"])
def test_fused_certified_and_verified_by_evidence_and_by_sum(model, folder, tmp_path, kind):
    write(TAKEN[kind], tmp_path / "theirs")
    made = leashed(model, tmp_path / "theirs", folder, texts=read_documents(folder / "digits.jsonl"))
    assert made.gate is not None
    assert made.sample
    made.save(tmp_path / "a")
    for by in ("evidence", "sum"):
        again = {Adapter.load(tmp_path / "a"): 1.0}
        served = serve(model, again, by=by, gated=by == "evidence")
        save_adapted(served, again, tiny.tokenizer(), tmp_path / by, base=str(folder / "base"))
        certificate = certify(
            model, served, tiny.tokenizer(), {"general": folder / "general.jsonl"}, window=48
        )
        certificate.save(tmp_path / f"{by}.json")
        assert verify(tmp_path / f"{by}.json", base=str(folder / "base")) == []
        row = certificate.figures["general"]
        # The budget was met on this text: it is measured there again, of the adapter alone.
        alone = row["alone"]["a"]["budget"]
        assert (alone["metric"], alone["declared"]) == ("softmax", BUDGET)
        assert 0.95 * BUDGET <= alone["mean"] <= BUDGET * (1 + 1e-4)
        if by == "sum":
            assert row["softmax_kl"]["mean"] == pytest.approx(alone["mean"], rel=1e-3)
    # Edited so that it is stronger than it says, it does not hold.
    path = tmp_path / "a" / "adapter_model.safetensors"
    stronger = {name: 3 * values if "lora_B" in name else values for name, values in load_file(path).items()}
    save_file(stronger, path, {"format": "pt"})
    forged = {Adapter.load(tmp_path / "a"): 1.0}
    served = serve(model, forged, by="sum", gated=False)
    save_adapted(served, forged, tiny.tokenizer(), tmp_path / "forged", base=str(folder / "base"))
    certify(model, served, tiny.tokenizer(), {"general": folder / "general.jsonl"}, window=48).save(
        tmp_path / "f.json"
    )
    assert "budget of a is declared as 0.02" in " ".join(verify(tmp_path / "f.json"))


def test_several_kinds_are_fused_by_evidence_in_one_model(model, folder, tmp_path, generator):
    """Each expert alone is what PEFT makes of its folder, whoever is awake beside it."""
    kinds = ["LoRA", "DoRA", "bias of all", "patterns"]
    made = {}
    for number, kind in enumerate(kinds):
        write(TAKEN[kind], tmp_path / str(number), seed=number)
        made[kind] = leashed(model, tmp_path / str(number), folder, name=f"domain-{number}")
    served = serve(model, dict.fromkeys(made.values(), 1.0))
    ids = torch.randint(256, (2, 20), generator=generator)
    mask = torch.ones(2, 20, dtype=torch.bool)
    adapted = torch.zeros(2, 20, len(kinds), 32)
    awake = torch.ones(2, 20, len(kinds), dtype=torch.bool)
    awake[0, :, 1] = False
    served.fusion.kept[1].fill(adapted, Text(ids, mask), awake, 0, None)
    for number, kind in enumerate(kinds):
        scores = model.action.score_loc(model.abduction(adapted[:, :, number])[0]).detach().double()
        theirs = law(at_share(tmp_path / str(number), made[kind].record["factor"]), ids)
        rows = slice(1 if number == 1 else 0, None)
        assert_close(scores[rows].softmax(-1), theirs[rows].exp(), rtol=0, atol=1e-5)
    assert not adapted[0, :, 1].any()


def test_other_metrics_and_a_quantile(model, folder, tmp_path):
    write(TAKEN["rsLoRA"], tmp_path / "theirs")
    for limit in (
        Budget(value=0.05, quantile=0.9, stretch=1.0),
        Budget(value=20.0, metric="latent", stretch=1.0),
    ):
        made = leashed(model, tmp_path / "theirs", folder, budget=limit)
        assert 0.95 * limit.value <= made.record["drift_base"] <= limit.value
        assert (made.record["metric"], made.record["quantile"]) == (limit.metric, limit.quantile)
        assert made.record["softmax_kl"]["after"]["p99"] <= made.record["softmax_kl"]["before"]["p99"]


def test_an_adapter_of_tether_is_leashed_further_and_keeps_what_it_carries(model, folder, tmp_path):
    write(TAKEN["LoRA"], tmp_path / "theirs")
    first = leashed(model, tmp_path / "theirs", folder, texts=read_documents(folder / "digits.jsonl"))
    first.save(tmp_path / "first")
    second = leashed(model, tmp_path / "first", folder, budget=BUDGET / 4)
    assert torch.equal(second.gate.whitening, first.gate.whitening)
    assert second.sample == first.sample
    assert 0.95 * BUDGET / 4 <= second.record["drift_base"] <= BUDGET / 4
    bare = leashed(model, tmp_path / "first", folder, gate=False, sample=False)
    assert (bare.gate, bare.sample) == (None, ())
    other = CausalQwenForCausalLM.from_backbone(foreign_adapters.plain(seed=1))
    with pytest.raises(CheckpointError, match=r"was made on base sha256:.*name the base"):
        leashed(other, tmp_path / "first", folder)


def test_of_a_long_domain_text_windows_spread_over_it_are_used(model, folder, tmp_path, monkeypatch):
    write(TAKEN["LoRA"], tmp_path / "theirs")
    documents = tiny.documents("digits", 40, 1)
    every = window_text(documents, tiny.tokenizer(), length=48)
    monkeypatch.setattr(leashing, "OWN", int(every.starts[-1]) // 3)
    read = []
    monkeypatch.setattr(
        leashing,
        "states_of",
        lambda model, texts, *rest, **more: read.extend(texts) or states_of(model, texts, *rest, **more),
    )
    made = leashed(model, tmp_path / "theirs", folder, texts=documents, sample=True)
    (text,) = read
    assert leashing.OWN * 0.8 < int(text.starts[-1]) < leashing.OWN * 1.2
    assert text.documents.min() < 5
    assert text.documents.max() > 35
    assert set(made.sample) <= set(documents)


def test_a_model_that_was_fine_tuned_whole_becomes_a_lora(model, folder, tmp_path, generator):
    write(TAKEN["rsLoRA"], tmp_path / "theirs")
    tuned = merged(tmp_path / "theirs")
    for part in (tuned, tiny.tokenizer()):
        part.save_pretrained(tmp_path / "tuned")
    ids = torch.randint(256, (2, 30), generator=generator)
    whole = leashed(model, tmp_path / "tuned", folder, rank=4, budget=1e3)
    served = serve(model, {whole: 1.0}, by="sum", gated=False)
    assert_close(law(served, ids).exp(), law(tuned, ids).exp(), rtol=0, atol=1e-5)
    assert whole.record["difference"]["kept"] == pytest.approx(1.0, abs=1e-5)
    assert whole.record["difference"]["left_out"] == {}
    made = leashed(
        model, tmp_path / "tuned", folder, rank=2, texts=read_documents(folder / "digits.jsonl"), sample=False
    )
    assert 0.95 * BUDGET <= made.record["drift_base"] <= BUDGET
    about = made.record["difference"]
    assert 0.5 < about["kept"] < 0.95
    # As wide as the best approximation of that rank, by numpy's decomposition.
    total = kept = 0.0
    own, other = (each.state_dict() for each in (foreign_adapters.plain(), tuned))
    for name in own:
        if name.endswith("proj.weight"):
            values = torch.linalg.svdvals((other[name] - own[name]).double()).square()
            total, kept = total + float(values.sum()), kept + float(values[:2].sum())
    assert about["kept"] == pytest.approx(kept / total, rel=1e-4)
    windows = window_text(read_documents(folder / "digits.jsonl"), tiny.tokenizer(), length=48)
    aside = hold_out(windows, HELD_OUT)
    losses = []
    for row in (
        torch.isin(aside.windows.documents[aside.windows.starts[:-1]], aside.away).nonzero()[:, 0].split(1)
    ):
        ids = aside.windows.batch(row).input_ids
        losses.append(-law(tuned, ids)[0, :-1].gather(1, ids[0, 1:, None]))
    assert about["nll"]["tuned"] == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)


def test_what_a_lora_keeps_of_a_fine_tunes_gain_is_measured(model, folder, tmp_path):
    """Every weight is trained, on documents of the domain; the higher the rank, the more of the gain is kept."""
    tuned = foreign_adapters.plain().train()
    optimizer = torch.optim.Adam(tuned.parameters(), lr=3e-3)
    for text in tiny.documents("digits", 80, 7):
        ids = tiny.tokenizer()(text, return_tensors="pt")["input_ids"]
        optimizer.zero_grad()
        tuned(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    for part in (tuned.eval(), tiny.tokenizer()):
        part.save_pretrained(tmp_path / "tuned")
    kept = {}
    for rank in (1, 24):
        made = leashed(
            model,
            tmp_path / "tuned",
            folder,
            rank=rank,
            texts=read_documents(folder / "digits.jsonl"),
            gate=False,
        )
        about = made.record["difference"]
        assert about["nll"]["tuned"] < about["nll"]["base"] - 0.5
        gain = about["nll"]["base"] - about["nll"]["tuned"]
        assert about["gain_kept"] == pytest.approx((about["nll"]["base"] - about["nll"]["taken"]) / gain)
        assert {"model.norm.weight", "model.embed_tokens.weight", "the output head"} <= about[
            "left_out"
        ].keys()
        kept[rank] = about["gain_kept"]
        warned = any("has " in line and "of its gain" in line for line in made.record["warnings"])
        assert warned == (about["gain_kept"] < 0.5)
    assert kept[1] < 0.5
    assert kept[1] < kept[24] - 0.1


def test_changes_that_no_lora_holds_are_left_out_and_said(model, folder, tmp_path):
    tuned = foreign_adapters.plain()
    with torch.no_grad():
        tuned.model.layers[0].mlp.up_proj.weight.add_(0.3)
        tuned.model.norm.weight.mul_(1.5)
        tuned.model.layers[1].self_attn.q_proj.bias.add_(0.1)
    for part in (tuned, tiny.tokenizer()):
        part.save_pretrained(tmp_path / "tuned")
    made = leashed(model, tmp_path / "tuned", folder, rank=1, budget=1e3)
    assert made.record["difference"]["left_out"] == {"model.norm.weight": pytest.approx(0.5)}
    assert made.record["difference"]["kept"] == pytest.approx(1.0, abs=1e-5)
    tuned.model.norm.weight.data.div_(1.5)
    ids = torch.arange(40).unsqueeze(0)
    served = serve(model, {made: 1.0}, by="sum", gated=False)
    assert_close(law(served, ids).exp(), law(tuned, ids).exp(), rtol=0, atol=1e-5)


def test_an_ia3_that_was_merged_is_leashed_as_a_model(model, folder, tmp_path):
    """The way out that is named where a kind is refused."""
    tuned = foreign_adapters.train(REFUSED["IA3"][0], size=0.3).merge_and_unload()
    for part in (tuned, tiny.tokenizer()):
        part.save_pretrained(tmp_path / "tuned")
    made = leashed(model, tmp_path / "tuned", folder, rank=16)
    assert made.record["difference"]["kept"] > 0.8
    assert 0 < made.record["drift_base"] <= BUDGET


def damaged(folder, change):
    """An adapter's folder, changed by a function of its configuration and weights."""
    write(TAKEN["LoRA"], folder)
    change(folder)
    return folder


def rewritten(**fields):
    def change(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


def reweighed(change):
    def rewrite(folder):
        path = folder / "adapter_model.safetensors"
        save_file(change(load_file(path)), path)

    return rewrite


def truncated(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


WEIGHTS = "adapter_model.safetensors"
FIRST = "base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight"
DAMAGE = {
    "no configuration": (lambda folder: (folder / "adapter_config.json").unlink(), "no adapter_config.json"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "expected adapter_model.safetensors"),
    "pickled": (
        lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"), "a pickle"
    ),
    "cut off": (truncated, "adapter_model.safetensors"),
    "another rank": (rewritten(r=3), "rank 4, where 3 is described"),
    "a field from the future": (rewritten(run_this="now"), "'run_this'.*merge_and_unload"),
    "experts": (rewritten(target_parameters=["mlp.experts.down_proj"]), "'target_parameters'"),
    "another task": (rewritten(task_type="SEQ_CLS"), "expected CAUSAL_LM"),
    "a pattern to search": (rewritten(alpha_pattern={"(a+)+$": 4}), "patterns from files are not searched for"),
    "no kind": (rewritten(peft_type=None), "with peft_type"),
    "no numbers": (reweighed(lambda held: held | {FIRST: held[FIRST] * float("nan")}), "not numbers"),
    "quantised": (reweighed(lambda held: held | {FIRST: held[FIRST].to(torch.int8)}), "quantised"),
    "half of a pair": (
        reweighed(lambda held: {k: v for k, v in held.items() if k != FIRST}), "lora_A and lora_B is missing"
    ),
    "wider": (
        reweighed(lambda held: held | {FIRST: torch.ones(4, 64)}), "made for 64 to 16 numbers, in the base it is 32"
    ),
    "another layer": (
        reweighed(lambda held: {k.replace("layers.1", "layers.9"): v for k, v in held.items()}),
        "3 of its 6 layers do not fit this base.*the base has no such layer",
    ),
    "nothing": (reweighed(lambda held: {"base_model.model.lm_head.weight": torch.ones(3)}), "lm_head"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_and_other_bases_are_refused_before_anything_is_measured(
    model, folder, tmp_path, monkeypatch, kind
):
    change, said = DAMAGE[kind]
    monkeypatch.setattr(leashing, "BaseText", None)
    with pytest.raises(CheckpointError, match=said):
        leashed(model, damaged(tmp_path / "theirs", change), folder)


def test_other_input_that_cannot_be_used(model, folder, tmp_path):
    theirs = write(TAKEN["LoRA"], tmp_path / "theirs")
    for path, said in ((tmp_path / "absent", "no such folder"), (folder, "neither an adapter")):
        with pytest.raises(CheckpointError, match=said):
            leashed(model, path, folder)
    for budget in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="> 0"):
            leashed(model, theirs, folder, budget=budget)
    with pytest.raises(ConfigError, match="a penalty or a hard budget"):
        leashed(model, theirs, folder, budget=Budget(hard=True))
    with pytest.raises(ConfigError, match=r"no factor was found at which.*give a larger budget"):
        leashed(model, theirs, folder, budget=1e-30)
    fused = serve(model, {leashed(model, theirs, folder): 1.0})
    with pytest.raises(ConfigError, match="the model is fused"):
        leashed(fused, theirs, folder)
    base = folder / "base"
    with pytest.raises(CheckpointError, match="there is nothing to leash"):
        leashed(model, base, folder)
    for change, said in (
        ({"vocab_size": 300}, "vocab_size 300 where the base has 258"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
    ):
        shutil.rmtree(tmp_path / "tuned", ignore_errors=True)
        shutil.copytree(base, tmp_path / "tuned")
        config = tmp_path / "tuned" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | change))
        with pytest.raises(CheckpointError, match=said):
            leashing.open_source(tmp_path / "tuned", base)
    tiny.backbone("llama").save_pretrained(tmp_path / "llama")
    tiny.tokenizer().save_pretrained(tmp_path / "llama")
    with pytest.raises(CheckpointError, match="a LlamaModel, the base is a Qwen2Model"):
        leashed(model, tmp_path / "llama", folder)
