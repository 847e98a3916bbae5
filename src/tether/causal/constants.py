"""The constants of source document 5 by name: which there are, which can still change, and how a person gives them."""

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ConfigDict, ValidationError, create_model

from tether.causal.config import PRESETS, CausalQwenConfig
from tether.errors import ConfigError

__all__ = ["CONSTANTS", "OF_LOSSES", "read_constants", "set_constants"]

OF_LOSSES = ("mode", "gate_alpha", "value_loss_weight", "ovr_impl")
"""No weight depends on these, so they can change at any time: what a model does unless told otherwise, alpha of the
gated value loss, lambda of the total loss, the form of the one-vs-rest loss."""
CONSTANTS = (*PRESETS["calibrated"], "abduction_size", *OF_LOSSES)
"""Everything that a model can be started with: scale of U, exogenous noise, thresholds C_k, what the value head
predicts, the width of the small MLP of abduction, and those of the losses."""


def read_constants(given: Iterable[str], known: Iterable[str] = CONSTANTS) -> dict[str, Any]:
    """Read constants as a command line gives them.

    Args:
        given: `NAME=VALUE` each, of names of `CausalQwenConfig`.
        known: names that can be given.

    Returns:
        Values by name, of the types of their fields; their ranges are checked where they are used.

    Raises:
        ConfigError: no `=`, a name that is unknown or given twice, or a value of another type.

    Example:
        >>> read_constants(["gate_alpha=0.3", "mode=deterministic"])
        {'gate_alpha': 0.3, 'mode': 'deterministic'}
    """
    hints, names = CausalQwenConfig.__annotations__, tuple(known)
    found: dict[str, str] = {}
    for one in given:
        name, equals, value = one.partition("=")
        if not equals or name not in names or name in found:
            raise ConfigError(f"{one!r}: expected NAME=VALUE, each name once, of {', '.join(names)}")
        found[name] = value
    fields: dict[str, Any] = {name: (hints[name], ...) for name in found}
    schema = create_model("Constants", __config__=ConfigDict(extra="forbid"), **fields)
    try:
        return dict(schema.model_validate(found).model_dump())
    except ValidationError as error:
        wrong = "; ".join(f"{item['loc'][0]}={item['input']}: {item['msg']}" for item in error.errors())
        raise ConfigError(wrong) from error


def set_constants(config: CausalQwenConfig, values: Mapping[str, Any]) -> None:
    """Change constants of a model that is there.

    Args:
        config: of the model; changed in place, as a whole or not at all.
        values: of `OF_LOSSES`, by name.

    Raises:
        ConfigError: another constant, on which weights depend, or a value out of range.
    """
    if fixed := sorted(set(values) - set(OF_LOSSES)):
        raise ConfigError(
            f"{', '.join(fixed)}: weights depend on these; give them where the model is made ('tether convert --set', "
            "from_backbone)"
        )
    # A config made anew is checked whole.
    type(config)(**{name: getattr(config, name) for name in OF_LOSSES} | dict(values))
    for name, value in values.items():
        setattr(config, name, value)
