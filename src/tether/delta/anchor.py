"""Base text made ready for fits: what the base infers there, its output Fisher, and what it writes of itself."""

from typing import Any, NamedTuple

from torch import Tensor

from tether.causal.features import default_layers
from tether.delta.background import write_background
from tether.delta.cache import StateCache, backbone_print
from tether.delta.head import Reference
from tether.delta.objective import output_fisher
from tether.delta.output_head import output_head
from tether.delta.source import reference, spread
from tether.errors import CheckpointError

__all__ = ["Anchor", "anchor_text", "check_base", "feature_layers"]


MOST = 32_768
"""Tokens of base text that fits see, and that budgets are met on, at most: spread over the text, held in memory."""


class Anchor(NamedTuple):
    """Base text made ready for fits; one serves any number of domains.

    Attributes:
        fitted: base quantities at tokens that fits see.
        probe: at tokens of other documents, on which budgets are met.
        fisher: output Fisher at some of the fitted tokens, shape (C, C).
        base: fingerprint of the backbone.
        layers: middle layers that the features hold.
        background: what the base writes of itself, see `tether.delta.background`; gates are told apart from it.
        targets: next tokens of `probe`, negative where there is none; None where they are not known.
    """

    fitted: Reference
    probe: Reference
    fisher: Tensor
    base: str
    layers: tuple[int, ...] = ()
    background: Tensor | None = None
    targets: Tensor | None = None


def anchor_text(
    model: Any,
    base: StateCache,
    held_out: StateCache,
    *,
    tokens: int = 1024,
    background: Tensor | None = None,
) -> Anchor:
    """Make base text ready for fits.

    Cost: `tokens` products with the (V, C) head, about 3 CPU seconds for a 135M model, and 15 to let the base
    write the background of the gates.

    Args:
        model: the base.
        base: states of base text for the constraint.
        held_out: states of other base text on which budgets are met.
        tokens: for the Fisher.
        background: what the base writes of itself, if at hand; None lets it write.

    Returns:
        The anchor.

    Raises:
        CheckpointError: states of another backbone than the model's, or of other layers than the first's.
    """  # noqa: DOC502 - raised by check_base
    for cache in (base, held_out):
        check_base(model, cache, base.layers)
    # Fits draw a few hundred of these a step: more of them would cost memory and nothing else.
    fitted, probe = (
        reference(model, cache.states[spread(len(cache.states), MOST)].float()) for cache in (base, held_out)
    )
    fisher = output_fisher(output_head(model), fitted.some(tokens).loc)
    written = write_background(model) if background is None else background
    targets = held_out.windows.targets[spread(len(held_out.states), MOST)].to(fisher.device)
    return Anchor(fitted, probe, fisher, base.base, base.layers, written, targets)


def feature_layers(model: Any, features: str) -> tuple[int, ...]:
    """Tell which middle layers a choice of features reads.

    Args:
        model: the base.
        features: one of `tether.delta.training.FEATURES`.

    Returns:
        Layer numbers, none for `last`.
    """
    depth = model.config.get_text_config(decoder=True).num_hidden_layers
    return default_layers(depth) if features == "multi" else ()


def check_base(model: Any, cache: StateCache, layers: tuple[int, ...]) -> None:
    """Refuse cached states that do not belong to a model or to a choice of features.

    Args:
        model: the base.
        cache: the states.
        layers: middle layers that are expected beside the last.

    Raises:
        CheckpointError: they are of another backbone, or of other layers.
    """
    if cache.layers != layers:
        raise CheckpointError(
            f"cached states hold the layers {list(cache.layers)} beside the last, {list(layers)} are expected: cache "
            "the domain and the base text with the same features"
        )
    if cache.base != backbone_print(model):
        raise CheckpointError(
            f"cached states are of backbone {cache.base[:19]}..., the model's is "
            f"{backbone_print(model)[:19]}...: delete the cache and run again"
        )
