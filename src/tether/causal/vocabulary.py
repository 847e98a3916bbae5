"""Give a model the token `<NUM>`: a reserved row of its vocabulary, or one row more."""

from typing import Any

import torch
from torch import Tensor, nn

from tether.causal.fingerprint import renew_fingerprint
from tether.causal.numbers import NumericTokenizer
from tether.causal.resizing import set_classes
from tether.errors import ConfigError

__all__ = ["ASLEEP", "add_numbers", "wake_numbers"]

ASLEEP = -1e4
"""Bias of an added `<NUM>` class: the base never writes it, so softmax over the other classes stays exact."""


@torch.no_grad()
def add_numbers(model: Any, tokenizer: Any) -> NumericTokenizer:
    """Let a model read and write numbers.

    Where the vocabulary has a reserved row, `<NUM>` takes it and no weight changes (spec document 5,
    section 4, step 1). Else the model grows by one row: embedded as the mean of the ten digits, with the
    same row in the head, and a bias so low that softmax over the other classes is the base's; training
    wakes it up (`wake_numbers`).

    Args:
        model: a CausalQwenForCausalLM; changed in place.
        tokenizer: its tokenizer, plain or numeric.

    Returns:
        The numeric tokenizer that goes with it.

    Raises:
        ConfigError: the tokenizer's `<NUM>` is not the model's, or lies several rows beyond its vocabulary.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    numeric = tokenizer if isinstance(tokenizer, NumericTokenizer) else NumericTokenizer(tokenizer, rows=rows)
    number = numeric.num_token_id
    known = model.config.num_token_id
    if known is not None:
        if known != number:
            raise ConfigError(
                f"the tokenizer's <NUM> is {number}, the model's is {known}: expected the model's own tokenizer"
            )
        return numeric
    if number > rows:
        raise ConfigError(
            f"<NUM> would be token {number} of a model with {rows} rows: expected a tokenizer of this model"
        )
    if number == rows:
        names = numeric.get_vocab()
        digits = [names[digit] for digit in "0123456789" if digit in names]
        _grow(model, torch.tensor([token for token in digits if token < rows], dtype=torch.long))
    model.config.num_token_id = number
    return numeric


def _grow(model: Any, digits: Tensor) -> None:
    embedding, action = model.get_input_embeddings(), model.action
    before = len(action.weight)
    tied = action.weight is embedding.weight

    def longer(weight: Tensor) -> nn.Parameter:
        row = weight[digits].mean(0, keepdim=True) if len(digits) else weight.mean(0, keepdim=True)
        return nn.Parameter(torch.cat([weight.detach(), row.detach()]), requires_grad=weight.requires_grad)

    embedding.weight = longer(embedding.weight)
    embedding.num_embeddings = len(embedding.weight)
    weight = embedding.weight if tied else longer(action.weight)
    if action.bias is None:
        bias = torch.zeros(len(action.weight), dtype=weight.dtype, device=weight.device)
        action.bias = nn.Parameter(bias)
    set_classes(action, weight, before, model.config.latent_scale)
    action.bias[-1] = ASLEEP
    count = len(weight)
    model.config.class_bias = True
    model.config.get_text_config(decoder=True).vocab_size = model.vocab_size = count


@torch.no_grad()
def wake_numbers(model: Any, latent_loc: Tensor, share: float) -> None:
    """Set the bias of an added `<NUM>` so that softmax expects it as often as a text has it.

    Does nothing where `<NUM>` is a reserved row or was woken before.

    Args:
        model: a model with numbers; changed in place.
        latent_loc: loc of U at some positions of the text, shape (n, C).
        share: share of its tokens that are `<NUM>`, in (0, 1).

    Raises:
        ConfigError: the share is not in (0, 1), or the model has no numbers.
    """
    if not 0 < share < 1:
        raise ConfigError(f"share={share}: expected the share of numbers among the tokens, in (0, 1)")
    action, number = model.action, model.config.num_token_id
    if number is None:
        raise ConfigError("a model without <NUM>: call model.add_numbers(tokenizer) first")
    if action.bias is None or action.bias[number] > ASLEEP / 2:
        return
    # Without the bias, beside which nothing of the score would be left in half precision.
    own = (latent_loc.float() @ action.weight[number].float()).double()
    scores = action.score_loc(latent_loc).float()
    normaliser = scores.logsumexp(dim=-1).double()
    low, high = -200.0, 200.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (
            (middle, high)
            if float(torch.sigmoid(action.capped(own + middle) - normaliser).mean()) < share
            else (low, middle)
        )
    action.bias[number] = (low + high) / 2
    if model.config.base_fingerprint is not None:
        renew_fingerprint(model)  # softmax is no longer that of the plain model
