"""A budget in somebody else's trainer: it is met in the trainer's own model, and what is written holds."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

import tiny
from foreign_adapters import lora
from tether.causal.loading import load, load_backbone
from tether.causal.softmax import softmax_kl
from tether.delta import leashing
from tether.delta.adapter import Adapter
from tether.delta.adapter_serving import serve
from tether.delta.budget import Budget
from tether.delta.leashed_trainer import LeashedTrainer
from tether.delta.material import HELD_OUT
from tether.delta.trainer_leash import TrainerLeash
from tether.delta.unadapted import without_adapters
from tether.delta.verification import verify
from tether.delta.windows import window_text
from tether.demo import corpora
from tether.errors import CheckpointError, ConfigError
from tether.store.documents import cut_documents, read_documents, write_documents

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

pytestmark = [
    pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated"),  # by PEFT, by TRL
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
]
BUDGET = 0.02
OPTIONS = {
    "use_cpu": True, "bf16": False, "learning_rate": 5e-3, "report_to": "none", "save_strategy": "no",
    "disable_tqdm": True, "logging_steps": 2,
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_background(monkeypatch):
    monkeypatch.setattr(leashing, "write_background", lambda model: tiny.BACKGROUND)


@pytest.fixture
def work(tmp_path):
    for part in (tiny.backbone(), tiny.tokenizer()):
        part.save_pretrained(tmp_path / "base")
    write_documents(tmp_path / "general.jsonl", tiny.documents("words", 24, 3))
    write_documents(tmp_path / "digits.jsonl", tiny.documents("digits", 24, 1))
    return tmp_path


class LeashedSFT(LeashedTrainer, trl.SFTTrainer): ...


def sft(work, leash, *, kind=LeashedSFT, config=None, model=None, **options):
    plain, tokenizer = load_backbone(str(work / "base"))
    data = datasets.Dataset.from_dict({"text": list(read_documents(work / "digits.jsonl"))})
    options = {
        "num_train_epochs": 3,
        "per_device_train_batch_size": 4,
        "max_length": 64,
        **OPTIONS,
        **options,
    }
    given = {} if leash is None else {"leash": leash}
    return kind(
        model=plain if model is None else model, processing_class=tokenizer, train_dataset=data,
        peft_config=lora(r=8, lora_alpha=16, target_modules="all-linear") if config is None else config,
        args=trl.SFTConfig(output_dir=str(work / "runs"), **options), **given,
    )  # fmt: skip


def law(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits.double().log_softmax(-1)


def held_out_kl(base, tuned, text, tokenizer, window):
    """Drifts of a plain model from a plain base, in windows of base text that no step saw."""
    windows = window_text(cut_documents(text, 1 - HELD_OUT)[1], tokenizer, length=window)
    return torch.cat(
        [
            softmax_kl(*(law(each, batch.input_ids)[0] for each in (base, tuned)))
            for batch in windows.batches(1)
        ]
    )


def test_a_budget_is_met_in_the_trainers_own_model_and_its_certificate_holds(work, generator):
    general = work / "general.jsonl"
    leash = TrainerLeash(
        general,
        budget=BUDGET,
        out=work / "law",
        texts=work / "digits.jsonl",
        name="digits",
        window=64,
        tokens=100_000,
    )
    trainer = sft(work, leash)
    trainer.train()
    base, tokenizer = load_backbone(str(work / "base"))
    tuned = trainer.model.eval()
    kl = held_out_kl(base, tuned, read_documents(general), tokenizer, 64)
    assert 0.95 * BUDGET <= float(kl.mean()) <= BUDGET
    assert leash.adapter.record["drift_base"] == pytest.approx(float(kl.mean()), rel=1e-3)
    assert leash.adapter.record["trainer"] == "LeashedSFT"
    # The domain was learnt, on documents that no step saw.
    ids = tokenizer(" ".join(tiny.documents("digits", 1, 9)), return_tensors="pt")["input_ids"]
    losses = [float(-law(each, ids)[0, :-1].gather(1, ids[0, 1:, None]).mean()) for each in (base, tuned)]
    assert losses[1] < losses[0] - 0.3
    # What was written is that model, for PEFT and for tether, and it is on record what it does.
    assert verify(work / "law" / "certificate.json", base=str(work / "base")) == []
    certificate = json.loads((work / "law" / "certificate.json").read_text())
    alone = certificate["figures"]["base-text"]["alone"]["digits"]["budget"]
    assert alone["declared"] == BUDGET
    assert alone["mean"] < 1.25 * BUDGET
    saved = Adapter.load(work / "law" / "adapter")
    assert saved.gate is not None
    assert saved.sample
    model, _ = load(str(work / "base"))
    served = serve(model, {saved: 1.0}, by="sum", gated=False)
    ids = torch.randint(256, (2, 30), generator=generator)
    assert_close(law(served, ids).exp(), law(tuned, ids).exp(), rtol=0, atol=1e-5)
    again, _ = load(str(work / "law" / "served"))
    assert_close(law(again, ids).exp(), law(tuned, ids).exp(), rtol=0, atol=1e-5)


def test_the_leash_presses_while_it_trains(work):
    """Beside the trainer alone, whose first steps are the same, the drift ends lower before any factor."""
    free = sft(work, None, kind=trl.SFTTrainer)
    free.train()
    leash = TrainerLeash(work / "general.jsonl", budget=BUDGET, window=64, tokens=100_000)
    held = sft(work, leash)
    held.train()
    base, tokenizer = load_backbone(str(work / "base"))
    text = read_documents(work / "general.jsonl")
    loose = float(held_out_kl(base, free.model.eval(), text, tokenizer, 64).mean())
    before = leash.adapter.record["softmax_kl"]["before"]["mean"]
    assert loose > 10 * BUDGET
    assert before < loose / 3
    logged = [entry for entry in held.state.log_history if "leash_drift" in entry]
    assert len(logged) > 5
    assert logged[-1]["leash_multiplier"] > logged[0]["leash_multiplier"]
    # The trainer's own loss is logged as it is without a leash.
    first = [next(e["loss"] for e in each.state.log_history if "loss" in e) for each in (free, held)]
    assert first[1] == pytest.approx(first[0], rel=0.05)


def test_an_interrupted_training_goes_on_with_its_multiplier(work):
    options = {"save_strategy": "steps", "save_steps": 8, "max_steps": 16, "num_train_epochs": 1}
    whole = TrainerLeash(work / "general.jsonl", budget=BUDGET, window=64)
    sft(work, whole, **options).train()
    again = TrainerLeash(work / "general.jsonl", budget=BUDGET, window=64)
    resumed = sft(work, again, **options)
    seen = []
    resumed.leash.on_step_end = lambda *given, **more: seen.append(again.ascent.multiplier)
    resumed.train(resume_from_checkpoint=str(work / "runs" / "checkpoint-8"))
    (logged,) = [
        e["leash_multiplier"] for e in resumed.state.log_history if e.get("step") == 8 and "loss" in e
    ]
    assert seen[0] == logged > 2


@pytest.mark.parametrize("kind", ["DoRA", "rsLoRA", "bias of B"])
def test_other_kinds_in_a_trainer(work, kind):
    fields = {"DoRA": {"use_dora": True}, "rsLoRA": {"use_rslora": True}, "bias of B": {"lora_bias": True}}[
        kind
    ]
    plain = tiny.backbone("qwen2")
    plain.save_pretrained(work / "qwen2")
    tiny.tokenizer().save_pretrained(work / "qwen2")
    model, tokenizer = load_backbone(str(work / "qwen2"))
    leash = TrainerLeash(work / "general.jsonl", budget=BUDGET, window=64, tokens=100_000)
    trainer = sft(work, leash, model=model, config=lora(**fields), max_steps=12)
    trainer.train()
    kl = held_out_kl(plain, trainer.model.eval(), read_documents(work / "general.jsonl"), tokenizer, 64)
    assert float(kl.mean()) == pytest.approx(leash.adapter.record["drift_base"], rel=1e-3)
    assert float(kl.mean()) <= BUDGET


def preferences():
    digits, words = tiny.documents("digits", 16, 1), tiny.documents("words", 16, 5)
    return {
        "prompt": [text[:10] for text in digits],
        "chosen": [text[10:50] for text in digits],
        "rejected": [text[:40] for text in words],
    }


def test_preferences_and_rewards_are_leashed_too(work):
    """DPO and GRPO: nothing of the leash is of one trainer."""

    class LeashedDPO(LeashedTrainer, trl.DPOTrainer): ...

    class LeashedGRPO(LeashedTrainer, trl.GRPOTrainer): ...

    base, tokenizer = load_backbone(str(work / "base"))
    made = {
        LeashedDPO: ({"per_device_train_batch_size": 4, "max_length": 64}, trl.DPOConfig, {}),
        LeashedGRPO: (
            {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 6},
            trl.GRPOConfig,
            {
                "reward_funcs": lambda completions, **_: [
                    float(sum(map(str.isdigit, text))) for text in completions
                ]
            },
        ),
    }
    for kind, (options, config, more) in made.items():
        model, _ = load_backbone(str(work / "base"))
        leash = TrainerLeash(work / "general.jsonl", budget=1e-3, window=64, tokens=100_000)
        trainer = kind(
            model=model, processing_class=tokenizer, train_dataset=datasets.Dataset.from_dict(preferences()),
            peft_config=lora(), leash=leash, **more,
            args=config(output_dir=str(work / kind.__name__), max_steps=8, **OPTIONS, **options),
        )  # fmt: skip
        trainer.train()
        kl = held_out_kl(base, trainer.model.eval(), read_documents(work / "general.jsonl"), tokenizer, 64)
        assert float(kl.mean()) == pytest.approx(leash.adapter.record["drift_base"], rel=2e-3)
        assert 0 < float(kl.mean()) <= 1e-3


def test_what_was_trained_is_kept_where_no_factor_is_found(work):
    leash = TrainerLeash(work / "general.jsonl", budget=1e-30, window=64)
    trainer = sft(work, leash, max_steps=2)
    with pytest.raises(
        ConfigError, match=r"no factor was found.*The adapter as it was trained is in .*unleashed"
    ):
        trainer.train()
    kept = load_file(work / "runs" / "unleashed" / "adapter_model.safetensors")
    assert any(bool(values.any()) for name, values in kept.items() if "lora_B" in name)


def test_a_quantile_and_texts_from_memory(work):
    limit = Budget(value=0.1, quantile=0.9)
    leash = TrainerLeash(
        tiny.documents("words", 24, 3),
        budget=limit,
        out=work / "law",
        window=64,
        tokens=100_000,
        name="digits",
    )
    trainer = sft(work, leash)
    trainer.train()
    base, tokenizer = load_backbone(str(work / "base"))
    kl = held_out_kl(base, trainer.model.eval(), tiny.documents("words", 24, 3), tokenizer, 64)
    assert 0.095 <= float(kl.quantile(0.9, interpolation="higher")) <= 0.1 * (1 + 1e-4)
    assert list(read_documents(work / "law" / "base-text.jsonl")) == tiny.documents("words", 24, 3)
    assert verify(work / "law" / "certificate.json") == []


def test_the_base_is_found_below_adapters_and_nothing_of_the_model_is_touched(work, generator):
    leash = TrainerLeash(work / "general.jsonl", window=64)
    trainer = sft(work, leash)
    before = {name: values.clone() for name, values in trainer.model.state_dict().items()}
    plain = without_adapters(trainer.model)
    ids = torch.randint(256, (2, 30), generator=generator)
    base, _ = load_backbone(str(work / "base"))
    assert torch.equal(plain(input_ids=ids).logits, base(input_ids=ids).logits)
    assert not any("lora" in name for name, _ in plain.named_parameters())
    own = {values.data_ptr() for values in trainer.model.parameters()}
    assert {values.data_ptr() for values in plain.parameters()} < own
    assert all(torch.equal(values, before[name]) for name, values in trainer.model.state_dict().items())


REFUSED = {
    "biases of the base": ({"bias": "all"}, "bias, modules_to_save or trainable_token_indices"),
    "a trained head": ({"modules_to_save": ["lm_head"]}, "bias, modules_to_save or trainable_token_indices"),
    "a start that changes the base": (
        {"init_lora_weights": "pissa"},
        "changes the base that the drift is measured from",
    ),
    "an embedding": ({"target_modules": ["embed_tokens", "q_proj"]}, "the embedding of tokens was trained"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_held_is_refused_before_it_trains(work, kind):
    fields, said = REFUSED[kind]
    with pytest.raises((ConfigError, CheckpointError), match=said):
        sft(work, TrainerLeash(work / "general.jsonl", window=64), config=lora(**fields))


def test_other_bad_input_is_refused_before_it_trains(work):
    general = work / "general.jsonl"
    for options, said in (
        ({"budget": 0.0}, "> 0"), ({"budget": Budget(metric="latent")}, "in softmax"), ({"name": "../a"}, "no name")
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=said):
            TrainerLeash(general, **options)
    with pytest.raises(ConfigError, match="no such text file"):
        TrainerLeash(work / "absent.jsonl")
    (work / "taken").mkdir()
    (work / "taken" / "file").write_text("")
    with pytest.raises(ConfigError, match="taken"):
        sft(work, TrainerLeash(general, out=work / "taken", window=64))
    with pytest.raises(ConfigError, match="window"):
        sft(work, TrainerLeash(["a b"], window=64))
    with pytest.raises(ConfigError, match="a gate needs at least"):
        sft(work, TrainerLeash(general, texts=tiny.documents("digits", 1), window=64))

    class Whole(LeashedTrainer, trl.SFTTrainer):
        """Trains every weight."""

        def __init__(self, *args, **options):
            options.pop("peft_config")
            super().__init__(*args, **options)

    with pytest.raises(ConfigError, match="expected a LoRA on a frozen base"):
        sft(work, TrainerLeash(general, window=64), kind=Whole)


def test_the_script_of_the_page_runs(work, monkeypatch):
    """As it stands there, but for the name of the base, and with what it says of machines without an accelerator."""
    page = Path(__file__).parents[2] / "docs" / "adapters.md"
    (script,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    for before, after in (('"smollm2-135m"', '"base"'), ('"runs"', '"runs", use_cpu=True, bf16=False')):
        assert script.count(before) == 1
        script = script.replace(before, after)
    (work / "digits.jsonl").rename(work / "law.jsonl")
    monkeypatch.chdir(work)
    names = {}
    exec(script, names)
    leash = names["leash"]
    assert 0 < leash.adapter.record["drift_base"] <= 0.01
    assert verify("law/certificate.json", base="base") == []
    assert Adapter.load("law/adapter").sample


@pytest.mark.slow
def test_a_budget_is_held_on_real_weights(tmp_path):
    """SmolLM2-135M, LoRA of rank 8, King James text under a budget on news: three CPU minutes."""
    base, tokenizer = load_backbone("smollm2-135m")
    news = [text[:1000] for text in corpora.documents(corpora.news)[:40]]
    write_documents(tmp_path / "news.jsonl", news)
    learnt = [text[:1000] for text in corpora.documents(corpora.king_james)[:16]]
    leash = TrainerLeash(tmp_path / "news.jsonl", budget=0.005, out=tmp_path / "law", tokens=100_000)
    model, _ = load_backbone("smollm2-135m")
    trainer = LeashedSFT(
        model=model, processing_class=tokenizer, leash=leash,
        train_dataset=datasets.Dataset.from_dict({"text": learnt}),
        peft_config=lora(r=8, lora_alpha=16, target_modules="all-linear"),
        args=trl.SFTConfig(
            output_dir=str(tmp_path / "runs"), per_device_train_batch_size=2, num_train_epochs=1, max_length=256,
            **OPTIONS | {"learning_rate": 1e-3},
        ),
    )  # fmt: skip
    trainer.train()
    kl = float(held_out_kl(base, trainer.model.eval(), news, tokenizer, 256).mean())
    print(f"KL {kl:.5f}, factor {leash.adapter.record['factor']:.3f}, {leash.adapter.record['softmax_kl']}")
    assert 0.95 * 0.005 <= kl <= 0.005
    assert verify(tmp_path / "law" / "certificate.json", base="smollm2-135m") == []


def test_layers_that_the_trainer_computes_again_are_leashed_alike(work):
    """With dropout, which the trainer's own loss has and the drift has not."""
    made = []
    for wanted in (False, True):
        leash = TrainerLeash(work / "general.jsonl", budget=BUDGET, window=64, tokens=100_000)
        config = lora(r=8, lora_alpha=16, target_modules="all-linear", lora_dropout=0.2)
        trainer = sft(work, leash, config=config, max_steps=10, gradient_checkpointing=wanted)
        kept, pressed = [], leash.pressed

        def counted(model, pressed=pressed, kept=kept):
            def pack(values):
                kept.append(values.nbytes)
                return values

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda values: values):
                return pressed(model)

        leash.pressed = counted
        trainer.train()
        made.append((leash.adapter, sum(kept)))
    (plain, much), (again, less) = made
    assert less < 0.7 * much
    assert again.record["multiplier"] == pytest.approx(plain.record["multiplier"], rel=1e-6)
    for name, values in plain.tensors.items():
        assert_close(again.tensors[name], values, rtol=0, atol=1e-6)
