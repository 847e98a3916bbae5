"""Finds the routers and experts of a mixture-of-experts model, and reads what a router decided."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tether.errors import ConfigError, ShapeError
from tether.router.experts import Experts, find_experts

__all__ = ["Routes", "Site", "find_sites", "make_site"]

ROUTERS = ("gate", "router")
"""What families call the router beside `experts`."""
CORRECTIONS = ("e_score_correction_bias", "expert_bias")
"""Names of the bias on the choice that goes with sigmoid scores."""


class Routes(NamedTuple):
    """What a router decided about n tokens.

    Attributes:
        logits: of all experts, shape (n, E), with their graph.
        weights: gates of the chosen experts, shape (n, k).
        chosen: the chosen experts, shape (n, k), int64.
    """

    logits: Tensor
    weights: Tensor
    chosen: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Site:
    """One layer of experts with its router.

    Attributes:
        name: of the layer in the model.
        router: the module whose output is (logits, weights, chosen), or the logits alone.
        mixture: the module whose output is the mixture of the experts.
        experts: their trainable parameters, or None where they cannot be told apart or are all frozen.
        reason: why `experts` is None.
        count: E.
        top_k: experts a token uses.
        gate: one of `tether.router.shaping.GATES`.
        renormalise: whether the weights of the chosen experts are brought to sum 1.
    """

    name: str
    router: nn.Module
    mixture: nn.Module
    experts: Experts | None
    reason: str = ""
    count: int
    top_k: int
    gate: str = "softmax"
    renormalise: bool = True

    def read(self, output: Any) -> Routes:
        """Read the router's output.

        Args:
            output: what the router's forward returned.

        Returns:
            The decision.

        Raises:
            ShapeError: the output is neither logits nor (logits, weights, chosen).
        """
        parts = output if isinstance(output, tuple) else (output,)
        logits = parts[0].reshape(-1, parts[0].shape[-1])
        if logits.shape[1] == self.count and len(parts) == 1:
            return self.choose(logits, None)
        if len(parts) == 3 and logits.shape[1] == self.count and not parts[2].is_floating_point():
            chosen = parts[2].reshape(len(logits), -1)
            weights = parts[1].reshape(len(logits), -1)
            if weights.shape[1] == self.count and chosen.shape[1] < self.count:
                weights = weights.gather(1, chosen)
            return Routes(logits, weights, chosen)
        shapes = [tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__ for part in parts]
        raise ShapeError(
            f"{self.name}: the router gives {shapes}; expected logits (n, {self.count}), alone or with weights and "
            "chosen experts behind them; register a site for a module that gives those"
        )

    def choose(self, logits: Tensor, bias: Tensor | None) -> Routes:
        """Choose the experts of each token from the logits.

        Args:
            logits: shape (n, E).
            bias: added to the scores for the choice alone, shape (E,), or None.

        Returns:
            The decision, its weights from the scores without the bias.
        """
        scores = logits.float().softmax(-1) if self.gate == "softmax" else logits.float().sigmoid()
        ranked = scores.detach() if bias is None else scores.detach() + bias.to(scores)
        chosen = ranked.topk(self.top_k, dim=-1).indices
        weights = scores.gather(1, chosen)
        if self.renormalise:
            weights = weights / weights.sum(-1, keepdim=True)
        return Routes(logits, weights.to(logits.dtype), chosen)


def find_sites(model: nn.Module) -> list[Site]:
    """Find every layer that has `experts` beside a `gate` or `router`.

    That is the layout of Qwen2Moe, Qwen3Moe, Mixtral, OLMoE and DeepSeek-V3 in transformers 5, whichever
    implementation computes the experts, and of older models with a list of experts and a linear gate.

    Args:
        model: any model.

    Returns:
        The sites in the model's order.

    Raises:
        ConfigError: there is none, or one does not say how many experts a token uses.
    """
    sites = []
    for name, block in model.named_modules():
        children = dict(block.named_children())
        router = next((children[key] for key in ROUTERS if key in children), None)
        if "experts" not in children or router is None:
            continue
        weight = getattr(router, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() != 2:
            continue
        top_k = next(
            (
                value
                for module in (router, block)
                for key in ("top_k", "num_experts_per_tok")
                if isinstance(value := getattr(module, key, None), int)
            ),
            None,
        )
        if top_k is None:
            raise ConfigError(
                f"{name}: no top_k nor num_experts_per_tok on the layer or its router, so it is not known how many "
                "experts a token uses; leave the search out with sites=() and name it with register_site(top_k=...)"
            )
        # Some keep the correction bias of sigmoid scores beside the router.
        beside = {*dict(block.named_buffers(recurse=False)), *dict(block.named_parameters(recurse=False))}
        gate = "sigmoid" if beside & set(CORRECTIONS) else None
        sites.append(make_site(name, router, children["experts"], top_k=top_k, gate=gate))
    if not sites:
        raise ConfigError(
            f"{type(model).__name__}: no layer with 'experts' beside a 'gate' or 'router'; expected a mixture-of-"
            "experts model, or name its layers with sites=() and register_site"
        )
    return sites


def make_site(
    name: str,
    router: nn.Module,
    experts: nn.Module,
    *,
    top_k: int,
    parameters: Experts | None = None,
    count: int | None = None,
    gate: str | None = None,
    renormalise: bool | None = None,
) -> Site:
    """Describe one layer of experts.

    Args:
        name: of the layer.
        router: gives the logits, shape (n, E), alone or followed by weights and chosen experts.
        experts: an `nn.ModuleList`, or a module that holds stacked tensors; its output, if it is called, is the
            mixture.
        top_k: experts a token uses, in [1, E].
        parameters: which tensors belong to which expert; None finds out.
        count: E; None takes the rows of the router's `weight`.
        gate: `softmax` or `sigmoid`; None takes `sigmoid` for routers with DeepSeek's correction bias.
        renormalise: whether weights are brought to sum 1; None takes the router's `norm_topk_prob`, else true.

    Returns:
        The site. Experts whose parameters cannot be read leave `experts` empty and the reason in `reason`: forms
        that need no cost work without.

    Raises:
        ConfigError: `top_k` out of range.
    """
    if count is None:
        count = len(router.get_parameter("weight"))
    if not 1 <= top_k <= count:
        raise ConfigError(f"{name}: top_k={top_k}, expected a number in [1, {count}]")
    reason = ""
    if parameters is None:
        try:
            parameters = find_experts(experts, count, name)
        except (ConfigError, ShapeError) as error:
            reason = str(error)
    if gate is None:
        gate = "sigmoid" if CORRECTIONS[0] in dict(router.named_buffers()) else "softmax"
    if renormalise is None:
        renormalise = bool(getattr(router, "norm_topk_prob", True))
    return Site(
        name=name, router=router, mixture=experts, experts=parameters, reason=reason, count=count, top_k=top_k,
        gate=gate, renormalise=renormalise,
    )  # fmt: skip


def trainable(site: Site) -> bool:
    """Tell whether a router learns.

    Args:
        site: the layer.

    Returns:
        Whether any parameter of its router has a gradient.
    """
    return any(parameter.requires_grad for parameter in site.router.parameters())


def in_backward() -> bool:
    """Tell whether autograd is running a backward pass on this thread, as a recomputing checkpoint does.

    Returns:
        Whether it is; torch's own checkpointing asks the same way.
    """
    return torch._C._current_graph_task_id() != -1
