"""How evenly a mixture-of-experts base uses its experts: the loss that its own causal LM adds."""

import inspect
import sys
from typing import Any, NamedTuple

from torch import Tensor

from tether.errors import ConfigError

__all__ = ["Balance", "balance_of"]

_FUNCTION = "load_balancing_loss_func"
_ARGUMENTS = ["gate_logits", "num_experts", "top_k", "attention_mask"]


class Balance(NamedTuple):
    """The loss of routing.

    Attributes:
        aux_loss: a scalar.
        weight: what it is multiplied by in the loss.
    """

    aux_loss: Tensor
    weight: float


def balance_of(
    backbone: Any, text: Any, router_logits: Any, asked: bool | None, attention_mask: Any
) -> Balance | None:
    """Compute the loss of routing as transformers' causal LM of the same family does.

    Its function is taken from the module of the backbone, so it is the family's own.

    Args:
        backbone: the decoder.
        text: its config.
        router_logits: what it gives under that name, one tensor of shape (B T, experts) for each layer with experts,
            or None.
        asked: the caller's `output_router_logits`; None leaves it to the config.
        attention_mask: shape (B, past + T) or of more dimensions, or None.

    Returns:
        The loss; None where it is not asked for, or where the family has none.

    Raises:
        ConfigError: a family whose loss takes other arguments.
    """
    asked = getattr(text, "output_router_logits", False) if asked is None else asked
    function = getattr(sys.modules[type(backbone).__module__], _FUNCTION, None)
    if not asked or not router_logits or function is None:
        return None
    chosen, weight = (getattr(text, name, None) for name in ("num_experts_per_tok", "router_aux_loss_coef"))
    if list(inspect.signature(function).parameters) != _ARGUMENTS or chosen is None or weight is None:
        raise ConfigError(
            f"output_router_logits with a base of type {text.model_type}: its loss of routing has another form than "
            "that of the other families, and would be left out; set output_router_logits=False, or train the base "
            "before it is wrapped"
        )
    experts = router_logits[0].shape[-1]
    mask = attention_mask if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2 else None
    if mask is not None:
        mask = mask[:, -(len(router_logits[0]) // len(mask)) :]
    return Balance(function(router_logits, experts, chosen, mask), float(weight))
