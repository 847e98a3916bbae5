"""The commands that study neurons: how encodings depend on the longest path, what LAPE-TEFM finds in each layer."""

from pathlib import Path
from typing import Annotated

import typer

from tether.cli.output import emit, quiet_libraries
from tether.cli.placing import load_backbone
from tether.cli.progress import reporter

__all__ = ["study_length", "study_neurons"]


def study_length(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, alias, path or hub id.")],
    probes: Annotated[Path, typer.Option(help="Probes: JSON lines with a field text.")],
    samples: Annotated[int, typer.Option(min=1, help="Probes used.")] = 12,
    paths: Annotated[int, typer.Option(min=4, help="Paths a probe.")] = 32,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Measure how the encoding phi changes with the longest path (8, 16, 32, 64), with a verdict a claim."""
    quiet_libraries()
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


def study_neurons(
    recipe: Annotated[Path, typer.Argument(help="A recipe of the operator lape_tefm.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Show what lape_tefm finds in each layer before it merges: ensembles, their pairs, importance, masks."""
    quiet_libraries()
    from tether.merge.plan import make_plan
    from tether.merge.recipe import read_recipe
    from tether.merge.tefm.describe import describe_neurons

    plan = make_plan(read_recipe(recipe))
    with reporter() as steps:
        found = describe_neurons(plan, on_step=steps("describing layers"))
    width = max(map(len, found), default=0)
    lines = [
        f"{name:<{width}} {len(one['pairs'])} pairs of ensembles, mean TOS "
        f"{sum(pair[2] for pair in one['pairs']) / max(1, len(one['pairs'])):.3f}, halves agree "
        f"{_shown(one['agreement'])}, mask {one['mask'][0]:.3f}, information {_shown(one['information'])}, first "
        f"hundredth has {_shown(one['importance'])} of TFI"
        for name, one in found.items()
    ]
    emit(found, as_json, "\n".join(lines))


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
