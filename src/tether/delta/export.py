"""Export a model as a plain checkpoint of its base's architecture, where that is exact; refuse where it is not."""

import copy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tether.causal.fused import Fusion
from tether.causal.modeling import CausalQwenForCausalLM
from tether.causal.numbers import without_numbers
from tether.causal.offloading import refuse_offloaded
from tether.causal.quantising import refuse_packed
from tether.errors import ConfigError
from tether.store.manifest import Input, Manifest, write_manifest
from tether.store.publish import publish_folder
from tether.store.reader import CheckpointReader

__all__ = ["Exported", "export_plain", "final_norm", "static_map"]

ROWS = 8192
"""Classes folded at once, so that no second head is held in float64."""
TOLERANCE = 1e-4
"""Largest difference of a logit allowed in float32; in a shorter type, that of its own rounding."""


class Exported(NamedTuple):
    """What was written.

    Attributes:
        folder: the checkpoint.
        folded: what the head became: `nothing`, where the base's own head serves, or `head`.
        norm: name of the final norm whose bias took the model's bias, or None where there was none.
        difference: largest difference between a logit of the checkpoint, read back, and the model's.
        tokens: how many tokens that was measured on.
    """

    folder: Path
    folded: str
    norm: str | None
    difference: float
    tokens: int


def export_plain(
    model: CausalQwenForCausalLM,
    tokenizer: Any,
    folder: str | Path,
    *,
    replace: bool = False,
    tokens: int = 128,
) -> Exported:
    """Write softmax mode as a plain checkpoint: logits = W (M z + a) become a head W M on the same backbone.

    The checkpoint is read back with transformers' own classes and compared with the model before it appears
    under its name. Cost: V x C x H for the fold, and the model a second time in memory for the comparison.

    Args:
        model: converted, trained or fused; only what softmax mode serves is exported.
        tokenizer: its tokenizer; the plain one is written, since a plain checkpoint reads digits as text.
        folder: where to; must be absent or empty.
        replace: whether a folder with content is replaced.
        tokens: how many tokens to compare logits on.

    Returns:
        What was written.

    Raises:
        ConfigError: what softmax mode serves is no static linear map of z, or the architecture has no place
            for its bias; every reason is named. Or the comparison failed.
    """
    refuse_packed(model, "an export")
    refuse_offloaded(model, "an export")
    matrix, offset = static_map(model)
    norm = final_norm(model) if bool(offset.any()) else None
    if bool(offset.any()) and norm is None:
        raise ConfigError(
            "the abduction has a bias (it was trained), and this architecture has no place for one: its output head "
            "has no bias, and its final norm (RMSNorm) none either, so a constant cannot pass through it; keep the "
            "tether checkpoint, or train without the abduction's bias"
        )
    weight, folded = _head(model, matrix)
    with torch.device("meta"):
        config = copy.deepcopy(model.backbone.config)
        tied = folded == "nothing" and model.config.tie_word_embeddings
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = tied
        target = AutoModelForCausalLM.from_config(config, dtype=weight.dtype, trust_remote_code=False)
    state = {
        f"{target.base_model_prefix}.{name}": value for name, value in model.backbone.state_dict().items()
    }
    if norm is not None:
        # W (M (z + c)) = W (M z + a) for M c = a.
        shift = torch.linalg.solve(matrix, offset)
        name = f"{target.base_model_prefix}.{norm}.bias"
        state[name] = (state[name].double().cpu() + shift).to(state[name])
    head = next(name for name, module in target.named_modules() if module is target.get_output_embeddings())
    state[f"{head}.weight"] = weight
    target.load_state_dict(state, assign=True)
    target.generation_config = model.generation_config
    written = Path(folder)
    with publish_folder(written, replace=replace) as temporary:
        target.save_pretrained(temporary)
        without_numbers(tokenizer).save_pretrained(temporary)
        difference = _compare(model, temporary, tokens)
        recipe = {
            "fusion": model.config.fusion,
            "folded": folded,
            "norm_bias": norm,
            "largest_logit_difference": difference,
            "tokens": tokens,
        }
        write_manifest(temporary, Manifest(kind="export", inputs=_source(model), recipe=recipe))
    return Exported(written, folded, norm, difference, tokens)


@torch.no_grad()
def static_map(model: CausalQwenForCausalLM) -> tuple[Tensor, Tensor]:
    """Find M and a with which the base's head and what follows it give the model's logits: W (M z + a).

    With abduction loc = m (A z + a), m the base's own multiplier of logits, which the plain checkpoint has too, and
    constant base scale s, a fusion whose fused y is B z has M = A + diag(s) B / m. That is so where every delta
    outputs y linearly and the chart adds y: deltas of the chart `linear`, or of `symmetric` that leave the scale
    alone. A delta of chart `matrix` gives diag(s) B itself, so with such deltas s may depend on the context. Softmax
    mode does not read the scale of U, so the change of scale of a delta of `linear` or `matrix` is left behind.

    Args:
        model: converted, trained or fused.

    Returns:
        M, shape (C, H), and a, shape (C,), float64, on the CPU.

    Raises:
        ConfigError: there is no such M; every reason is named.

    Reference:
        "Three repaired fusions" in the theory notes, 4a (a head that outputs the chart's coordinates).
    """
    abduction, fusion = model.abduction, model.fusion
    matrix = abduction.loc.weight.detach().double().cpu().clone()
    offset = abduction.loc.bias.detach().double().cpu().clone()
    reasons = []
    if abduction.mlp is not None and any(bool(values.any()) for values in abduction.mlp[2].parameters()):
        reasons.append(
            "the abduction has a trained MLP, which is not linear; convert without --abduction-size"
        )
    if model.action.bias is not None:
        reasons.append(
            "the classes have a bias (an added <NUM>), and the architecture's output head has none: an untied lm_head "
            "without bias cannot take it; export a model without <NUM>, or of a base with a reserved row for it"
        )
    active = [] if fusion is None else [k for k, weight in enumerate(fusion.weights) if weight != 0]
    if fusion is not None and active:
        reasons += _obstacles(fusion, active)
        plain = [k for k in active if fusion.native[k] != "matrix"]
        if plain and bool(abduction.log_scale.weight.any()):
            names = ", ".join(fusion.domains[k] for k in plain)
            reasons.append(
                "the base scale of U depends on the context (it was trained), so the deltas' moves are not linear in "
                f"z; learn {names} with --chart matrix"
            )
    if reasons:
        raise ConfigError(
            "this model cannot be exported exactly:\n" + "\n".join(f"- {line}" for line in reasons)
        )
    if fusion is not None:
        scale = abduction.log_scale.bias.detach().float().exp().double().cpu()
        for k in active:
            moved = fusion.second[k].double().cpu()
            if fusion.native[k] != "matrix":
                moved = scale.unsqueeze(-1) * moved
            matrix += fusion.weights[k] * moved / abduction.logit_scale
    return matrix, offset


def _obstacles(fusion: Fusion, active: list[int]) -> list[str]:
    described = fusion.description
    reasons = []
    if described.get("kind") == "adapters":
        # Their folders are what plain PEFT reads, and there is no move of the head to look at.
        return ["adapters in the backbone: their folders are PEFT's already; load or merge them there"]
    if described.get("by") == "evidence":
        return [
            "experts weighted by evidence: one set of weights holds no mixture; fuse with --by sum --no-gate"
        ]
    if fusion.gated:
        reasons.append("gates: each delta acts only in some contexts; fuse with --no-gate")
    if described.get("leash") is not None:
        reasons.append("a run-time leash: it pulls back single contexts; fuse without --leash")
    if fusion.layers:
        reasons.append(
            f"deltas that read layers {list(fusion.layers)} beside the last: a head sees only the last hidden state; "
            "learn with --features last"
        )
    for k in active:
        name, native = fusion.domains[k], fusion.native[k]
        moves_scale = not fusion.location_only and bool(fusion.first[k].any())
        if native in ("geodesic", "rootkl"):
            reasons.append(
                f"delta {name!r} is of chart {native}, which is curved; learn it in linear, or symmetric without scale"
            )
        elif native == "symmetric" and moves_scale:
            reasons.append(
                f"delta {name!r} changes the scale of U and is of chart symmetric, where the move of the location is "
                "w exp(x/2), not linear in z; learn it with --chart linear or with the location only"
            )
        elif moves_scale and fusion.chart != "linear" and not _alone(fusion, active):
            reasons.append(
                f"delta {name!r} changes the scale of U, and chart {fusion.chart} lets that act on the location; fuse "
                "with --chart linear"
            )
    if fusion.chart in ("geodesic", "rootkl") and not _alone(fusion, active):
        reasons.append(
            f"chart {fusion.chart} does not add moves of the location; fuse with --chart linear or symmetric"
        )
    return reasons


def _alone(fusion: Fusion, active: list[int]) -> bool:
    # Every chart reproduces a single delta of weight 1.
    return len(active) == 1 and fusion.weights[active[0]] == 1


@torch.no_grad()
def _head(model: CausalQwenForCausalLM, matrix: Tensor) -> tuple[Tensor, str]:
    weight = model.action.weight.detach()
    if torch.equal(matrix, torch.eye(len(matrix), dtype=matrix.dtype)):
        return weight, "nothing"
    matrix = matrix.to(weight.device)
    return torch.cat([(rows.double() @ matrix).to(weight.dtype) for rows in weight.split(ROWS)]), "head"


@torch.no_grad()
def final_norm(model: CausalQwenForCausalLM) -> str | None:
    """Find the norm with a bias whose output is z: the one place where a constant can join z exactly.

    A LayerNorm ends in "+ bias", and nothing but the head reads its output. RMSNorm has no bias, and its
    output has a fixed length, so no coordinate of it can be kept constant: there the answer is None.

    Args:
        model: any model of tether.

    Returns:
        The module's name within the backbone, or None.
    """
    seen: dict[str, Tensor] = {}
    norms = {
        name: module
        for name, module in model.backbone.named_modules()
        if isinstance(module, nn.LayerNorm) and module.bias is not None
    }

    def watch(name: str) -> Any:
        return lambda module, given, made: seen.__setitem__(name, made)

    hooks = [module.register_forward_hook(watch(name)) for name, module in norms.items()]
    try:
        ids = torch.zeros(1, 2, dtype=torch.int64, device=model.action.weight.device)
        states = model.backbone(input_ids=ids, use_cache=False).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()
    return next((name for name, made in seen.items() if torch.equal(made, states)), None)


# The checkpoint on disk against the model in memory, on tokens drawn from the whole vocabulary.
@torch.no_grad()
def _compare(model: CausalQwenForCausalLM, folder: Path, tokens: int) -> float:
    weight = model.action.weight
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=weight.dtype, trust_remote_code=False)
    plain = plain.to(weight.device).eval()
    generator = torch.Generator().manual_seed(0)
    config = plain.config.get_text_config()
    length = min(tokens, getattr(config, "max_position_embeddings", tokens))
    shape = (-(-tokens // length), length)
    ids = torch.randint(config.vocab_size, shape, generator=generator).to(weight.device)
    expected = model(input_ids=ids, use_cache=False, mode="softmax").logits.float()
    difference = float((plain(input_ids=ids, use_cache=False).logits.float() - expected).abs().max())
    allowed = (
        TOLERANCE
        if weight.dtype == torch.float32
        else 8 * torch.finfo(weight.dtype).eps * float(expected.abs().max())
    )
    if not difference <= allowed:
        raise ConfigError(
            f"the plain checkpoint's logits differ from the model's by {difference:.3g}, more than {allowed:.3g}: this "
            f"architecture ({type(plain).__name__}) does more to logits than a linear head; nothing was written"
        )
    return difference


def _source(model: CausalQwenForCausalLM) -> tuple[Input, ...]:
    folder = Path(model.name_or_path) if model.name_or_path else None
    if folder is None or not folder.is_dir():
        return ()
    digest = CheckpointReader(folder).fingerprint().removeprefix("sha256:")
    return (Input(role="model", path=str(folder), sha256=digest),)
