"""Short full fine-tunes of the default base on the demo's domains, made once and kept in the cache folder."""

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tether.causal.loading import cache_folder, load_backbone
from tether.demo.corpora import BASE_TEXTS, DOMAINS, documents
from tether.store.publish import publish_folder

__all__ = ["FineTune", "fine_tuned", "losses", "windows"]

logger = logging.getLogger(__name__)

BASE = "smollm2-135m"
LENGTH = 128
"""Tokens a window."""
SPLITS = {"test": (0, 0.25), "validation": (0.25, 0.35), "probe": (0.35, 0.5), "train": (0.5, 1.0)}
"""Share of a domain's documents (in their hashed order) from which each split is taken."""


class FineTune(NamedTuple):
    """How a model is fine-tuned: weights and optimiser in float32, matrix products in bfloat16.

    Attributes:
        domain: name of the text.
        seed: picks and orders the windows.
        steps: optimiser steps.
        rows: windows a step.
        rate: learning rate of AdamW after a warm-up of 5 steps, then cosine to a tenth.
    """

    domain: str
    seed: int
    steps: int = 80
    rows: int = 2
    rate: float = 4e-4

    @property
    def name(self) -> str:
        """Name of the folder."""
        return f"finetune-{BASE}-{self.domain}-{self.seed}-{self.steps}x{self.rows * LENGTH}-{self.rate:g}"


def windows(domain: str, split: str, tokenizer: Any, count: int, seed: int = 0) -> Tensor:
    """Cut a split of a domain into windows of equal length, at most two a document.

    Args:
        domain: a demo domain or base text.
        split: one of SPLITS.
        tokenizer: the base's tokenizer.
        count: windows wanted.
        seed: orders the documents.

    Returns:
        Tokens, shape (count, LENGTH).
    """
    texts = documents((DOMAINS | BASE_TEXTS)[domain])
    low, high = (round(len(texts) * share) for share in SPLITS[split])
    texts = texts[low:high]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    found: list[list[int]] = []
    for index in order:
        ids = tokenizer(texts[index], truncation=False, verbose=False)["input_ids"]
        found += [ids[i : i + LENGTH] for i in (0, LENGTH) if len(ids) >= i + LENGTH]
        if len(found) >= count:
            return torch.tensor(found[:count])
    raise ValueError(f"{domain}, {split}: {len(found)} windows of {LENGTH} tokens, {count} wanted")


@torch.no_grad()
def losses(model: Any, tokens: Tensor, rows: int = 8) -> Tensor:
    """Measure the mean loss of each window.

    Args:
        model: a causal LM.
        tokens: shape (n, LENGTH).
        rows: windows a pass.

    Returns:
        Nats a token, shape (n,).
    """
    found = []
    for part in tokens.split(rows):
        logits = model(input_ids=part[:, :-1], use_cache=False).logits.float()
        found.append(cross_entropy(logits.transpose(1, 2), part[:, 1:], reduction="none").mean(-1))
    return torch.cat(found)


def fine_tuned(how: FineTune, on_step: Callable[[dict[str, float]], None] | None = None) -> Path:
    """Fine-tune all weights of the base, or find the folder where that was done before.

    Args:
        how: text, seed and schedule.
        on_step: called with step and loss.

    Returns:
        Folder of the checkpoint.
    """
    folder = cache_folder() / how.name
    if (folder / "config.json").is_file():
        return folder
    model, tokenizer = load_backbone(BASE, dtype=torch.float32)
    tokens = windows(how.domain, "train", tokenizer, how.steps * how.rows, seed=how.seed)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=how.rate, weight_decay=0.0, betas=(0.9, 0.95))
    for step, part in enumerate(tokens.split(how.rows)):
        progress = max(0.0, (step - 5) / max(1, how.steps - 5))
        factor = min((step + 1) / 5, 0.55 + 0.45 * math.cos(math.pi * progress))
        optimizer.param_groups[0]["lr"] = how.rate * factor
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=part, labels=part, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        logger.info("%s: step %d, loss %.4f", how.name, step, loss.item())
        if on_step:
            on_step({"step": float(step), "loss": loss.item()})
    folder.parent.mkdir(parents=True, exist_ok=True)
    with publish_folder(folder) as target:
        model.eval().save_pretrained(target)
        tokenizer.save_pretrained(target)
    return folder
