"""The command that studies how encodings depend on the longest sampled path."""

from pathlib import Path
from typing import Annotated

import typer

from tether.cli.output import emit, quiet_libraries
from tether.cli.progress import reporter

__all__ = ["study_length"]


def study_length(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, alias, path or hub id.")],
    probes: Annotated[Path, typer.Option(help="Probes: JSON lines with a field text.")],
    samples: Annotated[int, typer.Option(min=1, help="Probes used.")] = 12,
    paths: Annotated[int, typer.Option(min=4, help="Paths a probe.")] = 32,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Measure how the encoding phi changes with the longest path (8, 16, 32, 64), with a verdict a claim."""
    quiet_libraries()
    from tether.causal.loading import load_backbone
    from tether.merge.paths import sample_paths
    from tether.merge.probes import encode_probes, read_probes
    from tether.merge.study import study_lengths

    meta = read_probes(probes)[:samples]
    backbone, tokenizer = load_backbone(model)
    encoded = encode_probes(meta, tokenizer)
    with reporter() as steps:
        bank = sample_paths(
            backbone, encoded, paths=paths, shortest=64, longest=64, batch_size=1, on_step=steps("sampling")
        )
        study = study_lengths(backbone, bank, on_step=steps("encoding"))
    head = ["weighting", "component", *(f"len_max {n}" for n in study.lengths[:-1]), "size", "noise"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in study.rows:
        figures = [*row.change, row.size, row.noise]
        lines.append(
            f"| {row.weighting} | {row.component} | " + " | ".join(f"{x:.3g}" for x in figures) + " |"
        )
    lines += ["", *(f"{c.verdict:<10}{c.name}: {c.figures}" for c in study.claims)]
    result = {
        **study._asdict(),
        "rows": [row._asdict() for row in study.rows],
        "claims": [claim._asdict() for claim in study.claims],
    }
    emit(result, as_json, "\n".join(lines))
