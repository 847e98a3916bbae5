"""Encode neurons on sampled paths: one streaming pass a model, one sample in memory at a time."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tether.causal.fingerprint import weights_fingerprint
from tether.causal.losses import IGNORE
from tether.errors import ConfigError
from tether.merge.descriptions import read_description
from tether.merge.packing import Pack, pack_sample, spread
from tether.merge.paths import PathBank
from tether.merge.probes import probes_hash
from tether.merge.recorder import Recorder
from tether.merge.signatures import DESCRIPTION, Description, Signatures
from tether.merge.towers import FAMILIES, find_linears
from tether.merge.weighting import GAMMA, PathWeights, path_weights
from tether.processes import current
from tether.store.publish import write_json
from tether.store.writer import write_safetensors

__all__ = ["encode", "token_losses"]


def encode(
    model: Any,
    bank: PathBank,
    folder: str | Path,
    *,
    families: Sequence[str] = FAMILIES,
    weighting: str = "position",
    gamma: float | None = None,
    gradients: bool = True,
    reference: Any = None,
    chunk: int = 8,
    on_step: Callable[[dict[str, float]], None] | None = None,
) -> "Signatures":
    """Encode the neurons of a model on sampled paths in one pass, one sample in memory at a time.

    Each sample is one forward and, with `gradients`, one backward pass without gradients of the weights;
    what is kept of it is 4 numbers a neuron. Every `chunk` samples are published as a file, and chunks that
    are there already are not computed again. Processes that work together (`tether.processes.joined`) take some chunks
    each.

    Args:
        model: whose neurons; in evaluation mode. Its parameters are frozen meanwhile and restored.
        bank: paths of this model, or of another with the same tokenizer.
        folder: where the files go.
        families: ends of module names inside a decoder layer.
        weighting: of positions and paths, see `tether.merge.weighting`.
        gamma: discount; None takes the weighting's own.
        gradients: also the gradient and the Fisher row norms; without, those two are zero.
        reference: the parent C, whose activations on the same tokens are the document's Y_ref; None takes the
            mean of the sample's paths.
        chunk: samples a file.
        on_step: called with `done` and `total` samples.

    Returns:
        The signatures, read from the folder as asked for.

    Raises:
        ConfigError: the folder holds signatures of something else, a family names nothing, or `chunk` < 1.
        CheckpointError: a file of the folder is damaged.

    Reference:
        LAPE, steps 1 to 4; docs/lape-tefm.md, "what differs".
    """  # noqa: DOC502 - CheckpointError and the families' ConfigError are raised by what it calls
    if chunk < 1:
        raise ConfigError(f"chunk={chunk}: expected at least one sample a file")
    folder = Path(folder)
    modules = {name: module for layer in find_linears(model, families) for name, module in layer.items()}
    samples = len(bank.probes)
    description = {
        "samples": samples, "chunk": chunk, "weighting": weighting,
        "gamma": GAMMA.get(weighting) if gamma is None else gamma,
        "gradients": gradients, "reference": None if reference is None else weights_fingerprint(reference),
        "model": weights_fingerprint(model), "paths": _hash(bank), "probes": probes_hash(bank.probes),
        "modules": {name: module.out_features for name, module in modules.items()},
    }  # fmt: skip
    weights = path_weights(bank.log_prob, bank.lengths, weighting, gamma)
    group = current()
    group.once(lambda: _claim(folder, description))
    for start in range(group.rank * chunk, samples, group.count * chunk):
        file = folder / f"signatures-{start // chunk:05d}.safetensors"
        if not file.is_file():
            rows = range(start, min(start + chunk, samples))
            found = [_encode_sample(model, bank, i, weights, families, gradients, reference) for i in rows]
            tensors = {name: torch.stack([one[name] for one in found]) for name in found[0]}
            write_safetensors(file, tensors)
        if on_step:
            on_step({"done": float(min(start + chunk, samples)), "total": float(samples)})
    group.wait()
    return Signatures(folder)


def _hash(bank: PathBank) -> str:
    digest = hashlib.sha256()
    for tensor in (bank.tokens, bank.lengths, bank.log_prob):
        digest.update(tensor.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def _claim(folder: Path, description: dict[str, Any]) -> None:
    file = folder / DESCRIPTION
    if file.is_file():
        there = read_description(file, "Encode into another folder.", Description)
        differs = sorted(key for key in description if there.get(key) != description[key])
        if differs:
            raise ConfigError(
                f"{folder} holds signatures with another {', '.join(differs)}; choose another folder, or remove it"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, description)


def _encode_sample(
    model: Any,
    bank: PathBank,
    sample: int,
    weights: PathWeights,
    families: Sequence[str],
    gradients: bool,
    reference: Any,
) -> dict[str, Tensor]:
    pack = pack_sample(bank, sample, model)
    length = bank.lengths[sample].to(pack.path.device).unsqueeze(-1)
    paths = len(length)
    position = spread(pack, weights.weights[sample].to(pack.path.device)).float()
    # Row k averages over the positions of path k.
    one_path = (pack.path == torch.arange(paths, device=pack.path.device).unsqueeze(-1)).float() / length
    share = weights.weights[sample].sum(-1).float().to(pack.path.device)
    y_ref = {}
    if reference is not None:
        with Recorder(reference, families, lambda y, x: one_path @ y) as recorder, torch.no_grad():
            reference(**pack.inputs, use_cache=False, logits_to_keep=1)
        y_ref = recorder.forward

    def activations(y: Tensor, x: Tensor) -> Tensor:
        del x
        return torch.cat([position.unsqueeze(0), one_path]) @ y

    def gradient(y: Tensor, x: Tensor, dy: Tensor) -> Tensor:
        # dL_k/dy carries 1 / len_k of the normalised loss; the sum over tokens is wanted once a path.
        total = (position * length.squeeze(-1)[pack.path.clamp(min=0)]) @ (y * dy)
        return torch.stack([total, _row_fisher(pack, x, dy, paths)])

    with Recorder(model, families, activations, gradient if gradients else None) as recorder:
        token_loss = token_losses(model, pack, gradients)
        if gradients:
            # The prefix reaches the losses through its keys only; each block's loss is its own path's L_norm.
            (one_path[:, pack.blocks] @ token_loss).sum().backward()
    found: dict[str, Tensor] = {}
    for name, value in recorder.forward.items():
        mean, by_path = value[0], value[1:]
        target = y_ref.get(name, by_path.mean(0, keepdim=True))
        found[f"{name}.activation"] = mean
        found[f"{name}.paper_gradient"] = share @ (by_path * (by_path - target))
        zero = torch.zeros_like(mean)
        back = recorder.backward.get(name)
        found[f"{name}.gradient"], found[f"{name}.fisher"] = (zero, zero.clone()) if back is None else back
    found["loss"] = position[pack.blocks] @ token_loss.detach()
    found["log_mass"], found["effective"] = weights.log_mass[sample], weights.effective[sample]
    return {name: tensor.detach().cpu().clone() for name, tensor in found.items()}


def token_losses(model: Any, pack: Pack, gradients: bool) -> Tensor:
    """Run a model on a pack and give the loss of every generated token.

    Args:
        model: in evaluation mode.
        pack: the sequence.
        gradients: build the graph, from the embeddings on; the weights stay frozen in it.

    Returns:
        ``-log p(token | before)``, nats, in the order of `pack.blocks`.
    """
    where = pack.blocks
    inputs = dict(pack.inputs)
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    handle = (
        model.get_decoder().register_forward_pre_hook(_differentiable, with_kwargs=True)
        if gradients
        else None
    )
    try:
        with torch.set_grad_enabled(gradients):
            logits = model(**inputs, use_cache=False, logits_to_keep=where).logits[0].float()
            return cross_entropy(logits, pack.targets[where], ignore_index=IGNORE, reduction="none")
    finally:
        if handle is not None:
            handle.remove()
        for parameter in frozen:
            parameter.requires_grad_(True)


# Starts the graph at the embeddings: the weights stay frozen, so that no gradient of them is computed.
def _differentiable(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    ids = kwargs.pop("input_ids", None)
    embeds = kwargs.pop("inputs_embeds", None)
    embeds = module.get_input_embeddings()(ids) if embeds is None else embeds
    return args, kwargs | {"inputs_embeds": embeds.detach().requires_grad_()}


# mean_k ||sum_t dy_kt x_kt^T||^2 by rows, through the (T, T) products of inputs: no gradient matrix is formed.
def _row_fisher(pack: Pack, x: Tensor, dy: Tensor, paths: int) -> Tensor:
    where = pack.blocks
    longest = int(pack.step.max()) + 1
    rows, steps = pack.path[where], pack.step[where]
    inputs, deltas = x.new_zeros(paths, longest, x.shape[-1]), dy.new_zeros(paths, longest, dy.shape[-1])
    inputs[rows, steps], deltas[rows, steps] = x[where], dy[where]
    kernel = inputs @ inputs.transpose(1, 2)
    return (deltas * (kernel @ deltas)).sum((0, 1)) / paths
