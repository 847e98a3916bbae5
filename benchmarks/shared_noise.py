"""What one draw of noise for a whole text does to the text, and forms that keep a person and not a word.

Sixteen individuals write on from four prompts each, 64 tokens, in mode `causal`, in each form. A form is good where
bigrams repeat as rarely as with independent noise, and texts of one individual can be told from texts of two.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from benchmarks.evidence import BASE, PIECE
from tether.causal.loading import load
from tether.causal.noise import Noise
from tether.demo import corpora

__all__ = ["rows"]

Row = dict[str, Any]
LENGTH = 64
PROMPT = 32
FORMS: dict[str, dict[str, Any]] = {
    "independent": {},
    **{f"common {part}": {"common": part} for part in (0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8)},
    "shared": {"shared": True},
    "shared, truncated at .5": {"shared": True, "truncation": 0.5},
    "common 0.2, truncated at .01": {"common": 0.2, "truncation": 0.01},
}


def rows(*, fast: bool) -> Iterator[Row]:
    """Let individuals write, and look at their texts.

    Args:
        fast: four individuals, three forms.

    Yields:
        Rows of case, metric, ours, baseline, ratio, runs; the baseline is independent noise.
    """
    torch.set_num_threads(1)
    model, tokenizer = load("smollm2-135m")
    count = 4 if fast else 16
    texts = [corpora.documents(recipe)[number][:PIECE] for recipe in BASE.values() for number in (0, 1)]
    # No two texts of an individual have a position in common, at which its noise would be the same in any form.
    lengths = [PROMPT + LENGTH * number for number in range(len(texts))]
    prompts = [
        tokenizer(text, return_tensors="pt")["input_ids"][0, :length]
        for text, length in zip(texts, lengths, strict=True)
    ]
    first: dict[str, float] = {}
    for form, options in FORMS.items() if not fast else list(FORMS.items())[::4]:
        found = _figures(model, prompts, count, **options)
        first = first or found
        for metric, figure in found.items():
            yield {
                "case": form, "metric": metric, "ours": figure, "baseline": first[metric],
                "ratio": figure / first[metric] if first[metric] else None, "runs": count * len(prompts),
            }  # fmt: skip


def _figures(
    model: Any, prompts: list[Tensor], count: int, truncation: float = 0.0, **options: Any
) -> dict[str, float]:
    written, marks, losses = [], [], []
    for prompt in prompts:
        noise = Noise.draw(count, model.latent_size, seed=1, **options)
        ids = model.generate(
            prompt.expand(count, -1), attention_mask=torch.ones(count, len(prompt), dtype=torch.long), mode="causal",
            noise=noise, truncation=truncation, max_new_tokens=LENGTH, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        written.append(ids[:, len(prompt) :])
        mark, loss = _marks(model, ids, len(prompt))
        marks.append(mark)
        losses.append(loss)
    own = torch.stack(written, 1).flatten(0, 1)
    bigrams = [list(pairwise(row)) for row in own.tolist()]
    return {
        "repeated bigrams": float(np.mean([1 - len(set(each)) / len(each) for each in bigrams])),
        "distinct tokens": float(np.mean([len(set(row)) / len(row) for row in own.tolist()])),
        "individuality": _individuality(torch.stack(marks)),
        "NLL under the base": float(torch.stack(losses).mean()),
    }


# What the words of a text have in common beyond what the model expected there: the mean over the text of the class
# weight of each word less the expected one, in units of its scatter; and the mean loss of its words.
@torch.no_grad()
def _marks(model: Any, ids: Tensor, prompt: int) -> tuple[Tensor, Tensor]:
    weight, found, losses = model.action.weight.float(), [], []
    for row in ids:
        logits = model(input_ids=row[None], mode="softmax").logits[0, prompt - 1 : -1].float()
        log_prob, token = logits.log_softmax(-1), row[prompt:]
        residual = weight[token] - log_prob.exp() @ weight
        found.append(residual.mean(0) / (residual.std(0) + 1e-6))
        losses.append(-log_prob.gather(-1, token[:, None]).mean())
    return torch.stack(found), torch.stack(losses).mean()


# Area under the curve of the cosine of two texts' marks, on different prompts, for one individual against two.
def _individuality(marks: Tensor) -> float:
    marks = torch.nn.functional.normalize(marks - marks.mean(1, keepdim=True), dim=-1)
    same, scores = [], []
    for one in range(len(marks)):
        for other in range(one + 1, len(marks)):
            cosine = marks[one] @ marks[other].T
            same += torch.eye(len(cosine)).flatten().tolist()
            scores += cosine.flatten().tolist()
    return float(roc_auc_score(same, scores))
