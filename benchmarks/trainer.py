"""A drift budget in TRL's SFTTrainer: the trainer alone, its adapter shrunk afterwards, and the trainer on a leash.

Drift is measured by plain forward passes of transformers, in windows of base text that no step saw. `TETHER_PARTS` and
`TETHER_SEEDS` choose domains (with commas) and seeds.
"""

import logging
import os
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from tether.causal.loading import load, load_backbone
from tether.causal.softmax import softmax_kl
from tether.delta.leashed_trainer import LeashedTrainer
from tether.delta.leashing import leash_adapter
from tether.delta.material import HELD_OUT
from tether.delta.trainer_leash import TrainerLeash
from tether.delta.verification import verify
from tether.delta.windows import Windows, window_text
from tether.demo import corpora
from tether.store.documents import cut_documents, write_documents

__all__ = ["rows"]

Row = dict[str, Any]
BASE = "smollm2-135m"
BUDGET = 0.005
DOMAINS = {"king james": corpora.king_james, "table rows": corpora.table_rows}
TOKENS, TESTED = 4_000, 1_000


def rows(*, fast: bool) -> Iterator[Row]:
    """Train, shrink, train on a leash.

    Args:
        fast: one domain, one seed, half of the text.

    Yields:
        Rows of case, metric, ours, baseline, ratio, runs; ours is the leashed arm, the baseline is named:
        the base, the trainer alone, or its adapter shrunk afterwards.
    """
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    set_verbosity_error()
    disable_progress_bar()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    base, tokenizer = load_backbone(BASE)
    news = [text[:1000] for text in corpora.documents(corpora.news)[:24]]
    _, held_out = cut_documents(news, 1 - HELD_OUT)
    tests = {
        "news": window_text(held_out, tokenizer),
        "wikipedia": window_text(corpora.documents(corpora.wikipedia), tokenizer, tokens=TESTED),
    }
    seeds = [int(seed) for seed in os.environ.get("TETHER_SEEDS", "0" if fast else "0 1").split()]
    parts = os.environ.get("TETHER_PARTS", "king james" if fast else ",".join(DOMAINS)).split(",")
    for seed in seeds:
        for name in parts:
            recipe = DOMAINS[name]
            learnt, tested = _parts(corpora.documents(recipe), tokenizer, TOKENS // (2 if fast else 1))
            domain = window_text(tested, tokenizer, tokens=TESTED)
            with tempfile.TemporaryDirectory() as folder:
                found = _arms(Path(folder), learnt, news, domain, tests, base, seed)
            case = f"{name}, seed {seed}"
            ours = found.pop("leashed")
            for arm, other in found.items():
                for metric, value in ours.items():
                    if metric in other:
                        yield {
                            "case": f"{case}, baseline {arm}", "metric": metric, "ours": value,
                            "baseline": other[metric], "ratio": value / other[metric], "runs": 1,
                        }  # fmt: skip
            for metric in ("factor at the end", "certificate: differences"):
                yield {
                    "case": case, "metric": metric, "ours": ours[metric], "baseline": None, "ratio": None, "runs": 1,
                }  # fmt: skip


def _parts(documents: Sequence[str], tokenizer: Any, tokens: int) -> tuple[list[str], list[str]]:
    learnt, count = [], 0
    short = [text[:1000] for text in documents]
    while count < tokens:
        learnt.append(short[len(learnt)])
        count += min(256, len(tokenizer(learnt[-1])["input_ids"]))
    return learnt, short[len(learnt) :]


def _arms(
    folder: Path,
    learnt: list[str],
    news: list[str],
    domain: Windows,
    tests: dict[str, Windows],
    base: Any,
    seed: int,
) -> dict[str, dict[str, float]]:
    write_documents(folder / "news.jsonl", news)
    found = {}
    started = time.process_time()
    alone = _train(folder / "alone", learnt, seed)
    cpu = time.process_time() - started
    alone.model.eval().save_pretrained(folder / "adapter")
    found["base"] = _measured(base, base, domain, {})
    found["trainer alone"] = _measured(base, alone.model, domain, tests) | {"CPU s": cpu}
    started = time.process_time()
    model, tokenizer = load(BASE)
    shrunk = leash_adapter(
        model,
        tokenizer,
        folder / "adapter",
        base_texts=folder / "news.jsonl",
        budget=BUDGET,
        name="a",
        tokens=100_000,
    )
    shrunk.save(folder / "shrunk")
    cpu += time.process_time() - started
    from peft import PeftModel

    loaded = PeftModel.from_pretrained(load_backbone(BASE)[0], folder / "shrunk").eval()
    found["shrunk"] = _measured(base, loaded, domain, tests) | {"CPU s": cpu}
    started = time.process_time()
    leash = TrainerLeash(folder / "news.jsonl", budget=BUDGET, out=folder / "out", tokens=100_000, seed=seed)
    leashed = _train(folder / "leashed", learnt, seed, leash)
    cpu = time.process_time() - started
    found["leashed"] = _measured(base, leashed.model.eval(), domain, tests) | {"CPU s": cpu}
    wrong = verify(folder / "out" / "certificate.json", base=BASE)
    found["leashed"]["factor at the end"] = leash.adapter.record["factor"] if leash.adapter else 0.0
    found["leashed"]["certificate: differences"] = float(len(wrong))
    return found


def _train(folder: Path, learnt: list[str], seed: int, leash: TrainerLeash | None = None) -> Any:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    class Leashed(LeashedTrainer, SFTTrainer): ...

    model, tokenizer = load_backbone(BASE)
    options = SFTConfig(
        output_dir=str(folder), use_cpu=True, bf16=False, learning_rate=1e-3, lr_scheduler_type="cosine",
        warmup_steps=0.125, num_train_epochs=1, per_device_train_batch_size=2, max_length=256, seed=seed,
        report_to="none", save_strategy="no", disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    # The start is drawn where PEFT is put in, from the global generator.
    torch.random.manual_seed(seed)
    trainer = (SFTTrainer if leash is None else Leashed)(
        model=model, args=options, train_dataset=Dataset.from_dict({"text": learnt}), processing_class=tokenizer,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        **({} if leash is None else {"leash": leash}),
    )  # fmt: skip
    trainer.train()
    return trainer


@torch.no_grad()
def _measured(base: Any, tuned: Any, domain: Windows, tests: dict[str, Windows]) -> dict[str, float]:
    found = {}
    losses = []
    for batch in domain.batches(1):
        ids = batch.input_ids
        law = tuned(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
        losses.append(-law.gather(1, ids[0, 1:, None]).squeeze(1))
    found["NLL of the domain"] = float(torch.cat(losses).mean())
    for name, windows in tests.items():
        kl = []
        for batch in windows.batches(1):
            before, after = (
                each(input_ids=batch.input_ids).logits[0].float().log_softmax(-1) for each in (base, tuned)
            )
            kl.append(softmax_kl(before, after))
        found[f"KL, {name}"] = float(torch.cat(kl).double().mean())
    return found
