"""Fingerprints: which weights a delta, a cache or a certificate is of, recomputed from the weights that are served."""

import copy
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from tether.causal.offloading import fetched, is_offloaded, weights_of
from tether.causal.portable import Portable
from tether.causal.quantising import refuse_packed
from tether.errors import CheckpointError, IdentityError

__all__ = [
    "Fingerprinted",
    "fingerprint",
    "is_changed",
    "note_weights",
    "renew_fingerprint",
    "served_fingerprint",
    "weights_fingerprint",
]

_NOTED = "_tether_noted"


def weights_fingerprint(model: torch.nn.Module) -> str:
    """Hash the weights of a model as they are in memory, rounded to bfloat16, and the buffers that are saved with them.

    The rounding makes a base loaded in float32 or bfloat16 the same base: a delta fits both. It also lets through a
    change of float32 weights that bfloat16 does not show, up to 0.4 % of each. Costs one pass over the weights, about
    2.8 CPU seconds for a billion; tied weights count once.

    Args:
        model: any module.

    Returns:
        `sha256:` and 64 hexadecimal digits.
    """
    return _hashed(_weights(model))


def served_fingerprint(model: Any) -> str:
    """Hash the base that a model serves, from the weights that it holds now and without a copy of them.

    While softmax mode is that of the plain causal LM it was made of (abduction is the identity, no class has a bias
    but a sleeping `<NUM>`), it is `weights_fingerprint` of that LM: backbone and head under the names that they have
    there, without the row of an added `<NUM>`. Else all weights but those of a fusion count. Of an aligned latent
    (`tether.delta.fisher`) the backbone's hash comes first, and that of the other weights behind it.

    Cost: as of `weights_fingerprint`, and a model without weights that is made for the names.

    Args:
        model: a CausalQwenForCausalLM, fused or not.

    Returns:
        The fingerprint; what the config says of it is not looked at.
    """
    return next(_served(model))


# The weights of a trained model may have been hashed whole where those of its plain LM would do.
def _served(model: Any) -> Iterator[str]:
    own = {name: weight for name, weight in _weights(model).items() if not name.startswith("fusion.")}
    if model.config.preset == "aligned":
        rest = {name: weight for name, weight in own.items() if not name.startswith("backbone.")}
        yield f"{_hashed(_plain_weights(model, head=False))}+fisher-{_hashed(rest)[7:23]}"
        return
    if _is_plain(model):
        yield _hashed(_plain_weights(model))
    yield _hashed(own)


def _is_plain(model: Any) -> bool:
    loc, mlp, bias = model.abduction.loc, model.abduction.mlp, model.action.bias
    zeros = [loc.bias, *(() if mlp is None else (mlp[2].weight, mlp[2].bias))]
    if bias is not None:
        zeros.append(bias[:-1] if _is_grown(model) else bias)
    start = torch.eye(*loc.weight.shape, dtype=loc.weight.dtype, device=loc.weight.device)
    return torch.equal(loc.weight, start) and not any(bool(part.any()) for part in zeros)


# Whether the last row is a <NUM> that was added, and that softmax never writes yet.
def _is_grown(model: Any) -> bool:
    from tether.causal.vocabulary import ASLEEP

    bias = model.action.bias
    return bias is not None and model.config.num_token_id == len(bias) - 1 and bool(bias[-1] <= ASLEEP / 2)


def _plain_weights(model: Any, *, head: bool = True) -> dict[str, Tensor]:
    prefix, head_name = _plain_names(model.config.backbone_config)
    embedding, weight = model.get_input_embeddings().weight, model.action.weight
    found = {f"{prefix}.{name}": part for name, part in _weights(model.backbone).items()}
    if head and weight is not embedding:
        found[head_name] = weight
    if _is_grown(model):
        found = {
            name: part[:-1] if part is weight or part is embedding else part for name, part in found.items()
        }
    return found


def _plain_names(config: Any) -> tuple[str, str]:
    # Names of the backbone, and of the head's weight, in the plain causal LM of a config.
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            plain = AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=False)
    except ValueError:  # a class that transformers makes of no config alone
        return "backbone", "action.weight"
    prefix, weight = plain.base_model_prefix, plain.get_output_embeddings().weight
    names = [
        name
        for name, part in plain.named_parameters(remove_duplicate=False)
        if part is weight and not name.startswith(f"{prefix}.")
    ]
    return prefix, next(iter(names), "action.weight")


def _weights(module: torch.nn.Module) -> dict[str, Any]:
    named = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    buffers = {
        name: part
        for name, part in module.state_dict().items()
        if name not in named and isinstance(part, Tensor)
    }
    return {**weights_of(module), **buffers}


def _hashed(weights: Mapping[str, Any]) -> str:
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        digest.update(f"{name} {tuple(weight.shape)}\n".encode())
        weight = fetched(weight)
        # Whole numbers in buffers would not survive the rounding.
        dtype = torch.bfloat16 if weight.is_floating_point() else weight.dtype
        rounded = weight.detach().to("cpu", dtype).contiguous().reshape(-1)
        digest.update(rounded.view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()}"


def note_weights(model: Any, hashed: str | None = None) -> None:
    """Remember the state of a model's weights, to tell later whether they were written to.

    Args:
        model: a CausalQwenForCausalLM.
        hashed: the fingerprint, where it was computed from just these weights in this process; None where it is only
            what a file says.
    """
    # Beside the weights, so that models that share a backbone share this.
    object.__setattr__(model.backbone, _NOTED, (hashed, _versions(model)))


def is_changed(model: Any) -> bool:
    """Tell whether a backbone was written to in place since its fingerprint was taken, as by an optimizer.

    Writing through `.data` leaves no trace in torch and is not seen; neither are weights that were replaced.

    Args:
        model: a CausalQwenForCausalLM.

    Returns:
        Whether it was.
    """
    return any(name.startswith("backbone.") for name in _written(model))


def _written(model: Any) -> list[str]:
    _, noted = getattr(model.backbone, _NOTED, (None, {}))
    now = _versions(model)
    return [
        name for name, was in noted.items() if name in now and now[name] != was and now[name][0] == was[0]
    ]


def renew_fingerprint(model: Any) -> str:
    """Give a model the fingerprint of the weights that it has now.

    Args:
        model: a CausalQwenForCausalLM.

    Returns:
        The fingerprint.
    """
    made = served_fingerprint(model)
    model.config.base_fingerprint = made
    note_weights(model, made)
    return made


def fingerprint(model: Any) -> str:
    """Give the fingerprint of a model, to bind something to it or to compare with what is bound.

    What a file says of it is not believed: the first call for a model from a checkpoint hashes the weights that are
    served (`served_fingerprint`; 0.4 CPU seconds for SmolLM2-135M). Nothing is cached beyond the process. Of a fusion
    of adapters it is that of the base that they were just put on.

    Args:
        model: a CausalQwenForCausalLM; one without a fingerprint (made from a config) gets one.

    Returns:
        The fingerprint.

    Raises:
        CheckpointError: its backbone was changed after the fingerprint was taken.
        IdentityError: its weights are not those whose fingerprint its config names.
    """
    stated: str | None = model.config.base_fingerprint
    if (model.config.fusion or {}).get("kind") == "adapters":
        return str(stated)
    if is_changed(model):
        raise CheckpointError(
            "the weights of the backbone have changed since the model was loaded or made, so what was learnt or cached "
            "of it is of other weights: write it with save_pretrained and load that, which gives it a new fingerprint"
        )
    if stated is None:
        return renew_fingerprint(model)
    if getattr(model.backbone, _NOTED, None) == (stated, _versions(model)):
        return stated
    found = []
    for each in _served(model):
        if each == stated:
            note_weights(model, stated)
            return stated
        found.append(each)
    half = " (in float16 only a base that is stored so is recognised)" * (
        model.action.weight.dtype == torch.float16
    )
    raise IdentityError(
        f"{model.name_or_path or 'the model'}: its weights have the fingerprint {found[0][:19]}..., its config names "
        f"{ascii(stated)[1:20]}...: backbone or head are not those of the base it claims{half}; take another copy, or "
        "make it again from the base"
    )


class Fingerprinted(Portable):
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
            ConfigError: the base is quantised.
        """  # noqa: DOC502 - raised by refuse_packed
        refuse_packed(self, "a checkpoint")
        if self.fusion is not None and is_changed(self):
            raise CheckpointError(
                "the weights of the backbone have changed since the deltas were fused into it: take them out with "
                "unfuse, write the base, and learn them again on it"
            )
        if self.fusion is None and _written(self):
            renew_fingerprint(self)
        if is_offloaded(self.backbone):  # type: ignore[attr-defined]
            # All of it is then in memory at once.
            held = weights_of(self)  # type: ignore[arg-type]
            options["state_dict"] = self.state_dict() | {name: fetched(each) for name, each in held.items()}  # type: ignore[attr-defined]
        super().save_pretrained(*args, **options)  # type: ignore[misc]


# Object and count of changes in place; inference tensors have no count.
def _versions(model: Any) -> dict[str, tuple[int, int]]:
    return {
        name: (id(parameter), -1 if parameter.is_inference() else parameter._version)
        for name, parameter in model.named_parameters()
        # What is offloaded is another object after each pass, and is never written to.
        if not (name.startswith("fusion.") or parameter.is_meta)
    }
