"""What a base does to its scores after its output head, found by comparing numbers, or refused."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from tether.errors import ConfigError, TetherError

__all__ = ["AfterHead", "check_same", "continued", "find_after_head", "logits_of", "probe_ids", "refusing"]

TOKENS = 8
"""Tokens that base and wrapper are compared on."""
EXACT = 1e-5
"""Largest difference of a logit in float32, as a share of the largest logit."""
ROUNDINGS = 4
"""The same in a shorter type, in units of its own rounding."""


class AfterHead(NamedTuple):
    """Logits of the base, from scores s of its output head: `scale * s`, or `cap tanh(scale * s / cap)`.

    Attributes:
        scale: finite, not 0.
        cap: > 0, or None for no cap.
    """

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, scores: Tensor) -> Tensor:
        """Apply it, in the dtype and the order of operations of the bases that have it.

        Args:
            scores: of the head, any shape.

        Returns:
            Logits.
        """
        scores = scores if self.scale == 1 else scores * self.scale
        return scores if self.cap is None else torch.tanh(scores / self.cap) * self.cap


@contextmanager
def refusing(model: PreTrainedModel, doing: str) -> Iterator[None]:
    """Turn what a model of a strange family raises into a refusal with its name and the reason.

    Args:
        model: the base.
        doing: what is tried, for the message.

    Yields:
        Nothing.

    Raises:
        ConfigError: for any error but tether's own.
        TetherError: as it was raised.
    """
    try:
        yield
    except TetherError:
        raise
    except Exception as error:
        # Each family fails in its own way; the user needs the name of the base, and why.
        reason = str(error).splitlines()[0] if str(error) else ""
        raise ConfigError(
            f"{type(model).__name__}: {doing} fails ({type(error).__name__}: {reason}); expected a causal LM whose "
            "logits follow from token ids alone and whose text the backbone keeps in past_key_values; choose another "
            "base"
        ) from error


def probe_ids(model: PreTrainedModel) -> Tensor:
    """Choose the tokens of the comparison, spread over the vocabulary.

    Args:
        model: the base.

    Returns:
        Ids, shape (1, 8), on the device of the embedding.
    """
    embedding = model.get_input_embeddings().weight
    ids = torch.linspace(0, len(embedding) - 1, TOKENS + 2)[1:-1].long()
    # Out of order: sorted ids could hide what depends on the order.
    return ids[torch.tensor([4, 0, 6, 2, 7, 1, 5, 3])].unsqueeze(0).to(embedding.device)


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Compute a model's logits without a cache.

    Args:
        model: in evaluation mode.
        ids: shape (1, T).

    Returns:
        Logits, shape (1, T, V).
    """
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


@torch.no_grad()
def continued(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Let a model write two tokens greedily, the second one from its cache.

    Args:
        model: in evaluation mode.
        ids: shape (1, T).

    Returns:
        Logits of both, shape (1, 2, V).
    """
    config = GenerationConfig(
        max_new_tokens=2, min_new_tokens=2, do_sample=False, pad_token_id=0, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    out = model.generate(ids, generation_config=config, attention_mask=torch.ones_like(ids))
    return torch.stack(out.logits, dim=1)


@torch.no_grad()
def find_after_head(model: PreTrainedModel, ids: Tensor, logits: Tensor) -> AfterHead:
    """Find what a base does after its head, among what the fields of its config can mean.

    A field that has `logit` or `lm_head` in its name may multiply or divide (`logit_scale`, `logits_scaling`,
    `lm_head_multiplier`) or cap (`final_logit_softcapping`). Names only propose: the smallest difference from the
    base's own logits decides, and `check_same` says whether it is small enough. Cost: one pass of the backbone.

    Args:
        model: the base, in evaluation mode.
        ids: tokens, shape (1, T).
        logits: what the base makes of them, shape (1, T, V).

    Returns:
        The candidate nearest to the base; of equally near ones, one that the config asks for.
    """
    states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    head = model.get_output_embeddings().weight
    scores = torch.nn.functional.linear(states.to(head.dtype), head)
    if scores.shape != logits.shape:
        # Left to the comparison of the wrapper, which names both shapes.
        return AfterHead()
    scales, caps = _candidates(model.config.get_text_config(decoder=True))
    found = [AfterHead(*pair) for pair in itertools.product([*scales, 1.0], [*caps, None])]
    return min(found, key=lambda made: _distance(made(scores), logits))


# Numbers that a config may multiply logits by, and those it may cap them at.
def _candidates(config: Any) -> tuple[list[float], list[float]]:
    scales: list[float] = []
    caps: list[float] = []
    for name in dir(config):
        if name.startswith("_") or not ("logit" in name or "lm_head" in name):
            continue
        value = getattr(config, name, None)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value:
            continue
        if "cap" in name and value > 0:
            caps.append(float(value))
        elif "scal" in name or "mult" in name:
            scales += [float(value), 1 / value]
    return scales, caps


def _distance(made: Tensor, expected: Tensor) -> float:
    return float((made.double() - expected.double()).abs().nan_to_num(nan=torch.inf).max())


def check_same(model: PreTrainedModel, made: Tensor, expected: Tensor) -> float:
    """Refuse a wrapper whose logits are not the base's.

    Args:
        model: the base, for its name and dtype.
        made: logits of the wrapper.
        expected: logits of the base.

    Returns:
        The largest difference, in logits.

    Raises:
        ConfigError: another shape, numbers that are not finite, or a difference beyond 1e-5 of the largest logit, or
            beyond rounding in a shorter type than float32.
    """
    name = type(model).__name__
    if made.shape != expected.shape:
        raise ConfigError(
            f"{name}: the base gives logits of shape {tuple(expected.shape)}, its output head of shape "
            f"{tuple(made.shape)}: expected all classes of the head; choose another base"
        )
    largest, difference = float(expected.double().abs().max()), _distance(made, expected)
    # Texts that were written come with logits in float32, whatever the model computed them in.
    allowed = max(EXACT, ROUNDINGS * torch.finfo(model.get_output_embeddings().weight.dtype).eps)
    if not difference <= allowed * largest:
        raise ConfigError(
            f"{name}: logits of the wrapper differ from the base's by {difference:.3g} (largest logit {largest:.3g}, "
            f"allowed {allowed * largest:.3g}) on {made.shape[1]} tokens: this base does something to its logits that "
            "is neither a multiplier nor a cap of its config, so a certificate would be of another model; choose "
            "another base"
        )
    return difference
