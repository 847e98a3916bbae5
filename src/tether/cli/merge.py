"""The commands that merge whole models: the merge itself, alignment, the study of path lengths."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tether.cli.observe import observe
from tether.cli.output import emit, quiet_libraries, tell
from tether.cli.placing import place, placed
from tether.cli.progress import reporter
from tether.cli.study import study_length, study_neurons
from tether.cli.texts import TEXT, open_text, reads_texts
from tether.errors import ConfigError

__all__ = ["merge_app"]


class _RunUnlessNamed(TyperGroup):
    """Take `tether merge RECIPE.yaml` for `tether merge run RECIPE.yaml`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in {*self.commands, "--help"}:
            args = ["run", *args]
        return super().parse_args(ctx, args)


merge_app = typer.Typer(
    cls=_RunUnlessNamed,
    no_args_is_help=True,
    help="Merge whole models: tether merge RECIPE.yaml (options: tether merge run --help).",
)
merge_app.command("study-length")(placed(study_length))
merge_app.command("study-neurons")(study_neurons)
merge_app.command("observe")(placed(observe, dtype=False))


def align(
    target: Annotated[str, typer.Argument(help="The model in whose coordinates the merge will be.")],
    source: Annotated[str, typer.Argument(help="The model whose units are to be brought there.")],
    text: Annotated[str, typer.Option(help=f"Text that both read: {TEXT}.")],
    out: Annotated[Path, typer.Option(help="The file of index maps, for a recipe's align.")],
    tokens: Annotated[
        int, typer.Option(min=64, help="Tokens to compare on; several times the width.")
    ] = 2048,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Find which units of SOURCE do what those of TARGET do; the models may differ in width and depth."""
    quiet_libraries()
    from tether.merge.pairing import align_checkpoints
    from tether.store.place import check_file

    check_file(out)
    read = open_text(text)
    with reporter() as steps:
        found = align_checkpoints(
            target, source, read, out, tokens=tokens, device=place()[0], on_step=steps("aligning")
        )
    lines = [
        f"{space:<18} similarity {found['similarity'][space]:.3f}, {found['unmatched'][space]} units unmatched"
        for space in found["similarity"]
    ]
    emit({"path": str(out), **found}, as_json, "\n".join([*lines, f"maps: {out}"]))


merge_app.command("align")(placed(reads_texts(align), dtype=False))


@merge_app.command("run")
def run(
    recipe: Annotated[Path, typer.Argument(help="YAML: operator, models, base; see docs/merging.md.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the result; else the recipe's out.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False,
    accept: Annotated[
        float | None,
        typer.Option(
            help="Most mean softmax KL from the first reference, nats; else the recipe's check.accept."
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Tensors worked on at once; the processors, at most 4, if left out."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Merge whole models; a stopped merge goes on. Exit 1: over the budget, nothing published."""
    from tether.merge.plan import make_plan
    from tether.merge.recipe import read_recipe
    from tether.merge.run import check_possible, merge
    from tether.store.place import check_place

    asked = read_recipe(recipe)
    if accept is not None:
        if asked.check is None:
            raise ConfigError(
                f"--accept: recipe {recipe} has no check to hold it against; give check.text in it"
            )
        if not 0 < accept < math.inf:
            raise ConfigError(f"--accept {accept}: expected a positive number of nats a token")
        asked = asked.model_copy(update={"check": asked.check.model_copy(update={"accept": accept})})
    target = out or (Path(asked.out) if asked.out else None)
    if target is None and not dry_run:
        raise ConfigError(f"recipe {recipe} has no out; give --out FOLDER")
    if target is not None:
        check_place(target)
    plan = make_plan(asked)
    if dry_run:
        check_possible(plan)
        emit(plan.summary(), as_json, _described(plan.summary()))
        return
    assert target is not None
    if asked.check:
        quiet_libraries()
        _say_texts(asked.check.text)
    with reporter() as steps:
        report = merge(plan, target, threads=threads, steps=steps)
    emit({"path": str(target), **report}, as_json, _said(target, report))
    if report.get("check", {}).get("accepted") is False:
        raise typer.Exit(1)


def _say_texts(texts: Mapping[str, str]) -> None:
    from tether.store.documents import read_documents

    for path in dict.fromkeys(texts.values()):
        tell(read_documents(path, fetch=False).recognised, "none")


def _described(summary: dict[str, Any]) -> str:
    kept = ", ".join(f"{count} from {name}" for name, count in summary["kept"].items()) or "none"
    lines = [
        f"operator   {summary['operator']}",
        *(f"{name:<10} {path}" for name, path in summary["models"].items()),
        f"into       {summary['into']}: names, config{', head tied to the embedding' if summary['tied'] else ''}",
        f"tokenizer  {summary['tokenizer']}",
        f"tensors    {summary['merged']} merged, kept: {kept}",
        f"types      {', '.join(f'{count} {dtype}' for dtype, count in summary['dtypes'].items())}",
        f"reads      {summary['bytes_read'] / 1e6:,.1f} MB, after one reading of every input",
        f"writes     {summary['bytes_written'] / 1e6:,.1f} MB in {len(summary['files'])} files",
        f"buffers    {summary['memory_per_thread'] / 1e6:,.1f} MB a thread",
        *(f"note       {note}" for note in summary["notes"]),
    ]
    return "\n".join(lines)


def _refined(refine: dict[str, Any]) -> list[str]:
    lines = []
    if "lambda" in refine:
        name = {"variance": "log_variance", "loss": "loss"}[refine["criterion"]]
        shown = ", ".join(f"{each['lambda']:g}: {each[name]:.4f}" for each in refine["tried"])
        lines.append(f"lambda {refine['lambda']:.6g} by {name.replace('_', ' ')} ({shown})")
    if step := refine.get("step"):
        if step["form"] == "paper":
            lines.append(
                f"last step: rows moved by {step['mean']:.2g} on average, {step['largest']:.2g} at most"
            )
        else:
            lines.append(
                f"last step: length {step['eta']:.2g} of the weights' norm, held-out loss {step['before']:.4f} -> "
                f"{step['after']:.4f}"
            )
    return lines


def _said(target: Path, report: dict[str, Any]) -> str:
    plan, rounding = report["plan"], report["rounding"]
    lines = [
        f"{target}: {plan['merged']} tensors merged by {plan['operator']}, {sum(plan['kept'].values())} kept"
    ]
    if rounding["worst"]:
        worst = rounding["worst"]
        lines.append(
            f"rounding moved the weights by {rounding['share_of_change']:.2%} of the change, in {worst['tensor']} by "
            f"{worst['share_of_change']:.2%}"
        )
    lines += [f"note: {note}" for note in plan["notes"]]
    lines += _refined(report.get("refine", {}))
    check = report.get("check")
    if check:
        for name, texts in check["references"].items():
            lines += [
                f"{name} on {text}: softmax KL {row['kl']['mean']:.5f} (p99 {row['kl']['p99']:.4f}, max "
                f"{row['kl']['max']:.3f}), NLL {row['nll_reference']:.4f} -> {row['nll_merged']:.4f}"
                for text, row in texts.items()
            ]
        if "lambda" in check:
            lines.append(
                f"lambda {check['lambda']['value']:.6g}, after {len(check['lambda']['tried'])} evaluations"
            )
        if check["budget"] is not None:
            verdict = "kept" if check["accepted"] else "exceeded: nothing was published"
            lines.append(
                f"budget of {check['budget']:g} nats {verdict} (worst mean {check['worst_mean_kl']:.5f})"
            )
    return "\n".join(lines)
