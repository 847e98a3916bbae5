"""Observe a model on its own paths: sample, accumulate Gram matrices, encode neurons, keep all in a folder."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from tether.causal.fingerprint import weights_fingerprint
from tether.errors import ConfigError
from tether.merge.encoding import encode
from tether.merge.gram import LayerGrams, gram_file, save_grams, stream_grams
from tether.merge.packing import pack_sample
from tether.merge.paths import PathBank, load_bank, sample_paths, save_bank
from tether.merge.probes import EncodedProbe, probes_hash
from tether.merge.survey import OBSERVATION, read_observation
from tether.merge.tefm.observed import Encoding, is_complete, write_layers
from tether.merge.towers import find_linears, find_tower
from tether.processes import current, joined, writes
from tether.store.publish import write_json

__all__ = ["PATHS", "observe"]

PATHS: Final = "paths.safetensors"


@joined()
def observe(
    model: Any,
    probes: Sequence[EncodedProbe],
    folder: str | Path,
    *,
    paths: int = 8,
    shortest: int = 4,
    longest: int = 32,
    top_p: float = 0.9,
    seed: int = 0,
    checkpoint: str | None = None,
    encodings: Sequence[Encoding] = (),
    on_step: Callable[[str], Callable[[dict[str, float]], None]] | None = None,
) -> Path:
    """Sample a model's own paths and accumulate the Gram matrices of its layers and its head on them.

    What is in the folder already is kept: paths are not sampled again, and a complete folder costs nothing. The neurons
    of its layers are encoded on the same paths where that is asked for, now or by a later call. Processes that
    `torchrun` or `accelerate launch` started together all call this and take some of the samples each; one of them
    writes.

    Args:
        model: in evaluation mode.
        probes: encoded for it.
        folder: where paths, matrices and a description go.
        paths: a sample.
        shortest: tokens of the shortest path.
        longest: tokens of the longest.
        top_p: nucleus.
        seed: of lengths and noise.
        checkpoint: fingerprint of the files the model was loaded from, see `CheckpointReader.fingerprint`; merges
            then refuse the matrices beside another model. None where it came from no files.
        encodings: weightings under which neurons are encoded, for ``lape_tefm``.
        on_step: given a stage's name, gives what is called with `done` and `total`.

    Returns:
        The folder.

    Raises:
        ConfigError: the folder holds another observation, or a number outside its range; or processes that differ in
            what they were given, of which there are more than samples, or that do not see the folder.
        CheckpointError: a file in the folder is damaged.
    """  # noqa: DOC502 - CheckpointError is raised by load_bank
    folder = Path(folder)
    description = {
        "model": weights_fingerprint(model), "probes": probes_hash(probes), "samples": len(probes), "paths": paths,
        "shortest": shortest, "longest": longest, "top_p": top_p, "seed": seed,
    }  # fmt: skip
    file, group = folder / OBSERVATION, current()
    group.agree(work="observing", **description)
    if len(probes) < group.count:
        raise ConfigError(
            f"{len(probes)} samples for {group.count} processes: give more, or start fewer processes"
        )
    if encodings:
        group.see(folder)
    there = group.once(lambda: read_observation(folder))
    if differs := sorted(
        key for key in description if there is not None and there.get(key) != description[key]
    ):
        raise ConfigError(
            f"{folder} holds an observation with another {', '.join(differs)}; choose another folder, or remove it"
        )
    if checkpoint is not None:
        description["checkpoint"] = checkpoint
    stage = on_step or (lambda name: lambda values: None)
    layers = len(find_tower(model).layers)

    def is_observed() -> bool:
        return file.is_file() and all(gram_file(folder, layer).is_file() for layer in range(layers + 1))

    def sampled() -> PathBank | None:
        return load_bank(folder / PATHS) if (folder / PATHS).is_file() and file.is_file() else None

    if not group.once(is_observed):
        bank = group.once(sampled)
        if bank is None:
            bank = sample_paths(
                model, probes, paths=paths, shortest=shortest, longest=longest, top_p=top_p, seed=seed,
                on_step=stage("sampling paths"),
            )  # fmt: skip
            if writes():
                folder.mkdir(parents=True, exist_ok=True)
                save_bank(folder / PATHS, bank)
                write_json(file, description)
        stream = _observed(model, bank, stage("observing layers"))
        if writes():
            save_grams(folder, stream)
        else:
            for _ in stream:
                pass
    for encoding in encodings:
        if not group.once(lambda encoding=encoding: is_complete(folder, encoding)):  # type: ignore[misc]
            _encode(model, folder, encoding, stage(f"encoding, {encoding.spelt}"))
    return folder


# The matrices of all samples, which each process has of some of them.
def _observed(
    model: Any, bank: PathBank, on_step: Callable[[dict[str, float]], None]
) -> Iterator[LayerGrams]:
    group = current()
    own = range(group.rank, len(bank.probes), group.count)
    packs = (pack_sample(bank, sample, model) for sample in own)
    for layer in stream_grams(model, packs, head=True, on_step=on_step):
        group.add(list({id(gram): gram for gram in layer.grams.values()}.values()))
        yield layer


# Chunks of samples are kept until every layer's file is there, so that an interrupted run goes on.
def _encode(
    model: Any, folder: Path, encoding: Encoding, on_step: Callable[[dict[str, float]], None]
) -> None:
    chunks = folder / f".{encoding.name}"
    bank = load_bank(folder / PATHS)
    signatures = encode(
        model, bank, chunks, weighting=encoding.weighting, gamma=encoding.gamma, on_step=on_step
    )

    def write() -> None:
        write_layers(folder, encoding, signatures, [list(layer) for layer in find_linears(model)])
        shutil.rmtree(chunks)

    current().once(write)
