"""Commands of training: train, evaluate."""

import os
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tether.cli.output import emit, plain, quiet_libraries
from tether.cli.placing import load, place
from tether.cli.progress import reporter
from tether.cli.texts import TEXT, open_text, open_texts
from tether.errors import ConfigError

if TYPE_CHECKING:
    from tether.causal.trainable import TrainOptions
    from tether.router.options import Shaping

__all__ = ["evaluate", "train"]


def train(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, alias, path or hub id.")],
    text: Annotated[str, typer.Option(help=f"What to learn: {TEXT}.")],
    out: Annotated[Path, typer.Option(help="Run folder: new, or of a stopped training with these options.")],
    held_out: Annotated[str | None, typer.Option(help="Text to evaluate on before and after.")] = None,
    part: Annotated[str | None, typer.Option(help="head (frozen backbone; the default) or all.")] = None,
    mode: Annotated[
        str | None,
        typer.Option(help="Loss: softmax or deterministic (one-vs-rest); the model's own mode if left out."),
    ] = None,
    constants: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Constant of the losses: mode, gate_alpha, value_loss_weight, ovr_impl. Repeatable.",
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Optimizer steps; one pass over the text if left out.")
    ] = None,
    numbers: Annotated[bool, typer.Option("--numbers", help="Read numbers as values: add <NUM>.")] = False,
    form: Annotated[
        str | None,
        typer.Option(
            help="Shape the routers of a mixture of experts and name the dead: balance, tax, prior, switch, ...; none "
            "only measures."
        ),
    ] = None,
    cost: Annotated[
        str | None,
        typer.Option(
            help="With --form: what experts cost (information, snr, fisher, paper, paper-log, ...)."
        ),
    ] = None,
    lam: Annotated[
        float | None, typer.Option(help="With --form: strength of the shaping; 0.01 if left out.")
    ] = None,
    options: Annotated[
        Path | None, typer.Option(help="YAML with more options, as TrainOptions names them.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train the head, or the whole model, on a text; started again, a stopped training goes on."""
    quiet_libraries()
    flags = {"part": part, "mode": mode, "steps": steps}
    from tether.causal.constants import OF_LOSSES, read_constants, set_constants

    values = read_constants(constants or (), OF_LOSSES)
    chosen = _options(options, {name: value for name, value in flags.items() if value is not None})
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    from tether.causal.training import check_processes
    from tether.causal.training import train as run

    shaping = _shaping(form, cost, lam, chosen.part)
    check_processes(chosen, processes)
    documents, *others = open_texts([text] if held_out is None else [text, held_out])
    held = others[0] if others else None
    _check_folder(out)
    net, tokenizer = _load(model)
    set_constants(net.config, values)
    if numbers:
        tokenizer = net.add_numbers(tokenizer)
    from tether.router.course import RoutingCourse, describe
    from tether.router.journal import write_course

    course = None if shaping is None else RoutingCourse(shaping, say=_tell_line)
    with reporter() as report:
        record = run(
            net, tokenizer, documents, options=chosen, folder=out, held_out=held, device=place()[0], term=course,
            on_step=report("training"),
        )  # fmt: skip
    if int(os.environ.get("RANK", "0")):
        return
    curve = record["curve"]
    said = f"{record['path']}: {record['steps']} steps, {record['tokens']} tokens"
    said += f", loss {curve[0]:.4f} -> {curve[-1]:.4f}"
    if record["after"]:
        said += "\nheld out, before -> after\n" + _table(record["before"], record["after"])
    if course is not None:
        files = write_course(out, record["term"])
        said += f"\n{describe(record['term'])}\n" + "\n".join(map(str, files))
    emit(record, as_json, said)


def evaluate(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, alias, path or hub id.")],
    text: Annotated[str, typer.Option(help=f"What to measure on: {TEXT}.")],
    tokens: Annotated[int | None, typer.Option(min=2, help="About how many tokens; all if left out.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Measure a model on a text: likelihoods in both modes, calibration, agreement, values."""
    quiet_libraries()
    documents = open_text(text)
    from tether.causal.evaluation import evaluate as measure

    net, tokenizer = _load(model)
    figures = measure(net, tokenizer, documents, tokens=tokens)
    emit(figures, as_json, _table(figures))


def _options(path: Path | None, flags: dict[str, Any]) -> "TrainOptions":
    from pydantic import ConfigDict, ValidationError, create_model

    from tether.causal.trainable import TrainOptions
    from tether.reading import read_yaml

    given: Any = {}
    if path is not None:
        given = read_yaml(path, error=ConfigError) or {}
    if not isinstance(given, dict):
        raise ConfigError(f"{path}: expected options as 'name: value' lines; got {type(given).__name__}")
    # The fields are those of TrainOptions, written once.
    known: dict[str, Any] = {
        field.name: (field.type, field.default)
        for field in fields(TrainOptions)
        if field.default is not MISSING
    }
    schema = create_model("Options", __config__=ConfigDict(extra="forbid", frozen=True), **known)
    try:
        checked = schema.model_validate({**given, **flags})
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise ConfigError(
            f"{path or 'options'}: {wrong}. Known options: {', '.join(sorted(known))}"
        ) from error
    return TrainOptions(**checked.model_dump())


def _shaping(form: str | None, cost: str | None, lam: float | None, part: str) -> "Shaping | None":
    from tether.router.options import COSTLY, Shaping

    given = {name: value for name, value in {"cost": cost, "lam": lam}.items() if value is not None}
    if form is None:
        if given:
            raise ConfigError(f"{', '.join(f'--{name}' for name in given)}: no meaning without --form")
        return None
    shaping = Shaping(form=form, **given)  # type: ignore[arg-type]
    if cost is not None and form not in COSTLY:
        raise ConfigError(f"--cost: no meaning with --form {form}, which reads no cost; leave it out")
    if part != "all" and form != "none":
        raise ConfigError(
            f"--form {form} with part={part!r}, where the routers are frozen with the backbone: give --part all, or "
            "--form none to measure"
        )
    return shaping


def _tell_line(line: str) -> None:
    # Above the bar, which rich moves down for what is printed; stdout has the result alone.
    typer.echo(plain(line), err=True)


def _check_folder(out: Path) -> None:
    from tether.store.place import check_free, check_place

    check_place(out)
    # A run's own folder is checked when it is opened: by its options, once the model's hash is known.
    if not (out / "run.json").is_file():
        check_free(out)


def _load(model: str) -> Any:
    import torch

    # Whatever the checkpoint's dtype: half precision would lose small steps.
    return load(model, dtype=torch.float32)


def _table(*columns: dict[str, Any]) -> str:
    def cell(value: Any) -> str:
        return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.4f}"

    return "\n".join(
        f"{name:<26}" + "".join(f"{cell(column[name]):>12}" for column in columns) for name in columns[0]
    )
