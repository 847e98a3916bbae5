"""Stock `Trainer` trains and evaluates the model as it does a plain one."""

import pytest
import torch
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments

import tiny
from tether.causal.modeling import CausalQwenForCausalLM

# Trainer warns of pinned memory and of tokens that it aligns.
pytestmark = pytest.mark.filterwarnings("ignore")


def rows(count=32, length=12):
    """Texts of which different shares are scored, so that means of parts are not the mean of the whole."""
    generator = torch.Generator().manual_seed(2)
    made = []
    for row in range(count):
        ids = torch.randint(256, (length,), generator=generator)
        labels = ids.clone()
        labels[: row % 9] = -100
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return made


def trainer(model, folder, **options):
    settings = {
        "output_dir": str(folder), "per_device_train_batch_size": 1, "per_device_eval_batch_size": 5, "max_steps": 2,
        "logging_steps": 1, "report_to": [], "use_cpu": True, "learning_rate": 1e-3, "seed": 0,
        "save_strategy": "no", "disable_tqdm": True, "max_grad_norm": 1e9, "optim": "sgd",
    }  # fmt: skip
    metrics = options.pop("compute_metrics", None)
    return Trainer(
        model=model, args=TrainingArguments(**settings | options), train_dataset=rows(), eval_dataset=rows(7),
        compute_metrics=metrics,
    )  # fmt: skip


def of_each(folder, **options):
    """What Trainer logs of the plain model and of the wrapped one, trained in the same parameters."""
    logs = []
    for wrap in (lambda base: base, CausalQwenForCausalLM.from_backbone):
        model = wrap(tiny.backbone("qwen2", layers=1))
        if isinstance(model, CausalQwenForCausalLM):
            for part in (model.abduction, model.numeric):
                part.requires_grad_(False)
        run = trainer(model, folder, **options)
        run.train()
        logs.append(
            [
                {name: entry[name] for name in ("loss", "grad_norm") if name in entry}
                for entry in run.state.log_history
            ]
        )
    return logs


@pytest.mark.parametrize("parts", [1, 4, 16])
def test_losses_and_gradients_are_those_of_the_plain_model_however_a_step_is_cut(parts, tmp_path):
    steps = 2 if parts < 16 else 1
    plain, wrapped = of_each(tmp_path, gradient_accumulation_steps=parts, max_steps=steps)
    assert len(plain) == steps + 1
    for before, after in zip(plain[:-1], wrapped[:-1], strict=True):
        assert after["loss"] == pytest.approx(before["loss"], abs=1e-4)
        assert after["grad_norm"] == pytest.approx(before["grad_norm"], rel=1e-4)


def test_smoothed_labels_are_shifted(tmp_path):
    plain, wrapped = of_each(tmp_path, label_smoothing_factor=0.1, max_steps=1)
    assert wrapped[0]["loss"] == pytest.approx(plain[0]["loss"], abs=1e-4)


def test_an_evaluation_gives_the_loss_and_the_metrics_of_the_plain_model(tmp_path):
    def metrics(found):
        assert found.predictions.shape == (7, 12, 258)
        return {"right": float((found.predictions[:, :-1].argmax(-1) == found.label_ids[:, 1:]).mean())}

    figures = [
        trainer(model, tmp_path, compute_metrics=metrics).evaluate()
        for model in (tiny.backbone("qwen2"), CausalQwenForCausalLM.from_backbone(tiny.backbone("qwen2")))
    ]
    assert figures[1]["eval_loss"] == pytest.approx(figures[0]["eval_loss"], abs=1e-5)
    assert figures[1]["eval_right"] == figures[0]["eval_right"]


def test_a_run_that_was_stopped_goes_on_and_ends_with_the_best_model(tmp_path):
    options = {
        "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1,
        "load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "optim": "adamw_torch",
    }  # fmt: skip
    made = CausalQwenForCausalLM.from_backbone(tiny.backbone("llama"))
    whole = trainer(made, tmp_path / "whole", **options)
    whole.train()
    resumed = trainer(
        CausalQwenForCausalLM.from_backbone(tiny.backbone("llama")), tmp_path / "again", **options
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert whole.state.best_metric == resumed.state.best_metric
    assert_close(resumed.model.state_dict(), whole.model.state_dict())
    assert resumed.evaluate()["eval_loss"] == pytest.approx(whole.state.best_metric, abs=1e-6)
