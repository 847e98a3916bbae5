"""The command on routers: among domain deltas, or among the experts of an upcycled mixture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tether.cli.output import emit, quiet_libraries
from tether.cli.placing import load
from tether.cli.progress import reporter
from tether.cli.texts import open_texts, text_name
from tether.errors import ConfigError

if TYPE_CHECKING:
    from tether.store.opened import Text

__all__ = ["route"]


TOP_K = 2
"""Experts a token of an upcycled mixture uses."""
IDLE = {
    "without --moe": ("form", "steps", "experts"),
    "with --moe": ("budget", "base_text", "experts"),
    "with --moe and no --text": ("budget", "base_text", "form", "steps", "tokens", "experts"),
    "with --experts": ("budget", "base_text", "form", "steps", "tokens", "text"),
}
"""Options without a meaning."""


def route(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="The base: of the deltas, or the dense checkpoint's folder.")],
    out: Annotated[Path, typer.Option(help="Folder for the routed checkpoint; must be new or empty.")],
    parts: Annotated[
        list[str] | None,
        typer.Argument(
            help="Delta files; with --moe, folders of fine-tunes of the base, or none with --experts."
        ),
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="Each part's domain text, in the order of the parts.")
    ] = None,
    base_text: Annotated[
        str | None, typer.Option(help="General text on which the drift is held; not with --moe.")
    ] = None,
    moe: Annotated[
        bool, typer.Option("--moe", help="Make a mixture of experts of fine-tunes instead.")
    ] = False,
    experts: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="With --moe and no fine-tunes: this many copies of the base's own MLPs, for tether train.",
        ),
    ] = None,
    budget: Annotated[float, typer.Option(help="Mean drift on base text, softmax nats a token.")] = 0.01,
    form: Annotated[
        str, typer.Option(help="With --moe: how routers are shaped (balance, prior, switch, ...).")
    ] = "balance",
    steps: Annotated[int, typer.Option(min=1, help="With --moe: steps of training the routers.")] = 200,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of each text to use, in whole windows.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Route instead of add: per-token weights over deltas, or over experts, learnt from text."""
    quiet_libraries()
    from tether.store.place import check_free

    check_free(out)
    parts, texts = parts or [], text or []
    if moe and experts is not None and not parts:
        _check_options(context, "with --experts")
        _mixture(model, [model] * (experts - 1), {}, out, form, steps, tokens, as_json)
        return
    _check_options(
        context, "without --moe" if not moe else "with --moe" if texts else "with --moe and no --text"
    )
    if not parts:
        raise ConfigError(
            "no parts: expected delta files, or with --moe folders of fine-tunes or --experts for copies of the base"
        )
    if len(texts) != len(parts) and not (moe and not texts):
        raise ConfigError(
            f"{len(parts)} parts and {len(texts)} texts: expected --text once for each part, in their order"
        )
    if not moe and base_text is None:
        raise ConfigError("no --base-text: expected general text on which the drift is held to the budget")
    opened = open_texts([*texts, *([] if base_text is None else [base_text])])
    if moe:
        named = dict(zip(map(text_name, texts), opened, strict=True))
        if len(named) < len(texts):
            raise ConfigError(f"texts {', '.join(texts)}: expected files of different names; rename one")
        _mixture(model, parts, named, out, form, steps, tokens, as_json)
    else:
        _deltas(model, parts, opened[:-1], opened[-1], out, budget, tokens, as_json)


def _check_options(context: typer.Context, case: str) -> None:
    given = [
        f"--{name.replace('_', '-')}"
        for name in IDLE[case]
        if (source := context.get_parameter_source(name)) is not None and source.name == "COMMANDLINE"
    ]
    if given:
        raise ConfigError(f"{', '.join(given)}: no meaning {case}; leave it out")


def _deltas(
    model: str, parts: list[str], texts: "Sequence[Text]", general: "Text", out: Path, budget: float,
    tokens: int | None, as_json: bool,
) -> None:  # fmt: skip
    from tether.causal.checkpoint import save_checkpoint
    from tether.delta.delta import Delta
    from tether.delta.shards import read_states
    from tether.delta.windows import reader, window_text
    from tether.router.deltas import DeltaRouterFit, route_deltas

    fit = DeltaRouterFit(budget=budget)
    limit = tokens or fit.tokens
    deltas = [Delta.load(path) for path in parts]
    layers = tuple(sorted({layer for delta in deltas for layer in delta.layers}))
    if len(general) < 2:
        raise ConfigError(
            f"{general.seen.name}: {len(general)} document; expected at least 2, some to learn on and some for the "
            "budget"
        )
    cut = max(1, round(0.6 * len(general)))
    pieces = [*texts, general[:cut], general[cut:]]
    base, tokenizer = load(model)
    tokenizer = reader(base, tokenizer)
    windows = [window_text(piece, tokenizer, tokens=limit) for piece in pieces]
    with reporter() as report:
        names = [*(delta.name for delta in deltas), "base text", "held-out base text"]
        caches = [
            read_states(base, part, layers=layers, on_step=report(f"reading {name}"))
            for name, part in zip(names, windows, strict=True)
        ]
        domains = dict(zip(names, caches[: len(deltas)], strict=False))
        fitted, held_out = caches[-2:]
        routed = route_deltas(base, deltas, domains, fitted, held_out, fit, report("learning to route"))
    inputs = {delta.name: delta.path for delta in deltas if delta.path is not None}
    save_checkpoint(routed, tokenizer, out, inputs=inputs)
    record: dict[str, Any] = routed.config.fusion["router"]["record"]
    shares = "\n".join(
        f"  on {name}: " + ", ".join(f"{d.name} {s:.2f}" for d, s in zip(deltas, row, strict=True))
        for name, row in record["shares"].items()
    )
    result = {"path": str(out), **{key: value for key, value in record.items() if key != "curve"}}
    emit(
        result,
        as_json,
        f"{out}: drift on held-out base text {record['drift_base']:.4f} of {budget} nats; mean shares\n{shares}",
    )


def _mixture(
    model: str, parts: list[str], texts: "Mapping[str, Text]", out: Path, form: str, steps: int, tokens: int | None,
    as_json: bool,
) -> None:  # fmt: skip
    import tempfile

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tether.causal.loading import resolve
    from tether.delta.windows import window_text
    from tether.router.mixture import upcycle
    from tether.router.options import FORMS
    from tether.router.training import RouterFit, train_routers
    from tether.store.publish import publish_folder

    if form not in FORMS:
        raise ConfigError(f"form={form!r}: expected one of {', '.join(FORMS)}")
    if form == "bias":
        raise ConfigError(
            "form='bias': its bias on the choice is no weight of the model, and what is published would choose without "
            "it; use balance, prior or switch"
        )
    count = len(parts) + 1
    if form == "switch" and count <= TOP_K:
        raise ConfigError(
            f"form='switch': every token uses all {count} experts, where it is constant; use balance"
        )
    base = resolve(model)
    windows = []
    if texts:
        tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
        # Before the copying: a text that is too short is found at once.
        windows = [window_text(text, tokenizer, tokens=tokens) for text in texts.values()]
    parts = [base if part == model else part for part in parts]
    result: dict[str, Any] = {"path": str(out), "experts": [base, *parts]}
    said = f"{out}: a mixture of {len(parts) + 1} experts"
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    # What is not taught yet has another name, so that nobody takes it for the result.
    with (
        reporter() as report,
        tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=f".{out.name}.") as made,
    ):
        draft = Path(made) / "draft" if texts else out
        upcycle(base, parts, draft, top_k=TOP_K, on_step=report("copying experts"))
        if texts:
            mixture = AutoModelForCausalLM.from_pretrained(draft, trust_remote_code=False)
            kept = mixture.dtype
            # Taught in float32, where small steps are not rounded away, and published as it came.
            mixture.float()
            record = train_routers(
                mixture, windows, RouterFit(form=form, steps=steps), on_step=report("teaching routers")
            )
            manifest = (draft / "tether.json").read_bytes()
            with publish_folder(out) as folder:
                mixture.to(kept).save_pretrained(folder)
                tokenizer.save_pretrained(folder)
                (folder / "tether.json").write_bytes(manifest)
            result |= {key: record[key] for key in ("before", "after")}
            before, after = record["before"], record["after"]
            said += "".join(
                f"\n  {name}: NLL {a:.3f} -> {b:.3f}"
                for name, a, b in zip(texts, before["losses"], after["losses"], strict=True)
            )
            said += f"\n  dead experts a layer: {before['mean']['dead']:.1f} -> {after['mean']['dead']:.1f}"
    emit(result, as_json, said)
