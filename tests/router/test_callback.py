"""The callback in a stock `transformers.Trainer`: the same steps as by hand, resumed as if it had not stopped."""

import json
import logging
import re
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import Qwen3MoeForCausalLM, Trainer, TrainingArguments

import tiny_moe
from tether.causal.modeling import CausalQwenForCausalLM
from tether.errors import ConfigError
from tether.router import RoutingCallback, RoutingShaper

# Trainer warns of pinned memory and of tokens that it aligns.
pytestmark = pytest.mark.filterwarnings("ignore")

DOCS = Path(__file__).parents[2] / "docs" / "fars.md"
LAM = 0.5
"""Strong, so that a term left out or counted twice shows."""


def rows(count=96):
    made = []
    for row in range(count):
        ids = tiny_moe.tokens(batch=1, seed=row)[0]
        labels = ids.clone()
        # Unequal numbers of labels: means of parts are not the mean of the whole.
        labels[: row % 7] = -100
        mask = torch.ones_like(ids)
        mask[12 - row % 3 :] = 0
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels.masked_fill(mask == 0, -100)})
    return made


def trainer(folder, model=None, callbacks=None, **options):
    settings = {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "max_steps": 12, "logging_steps": 1,
        "report_to": [], "use_cpu": True, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "seed": 0,
        "save_strategy": "no", "disable_tqdm": True, "max_grad_norm": 0.0, "weight_decay": 0.0, "optim": "adamw_torch",
        "train_sampling_strategy": "sequential",
    }  # fmt: skip
    chosen = [RoutingCallback(form="tax", lam=LAM)] if callbacks is None else callbacks
    return Trainer(
        model=model or tiny_moe.build("qwen3_moe"), args=TrainingArguments(**settings | options),
        train_dataset=rows(), eval_dataset=rows(4), callbacks=chosen,
    )  # fmt: skip


def by_hand(steps, parts=1, lam=LAM):
    model = tiny_moe.build("qwen3_moe")
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    losses = []
    with RoutingShaper(model, optimizer, "tax", lam=lam) as shaper:
        for step in range(steps):
            cut = rows()[4 * parts * step : 4 * parts * (step + 1)]
            batches = [
                {key: torch.stack([row[key] for row in cut[4 * part : 4 * part + 4]]) for key in cut[0]}
                for part in range(parts)
            ]
            labels = sum(int((batch["labels"][:, 1:] >= 0).sum()) for batch in batches)
            total = 0.0
            optimizer.zero_grad()
            for batch in batches:
                loss = model(**batch, num_items_in_batch=torch.tensor(labels)).loss
                loss = loss + shaper.loss(batch["attention_mask"]) / parts
                loss.backward()
                total += loss.item()
            optimizer.step()
            losses.append(total)
    return model, losses


def weights_equal(model, other, **tolerance):
    for name, parameter in model.named_parameters():
        assert_close(parameter, other.get_parameter(name), **tolerance)


@pytest.mark.parametrize("parts", [1, 2])
def test_the_steps_are_those_of_a_loop_by_hand_however_a_step_is_cut(tmp_path, parts):
    run = trainer(tmp_path, gradient_accumulation_steps=parts)
    run.train()
    model, losses = by_hand(12, parts)
    assert [entry["loss"] for entry in run.state.log_history[:-1]] == pytest.approx(losses, abs=1e-4)
    weights_equal(run.model, model, rtol=1e-4, atol=1e-5)
    plain, _ = by_hand(12, parts, lam=0.0)
    moved = run.model.model.layers[0].mlp.gate.weight - plain.model.layers[0].mlp.gate.weight
    assert float(moved.detach().abs().max()) > 0.01


@pytest.mark.parametrize("restored", [False, True])
def test_a_training_goes_on_from_a_checkpoint(tmp_path, restored):
    whole = trainer(tmp_path / "whole")
    whole.train()
    trainer(tmp_path / "cut", save_strategy="steps", save_steps=7).train()
    checkpoint = tmp_path / "cut" / "checkpoint-7"

    def resume(**options):
        # Trainer 5.23 looks for stacked experts in a file that has them one by one: this is how they are read.
        model = Qwen3MoeForCausalLM.from_pretrained(checkpoint, experts_implementation="eager")
        run = trainer(tmp_path / "cut", model, **options)
        run.train(resume_from_checkpoint=str(checkpoint))
        return run

    weights_equal(resume(restore_callback_states_from_checkpoint=restored).model, whole.model, rtol=0, atol=0)
    # What the shaper had learnt is needed for that.
    state = checkpoint / "trainer_state.json"
    kept = json.loads(state.read_text())
    del kept["stateful_callbacks"]["RoutingCallback"]["saved"]
    state.write_text(json.dumps(kept))
    router = resume().model.model.layers[0].mlp.gate.weight
    assert not torch.equal(router, whole.model.model.layers[0].mlp.gate.weight)


def test_the_dead_are_named_and_the_model_is_left_as_it_was(tmp_path, caplog):
    model = tiny_moe.build("qwen3_moe")
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 3.0
        model.model.layers[1].mlp.gate.weight[5, 0] = -30.0
    with caplog.at_level(logging.WARNING, logger="tether.router.course"):
        trainer(tmp_path, model, callbacks=[RoutingCallback(form="none")], max_steps=24).train()
    report = json.loads((tmp_path / "routing.json").read_text())
    assert 5 in report["layers"]["model.layers.1.mlp"]["dead"]
    said = [record.getMessage() for record in caplog.records if record.name == "tether.router.course"]
    assert said[0].startswith("step 20: ")
    assert re.search(r"model\.layers\.1\.mlp[^;]* 5", said[0])
    assert "dead experts (under 1 % of a fair share): " in said[-1]
    assert (tmp_path / "routing.png").is_file()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_evaluation_is_without_the_term(tmp_path):
    run = trainer(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1)
    run.train()
    found = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert len(found) == 2
    assert found[-1] == pytest.approx(
        trainer(tmp_path, run.model, callbacks=[]).evaluate()["eval_loss"], abs=1e-5
    )


def test_a_wrapped_model_is_shaped_too(tmp_path):
    model = CausalQwenForCausalLM.from_backbone(tiny_moe.build("qwen3_moe"))
    before = [layer.mlp.gate.weight.detach().clone() for layer in model.backbone.layers]
    run = trainer(tmp_path, model, max_steps=2)
    run.train()
    assert run.state.log_history[1]["loss"] > 0
    assert all(
        not torch.equal(a, b.mlp.gate.weight) for a, b in zip(before, model.backbone.layers, strict=True)
    )
    assert list(json.loads((tmp_path / "routing.json").read_text())["layers"]) == [
        "backbone.layers.0.mlp", "backbone.layers.1.mlp",
    ]  # fmt: skip


def test_what_would_silently_do_nothing_is_refused_at_the_start(tmp_path):
    with pytest.raises(ConfigError, match="form='fars'"):
        RoutingCallback(form="fars")
    frozen = tiny_moe.build("qwen3_moe")
    for layer in frozen.model.layers:
        layer.mlp.gate.requires_grad_(False)
    with pytest.raises(ConfigError, match="the router is frozen"):
        trainer(tmp_path, frozen).train()
    with pytest.raises(ConfigError, match="returned no loss"):
        trainer(tmp_path, label_smoothing_factor=0.1).train()
    own = trainer(tmp_path)
    own.compute_loss_func = lambda outputs, labels, num_items_in_batch: outputs.logits.mean()
    with pytest.raises(ConfigError, match="returned no loss"):
        own.train()


def test_the_script_of_the_docs_runs(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    (script,) = [block for block in blocks if "RoutingCallback" in block]
    assert script.count("\n") <= 14
    monkeypatch.chdir(tmp_path)
    tiny_moe.build("qwen3_moe").save_pretrained("M")
    space = {"dataset": rows()}
    exec(script, space)
    assert isinstance(space["model"], Qwen3MoeForCausalLM)
    report = json.loads((tmp_path / "out" / "routing.json").read_text())
    assert report["form"] == "balance"
    assert len(report["layers"]) == 2
    assert (tmp_path / "out" / "routing.png").is_file()
