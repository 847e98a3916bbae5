"""The command that writes a plain checkpoint."""

from pathlib import Path
from typing import Annotated

import typer

from tether.cli.output import emit, quiet_libraries
from tether.cli.placing import load

__all__ = ["export"]


def export(
    model: Annotated[str, typer.Argument(help="Fused, trained or converted checkpoint.")],
    out: Annotated[Path, typer.Option(help="Folder for the plain checkpoint; must be new or empty.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Write softmax mode as a plain checkpoint of the base's architecture, if that is exact."""
    quiet_libraries()
    from tether.delta.export import export_plain
    from tether.store.place import check_free

    check_free(out)
    loaded, tokenizer = load(model)
    made = export_plain(loaded, tokenizer, out)
    head = "the fusion folded into its head" if made.folded == "head" else "the base's own head"
    norm = f", a bias folded into {made.norm}" if made.norm else ""
    emit(
        {**made._asdict(), "folder": str(out)},
        as_json,
        f"{out}: plain {type(loaded.backbone).__name__} with {head}{norm}; logits within {made.difference:.1e} of the "
        f"model's on {made.tokens} tokens",
    )
