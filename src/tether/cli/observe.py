"""The command that observes a model on its own paths, once, for any number of merges."""

from pathlib import Path
from typing import Annotated

import typer

from tether.cli.output import emit, quiet_libraries
from tether.cli.placing import place
from tether.cli.progress import reporter
from tether.errors import ConfigError

__all__ = ["observe"]


def observe(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, alias, path or hub id.")],
    probes: Annotated[Path, typer.Option(help="JSON lines with text and image, or an ImageFolder.")],
    out: Annotated[Path, typer.Option(help="Folder for paths and matrices: new, or of an interrupted run.")],
    samples: Annotated[int, typer.Option(min=1, help="Probes used at most.")] = 256,
    seed: Annotated[int, typer.Option(help="Of the sampled paths.")] = 0,
    signatures: Annotated[
        list[str] | None,
        typer.Option(
            help="Also encode neurons, for lape_tefm: position, paper, or one with its discount as in paper:0.95."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Sample a model's own continuations of the probes and keep what `regression_mean` and `lape_tefm` need of them."""
    quiet_libraries()
    from tether.merge.observation import observe as run
    from tether.merge.probes import encode_probes, load_reader, read_probes
    from tether.merge.tefm.observed import parse_encoding
    from tether.store.place import check_place
    from tether.store.reader import CheckpointReader

    check_place(out)
    encodings = [parse_encoding(text) for text in signatures or ()]
    meta = read_probes(probes)[:samples]
    if out.is_file():
        raise ConfigError(f"{out} is a file: expected a folder, new or of an interrupted run")
    backbone, tokenizer, processor = load_reader(model, images=any(probe.image for probe in meta))
    backbone.to(place()[0])
    encoded = encode_probes(meta, tokenizer, processor=processor)
    files = Path(backbone.name_or_path)
    checkpoint = CheckpointReader(files).fingerprint() if files.is_dir() else None
    with reporter() as steps:
        run(backbone, encoded, out, seed=seed, checkpoint=checkpoint, encodings=encodings, on_step=steps)
    spelt = [encoding.spelt for encoding in encodings]
    neurons = f", neurons under {', '.join(spelt)}" if spelt else ""
    emit(
        {"folder": str(out), "samples": len(meta), "seed": seed, "signatures": spelt},
        as_json,
        f"observed {len(meta)} probes{neurons}: {out}",
    )
