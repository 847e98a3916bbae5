"""Turns a dense checkpoint and fine-tunes of it into a mixture of experts that plain transformers loads."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tether.errors import CheckpointError, ConfigError
from tether.store.manifest import Input, Manifest, write_manifest
from tether.store.publish import publish_folder
from tether.store.reader import CheckpointReader
from tether.store.writer import ShardWriter

__all__ = ["Target", "mixture_config", "upcycle"]

MLP = re.compile(r"^(?P<layer>model\.layers\.\d+)\.mlp\.(?P<part>gate_proj|up_proj|down_proj)\.weight$")


class Target(NamedTuple):
    """A family of mixtures and how its checkpoints name things.

    Attributes:
        model_type: of transformers.
        block: of the layer that holds experts and router.
        parts: names of an expert's matrices, by those of the dense MLP.
    """

    model_type: str
    block: str
    parts: dict[str, str]


_PLAIN = {name: name for name in ("gate_proj", "up_proj", "down_proj")}
TARGETS = {
    "qwen3": Target("qwen3_moe", "mlp", _PLAIN),
    "llama": Target("mixtral", "block_sparse_moe", {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}),
    "mistral": Target("mixtral", "block_sparse_moe", {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}),
}
"""Mixtures that compute exactly what the dense family does when all experts are alike."""


def mixture_config(dense: Any, experts: int, top_k: int) -> Any:
    """Describe the mixture of experts of a dense model.

    Args:
        dense: configuration of the dense model: Qwen3, Llama or Mistral.
        experts: E, >= 2.
        top_k: experts a token uses, in [1, E].

    Returns:
        A configuration of Qwen3Moe or Mixtral.

    Raises:
        ConfigError: another family, biases or a mixed attention that the mixture does not have, or numbers out of
            range.
    """
    from transformers import AutoConfig

    if dense.model_type not in TARGETS:
        raise ConfigError(
            f"model type {dense.model_type!r}: expected {', '.join(TARGETS)}, whose mixtures have the same attention"
        )
    if experts < 2 or not 1 <= top_k <= experts:
        raise ConfigError(
            f"{experts} experts, top_k={top_k}: expected at least 2 experts, and top_k in [1, E]"
        )
    target = TARGETS[dense.model_type]
    biases = [key for key in ("attention_bias", "mlp_bias") if getattr(dense, key, False)]
    if biases and target.model_type == "mixtral":
        raise ConfigError(f"{', '.join(biases)}: Mixtral has no such biases; expected a model without them")
    kinds = set(getattr(dense, "layer_types", None) or ())
    if len(kinds) > 1:
        raise ConfigError(
            f"layers of {' and '.join(sorted(kinds))}: {target.model_type} has one kind of attention in all layers; "
            "expected a model without a window, or with one on every layer"
        )
    kept = dense.to_dict()
    for key in (
        "model_type",
        "architectures",
        "transformers_version",
        "_name_or_path",
        "mlp_bias",
        "layer_types",
    ):
        kept.pop(key, None)
    if target.model_type == "qwen3_moe":
        kept |= {
            "num_experts": experts, "moe_intermediate_size": dense.intermediate_size, "norm_topk_prob": True,
            "decoder_sparse_step": 1, "mlp_only_layers": [],
        }  # fmt: skip
    else:
        kept |= {"num_local_experts": experts, "sliding_window": getattr(dense, "sliding_window", None)}
    made = AutoConfig.for_model(target.model_type, **kept, num_experts_per_tok=top_k)
    made.architectures = ["Qwen3MoeForCausalLM" if target.model_type == "qwen3_moe" else "MixtralForCausalLM"]
    return made


def upcycle(
    base: str | Path,
    tuned: Sequence[str | Path],
    out: str | Path,
    *,
    top_k: int = 2,
    base_expert: bool = True,
    seed: int = 0,
    shard_bytes: int = 5_000_000_000,
    on_step: Callable[[dict[str, float]], None] | None = None,
) -> Path:
    """Write the mixture whose experts are the MLPs of fine-tunes of one dense model.

    Attention, norms and embeddings are the base's; routers start small and random, so that experts are chosen
    about evenly before `tether.router.training` teaches them. Tensors are copied one at a time from shard to
    shard.

    Args:
        base: folder of the dense checkpoint.
        tuned: folders of its fine-tunes, at least one.
        out: the folder to write, new or empty.
        top_k: experts a token uses.
        base_expert: whether the base's own MLP is the first expert: what to do on text of no domain.
        seed: of the routers.
        shard_bytes: size of a file at most.
        on_step: called with `done` and `total` tensors.

    Returns:
        The folder.

    Raises:
        ConfigError: a family without a mixture, numbers out of range, or `out` is not empty.
        CheckpointError: a folder cannot be read, a fine-tune's MLP has other names or shapes than the base's, or
            weights are not finite.
    """  # noqa: DOC502 - ConfigError is raised by what it calls
    from transformers import AutoConfig, AutoTokenizer

    base, out = Path(base), Path(out)
    folders = ([base] if base_expert else []) + [Path(folder) for folder in tuned]
    for folder in (base, *folders):
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder}: no config.json; expected the folder of a checkpoint")
    dense = AutoConfig.from_pretrained(base, trust_remote_code=False)
    config = mixture_config(dense, len(folders), top_k)
    target = TARGETS[dense.model_type]
    reader, readers = CheckpointReader(base), [CheckpointReader(folder) for folder in folders]
    _compare(reader, readers)
    generator = torch.Generator().manual_seed(seed)
    with publish_folder(out) as folder:
        config.save_pretrained(folder)
        AutoTokenizer.from_pretrained(base, trust_remote_code=False).save_pretrained(folder)
        for extra in ("generation_config.json",):
            if (base / extra).is_file():
                (folder / extra).write_bytes((base / extra).read_bytes())
        with ShardWriter(folder, shard_bytes=shard_bytes) as writer:
            for done, name in enumerate(reader.names, start=1):
                found = MLP.match(name)
                if found is None:
                    writer.add(name, _finite(reader, name))
                else:
                    block = f"{found['layer']}.{target.block}"
                    for row, other in enumerate(readers):
                        tensor = _finite(other, name)
                        writer.add(f"{block}.experts.{row}.{target.parts[found['part']]}.weight", tensor)
                    if found["part"] == "gate_proj":
                        writer.add(f"{block}.gate.weight", _router(len(readers), tensor, generator))
                if on_step:
                    on_step({"done": done, "total": len(reader.names)})
        inputs = [
            Input(role="base" if r is reader else "expert", path=str(r.path), sha256=_hash(r))
            for r in (reader, *readers)
        ]
        recipe = {
            "top_k": top_k,
            "base_expert": base_expert,
            "seed": seed,
            "experts": [str(f) for f in folders],
        }
        write_manifest(folder, Manifest(kind="mixture", inputs=tuple(inputs), recipe=recipe))
    return out


def _finite(reader: CheckpointReader, name: str) -> Tensor:
    tensor = reader.tensor(name)
    if not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(
            f"{reader.path}: {name} has entries that are not finite; expected a sound checkpoint"
        )
    return tensor


def _hash(reader: CheckpointReader) -> str:
    return reader.fingerprint().removeprefix("sha256:")


def _router(experts: int, like: Tensor, generator: torch.Generator) -> Tensor:
    start = 0.02 * torch.randn(experts, like.shape[1], generator=generator)
    return start.to(like.dtype)


def _compare(base: CheckpointReader, readers: Sequence[CheckpointReader]) -> None:
    names = [name for name in base.names if MLP.match(name)]
    wrong = []
    if not names:
        wrong.append(f"{base.path} has no tensors like model.layers.0.mlp.gate_proj.weight")
    for reader in readers:
        known = set(reader.names)
        missing = [name for name in names if name not in known]
        other = [name for name in names if name in known and reader.shape(name) != base.shape(name)]
        # A head may be tied in one file and written out in the other.
        odd = sorted((known ^ set(base.names)) - {"lm_head.weight", *missing})
        if odd:
            wrong.append(f"{reader.path} and the base do not have the same tensors, such as {odd[0]}")
        if missing:
            wrong.append(f"{reader.path} lacks {len(missing)} tensors, such as {missing[0]}")
        if other:
            wrong.append(
                f"{reader.path} has {other[0]} of shape {reader.shape(other[0])}, the base {base.shape(other[0])}"
            )
    if wrong:
        raise CheckpointError(
            "; ".join(wrong) + ": expected fine-tunes of the base, all layers, not adapters"
        )
