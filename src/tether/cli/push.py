"""The command `push`: a checkpoint, an adapter or a delta, with its model card, on a hub."""

from pathlib import Path
from typing import Annotated

import typer

from tether.cli.output import emit, quiet_libraries

__all__ = ["push"]


def push(
    path: Annotated[Path, typer.Argument(help="A delta, or the folder of an adapter or a checkpoint.")],
    repository: Annotated[str, typer.Argument(help="OWNER/NAME on the hub; made if there is none.")],
    base: Annotated[
        str | None,
        typer.Option(help="For the model card: hub id of the base, where the files do not say it."),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Let anybody see a repository that is made.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the model card and the files, and send nothing.")
    ] = False,
    message: Annotated[str | None, typer.Option(help="Of the commit.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Put a model, an adapter or a delta on the Hugging Face hub, with a model card made of what is on record."""
    quiet_libraries()
    from tether.delta.parcel import pack, send

    parcel = pack(path, name=repository, base=base)
    files = sorted(parcel.files)
    result = {"kind": parcel.kind, "repository": repository, "files": files, "card": parcel.card}
    carried = f" It carries {parcel.sample} pieces of text." if parcel.sample else ""
    if dry_run:
        emit(result, as_json, f"{parcel.card}\nFiles: {', '.join(files)}. Nothing was sent.{carried}")
        return
    place = send(parcel, repository, private=not public, message=message)
    told = f"{path}: {len(files)} files and a model card are at {place}.{carried}"
    emit(result | {"url": place}, as_json, told)
