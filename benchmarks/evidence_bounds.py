"""The promises of a fusion by evidence, counted: regret of whole windows, loss of single tokens, drift of contexts.

A small random model is served on 100,000 windows of every kind that could break a promise; the trial's deltas on
SmolLM2-135M on some hundreds, of text among them. Everything goes through `tether.delta.account`, which measures what
is served.
"""

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.corpus import states_folder
from benchmarks.evidence import NAMES, STRANGE, Trial
from benchmarks.fresh_texts import split
from tether.causal.evidence import Rule
from tether.causal.gates import window_mean
from tether.causal.losses import IGNORE
from tether.causal.modeling import CausalQwenForCausalLM
from tether.delta.account import Account, account
from tether.delta.delta import Delta
from tether.delta.fusion import fuse
from tether.delta.gate import Gate
from tether.delta.regret import account_figures
from tether.delta.windows import Windows

__all__ = ["rows", "windows_of"]

Row = dict[str, Any]
LENGTH = 32
BATCH = 500
WINDOW = 4
"""Tokens that gates of the small model look at."""


def rows(*, fast: bool) -> Iterator[Row]:
    """Serve and count.

    Args:
        fast: a hundredth of the windows, and no real model.

    Yields:
        Rows of case, metric, ours (violations), baseline (none allowed), ratio (largest share of the allowed), runs.
    """
    yield from _small(1_000 if fast else 100_000)
    if not fast:
        with states_folder() as folder:
            yield from _real(Trial(folder, 0, fast=False), int(os.environ.get("TETHER_WINDOWS", "60")))


def _small(count: int) -> Iterator[Row]:
    generator = torch.Generator().manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        backbone = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.dim() > 1:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model = CausalQwenForCausalLM.from_backbone(backbone.eval())
    deltas = {
        Delta(
            name=name, chart="symmetric", gate=_gate(model, generator), base=model.config.base_fingerprint, record={},
            first=None, second=size * torch.randn(24, 24, generator=generator),
        ): 1.0
        for name, size in (("mild", 0.02), ("strong", 0.1), ("wild", 1.0))
    }  # fmt: skip
    # Behind gates that open and close and say how much a context looks like each domain; and with nobody asleep.
    served = [fuse(model, deltas, rule=Rule(hold=2)), fuse(model, deltas, gated=False)]
    kinds = ("random", "repeated", "alternating", "switching", "written")
    for number, kind in enumerate(kinds):
        found = _Count()
        for turn in range(-(-count // len(kinds) // BATCH)):
            fused = served[turn % 2]
            ids = _made(kind, BATCH, 64, generator) if kind != "written" else _written(fused, 64, generator)
            found.add(fused, windows_of(ids))
        yield from found.rows(f"small model, {kind}", number)


# A gate that is open in about a third of random contexts, each delta's own third.
@torch.no_grad()
def _gate(model: Any, generator: torch.Generator) -> Gate:
    ids = torch.randint(64, (50, LENGTH), generator=generator)
    mean, *_ = window_mean(
        model.backbone(ids).last_hidden_state, torch.ones_like(ids, dtype=torch.bool), WINDOW
    )
    center = mean[0, -1]
    distance = (mean - center).square().sum(-1)
    limits = distance.quantile(1 / 3, dim=0)[:WINDOW]
    limits[-1] = distance[:, WINDOW:].quantile(1 / 3)
    return Gate(center, torch.zeros(1, len(center)), limits, torch.ones(1))


def _made(kind: str, count: int, vocab: int, generator: torch.Generator) -> Tensor:
    def draw(*shape: int) -> Tensor:
        return torch.randint(vocab, shape, generator=generator)

    time = torch.arange(LENGTH)
    if kind == "repeated":
        return draw(count, 1).expand(-1, LENGTH)
    if kind == "alternating":
        return draw(count, 2)[:, time % 2]
    if kind == "switching":
        at = torch.randint(1, LENGTH, (count, 1), generator=generator)
        return torch.where(time < at, draw(count, 1), draw(count, LENGTH))
    return draw(count, LENGTH)


def _written(fused: Any, vocab: int, generator: torch.Generator) -> Tensor:
    start = torch.randint(vocab, (BATCH, 1), generator=generator)
    return fused.generate(
        start, attention_mask=torch.ones_like(start), do_sample=True, max_new_tokens=LENGTH - 1, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip


def windows_of(ids: Tensor) -> Windows:
    """Lay texts of one length out as windows, one each.

    Args:
        ids: shape (B, L).

    Returns:
        The windows, each its own document.
    """
    count, length = ids.shape
    targets = torch.cat([ids[:, 1:], torch.full((count, 1), IGNORE)], dim=1)
    documents = torch.arange(count).repeat_interleave(length)
    return Windows(ids.flatten(), targets.flatten(), documents, torch.arange(count + 1) * length)


class _Count:
    """Adds up violations, and the largest share of what was allowed."""

    def __init__(self) -> None:
        self.windows = self.tokens = self.contexts = 0
        self.broken = {"regret": 0, "token": 0, "drift": 0}
        self.largest = {"regret": 0.0, "token": 0.0, "drift": 0.0}

    def add(self, fused: Any, windows: Windows, batch: int = 100) -> None:
        found: Account
        (found,) = account([fused], windows, batch_size=batch)
        figures = account_figures(fused.fusion, found)
        self.windows += figures["windows"]
        self.tokens += len(found.nll)
        self.contexts += figures["tokens"]
        self.broken["regret"] += sum(party["violations"] for party in figures["regret"].values())
        self.broken["token"] += figures["worst_token"]["violations"]
        self.broken["drift"] += figures["parts"]["violations"]
        pairs = [pair for party in figures["regret"].values() for pair in party["documents"]]
        self._raise("regret", max(own / allowed for own, allowed in pairs))
        allowed = -found.log_weights[found.scored, 0]
        kept = allowed > 1e-3
        self._raise(
            "token", float(((found.nll - found.base_nll).double() / allowed)[kept].max()) if kept.any() else 0
        )
        self._raise("drift", figures["parts"]["largest_ratio"])

    def _raise(self, name: str, value: float) -> None:
        self.largest[name] = max(self.largest[name], value)

    def rows(self, case: str, number: int) -> Iterator[Row]:
        counts = {"regret": self.windows, "token": self.tokens, "drift": self.contexts}
        whats = {
            "regret": "windows over the regret",
            "token": "tokens over the bound",
            "drift": "contexts over the mean",
        }
        for name, what in whats.items():
            yield {
                "case": case, "metric": f"{what}, of {counts[name]}", "ours": self.broken[name], "baseline": 0,
                "ratio": self.largest[name], "runs": 1,
            }  # fmt: skip


def _real(trial: Trial, count: int) -> Iterator[Row]:
    fused = trial.fused(NAMES[:6])
    generator = torch.Generator().manual_seed(1)
    length = 64

    def pieces(names: Any) -> Tensor:
        found = []
        for name in names:
            for text in split(name, trial.seed, trial.tokenizer).held_out:
                ids = trial.tokenizer(text)["input_ids"]
                found += [ids[at : at + length] for at in range(0, len(ids) - length, length)][:3]
        order = torch.randperm(len(found), generator=generator)[:count].tolist()
        return torch.tensor([found[at] for at in order])

    own, strange = pieces(NAMES[:6]), pieces(STRANGE)
    shuffled = torch.stack([row[torch.randperm(length, generator=generator)] for row in own])
    start = own[:, :8]
    written = fused.generate(
        start, attention_mask=torch.ones_like(start), do_sample=True, max_new_tokens=length - 8, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    texts = {
        "domains": own, "foreign text": strange, "shuffled": shuffled, "written": written,
        "random tokens": torch.randint(fused.vocab_size, (count, length), generator=generator),
        "repeated": own[:, 10:11].expand(-1, length),
        "switching": torch.cat([own[:, : length // 2], strange[: len(own), length // 2 :]], dim=1),
    }  # fmt: skip
    for number, (kind, ids) in enumerate(texts.items()):
        found = _Count()
        found.add(fused, windows_of(ids), batch=8)
        yield from found.rows(f"SmolLM2-135M, six domains, {kind}", number)
