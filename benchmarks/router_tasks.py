"""Small trainings on which ways to shape a router are compared: regression tasks, and bytes of three kinds of text."""

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits
from torch import Tensor, nn
from torch.nn import functional
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from tether.demo.corpora import DOMAINS, documents
from tether.router import RoutingShaper
from tether.router.journal import routing_png
from tether.store.publish import publish_file

__all__ = ["ARMS", "TASKS", "Arm", "Outcome", "byte_texts", "language", "regression"]

EXPERTS = 8
SHARES = (0.4, 0.3, 0.2, 0.1)
NOISY = 2
"""The task whose targets carry noise of size 1: a large gradient that no expert can learn away."""
TASKS = tuple(f"task {i}" for i in range(4))


class Arm(NamedTuple):
    """One way to shape.

    Attributes:
        form: of the shaper.
        cost: of the shaper.
        lam: strength.
        every: steps between readings.
        cap: of the normalised cost.
    """

    form: str
    cost: str = "information"
    lam: float = 0.01
    every: int = 10
    cap: float = 4.0

    def options(self, seed: int) -> dict[str, Any]:
        """Give the shaper's options."""
        return {**self._asdict(), "seed": seed}


ARMS = {
    "none": Arm("none"),
    "Switch": Arm("switch"),
    "bias": Arm("bias"),
    "KL-uniform": Arm("prior", "uniform"),
    "direction 1": Arm("tax", "snr"),
    "direction 2": Arm("tax"),
    "balance 0.005": Arm("balance", lam=0.005),
    "balance": Arm("balance"),
    "shuffled cost": Arm("tax", "shuffled"),
    "goodness": Arm("goodness", lam=0.1),
    "goodness, g=0": Arm("entropy", lam=0.1),
}


class Outcome(NamedTuple):
    """Where a training ended.

    Attributes:
        loss: on held-out data.
        metrics: the routing there, mean over layers.
    """

    loss: float
    metrics: dict[str, float]


class Router(nn.Module):
    """A linear router with bias that gives logits, weights and choices, as those of transformers do."""

    def __init__(self, width: int, starved: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, width) / width**0.5)
        start = torch.zeros(EXPERTS)
        if starved:
            start[EXPERTS // 2 :] = -8.0
        self.bias = nn.Parameter(start)
        self.top_k = 2

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = functional.linear(x, self.weight, self.bias)
        weights, chosen = logits.softmax(-1).topk(self.top_k, dim=-1)
        return logits, weights / weights.sum(-1, keepdim=True), chosen


class Bank(nn.Module):
    """Two-layer experts, stacked."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(EXPERTS, width, hidden) / width**0.5)
        self.down = nn.Parameter(torch.randn(EXPERTS, hidden) / hidden**0.5)

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        gates = torch.zeros(len(x), EXPERTS).scatter(1, chosen, weights)
        inner = torch.relu(torch.einsum("ni,eih->enh", x, self.up))
        return torch.einsum("enh,eh,ne->n", inner, self.down, gates).unsqueeze(-1)


class Mixture(nn.Module):
    """One layer of experts."""

    def __init__(self, width: int, starved: bool) -> None:
        super().__init__()
        self.gate = Router(width, starved)
        self.experts = Bank(width, 16)

    def forward(self, x: Tensor) -> Tensor:
        _, weights, chosen = self.gate(x)
        return self.experts(x, chosen, weights)


def regression(arm: Arm, seed: int, *, steps: int = 1200, starved: bool = False) -> Outcome:
    """Train on four regression tasks of unequal shares, one of them noisy.

    The tasks, the start and the batches depend on the seed alone, so that arms are paired.

    Args:
        arm: how to shape.
        seed: of everything.
        steps: of Adam, 256 samples each.
        starved: start half of the experts at a logit of -8.

    Returns:
        Loss and routing on 8,192 fresh samples.
    """
    loss, report = _trained(arm, seed, steps, starved)
    return Outcome(loss, report["mean"])


def _trained(arm: Arm, seed: int, steps: int, starved: bool) -> tuple[float, dict[str, Any]]:
    with torch.random.fork_rng():
        torch.random.manual_seed(seed)
        width = 16
        centers = torch.randn(len(SHARES), width)
        teachers = (
            torch.randn(len(SHARES), width, 12) * 2 / width**0.5,
            torch.randn(len(SHARES), 12) / 12**0.5,
        )
        model = Mixture(width, starved)

    def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        task = torch.multinomial(torch.tensor(SHARES), count, replacement=True, generator=generator)
        x = centers[task] + torch.randn(count, width, generator=generator)
        every = torch.einsum(
            "tnh,th->nt", torch.tanh(torch.einsum("ni,tih->tnh", x, teachers[0])), teachers[1]
        )
        y = every.gather(1, task[:, None]).squeeze(1)
        y = y + torch.randn(count, generator=generator) * (task == NOISY)
        return x, y, task

    generator = torch.Generator().manual_seed(1000 + seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    with RoutingShaper(model, optimizer, **arm.options(seed)) as shaper:
        for _ in range(steps):
            x, y, _task = draw(256, generator)
            loss = (model(x).squeeze(-1) - y).square().mean()
            total = loss + shaper.loss(task_loss=loss if arm.form == "goodness" else None)
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
        x, y, task = draw(8192, torch.Generator().manual_seed(99))
        with torch.no_grad():
            held_out = float((model(x).squeeze(-1) - y).square().mean())
        return held_out, shaper.report(task)


def byte_texts(limit: int = 400_000) -> dict[str, Tensor]:
    """Read three kinds of text as bytes: Python's library source, the King James text, and tables of numbers.

    Args:
        limit: bytes of each at most.

    Returns:
        Bytes, shape (n,), int64, by kind.
    """
    tables = [bunch.data.round(4) for bunch in (load_digits(), load_breast_cancer(), load_diabetes())]
    numbers = [",".join(f"{value:g}" for value in row) for table in tables for row in table.tolist()]
    # Rows of one table after the other would make the held-out tenth another kind of table.
    shuffled = [numbers[i] for i in torch.randperm(len(numbers), generator=torch.Generator().manual_seed(0))]
    texts = {
        "code": "\n".join(itertools.islice(documents(DOMAINS["code"]), 100)),
        "bible": "\n".join(itertools.islice(documents(DOMAINS["bible"]), 400)),
        "numbers": "\n".join(shuffled),
    }
    raw = {name: text.encode()[:limit] for name, text in texts.items()}
    return {name: torch.frombuffer(bytearray(text), dtype=torch.uint8).long() for name, text in raw.items()}


def language(arm: Arm, seed: int, texts: dict[str, Tensor], *, steps: int = 300) -> Outcome:
    """Train a byte-level language model of two layers of eight experts.

    Args:
        arm: how to shape.
        seed: of the start and the batches.
        texts: from `byte_texts`; the last tenth of each is held out.
        steps: of AdamW, 8 sequences of 64 bytes each.

    Returns:
        Loss in nats a byte and routing on held-out bytes.
    """
    config = Qwen3MoeConfig(
        vocab_size=256, hidden_size=64, intermediate_size=64, moe_intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, head_dim=16, num_experts=EXPERTS, num_experts_per_tok=2,
        norm_topk_prob=True, max_position_embeddings=128, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    config._experts_implementation = "grouped_mm"
    with torch.random.fork_rng():
        torch.random.manual_seed(seed)
        model = Qwen3MoeForCausalLM(config)
        _spread(model)
    parts = list(texts.values())
    cut = [int(0.9 * len(part)) for part in parts]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with RoutingShaper(model, optimizer, **arm.options(seed)) as shaper:
        for ids, _ in _batches([p[:c] for p, c in zip(parts, cut, strict=True)], steps, 1000 + seed):
            loss = _nats(model, ids)
            total = loss + shaper.loss(task_loss=loss if arm.form == "goodness" else None)
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
        losses = []
        for ids, task in _batches([p[c:] for p, c in zip(parts, cut, strict=True)], 24, 99):
            with torch.no_grad():
                losses.append(float(_nats(model, ids)))
            shaper.observe(task)
        return Outcome(sum(losses) / len(losses), shaper.report()["mean"])


def _spread(model: nn.Module) -> None:
    """Start at the scale torch gives by itself, which suits this width: at transformers' 0.02 all tokens look alike.

    Embeddings of size 1 an entry, matrices of 1/sqrt(inputs). At 0.02 what all tokens have in common (the frequency
    of bytes) soon outweighs the embeddings, and one expert gets nine tokens of ten whatever they are.
    """
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
        elif isinstance(weight, nn.Parameter) and weight.dim() == 2:
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        for parameter in module.parameters(recurse=False):
            if parameter.dim() == 3:  # stacked experts, (E, outputs, inputs)
                nn.init.normal_(parameter, std=parameter.shape[2] ** -0.5)


def _nats(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def _batches(
    parts: list[Tensor], count: int, seed: int, size: int = 8, length: int = 64
) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        task = torch.randint(len(parts), (size,), generator=generator)
        rows = []
        for t in task.tolist():
            start = int(torch.randint(len(parts[t]) - length - 1, (1,), generator=generator))
            rows.append(parts[t][start : start + length + 1])
        yield torch.stack(rows), task


def main() -> None:
    """Draw how one regression run is routed with the tax of direction 2."""
    path = Path(sys.argv[1])
    with publish_file(path) as target:
        target.write_bytes(routing_png(_trained(ARMS["direction 2"], 200, 1200, False)[1], TASKS))


if __name__ == "__main__":
    main()
