"""A base whose linear layers are packed in 4 or 8 bits: asked for, described in files, refused where it must be.

transformers packs them with bitsandbytes while it loads. The embedding, the output head, abduction, action and all that
is fused stay in full precision; an adapter is learnt on top in full precision too, as in QLoRA.

Reference:
    Dettmers et al. 2023 (arXiv:2305.14314) for 4 bits, Dettmers et al. 2022 (arXiv:2208.07339) for 8.
"""

import importlib.util
from collections.abc import Mapping
from logging import ERROR, getLogger
from typing import Annotated, Any, Final, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from tether.causal.placement import DTYPES
from tether.errors import CheckpointError, ConfigError
from tether.reading import Strict, checked

__all__ = [
    "FORMS",
    "Packing",
    "check_described",
    "find_packing",
    "packed",
    "recorded",
    "refuse_packed",
    "scales_of",
    "settle",
    "told",
]

FORMS = ("4bit", "8bit")
"""Names that a user types."""
_METHOD: Final = "bitsandbytes"


class Packing(Strict):
    """How a base is packed, as adapters, models and certificates say it.

    Attributes:
        bits: 4 or 8.
        kind: of 4 bits, which 16 numbers there are.
        double: of 4 bits, whether the scales are packed too.
        compute: of 4 bits, number format that layers compute in.
        threshold: of 8 bits, size of an activation from which its column is left in half precision; 0 for none.
    """

    method: Literal["bitsandbytes"] = _METHOD
    bits: Literal[4, 8]
    kind: Literal["nf4", "fp4"] | None = None
    double: bool | None = None
    compute: Literal["float32", "bfloat16", "float16"] | None = None
    threshold: Annotated[float, Field(ge=0, le=1e9)] | None = None

    def config(self) -> Any:
        """Say it as transformers wants to hear it.

        Returns:
            A `BitsAndBytesConfig`.

        Raises:
            ConfigError: bitsandbytes or accelerate is not installed.
        """
        missing = [name for name in (_METHOD, "accelerate") if importlib.util.find_spec(name) is None]
        if missing:
            raise ConfigError(
                f"a base in {self.bits} bits needs the package {' and '.join(missing)}, which is not installed: "
                "pip install 'tether[quantised]'"
            )
        from transformers import BitsAndBytesConfig

        if self.bits == 8:
            return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=self.threshold)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.kind,
            bnb_4bit_use_double_quant=self.double,
            bnb_4bit_compute_dtype=DTYPES[self.compute or "float32"],
        )


def find_packing(form: Any, dtype: torch.dtype | None = None) -> Packing | None:
    """Find out what is asked for.

    Args:
        form: `4bit` (NF4 with packed scales, as in QLoRA) or `8bit` (LLM.int8), a `BitsAndBytesConfig`, what a file
            says, a `Packing`, or None.
        dtype: number format of what is not packed, in which layers of `4bit` compute; None takes float32.

    Returns:
        The packing, or None.

    Raises:
        ConfigError: something else.
    """
    if form is None or isinstance(form, Packing):
        return form
    if form == "4bit":
        compute = str(dtype or torch.float32).removeprefix("torch.")
        return checked(Packing, {"bits": 4, "kind": "nf4", "double": True, "compute": compute}, form)
    if form == "8bit":
        return Packing(bits=8, threshold=6.0)
    fields: Any = form if isinstance(form, Mapping) else getattr(form, "to_dict", dict)()
    if "bits" in fields:
        return checked(Packing, dict(fields), "the packing of the base")
    if str(getattr(fields.get("quant_method"), "value", fields.get("quant_method"))) != _METHOD:
        raise ConfigError(
            f"quantisation {form!r:.80}: expected {' or '.join(FORMS)}, or a BitsAndBytesConfig of transformers"
        )
    own = {
        "llm_int8_skip_modules": None, "llm_int8_enable_fp32_cpu_offload": False, "llm_int8_has_fp16_weight": False,
        "bnb_4bit_quant_storage": "uint8",
    }  # fmt: skip
    if odd := [name for name, value in own.items() if fields.get(name, value) != value]:
        raise ConfigError(
            f"quantization_config with {', '.join(odd)}: a file could not say how to load that again; leave it out"
        )
    if fields.get("load_in_8bit"):
        return Packing(bits=8, threshold=float(fields["llm_int8_threshold"]))
    said = {"kind": fields["bnb_4bit_quant_type"], "double": fields["bnb_4bit_use_double_quant"]}
    return checked(
        Packing, {"bits": 4, **said, "compute": fields["bnb_4bit_compute_dtype"]}, "quantization_config"
    )


def packed(model: Any) -> Packing | None:
    """Tell how a model's base is packed.

    Args:
        model: a CausalQwenForCausalLM, a causal LM of transformers, or either's backbone.

    Returns:
        The packing, or None for a base in full precision.

    Raises:
        ConfigError: it is packed in another way.
    """  # noqa: DOC502 - raised by find_packing
    config = getattr(model.config, "backbone_config", None) or model.config
    said = getattr(config, "quantization_config", None)
    return None if said is None else find_packing(said)


def recorded(model: Any) -> dict[str, Any] | None:
    """Say in a file how a model's base is packed.

    Args:
        model: as of `packed`.

    Returns:
        What `find_packing` takes; None for a base in full precision.
    """
    found = packed(model)
    return None if found is None else found.model_dump(exclude_none=True)


def told(packing: Mapping[str, Any] | Packing | None) -> str:
    """Say it to a user.

    Args:
        packing: or None.

    Returns:
        A few words, such as `4 bits (nf4)`.
    """
    if packing is None:
        return "full precision"
    held = packing.model_dump() if isinstance(packing, Packing) else packing
    return f"{held.get('bits')} bits" + (f" ({held['kind']})" if held.get("kind") else "")


def refuse_packed(model: Any, doing: str) -> None:
    """Refuse a base that is packed where its weights are read or written themselves.

    Args:
        model: as of `packed`.
        doing: what needs them, such as `learning a delta`.

    Raises:
        ConfigError: it is packed.
    """
    config = getattr(model.config, "backbone_config", None) or model.config
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(
            f"{doing} needs the base in full precision, and this one is quantised: load the checkpoint without "
            "quantisation; on a quantised base adapters are learnt, fused, served and certified"
        )


def settle(model: nn.Module) -> None:
    """Keep bitsandbytes from packing the weights of 4 bits anew on some CPUs, and from a warning at each product of 8.

    On CPUs with AVX-512 for bfloat16 it changes their order, their scales and the format that they compute in at the
    first pass. The fingerprint would be of other weights, other machines would give other figures, and gradients
    through the new order are wrong (docs/decisions.md).

    Args:
        model: just loaded.
    """
    getLogger(f"{_METHOD}.autograd").setLevel(ERROR)  # that activations are rounded is what 8 bits are
    for part in model.modules():
        if "support_avx512bf16_for_cpu" in vars(part):
            vars(part)["support_avx512bf16_for_cpu"] = False


def scales_of(layer: nn.Module) -> list[Any]:
    """Find what bitsandbytes holds beside a layer's packed weights, in none of the ways that torch knows.

    Args:
        layer: any module.

    Returns:
        Objects and tensors; none of a layer that is not packed.
    """
    held = vars(layer)
    found = [held["quant_state"]] if held.get("quant_state") is not None else []
    state = held.get("state")
    if type(state).__module__.partition(".")[0] == _METHOD:
        found += [value for value in vars(state).values() if isinstance(value, Tensor)]
    return found


def check_described(content: Any, where: Any) -> Packing | None:
    """Read what a file says of the packing.

    Args:
        content: of the file.
        where: the file.

    Returns:
        The packing, or None.

    Raises:
        CheckpointError: it is none.
    """
    if content is None:
        return None
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{where}: how the base is quantised is said by {content!a:.40}; take another copy"
        )
    return checked(Packing, content, where)
