"""Observe a model on its own paths: sample, accumulate Gram matrices, encode neurons, keep all in a folder."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from tether.causal.fingerprint import weights_fingerprint
from tether.errors import ConfigError
from tether.merge.encoding import encode
from tether.merge.gram import gram_file, save_grams, stream_grams
from tether.merge.packing import pack_bank
from tether.merge.paths import load_bank, sample_paths, save_bank
from tether.merge.probes import EncodedProbe, probes_hash
from tether.merge.survey import OBSERVATION, read_observation
from tether.merge.tefm.observed import Encoding, is_complete, write_layers
from tether.merge.towers import find_linears, find_tower
from tether.store.publish import write_json

__all__ = ["PATHS", "observe"]

PATHS: Final = "paths.safetensors"


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
    of its layers are encoded on the same paths where that is asked for, now or by a later call.

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
        ConfigError: the folder holds another observation, or a number outside its range.
        CheckpointError: a file in the folder is damaged.
    """  # noqa: DOC502 - CheckpointError is raised by load_bank
    folder = Path(folder)
    description = {
        "model": weights_fingerprint(model), "probes": probes_hash(probes), "samples": len(probes), "paths": paths,
        "shortest": shortest, "longest": longest, "top_p": top_p, "seed": seed,
    }  # fmt: skip
    file = folder / OBSERVATION
    there = read_observation(folder)
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
    if not (file.is_file() and all(gram_file(folder, layer).is_file() for layer in range(layers + 1))):
        if (folder / PATHS).is_file() and file.is_file():
            bank = load_bank(folder / PATHS)
        else:
            bank = sample_paths(
                model, probes, paths=paths, shortest=shortest, longest=longest, top_p=top_p, seed=seed,
                on_step=stage("sampling paths"),
            )  # fmt: skip
            folder.mkdir(parents=True, exist_ok=True)
            save_bank(folder / PATHS, bank)
            write_json(file, description)
        stream = stream_grams(model, pack_bank(bank, model), head=True, on_step=stage("observing layers"))
        save_grams(folder, stream)
    for encoding in encodings:
        if not is_complete(folder, encoding):
            _encode(model, folder, encoding, stage(f"encoding, {encoding.spelt}"))
    return folder


# Chunks of samples are kept until every layer's file is there, so that an interrupted run goes on.
def _encode(
    model: Any, folder: Path, encoding: Encoding, on_step: Callable[[dict[str, float]], None]
) -> None:
    chunks = folder / f".{encoding.name}"
    bank = load_bank(folder / PATHS)
    signatures = encode(
        model, bank, chunks, weighting=encoding.weighting, gamma=encoding.gamma, on_step=on_step
    )
    write_layers(folder, encoding, signatures, [list(layer) for layer in find_linears(model)])
    shutil.rmtree(chunks)
