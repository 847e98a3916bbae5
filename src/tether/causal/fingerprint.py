"""Fingerprints: which weights a delta, a cache or a certificate is of, and whether they are still those."""

import hashlib
from typing import Any

import torch

from tether.errors import CheckpointError

__all__ = [
    "Fingerprinted",
    "fingerprint",
    "is_changed",
    "note_weights",
    "renew_fingerprint",
    "weights_fingerprint",
]

_NOTED = "_tether_noted"


def weights_fingerprint(model: torch.nn.Module) -> str:
    """Hash the weights of a model as they are in memory, rounded to bfloat16.

    The rounding makes a base loaded in float32 or bfloat16 the same base: a delta fits both. Costs one
    pass over the weights; tied weights count once.

    Args:
        model: any module.

    Returns:
        `sha256:` and 64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
        rounded = parameter.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8)
        digest.update(rounded.reshape(-1).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def note_weights(model: Any) -> None:
    """Remember the state of a backbone's weights, of which the model's fingerprint is.

    Args:
        model: a CausalQwenForCausalLM.
    """
    # Beside the weights, so that models that share a backbone share this.
    object.__setattr__(model.backbone, _NOTED, _versions(model.backbone))


def is_changed(model: Any) -> bool:
    """Tell whether a backbone was written to in place since its fingerprint was taken, as by an optimizer.

    Writing through `.data` leaves no trace in torch and is not seen; neither are weights that were replaced.

    Args:
        model: a CausalQwenForCausalLM.

    Returns:
        Whether it was.
    """
    noted: dict[str, tuple[int, int]] = getattr(model.backbone, _NOTED, {})
    now = _versions(model.backbone)
    return any(name in now and now[name] != was and now[name][0] == was[0] for name, was in noted.items())


def renew_fingerprint(model: Any) -> str:
    """Give a model the fingerprint of the weights that it has now.

    Args:
        model: a CausalQwenForCausalLM.

    Returns:
        The fingerprint.
    """
    made = weights_fingerprint(model)
    model.config.base_fingerprint = made
    note_weights(model)
    return made


def fingerprint(model: Any) -> str:
    """Give the fingerprint of a model, to bind something to it or to compare with what is bound.

    Args:
        model: a CausalQwenForCausalLM; one without a fingerprint (made from a config) gets one.

    Returns:
        The fingerprint.

    Raises:
        CheckpointError: its backbone was changed after the fingerprint was taken.
    """
    if is_changed(model):
        raise CheckpointError(
            "the weights of the backbone have changed since the model was loaded or made, so what was learnt or cached "
            "of it is of other weights: write it with save_pretrained and load that, which gives it a new fingerprint"
        )
    found: str | None = model.config.base_fingerprint
    return renew_fingerprint(model) if found is None else found


class Fingerprinted:
    """Loading and saving of a model whose fingerprint follows its weights."""

    config: Any
    fusion: Any

    @classmethod
    def from_pretrained(cls, *args: Any, **options: Any) -> Any:
        """Load a checkpoint.

        Args:
            args: as in transformers.
            options: as in transformers.

        Returns:
            The model, or what transformers returns with the options given.
        """
        made = super().from_pretrained(*args, **options)  # type: ignore[misc]
        note_weights(made[0] if isinstance(made, tuple) else made)
        return made

    def save_pretrained(self, *args: Any, **options: Any) -> None:
        """Write a checkpoint; weights that were trained by hand get a new fingerprint.

        Args:
            args: as in transformers.
            options: as in transformers.

        Raises:
            CheckpointError: the model is fused, and its backbone is no longer the one of its deltas.
        """
        if is_changed(self):
            if self.fusion is not None:
                raise CheckpointError(
                    "the weights of the backbone have changed since the deltas were fused into it: take them out with "
                    "unfuse, write the base, and learn them again on it"
                )
            renew_fingerprint(self)
        super().save_pretrained(*args, **options)  # type: ignore[misc]


# Object and count of changes in place; inference tensors have no count.
def _versions(module: torch.nn.Module) -> dict[str, tuple[int, int]]:
    return {
        name: (id(parameter), -1 if parameter.is_inference() else parameter._version)
        for name, parameter in module.named_parameters()
    }
