"""Sampled generation paths S_k: drawn once for a model, kept as tokens and log probabilities."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tether.errors import CheckpointError, ConfigError
from tether.merge.probes import EncodedProbe
from tether.merge.towers import refuse_image_positions
from tether.processes import current
from tether.store.reader import CheckpointReader
from tether.store.writer import write_safetensors

__all__ = ["PathBank", "load_bank", "nucleus_sample", "sample_paths", "save_bank"]

CANDIDATES = 1024
"""Most probable tokens looked at first; the whole vocabulary is sorted only where they miss the nucleus."""


class PathBank(NamedTuple):
    """Paths of one model, N samples with K paths of at most T tokens.

    Attributes:
        probes: what was continued, N of them.
        tokens: generated tokens, 0 after a path's end, shape (N, K, T), int64.
        log_prob: log p(token | before) under the full softmax of the model, nats, shape (N, K, T), float32.
        lengths: tokens of each path, in [1, T], shape (N, K), int64.
    """

    probes: list[EncodedProbe]
    tokens: Tensor
    log_prob: Tensor
    lengths: Tensor


def nucleus_sample(log_prob: Tensor, noise: Tensor, top_p: float) -> Tensor:
    """Draw one token a row from the smallest set of most probable tokens whose mass reaches `top_p`.

    The token is the inverse of the set's distribution function at `noise`, so equal noise gives equal tokens
    whatever else is in the batch.

    Args:
        log_prob: log probabilities, shape (B, V).
        noise: uniform numbers in [0, 1), shape (B,).
        top_p: mass in (0, 1].

    Returns:
        Tokens, shape (B,), int64.

    Reference:
        Holtzman et al. 2019, section 3.1 (nucleus sampling).

    Example:
        >>> import torch
        >>> nucleus_sample(torch.tensor([[0.1, 0.6, 0.3]]).log(), torch.tensor([0.7]), 0.9)
        tensor([2])
    """
    count = min(CANDIDATES, log_prob.shape[-1])
    value, index = log_prob.topk(count, dim=-1)
    # Sums in float64: a vocabulary of 1e5 rounding errors would move the edge of the set.
    mass = value.double().exp().cumsum(-1)
    if count < log_prob.shape[-1] and bool((mass[:, -1] < top_p).any()):
        value, index = log_prob.sort(dim=-1, descending=True, stable=True)
        mass = value.double().exp().cumsum(-1)
    # Tokens before which less than top_p lies; the first always does.
    kept = ((mass - value.double().exp()) < top_p).sum(-1, keepdim=True).clamp(min=1)
    total = mass.gather(-1, kept - 1)
    rank = torch.searchsorted(mass, noise.double().unsqueeze(-1) * total, right=True)
    return index.gather(-1, rank.minimum(kept - 1)).squeeze(-1)


@torch.no_grad()
def sample_paths(
    model: Any,
    probes: Sequence[EncodedProbe],
    *,
    paths: int = 8,
    shortest: int = 4,
    longest: int = 32,
    top_p: float = 0.9,
    seed: int = 0,
    batch_size: int = 4,
    on_step: Callable[[dict[str, float]], None] | None = None,
) -> PathBank:
    """Continue every probe several times by nucleus sampling, each path with its own random length.

    A path has ``len_k ~ U[shortest, longest]`` tokens, or fewer where the model ends its text first. The
    prompt is read once a sample and its keys and values are repeated for the paths; finished paths leave
    the batch. Noise and lengths of a path depend on its place and the seed only, not on the batch. Tokens that
    stand for images are never drawn. Processes that work together (`tether.processes.joined`) take some samples each.

    Args:
        model: a causal LM or a vision-language wrapper around one, in evaluation mode.
        probes: encoded for this model.
        paths: K, >= 1.
        shortest: smallest length, >= 1.
        longest: largest length.
        top_p: nucleus, in (0, 1].
        seed: of lengths and noise.
        batch_size: text samples read side by side; samples with images go alone.
        on_step: called with `done` and `total` samples.

    Returns:
        The paths in the order of the probes.

    Raises:
        ConfigError: no probes, a number outside its range, or image probes for a model whose positions they do
            not fit.

    Reference:
        LAPE, section "formula derivation": sampling of S_k, len_k uniform.
    """
    if not probes:
        raise ConfigError("no probes were given; expected at least one sample to continue")
    if paths < 1 or not 1 <= shortest <= longest or not 0 < top_p <= 1 or batch_size < 1:
        raise ConfigError(
            f"paths={paths}, shortest={shortest}, longest={longest}, top_p={top_p}, batch_size={batch_size}: "
            "expected paths >= 1, 1 <= shortest <= longest, 0 < top_p <= 1, batch_size >= 1"
        )
    if any(probe.extras for probe in probes):
        refuse_image_positions(model)
    generator = torch.Generator().manual_seed(seed)
    shape = (len(probes), paths)
    lengths = torch.randint(shortest, longest + 1, shape, generator=generator)
    noise = torch.rand((*shape, longest), generator=generator)
    bank = PathBank(
        list(probes),
        torch.zeros((*shape, longest), dtype=torch.int64),
        torch.zeros((*shape, longest)),
        lengths,
    )
    group = current()
    own = _groups(probes, batch_size)[group.rank :: group.count]
    done, total = 0, sum(map(len, own))
    for rows in own:
        _continue(model, bank, torch.tensor(rows), noise, top_p)
        done += len(rows)
        if on_step:
            on_step({"done": float(done), "total": float(total)})
    mine = torch.tensor([row for rows in own for row in rows], dtype=torch.int64)
    kept = (bank.tokens, bank.log_prob, bank.lengths)
    for theirs, *parts in group.gather((mine, *(values[mine] for values in kept))):
        for values, part in zip(kept, parts, strict=True):
            values[theirs] = part
    return bank


def _groups(probes: Sequence[EncodedProbe], size: int) -> list[list[int]]:
    text = sorted((i for i, probe in enumerate(probes) if not probe.extras), key=lambda i: len(probes[i][0]))
    groups = [text[start : start + size] for start in range(0, len(text), size)]
    return groups + [[i] for i, probe in enumerate(probes) if probe.extras]


def _stop_tokens(model: Any) -> Tensor:
    ids = model.generation_config.eos_token_id if model.can_generate() else None
    return torch.tensor([] if ids is None else ids, dtype=torch.int64).reshape(-1)


# Tokens that stand for pictures: a path with one of them could not be read without a picture for it.
def _placeholders(model: Any, vocabulary: int) -> Tensor:
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    ids = {i for name in names if isinstance(i := getattr(model.config, name, None), int)}
    return torch.tensor(sorted(i for i in ids if 0 <= i < vocabulary), dtype=torch.int64)


# Fills the bank's rows in place.
def _continue(model: Any, bank: PathBank, samples: Tensor, noise: Tensor, top_p: float) -> None:
    device = model.device
    paths, longest = bank.lengths.shape[1], noise.shape[-1]
    prompts = [bank.probes[i].input_ids for i in samples.tolist()]
    width = max(map(len, prompts))
    # Padded on the left, so that every prompt's last token is in the last column.
    ids = torch.stack([torch.nn.functional.pad(prompt, (width - len(prompt), 0)) for prompt in prompts])
    mask = torch.stack([torch.arange(width) >= width - len(prompt) for prompt in prompts]).long()
    extras = {name: tensor.to(device) for name, tensor in bank.probes[int(samples[0])].extras.items()}
    output = model(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0).to(device),
        use_cache=True,
        logits_to_keep=1,
        **extras,
    )
    cache = output.past_key_values
    cache.batch_repeat_interleave(paths)
    # Row r of the batch is path r % K of sample r // K; alive holds the rows that still grow.
    sample = samples.repeat_interleave(paths)
    path = torch.arange(paths).repeat(len(samples))
    log_prob = torch.log_softmax(output.logits[:, -1].float(), dim=-1).cpu().repeat_interleave(paths, 0)
    mask = mask.repeat_interleave(paths, 0)
    stops, barred = _stop_tokens(model), _placeholders(model, log_prob.shape[-1])
    for step in range(longest):
        allowed = log_prob.index_fill(-1, barred, -torch.inf)
        token = nucleus_sample(allowed, noise[sample, path, step], top_p)
        bank.tokens[sample, path, step] = token
        bank.log_prob[sample, path, step] = log_prob.gather(-1, token.unsqueeze(-1)).squeeze(-1)
        ended = torch.isin(token, stops) | (bank.lengths[sample, path] <= step + 1)
        bank.lengths[sample[ended], path[ended]] = step + 1
        if bool(ended.all()):
            break
        alive = (~ended).nonzero().squeeze(-1)
        if len(alive) < len(ended):
            cache.batch_select_indices(alive.to(device))
            sample, path, token, mask = sample[alive], path[alive], token[alive], mask[alive]
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        output = model(
            input_ids=token.unsqueeze(-1).to(device),
            attention_mask=mask.to(device),
            position_ids=(mask.sum(-1, keepdim=True) - 1).to(device),
            past_key_values=cache,
            use_cache=True,
        )
        log_prob = torch.log_softmax(output.logits[:, -1].float(), dim=-1).cpu()


def save_bank(path: str | Path, bank: PathBank) -> None:
    """Write a bank as one safetensors file, whole or not at all.

    Args:
        path: the file.
        bank: the paths.
    """
    tensors = {"tokens": bank.tokens, "log_prob": bank.log_prob, "lengths": bank.lengths}
    for number, probe in enumerate(bank.probes):
        tensors[f"probe.{number}.input_ids"] = probe.input_ids
        tensors |= {f"probe.{number}.{name}": tensor for name, tensor in probe.extras.items()}
    write_safetensors(Path(path), {name: tensor.contiguous().clone() for name, tensor in tensors.items()})


def load_bank(path: str | Path) -> PathBank:
    """Read a bank.

    Args:
        path: a file that `save_bank` wrote.

    Returns:
        The paths.

    Raises:
        CheckpointError: the file is missing, damaged or no bank.
    """
    try:
        reader = CheckpointReader(path)
        probes: dict[str, dict[str, Tensor]] = {}
        for name in reader.names:
            if name.startswith("probe."):
                _, number, field = [*name.split(".", 2), "", ""][:3]
                probes.setdefault(number, {})[field] = reader.tensor(name)
        tokens, log_prob, lengths = (reader.tensor(name) for name in ("tokens", "log_prob", "lengths"))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: not a bank of paths ({error}); sample the paths again") from error
    listed = [
        probes.pop(str(number), {}) for number in range(len(tokens) if tokens.dim() and tokens.numel() else 0)
    ]
    encoded = [EncodedProbe(each.pop("input_ids", lengths), each) for each in listed]
    bank = PathBank(encoded, tokens, log_prob, lengths)
    if probes or not _fits(bank):
        raise CheckpointError(
            f"{path}: not a bank of paths (its tensors do not fit together); sample the paths again"
        )
    return bank


def _fits(bank: PathBank) -> bool:
    tokens, log_prob, lengths = bank.tokens, bank.log_prob, bank.lengths
    if tokens.dim() != 3 or tokens.shape != log_prob.shape or tokens.shape[:2] != lengths.shape:
        return False
    whole = [tokens, lengths, *(probe.input_ids for probe in bank.probes)]
    if any(values.dtype != torch.int64 or values.numel() == 0 or int(values.min()) < 0 for values in whole):
        return False
    if any(probe.input_ids.dim() != 1 for probe in bank.probes):
        return False
    if not log_prob.is_floating_point() or not bool(log_prob.isfinite().all()):
        return False
    return int(lengths.min()) >= 1 and int(lengths.max()) <= tokens.shape[2]
