"""Configuration of a model served with adapters."""

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig

from tether.causal.config import CausalQwenConfig
from tether.causal.evidence import Rule
from tether.delta.carried import declared_drift

if TYPE_CHECKING:
    from tether.delta.adapter import Adapter

__all__ = ["AdaptedConfig", "describe", "describe_evidence", "serving_options"]


@strict
class AdaptedConfig(CausalQwenConfig):
    """Fields of an `AdaptedForCausalLM`.

    Args:
        base: where the base is: alias, hub id, absolute path, or path relative to the folder; see
            `tether.delta.adapter_serving.find_base`.
        quantised: how the base is packed, see `tether.causal.quantising`; None for full precision.
    """

    model_type = "causal_qwen_adapted"
    model_class: ClassVar[str] = "AdaptedForCausalLM"

    base: str | None = None
    quantised: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        import_module("tether.delta.adapter_serving")


def describe(adapters: "Sequence[Adapter]", weights: Sequence[float], gated: bool) -> dict[str, Any]:
    """Describe what a fusion of adapters consists of, however they are fused.

    Args:
        adapters: in their order.
        weights: of each.
        gated: whether each acts only where its gate is open; then all have one.

    Returns:
        The beginning of `CausalQwenConfig.fusion`.
    """
    described: dict[str, Any] = {
        "kind": "adapters",
        "gated": gated,
        "domains": [adapter.name for adapter in adapters],
        "native": ["symmetric"] * len(adapters),
        "weights": [float(weight) for weight in weights],
        "location_only": False,
        "budgets": [declared_drift(adapter.record) for adapter in adapters],
    }
    if gated:
        # Gates read states; a configuration is needed before any of that can be imported.
        from tether.delta.gate import describe_gates

        described |= describe_gates([adapter.gate for adapter in adapters if adapter.gate is not None])
    return described


def describe_evidence(adapters: "Sequence[Adapter]", rule: Rule) -> dict[str, Any]:
    """Describe that adapters are fused by evidence.

    Args:
        adapters: in their order.
        rule: how experts are weighted.

    Returns:
        The rest of `CausalQwenConfig.fusion`.
    """
    return {
        "by": "evidence",
        "strengths": [list(adapter.strengths) for adapter in adapters],
        **rule.described(),
    }


def serving_options(described: Mapping[str, Any]) -> dict[str, Any]:
    """Give the options of `tether.delta.adapter_serving.serve` that a description stands for.

    Args:
        described: `CausalQwenConfig.fusion`; one from before there was evidence says nothing of it, and is a sum.

    Returns:
        Keyword arguments.
    """
    if described.get("by") == "evidence":
        return {"by": "evidence", "rule": Rule.of(described), "gated": described["gated"]}
    leash = described.get("leash") or {"nats": None, "metric": "softmax"}
    return {
        "by": "sum", "chart": described["chart"], "gated": described["gated"], "leash": leash["nats"],
        "leash_metric": leash["metric"],
    }  # fmt: skip


AutoConfig.register("causal_qwen_adapted", AdaptedConfig, exist_ok=True)
