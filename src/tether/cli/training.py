"""Commands of training: train, evaluate."""

import os
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tether.cli.output import emit, quiet_libraries
from tether.cli.placing import load, place
from tether.cli.progress import reporter
from tether.errors import ConfigError

if TYPE_CHECKING:
    from tether.causal.pairs import Document
    from tether.causal.trainable import TrainOptions

__all__ = ["evaluate", "train"]

TEXT = "JSON lines with 'text', or with 'prompt' and 'completion'; or plain text."


def train(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, alias, path or hub id.")],
    text: Annotated[Path, typer.Option(help=f"What to learn: {TEXT}")],
    out: Annotated[Path, typer.Option(help="Run folder: new, or of a stopped training with these options.")],
    held_out: Annotated[Path | None, typer.Option(help="Text to evaluate on before and after.")] = None,
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

    check_processes(chosen, processes)
    documents, held = _read(text), None if held_out is None else _read(held_out)
    _check_folder(out)
    net, tokenizer = _load(model)
    set_constants(net.config, values)
    if numbers:
        tokenizer = net.add_numbers(tokenizer)
    with reporter() as report:
        record = run(
            net, tokenizer, documents, options=chosen, folder=out, held_out=held, device=place()[0],
            on_step=report("training"),
        )  # fmt: skip
    if int(os.environ.get("RANK", "0")):
        return
    curve = record["curve"]
    said = f"{record['path']}: {record['steps']} steps, {record['tokens']} tokens"
    said += f", loss {curve[0]:.4f} -> {curve[-1]:.4f}"
    if record["after"]:
        said += "\nheld out, before -> after\n" + _table(record["before"], record["after"])
    emit(record, as_json, said)


def evaluate(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, alias, path or hub id.")],
    text: Annotated[Path, typer.Option(help=TEXT)],
    tokens: Annotated[int | None, typer.Option(min=2, help="About how many tokens; all if left out.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Measure a model on a text: likelihoods in both modes, calibration, agreement, values."""
    quiet_libraries()
    documents = _read(text)
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


def _read(path: Path) -> "list[Document]":
    from tether.causal.pairs import holds_pairs, read_pairs
    from tether.store.documents import read_documents

    return [*read_pairs(path)] if holds_pairs(path) else [*read_documents(path)]


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
