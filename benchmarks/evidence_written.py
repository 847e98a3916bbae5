"""What a fusion by evidence writes: it stays in the domain of its prompt, and with the base where nobody asked.

TETHER_PROMPT gives the length of the prompts in tokens, TETHER_TEXTS how many, TETHER_SEEDS the seed of the fits.
"""

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.corpus import states_folder
from benchmarks.evidence import NAMES, Trial
from benchmarks.evidence_bounds import windows_of
from benchmarks.fresh_texts import split
from tether.delta.fusion import fuse
from tether.delta.measure import Variant, measure
from tether.delta.windows import window_text

__all__ = ["rows"]

Row = dict[str, Any]
PROMPT = int(os.environ.get("TETHER_PROMPT", "128"))
LENGTH = 128
SAMPLINGS = {"temperature 1": {}, "temperature .7, top-p .9": {"temperature": 0.7, "top_p": 0.9}}


def rows(*, fast: bool) -> Iterator[Row]:
    """Let fused models write, and measure what they wrote.

    Args:
        fast: four texts each and two domains.

    Yields:
        Rows of case, metric, ours, baseline, ratio, runs. Of a prompt of a domain: the loss of what the fusion wrote
        under the domain's delta alone, beside that of what this delta alone wrote, and the standard error of their
        difference over prompts. Of a neutral prompt: in how many texts the base has at least half of the weight at
        the end.
    """
    count, domains = (4, NAMES[:2]) if fast else (int(os.environ.get("TETHER_TEXTS", "32")), NAMES[:6])
    with states_folder() as folder:
        trial = Trial(folder, int(os.environ.get("TETHER_SEEDS", "0")), fast=fast)
        fused = trial.fused(domains)
        neutral = _begun(trial, [text for texts in trial.general.values() for text in texts], count)
        for sampling, options in SAMPLINGS.items():
            text = _written(fused, neutral, trial.seed, options)
            with torch.no_grad():
                output = fused(input_ids=text, written_from=PROMPT, output_weights=True, logits_to_keep=1)
            kept = int((output.log_weights[:, -1, 0].exp() >= 0.5).sum())
            yield _row(f"{count} neutral prompts, {sampling}", "texts that the base ends with", kept, count)
        for name in domains:
            single = fuse(trial.model, {trial.delta(name): 1.0}, by="sum", gated=False)
            begun = _begun(trial, list(split(name, trial.seed, trial.tokenizer).held_out), count)
            texts = [_written(model, begun, trial.seed, {}) for model in (fused, single)]
            variant = Variant((1.0,), "symmetric", False)
            losses = []
            for text in texts:
                result = measure(trial.model, single.fusion, windows_of(text), [variant])
                losses.append(_of_written(result.nll[0], len(text)))
            case, further = f"{name}, {count} texts of {LENGTH} tokens", losses[0] - losses[1]
            means = (float(loss.mean()) for loss in losses)
            yield _row(case, "loss under the own delta", *means)
            error = float(further.std() / len(further) ** 0.5)
            yield _row(case, "standard error of the difference of losses", error, None)


def _begun(trial: Trial, documents: list[str], count: int) -> Tensor:
    windows = window_text(documents, trial.tokenizer, length=PROMPT)
    lengths = windows.starts.diff()
    starts = windows.starts[:-1][lengths == PROMPT][:count]
    return torch.stack([windows.input_ids[start : start + PROMPT] for start in starts.tolist()])


def _written(model: Any, begun: Tensor, seed: int, options: dict[str, Any]) -> Tensor:
    with torch.random.fork_rng():
        torch.random.manual_seed(seed)
        return model.generate(
            begun, attention_mask=torch.ones_like(begun), do_sample=True, max_new_tokens=LENGTH, eos_token_id=None,
            pad_token_id=0, **options,
        )  # fmt: skip


def _of_written(nll: Tensor, count: int) -> Tensor:
    return nll.view(count, -1)[:, PROMPT - 1 :].double().mean(1)


def _row(case: str, metric: str, ours: float, baseline: float | None) -> Row:
    ratio = ours / baseline if baseline else None
    return {"case": case, "metric": metric, "ours": ours, "baseline": baseline, "ratio": ratio, "runs": 1}
