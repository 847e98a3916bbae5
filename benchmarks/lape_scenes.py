"""Pictures of digits in colours and places, questions about them, and small vision-language models that answer."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from sklearn.datasets import load_digits
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)

__all__ = [
    "QUESTIONS",
    "Scenes",
    "TextBatches",
    "accuracy",
    "answer_loss",
    "drift",
    "eye",
    "open_eye",
    "parent",
    "reader",
    "tune",
    "with_eye",
]

QUESTIONS = {"digit": "what digit ?", "colour": "what colour ?", "place": "where ?"}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = {"red": (255, 60, 60), "green": (60, 255, 60), "blue": (80, 80, 255), "yellow": (255, 255, 60),
           "cyan": (60, 255, 255), "pink": (255, 60, 255)}  # fmt: skip
PLACES = ("northwest", "northeast", "southwest", "southeast")
FILLERS = ("a", "is", "here", "and", "the", "with", "seen", "drawn")
MARKS = ("<image>", "<eos>", "<pad>", "what", "digit", "colour", "where", "?", ".")
WORDS = (*MARKS, *NUMBERS, *COLOURS, *PLACES, *FILLERS)
ANSWERS: dict[str, Sequence[str]] = {"digit": NUMBERS, "colour": tuple(COLOURS), "place": PLACES}
SIDE = {"clip": 32, "siglip": 24}
"""Pixels that each vision tower sees."""
TOKENS = {"clip": 16, "siglip": 9}
"""Image tokens that it gives."""
PATCH = 8


def _tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>")
    made.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return made


def _ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def reader(kind: str) -> LlavaProcessor:
    """Make the processor of a vision-language model.

    Args:
        kind: `clip` or `siglip`.

    Returns:
        The processor; pictures are resized to the tower's side and scaled to [-1, 1].
    """
    side = {"height": SIDE[kind], "width": SIDE[kind]}
    images = CLIPImageProcessor(
        size=side, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_convert_rgb=True
    )
    return LlavaProcessor(
        image_processor=images, tokenizer=_tokenizer(), patch_size=PATCH, image_token="<image>",
        vision_feature_select_strategy="default" if kind == "clip" else "full",
        num_additional_image_tokens=1 if kind == "clip" else 0,
    )  # fmt: skip


class Scenes(NamedTuple):
    """Pictures and what is on them.

    Attributes:
        pictures: RGB, shape (n, 32, 32, 3), uint8.
        labels: question to the number of its answer among ANSWERS, shape (n,).
        pixels: kind of tower to what its processor makes of the pictures.
    """

    pictures: npt.NDArray[np.uint8]
    labels: dict[str, Tensor]
    pixels: dict[str, Tensor]

    @classmethod
    def drawn(cls, rows: npt.NDArray[np.int64], seed: int) -> "Scenes":
        """Draw scikit-learn's digits over a dark canvas in one of six colours, with a white mark in one corner.

        Args:
            rows: which digits.
            seed: of colours, corners and the canvas's noise.

        Returns:
            The scenes.
        """
        draw, data = np.random.default_rng(seed), load_digits()
        colour, place = draw.integers(len(COLOURS), size=len(rows)), draw.integers(4, size=len(rows))
        ink = data.images[rows].repeat(4, 1).repeat(4, 2)[..., None] / 16
        shades = np.array(list(COLOURS.values()))[colour][:, None, None, :]
        pictures = (1 - ink) * draw.integers(0, 40, (len(rows), 32, 32, 3)) + ink * shades
        for number, (y, x) in enumerate(zip(place // 2 * 26, place % 2 * 26, strict=True)):
            pictures[number, y : y + 6, x : x + 6] = 255
        whole = pictures.round().astype(np.uint8)
        labels = {"digit": data.target[rows], "colour": colour, "place": place}
        pixels = {
            kind: reader(kind).image_processor([Image.fromarray(p) for p in whole], return_tensors="pt")[
                "pixel_values"
            ]
            for kind in SIDE
        }
        return cls(whole, {name: torch.as_tensor(values) for name, values in labels.items()}, pixels)

    def save(self, folder: Path, count: int) -> None:
        """Write the first pictures as PNG files.

        Args:
            folder: where to.
            count: how many.
        """
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            Image.fromarray(self.pictures[number]).save(folder / f"{number:03d}.png")


class TextBatches:
    """Descriptions in words with questions about them: what the parent learns and the others rehearse.

    Args:
        seed: of the draws.
    """

    def __init__(self, seed: int) -> None:
        self.draw = np.random.default_rng(seed)

    def batch(self, rows: int) -> tuple[Tensor, Tensor]:
        """Draw descriptions such as `the seven and red southeast . what colour ? red`.

        Args:
            rows: how many.

        Returns:
            Tokens and targets (-100 where nothing is to be learnt), shape (rows, S).
        """
        made = []
        for _ in range(rows):
            truth = {name: str(self.draw.choice(list(words))) for name, words in ANSWERS.items()}
            words = [*truth.values(), *self.draw.choice(FILLERS, size=3)]
            asked = str(self.draw.choice(list(QUESTIONS)))
            text = f"{' '.join(self.draw.permutation(words))} . {QUESTIONS[asked]}"
            made.append((_ids(text), _ids(f"{truth[asked]} <eos>")))
        return _padded(made)


def _padded(rows: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.full((len(rows), width), WORDS.index("<pad>"))
    targets = torch.full((len(rows), width), -100)
    for number, (prompt, answer) in enumerate(rows):
        ids[number, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        targets[number, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    return ids, targets


def _text_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(WORDS), hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False,
        eos_token_id=WORDS.index("<eos>"), bos_token_id=None, pad_token_id=WORDS.index("<pad>"),
    )  # fmt: skip


def parent(seed: int, steps: int) -> Any:
    """Train the language model that both vision-language models start from.

    Args:
        seed: of weights and text.
        steps: of 32 descriptions.

    Returns:
        The model.
    """
    torch.random.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(_text_config())
    texts = TextBatches(seed)
    optimizer, schedule = _optimizer([(list(model.parameters()), 2e-3)], steps)
    for _ in range(steps):
        ids, targets = texts.batch(32)
        _step(model, optimizer, schedule, _loss(model(input_ids=ids, use_cache=False).logits, targets))
    return model.eval()


def with_eye(language: Any, kind: str, seed: int) -> Any:
    """Give a language model a vision tower and a projector, both untrained.

    Args:
        language: from `parent`; copied.
        kind: `clip` (64 wide, 32 pixels) or `siglip` (96 wide, 24 pixels).
        seed: of the new weights.

    Returns:
        A Llava model.
    """
    torch.random.manual_seed(seed)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": PATCH, "image_size": SIDE[kind]}
    vision = (
        CLIPVisionConfig(hidden_size=64, intermediate_size=128, **sizes)
        if kind == "clip"
        else SiglipVisionConfig(hidden_size=96, intermediate_size=192, **sizes)
    )
    config = LlavaConfig(
        text_config=_text_config(), vision_config=vision, image_token_id=WORDS.index("<image>"),
        vision_feature_layer=-1, vision_feature_select_strategy="default" if kind == "clip" else "full",
        tie_word_embeddings=False,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.lm_head.load_state_dict(language.lm_head.state_dict())
    model.generation_config.eos_token_id = WORDS.index("<eos>")
    return model


def open_eye(model: Any, scenes: Scenes, *, steps: int, seed: int, rate: float = 2e-3) -> Any:
    """Train the vision tower alone to tell digit, colour and place, as vision towers are trained before they are used.

    Args:
        model: from `with_eye`, its tower trained in place.
        scenes: to train on.
        steps: of 64 pictures.
        seed: of the draws and of the heads, which are thrown away.
        rate: highest learning rate.

    Returns:
        The model.
    """
    torch.random.manual_seed(seed)
    tower, kind, draw = model.model.vision_tower, eye(model), np.random.default_rng(seed)
    width = tower.config.hidden_size
    heads = torch.nn.ModuleDict({name: torch.nn.Linear(width, len(words)) for name, words in ANSWERS.items()})
    both = torch.nn.ModuleList([tower, heads])
    optimizer, schedule = _optimizer([(list(both.parameters()), rate)], steps)
    for _ in range(steps):
        rows = torch.as_tensor(draw.integers(len(scenes.pictures), size=64))
        seen = tower(pixel_values=scenes.pixels[kind][rows]).last_hidden_state[:, -TOKENS[kind] :].mean(1)
        losses = [cross_entropy(heads[name](seen), scenes.labels[name][rows]) for name in ANSWERS]
        _step(both, optimizer, schedule, torch.stack(losses).sum())
    return model


def eye(model: Any) -> str:
    """Say which tower a model has.

    Args:
        model: from `with_eye` or loaded.

    Returns:
        `clip` or `siglip`.
    """
    return "clip" if "clip" in model.config.vision_config.model_type else "siglip"


def tune(
    model: Any, scenes: Scenes, questions: Mapping[str, float], *, steps: int, rates: tuple[float, float], seed: int
) -> Any:  # fmt: skip
    """Train tower and projector alone for a quarter of the steps, then everything, with an eighth of plain text.

    Args:
        model: from `with_eye`, trained in place.
        scenes: to train on.
        questions: question to its share.
        steps: of 56 questions and 8 descriptions.
        rates: highest learning rate of the language model and of the rest.
        seed: of the draws.

    Returns:
        The model.
    """
    language = [*model.model.language_model.parameters(), *model.lm_head.parameters()]
    inside = {id(parameter) for parameter in language}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in inside]
    optimizer, schedule = _optimizer([(language, rates[0]), (rest, rates[1])], steps)
    draw, texts, kind = np.random.default_rng(seed), TextBatches(seed + 1000), eye(model)
    names, shares = list(questions), np.array(list(questions.values()))
    model.train()
    for step in range(steps):
        for parameter in language:
            parameter.requires_grad_(step >= steps // 4)
        asked = str(draw.choice(names, p=shares / shares.sum()))
        rows = torch.as_tensor(draw.integers(len(scenes.pictures), size=56))
        loss = _loss(*_answered(model, scenes, asked, rows, kind))
        if step >= steps // 4:
            ids, targets = texts.batch(8)
            loss = loss + 0.125 * _loss(model(input_ids=ids, use_cache=False).logits, targets)
        _step(model, optimizer, schedule, loss)
    return model.eval()


def answer_loss(model: Any, scenes: Scenes, asked: str, rows: Tensor) -> Tensor:
    """Measure the loss of answers to one question.

    Args:
        model: a vision-language model.
        scenes: to ask about.
        asked: the question.
        rows: which pictures.

    Returns:
        Nats a word of the answer, differentiable.
    """
    return _loss(*_answered(model, scenes, asked, rows, eye(model)))


def _answered(model: Any, scenes: Scenes, asked: str, rows: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    prompt = [WORDS.index("<image>")] * TOKENS[kind] + _ids(QUESTIONS[asked])
    answers = [WORDS.index(word) for word in ANSWERS[asked]]
    pairs = [(prompt, [answers[int(label)], WORDS.index("<eos>")]) for label in scenes.labels[asked][rows]]
    ids, targets = _padded(pairs)
    return model(input_ids=ids, pixel_values=scenes.pixels[kind][rows], use_cache=False).logits, targets


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())


def _optimizer(groups: list[tuple[list[Any], float]], steps: int) -> tuple[Any, Any]:
    optimizer = torch.optim.AdamW(
        [{"params": each, "lr": rate} for each, rate in groups], weight_decay=0.0, betas=(0.9, 0.95)
    )
    warm = max(1, steps // 10)

    def factor(step: int) -> float:
        progress = max(0.0, (step - warm) / max(1, steps - warm))
        return min((step + 1) / warm, 0.55 + 0.45 * math.cos(math.pi * progress))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return optimizer, schedule


def _step(model: Any, optimizer: Any, schedule: Any, loss: Tensor) -> None:
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def accuracy(model: Any, scenes: Scenes, asked: str) -> float:
    """Measure one task.

    Args:
        model: a vision-language model.
        scenes: to ask about.
        asked: the question.

    Returns:
        Share of pictures for which the likeliest of all words is the answer.
    """
    right = 0.0
    for rows in torch.arange(len(scenes.pictures)).split(128):
        logits, targets = _answered(model, scenes, asked, rows, eye(model))
        right += float((logits[:, -3].argmax(-1) == targets[:, -2]).sum())
    return right / len(scenes.pictures)


@torch.no_grad()
def drift(language: Any, model: Any, rows: int = 256) -> tuple[float, float]:
    """Measure how far a model has moved from the parent on descriptions in words.

    Args:
        language: the parent.
        model: a vision-language model.
        rows: descriptions.

    Returns:
        Mean softmax KL(parent || model) at the answers and the model's NLL of them, nats.
    """
    ids, targets = TextBatches(99).batch(rows)
    log_p, log_q = (
        torch.log_softmax(each(input_ids=ids, use_cache=False).logits[:, :-1], -1)
        for each in (language, model)
    )
    kept = targets[:, 1:] != -100
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)[kept].mean()
    loss = -log_q.gather(-1, targets[:, 1:].clamp(min=0).unsqueeze(-1)).squeeze(-1)[kept].mean()
    return float(kl), float(loss)
