"""The demo's texts with their cached states, for benchmarks of deltas."""

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from tether.causal.loading import load
from tether.delta.cache import StateCache
from tether.delta.head import Head
from tether.delta.output_head import chunk_rows
from tether.delta.shards import cached
from tether.delta.source import reference, spread
from tether.delta.windows import window_text
from tether.demo.corpora import BASE_TEXTS, DOMAINS, documents

__all__ = ["Corpus", "states_folder"]

PIECE = 1200


@contextlib.contextmanager
def states_folder() -> Iterator[Path]:
    """Give the folder that TETHER_STATES names, so that texts are read once for several runs, or a passing one."""
    named = os.environ.get("TETHER_STATES")
    if named:
        yield Path(named)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


class Corpus:
    """Training and test documents of each domain, and base text in three parts of other documents.

    Args:
        folder: where states are kept.
        tokens: training tokens a domain; a sixth of it is tested on.
        features: `last` or `multi`, of what is cached.
    """

    def __init__(self, folder: Path, *, tokens: int, features: str = "last") -> None:
        self.folder, self.tokens, self.features = folder, tokens, features
        self.model, self.tokenizer = load("smollm2-135m")

    def documents(self, name: str) -> tuple[list[str], int]:
        """Give the documents of a text and how many tokens of them to take."""
        kind, _, part = name.partition("-")
        if kind != "base":
            every = documents(DOMAINS[kind])
            # Test documents come last, so that they are the same whatever is trained on.
            return (every[::-1], self.tokens // 6) if part == "test" else (every, self.tokens)
        pieces = [
            [d[:PIECE] for d in documents(recipe) if len(d) > PIECE // 2] for recipe in BASE_TEXTS.values()
        ]
        third = ("base", "base-held-out", "base-fresh").index(name)
        mixed = [piece for pair in zip(*pieces, strict=False) for piece in pair]
        blocks = [mixed[start : start + 2] for start in range(2 * third, len(mixed), 6)]
        # Of the third part little is read: it only repeats what was measured on the second.
        return [piece for block in blocks for piece in block], self.tokens // (6 if third == 2 else 2)

    def cache(self, name: str, layers: Sequence[int] = ()) -> StateCache:
        """Read a text once."""
        texts, tokens = self.documents(name)
        return cached(
            self.model,
            window_text(texts, self.tokenizer, tokens=tokens),
            self.folder,
            layers=layers,
        )

    @torch.no_grad()
    def loss(self, cache: StateCache, head: Head | None, count: int = 1024, *, model: Any = None) -> float:
        """Mean loss over the whole vocabulary with a delta, or of the base; `model`: with another latent."""
        model = model or self.model
        scored = (cache.windows.targets >= 0).nonzero().squeeze(-1)
        scored = scored[spread(len(scored), count)]
        weight = model.action.weight.detach()
        found = []
        for index in scored.split(chunk_rows(weight)):
            at = reference(model, cache.states[index].float())
            loc = at.loc if head is None else at.loc + at.scale * head.displacement(at.states)[1]
            log_prob = torch.log_softmax(loc @ weight.T, -1)
            found.append(-log_prob.gather(-1, cache.windows.targets[index].unsqueeze(-1)).squeeze(-1))
        return float(torch.cat(found).double().mean())
