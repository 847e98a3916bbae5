"""Small byte-level Llamas and the tables of scikit-learn as lines of text: what the trial of widths is made of."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from sklearn.datasets import load_breast_cancer, load_digits
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from tether.demo.corpora import BASE_TEXTS, documents
from tether.merge.axes import find_tower, sizes
from tether.merge.maps import bring

__all__ = [
    "LENGTH",
    "Data",
    "Lines",
    "accuracy",
    "byte_tokenizer",
    "fresh",
    "nll",
    "shuffled",
    "train",
    "widened",
]

LENGTH = 48
"""Bytes of a line."""
PAD = 257
ANSWERS = {"digits": "0123456789", "tumors": "MB", "text": ""}


class Lines(NamedTuple):
    """Lines of one kind; the last byte of a task's line is the answer.

    Attributes:
        tokens: bytes, padded to LENGTH, shape (n, LENGTH).
        lengths: bytes of each, shape (n,).
        answers: bytes that can be an answer; none for running text.
    """

    tokens: Tensor
    lengths: Tensor
    answers: tuple[int, ...]


def _lines(texts: list[str], answers: str) -> Lines:
    found = [list(text.encode()) for text in texts]
    tokens = torch.tensor([row + [PAD] * (LENGTH - len(row)) for row in found])
    return Lines(tokens, torch.tensor([len(row) for row in found]), tuple(answers.encode()))


def _digits() -> list[str]:
    data = load_digits()
    small = data.images.reshape(-1, 4, 2, 4, 2).mean((2, 4)) * 9 / 16
    return [
        f"digit {' '.join(''.join(str(round(v)) for v in row) for row in image)} ={label}"
        for image, label in zip(small, data.target, strict=True)
    ]


def _tumors() -> list[str]:
    data = load_breast_cancer()
    columns = [list(data.feature_names).index(f"worst {n}") for n in ("radius", "texture", "concave points")]
    return [
        f"tumor {' '.join(f'{row[c]:.3g}' for c in columns)} ={'MB'[label]}"
        for row, label in zip(data.data, data.target, strict=True)
    ]


def _news() -> list[str]:
    texts = [text.encode("ascii", "ignore").decode() for text in documents(BASE_TEXTS["news"])]
    return [t[i : i + LENGTH] for t in texts for i in range(0, len(t) - LENGTH, LENGTH)][:6000]


class Data:
    """Both tasks (4 x 4 brightnesses of a digit; measurements of a tumour) and news, in two parts.

    Args:
        seed: of the split.

    Attributes:
        texts: name to the lines to train on.
        train: the same as tokens.
        test: name to lines that no model and no merge sees: 30 % of each task, 400 lines of news.
    """

    def __init__(self, seed: int) -> None:
        self.texts: dict[str, list[str]] = {}
        self.train: dict[str, Lines] = {}
        self.test: dict[str, Lines] = {}
        for name, lines in {"digits": _digits(), "tumors": _tumors(), "text": _news()}.items():
            order = torch.randperm(len(lines), generator=torch.Generator().manual_seed(seed)).tolist()
            held = round(0.3 * len(lines)) if ANSWERS[name] else 400
            self.test[name] = _lines([lines[i] for i in order[:held]], ANSWERS[name])
            self.texts[name] = [lines[i] for i in order[held:]]
            self.train[name] = _lines(self.texts[name], ANSWERS[name])


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer of bytes.

    Returns:
        The tokenizer; bytes of ASCII are their own numbers.
    """
    own = {chr(number): number for number in range(33, 127)} | {"Ġ": 32, "Ċ": 10}
    rest = iter(sorted(set(range(256)) - set(own.values())))
    words = {s: own[s] if s in own else next(rest) for s in sorted(pre_tokenizers.ByteLevel.alphabet())}
    core = Tokenizer(models.BPE(vocab=words | {"<eos>": 256, "<pad>": PAD}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>")


def fresh(width: int, seed: int) -> Any:
    """Make an untrained Llama of three layers, heads of 32 dimensions, two of them a key-value head.

    Args:
        width: hidden size, a multiple of 64.
        seed: of its weights.

    Returns:
        The model.
    """
    config = LlamaConfig(
        vocab_size=258, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3, head_dim=32,
        num_attention_heads=width // 32, num_key_value_heads=width // 64, max_position_embeddings=128,
        tie_word_embeddings=True, eos_token_id=256, bos_token_id=256, pad_token_id=PAD,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.random.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config)


@torch.no_grad()
def widened(model: Any, width: int, seed: int) -> Any:
    """Widen a model without changing what it computes, up to what the new dimensions add to its norms.

    New units read the old dimensions and only the new ones read them; new dimensions of the stream are written
    and read by nothing yet. Norm gains shrink by the root of the ratio of widths, since a norm divides by a mean.

    Args:
        model: of `fresh`.
        width: the new hidden size.
        seed: of the new weights.

    Returns:
        The wide model.
    """
    grown = fresh(width, seed)
    ratio = (model.config.hidden_size / width) ** 0.5
    for name, values in dict(grown.named_parameters()).items():
        source = model.get_parameter(name)
        if values.dim() == 1:
            values.fill_(ratio)
            values[: len(source)] *= source
            continue
        rows, columns = source.shape
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            values[:rows, columns:] = 0
        else:
            values[:, columns:] = 0
        values[:rows, :columns] = source
    return grown


@torch.no_grad()
def shuffled(model: Any, seed: int) -> Any:
    """Put the residual dimensions, hidden units and key-value heads of a model in another order, in place.

    Args:
        model: of `fresh`.
        seed: of the order.

    Returns:
        The model, which computes the same.
    """
    state = model.state_dict()
    tower = find_tower(state)
    assert tower is not None
    lengths = sizes(model.config.to_dict(), {c: tuple(state[n].shape) for c, n in tower.names.items()}, "it")
    generator = torch.Generator().manual_seed(seed)

    def order(count: int) -> Any:
        return torch.randperm(count, generator=generator).numpy()

    maps = {"residual": order(lengths.residual)}
    for layer in range(tower.layers):
        maps |= {
            f"layers.{layer}.mlp": order(lengths.mlp),
            f"layers.{layer}.group": order(lengths.group),
        }
    for canonical, name in tower.names.items():
        values = state[name].numpy().copy()
        moved = bring(canonical, values, values, maps, lengths, lengths)
        if canonical != "lm_head.weight":  # tied
            state[name].copy_(torch.from_numpy(moved.copy()))
    return model


def train(model: Any, data: Data, mix: Mapping[str, int], *, steps: int, rate: float, seed: int) -> Any:
    """Train on lines of several kinds; the answer counts as much as the rest of its line.

    Args:
        model: trained in place.
        data: to draw from.
        mix: kind to lines a step.
        steps: of AdamW, with a warm-up of 10 and a cosine to a tenth.
        rate: its highest learning rate.
        seed: of the draws.

    Returns:
        The model, in evaluation mode.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, pct_start=min(0.5, 10 / steps), div_factor=10, final_div_factor=1
    )
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(steps):
        parts = []
        for name, count in mix.items():
            lines = data.train[name]
            rows = torch.randint(len(lines.tokens), (count,), generator=generator)
            parts.append(Lines(lines.tokens[rows], lines.lengths[rows], lines.answers))
        loss = torch.stack([_loss(model, part) for part in parts]).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    return model.eval()


def _loss(model: Any, lines: Lines) -> Tensor:
    targets = lines.tokens[:, 1:].masked_fill(lines.tokens[:, 1:] == PAD, -100)
    logits = model(input_ids=lines.tokens[:, :-1], use_cache=False).logits
    whole = cross_entropy(logits.transpose(1, 2), targets)
    if not lines.answers:
        return whole
    rows = torch.arange(len(targets))
    return (whole + cross_entropy(logits[rows, lines.lengths - 2], targets[rows, lines.lengths - 2])) / 2


@torch.no_grad()
def accuracy(model: Any, lines: Lines) -> tuple[float, float]:
    """Measure a task.

    Args:
        model: a causal LM.
        lines: of the task.

    Returns:
        Share of lines whose answer is the likeliest of all possible ones, and its NLL, nats.
    """
    logits = model(input_ids=lines.tokens[:, :-1], use_cache=False).logits
    rows = torch.arange(len(logits))
    last, answer = logits[rows, lines.lengths - 2], lines.tokens[rows, lines.lengths - 1]
    possible = torch.tensor(lines.answers)
    right = possible[last[:, possible].argmax(-1)] == answer
    return float(right.float().mean()), float(cross_entropy(last, answer))


@torch.no_grad()
def nll(model: Any, lines: Lines) -> float:
    """Measure running text.

    Args:
        model: a causal LM.
        lines: of text.

    Returns:
        Nats a byte.
    """
    logits = model(input_ids=lines.tokens[:, :-1], use_cache=False).logits
    return float(cross_entropy(logits.transpose(1, 2), lines.tokens[:, 1:]))
