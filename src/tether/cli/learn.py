"""The command `learn`: a domain as a delta of the abduction head, or as an adapter, on a drift budget."""

from pathlib import Path
from typing import Annotated, Any

import typer

from tether.cli.adapters import learn_adapter
from tether.cli.configured import printed, read_config
from tether.cli.output import emit, quiet_libraries
from tether.cli.placing import load, refuse_quantise
from tether.cli.progress import reporter
from tether.cli.texts import TEXT, open_texts
from tether.errors import ConfigError
from tether.names import check_name

__all__ = ["learn"]

BUDGET = 0.05
"""Where neither a budget nor a penalty is given."""
JSON = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def learn(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="Base: checkpoint folder, alias, path or hub id.")],
    text: Annotated[str, typer.Option(help=f"The domain's text: {TEXT}.")],
    base_text: Annotated[str, typer.Option(help="General text on which the drift is held, likewise.")],
    out: Annotated[Path, typer.Option(help="The delta file to write, customarily NAME.delta.")],
    budget: Annotated[
        float | None,
        typer.Option(help="Mean drift allowed on base text, nats per token.", show_default=f"{BUDGET:g}"),
    ] = None,
    metric: Annotated[
        str, typer.Option(help="What the budget is in: softmax, fisher or latent.")
    ] = "softmax",
    penalty: Annotated[
        float | None,
        typer.Option(
            help="Weight of a plain penalty on the drift at the domain's own contexts, instead of a budget."
        ),
    ] = None,
    chart: Annotated[
        str, typer.Option(help="Chart of the delta: symmetric, linear, geodesic, rootkl, matrix.")
    ] = "symmetric",
    features: Annotated[
        str, typer.Option(help="What the delta reads: last, or multi (three middle layers too).")
    ] = "last",
    location_only: Annotated[
        bool, typer.Option("--location-only", help="Leave scales alone: exact to export.")
    ] = False,
    keep_values: Annotated[
        bool,
        typer.Option(
            "--keep-values",
            help="Leave what the model says of numbers exactly as it is (chart matrix, location only).",
        ),
    ] = False,
    rank: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Rank of the delta at most, for a smaller file; of an adapter its rank.",
            show_default="whole, of an adapter 8",
        ),
    ] = None,
    quantile: Annotated[
        float | None, typer.Option(help="Limit this quantile of the drift instead of its mean.")
    ] = None,
    hard: Annotated[
        bool,
        typer.Option("--hard", help="Limit the drift of every single training context, not of their mean."),
    ] = False,
    tokens: Annotated[int | None, typer.Option(min=1, help="Domain tokens to use, in whole windows.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Keep hidden states here for the next fit.")] = None,
    disk: Annotated[
        float,
        typer.Option(
            min=0,
            help="GB of hidden states kept of each text; a longer one is used in windows spread over it.",
        ),
    ] = 16.0,
    adapter: Annotated[
        str | None, typer.Option(help="Learn a PEFT adapter on the backbone instead of a delta: lora.")
    ] = None,
    no_gate: Annotated[
        bool, typer.Option("--no-gate", help="Fit no gate: the delta then acts everywhere.")
    ] = False,
    held_out: Annotated[
        float | None,
        typer.Option(
            help="Share of the text to keep aside and choose the strength on, at most 2,048 tokens; 0 for none.",
            show_default="0.15",
        ),
    ] = None,
    no_sample: Annotated[
        bool, typer.Option("--no-sample", help="Private text: let the file carry none of what is kept aside.")
    ] = False,
    window: Annotated[int, typer.Option(min=1, help="Tokens a context.")] = 256,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Passes over the text.", show_default="2, of an adapter 1")
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tokens a step, of an adapter windows.", show_default="256, of an adapter 2"
        ),
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.", show_default="0.001")] = None,
    alpha: Annotated[
        int | None,
        typer.Option(min=1, help="Of an adapter: its update is alpha / rank B A.", show_default="16"),
    ] = None,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing",
            help="Of an adapter: compute layers again in the backward pass: less memory, more time, the same adapter.",
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="Of shuffles and draws.")] = 0,
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML with options by their names, for those not given here.",
            callback=read_config,
            is_eager=True,
        ),
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the options as such a file, and do nothing else.")
    ] = False,
    as_json: JSON = False,
) -> None:
    """Learn a domain as a delta of the abduction head, on a drift budget."""
    if print_config:
        typer.echo(printed(ctx), nl=False)
        return
    quiet_libraries()
    from tether.store.place import check_file, check_place

    check_name(out.stem)
    of_fit = {"rank": rank, "epochs": epochs, "batch": batch, "lr": lr}
    given: dict[str, Any] = {"seed": seed} | {
        name: value for name, value in of_fit.items() if value is not None
    }
    if cache is not None:
        check_place(cache / "states")
    if adapter is not None:
        # Options of deltas only, by the value they have when they are given.
        delta_only = {
            "penalty": penalty is not None, "chart": chart != "symmetric", "features": features != "last",
            "location_only": location_only, "hard": hard, "keep_values": keep_values,
        }  # fmt: skip
        given |= {"gradient_checkpointing": gradient_checkpointing} | (
            {} if alpha is None else {"alpha": alpha}
        )
        learn_adapter(
            adapter, model, text, base_text, out, budget=BUDGET if budget is None else budget, metric=metric,
            quantile=quantile, gate=not no_gate, tokens=tokens, cache=cache, disk=disk * 1e9,
            held_out=held_out, sample=not no_sample,
            window=window, fit=given, as_json=as_json, **delta_only,
        )  # fmt: skip
        return
    if alpha is not None:
        raise ConfigError("--alpha is of an adapter: a delta has none; leave it out, or add --adapter lora")
    refuse_quantise("learning a delta")
    if gradient_checkpointing:
        raise ConfigError(
            "--gradient-checkpointing is of an adapter: a delta's fit does not go through the backbone; leave it out, "
            "or add --adapter lora"
        )
    from tether.cli.learnt import learnt_told
    from tether.delta.held_out import HELD_OUT
    from tether.delta.learning import check_options, learn_delta

    # All that can be wrong without the model is found before it is loaded.
    of_budget = {
        "budget": budget is not None,
        "metric": metric != "softmax",
        "quantile": quantile is not None,
    }
    if penalty is not None and any(of_budget.values()):
        both = ", ".join(f"--{name}" for name, value in of_budget.items() if value)
        raise ConfigError(f"--penalty with {both}: a penalty takes the budget's place; leave one out")
    options: dict[str, Any] = {
        "budget": BUDGET if budget is None and penalty is None else budget, "metric": metric, "penalty": penalty,
        "chart": "matrix" if keep_values and chart == "symmetric" else chart, "features": features,
        "location_only": location_only or keep_values, "quantile": quantile, "hard": hard,
        "keep_values": keep_values, "gate": not no_gate, "held_out": HELD_OUT if held_out is None else held_out,
        **given,
    }  # fmt: skip
    check_options(**options)
    check_file(out)
    own, general = open_texts([text, base_text])
    base, tokenizer = load(model)
    with reporter() as steps:
        delta = learn_delta(
            base, tokenizer, own, base_texts=general, name=out.stem, window=window, tokens=tokens,
            cache_folder=cache, disk=disk * 1e9, sample=not no_sample, on_step=steps(f"learning {out.stem}"), **options,
        )  # fmt: skip
    delta.save(out)
    told = learnt_told(delta.record, delta.sample, model=model, out=out, asked=not no_sample, kind=own.kind)
    record = {key: value for key, value in delta.record.items() if key != "curve"}
    emit({"path": str(out), "name": delta.name, **record, "sample": list(delta.sample)}, as_json, told)
