"""What an adapter's fit costs beside TRL's SFTTrainer with the same LoRA on the same windows, in CPU seconds a token.

Each arm is measured whole: from a loaded base to a trained adapter, reading of base text and measuring of the budget
included. The steps alone stand beside it, since what is not a step does not grow with the text.
"""

import logging
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tether.causal.loading import load, load_backbone
from tether.delta.adapter_learning import learn_adapter
from tether.delta.adapter_training import AdapterFit
from tether.delta.budget import Budget
from tether.demo import corpora

__all__ = ["rows"]

Row = dict[str, Any]
BASE = "smollm2-135m"
LENGTH, BATCH = 256, 2
TOKENS = 4_096
BUDGET = 0.01


def rows(*, fast: bool) -> Iterator[Row]:
    """Fit with TRL, and here without and with a budget.

    Args:
        fast: a quarter of the text.

    Yields:
        Rows of case, metric, ours, baseline (TRL), ratio, runs.
    """
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    set_verbosity_error()
    disable_progress_bar()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    _, tokenizer = load_backbone(BASE)
    count = (TOKENS // 4 if fast else TOKENS) // LENGTH
    learnt = _windows(corpora.documents(corpora.king_james), tokenizer, count)
    news = [text[:1000] for text in corpora.documents(corpora.news)[:24]]
    theirs = _trl(learnt)
    arms = {"without a budget": None, f"budget of {BUDGET}": Budget(value=BUDGET)}
    for name, budget in arms.items():
        whole, steps = _ours(learnt, news, budget)
        for metric, ours, baseline in (("whole fit", whole, theirs[0]), ("steps alone", steps, theirs[1])):
            yield {
                "case": f"{name}; baseline: SFTTrainer", "metric": f"CPU milliseconds a token, {metric}",
                "ours": 1e3 * ours / count / LENGTH, "baseline": 1e3 * baseline / count / LENGTH,
                "ratio": ours / baseline, "runs": 1,
            }  # fmt: skip


# Texts that are one full window each under both.
def _windows(documents: list[str], tokenizer: Any, count: int) -> list[str]:
    found: list[str] = []
    ids = [token for text in documents[: 20 * count] for token in tokenizer(text)["input_ids"]]
    at = 0
    while len(found) < count:
        text = tokenizer.decode(ids[at : at + LENGTH])
        at += LENGTH
        if len(tokenizer(text)["input_ids"]) == LENGTH:
            found.append(text)
    return found


def _trl(learnt: list[str]) -> tuple[float, float]:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = load_backbone(BASE)
    with tempfile.TemporaryDirectory() as folder:
        begun = time.process_time()
        options = SFTConfig(
            output_dir=folder, use_cpu=True, bf16=False, learning_rate=1e-3, num_train_epochs=1,
            per_device_train_batch_size=BATCH, max_length=LENGTH, report_to="none", save_strategy="no",
            disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        trainer = SFTTrainer(
            model=model, args=options, train_dataset=Dataset.from_dict({"text": learnt}), processing_class=tokenizer,
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        )  # fmt: skip
        started = time.process_time()
        trainer.train()
        ended = time.process_time()
    return ended - begun, ended - started


def _ours(learnt: list[str], news: list[str], budget: Budget | None) -> tuple[float, float]:
    model, tokenizer = load(BASE)
    fit = AdapterFit(budget=budget, batch=BATCH, gate=False, held_out=0.0)
    seen: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        begun = time.process_time()
        learn_adapter(
            model, tokenizer, learnt, base_texts=news, name="a", window=LENGTH, cache_folder=Path(folder), fit=fit,
            sample=False, on_step=lambda entry: seen.append(time.process_time()) if "nll" in entry else None,
        )  # fmt: skip
        ended = time.process_time()
    # The first step is told of at its end.
    steps = (seen[-1] - seen[0]) * len(seen) / (len(seen) - 1)
    return ended - begun, steps
