"""Commands on domains: learn, fuse, certify, verify, and the demo of all of them."""

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from tether.cli.output import emit, quiet_libraries
from tether.cli.progress import reporter
from tether.errors import ConfigError

__all__ = ["certify", "demo", "fuse", "learn", "verify"]

JSON = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def demo(
    out: Annotated[Path, typer.Option(help="Run folder: new, or of an interrupted demo.")] = Path("demo"),
    fast: Annotated[bool, typer.Option("--fast", help="A fraction of the text, for a quick check.")] = False,
    as_json: JSON = False,
) -> None:
    """Learn three domains on real weights, fuse them, certify the drift, write a report."""
    quiet_libraries()
    from tether.demo.pipeline import run_demo
    from tether.demo.plan import Plan
    from tether.report.html import markdown_table

    with reporter() as steps:
        results = run_demo(out, Plan.fast() if fast else Plan(), steps)
    lines = [
        markdown_table(results),
        "",
        f"report       {out / 'report.html'}",
        f"certificate  {out / 'certificate.json'}   (check it: tether verify {out / 'certificate.json'})",
        f"model        {out / 'fused'}   (try it: tether generate {out / 'fused'} 'Patient: age 52,')",
    ]
    emit(results, as_json, "\n".join(lines))


def learn(
    model: Annotated[str, typer.Argument(help="Base: checkpoint folder, alias, path or hub id.")],
    text: Annotated[Path, typer.Option(help="The domain's text: .jsonl with 'text' a line, or plain.")],
    base_text: Annotated[Path, typer.Option(help="General text on which the drift is held, likewise.")],
    out: Annotated[Path, typer.Option(help="The delta file to write, customarily NAME.delta.")],
    budget: Annotated[float, typer.Option(help="Mean drift allowed on base text, nats per token.")] = 0.05,
    metric: Annotated[
        str, typer.Option(help="What the budget is in: softmax, fisher or latent.")
    ] = "softmax",
    penalty: Annotated[
        float | None, typer.Option(help="The paper's plain lambda instead of a budget.")
    ] = None,
    chart: Annotated[
        str, typer.Option(help="Chart of the delta: symmetric, linear, geodesic, rootkl.")
    ] = "symmetric",
    tokens: Annotated[int | None, typer.Option(min=1, help="Domain tokens to use at most.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Keep hidden states here for the next fit.")] = None,
    as_json: JSON = False,
) -> None:
    """Learn a domain as a delta of the abduction head, on a drift budget."""
    quiet_libraries()
    from tether.causal.loading import load
    from tether.delta.learning import check_options, learn_delta

    # All that can be wrong without the model is found before it is loaded.
    check_options(text, base_text, budget=budget, metric=metric, penalty=penalty, chart=chart)
    if out.exists():
        raise ConfigError(f"{out} exists already: choose another name, or remove it")
    base, tokenizer = load(model)
    with reporter() as steps:
        delta = learn_delta(
            base, tokenizer, text, base_texts=base_text, budget=budget, name=out.stem, metric=metric, penalty=penalty,
            chart=chart, tokens=tokens, cache_folder=cache, on_step=steps(f"learning {out.stem}"),
        )  # fmt: skip
    delta.save(out)
    record = {key: value for key, value in delta.record.items() if key != "curve"}
    held = (
        ""
        if penalty is not None
        else f", drift on held-out base text {record['drift_base']:.4f} of {budget} nats"
    )
    own = f"; on its own text {record['drift_domain']['softmax']:.4f} (softmax KL)"
    emit({"path": str(out), **record}, as_json, f"{out}: {record['tokens']} tokens{held}{own}")


def fuse(
    model: Annotated[str, typer.Argument(help="The base the deltas were learnt on.")],
    deltas: Annotated[
        list[str], typer.Argument(help="Delta files, each with a weight if not 1: code.delta=0.5")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the fused checkpoint; must be new or empty.")],
    chart: Annotated[str, typer.Option(help="symmetric, linear, geodesic or rootkl.")] = "symmetric",
    gate: Annotated[
        bool, typer.Option("--gate/--no-gate", help="Let each delta act only on its own domain.")
    ] = True,
    as_json: JSON = False,
) -> None:
    """Superpose deltas into one checkpoint that AutoModelForCausalLM loads."""
    quiet_libraries()
    from tether.cauchy.charts import CHARTS
    from tether.causal.loading import load
    from tether.delta.delta import Delta
    from tether.delta.fusion import check_free, save_checkpoint
    from tether.delta.fusion import fuse as fuse_deltas

    check_free(out)
    if chart not in CHARTS:
        raise ConfigError(f"chart={chart!r}: expected one of {', '.join(CHARTS)}")
    weights = {Delta.load(path): weight for path, weight in map(_weighted, deltas)}
    base, tokenizer = load(model)
    fused = fuse_deltas(base, weights, chart=chart, gated=gate)
    inputs = {delta.name: delta.path for delta in weights if delta.path is not None}
    save_checkpoint(fused, tokenizer, out, inputs=inputs)
    described: dict[str, Any] = fused.config.fusion
    parts = " + ".join(f"{w:g} {n}" for n, w in zip(described["domains"], described["weights"], strict=True))
    emit(
        {"path": str(out), **described},
        as_json,
        f"{out}: {parts}, chart {chart}, {'gated' if gate else 'ungated'}",
    )


def _weighted(text: str) -> tuple[str, float]:
    """Read `path` or `path=weight`."""
    if Path(text).exists() or "=" not in text:
        return text, 1.0
    path, _, number = text.rpartition("=")
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise ConfigError(f"{text!r}: expected a delta file, or FILE=WEIGHT with a finite number")
    return path, weight


def certify(
    model: Annotated[str, typer.Argument(help="The base.")],
    fused: Annotated[Path, typer.Argument(help="Folder of the fused checkpoint.")],
    text: Annotated[list[Path], typer.Option(help="Text to measure on; repeat for several.")],
    out: Annotated[Path, typer.Option(help="The certificate to write, JSON.")],
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of each text at most.")] = None,
    as_json: JSON = False,
) -> None:
    """Measure how far a fused model has moved from its base and put it on record."""
    quiet_libraries()
    from tether.causal.loading import load
    from tether.delta.certificate import certify as certify_model
    from tether.delta.windows import read_documents

    for path in text:
        read_documents(path)
    if len({path.stem for path in text}) < len(text):
        raise ConfigError(f"texts {', '.join(map(str, text))}: expected files of different names; rename one")
    base, tokenizer = load(model)
    moved, _ = load(str(fused))
    with reporter() as steps:
        certificate = certify_model(
            base,
            moved,
            tokenizer,
            {path.stem: path for path in text},
            tokens=tokens,
            on_step=steps("measuring"),
        )
    certificate.save(out)
    lines = [
        f"{name}: softmax KL {row['softmax_kl']['mean']:.5f} (p99 {row['softmax_kl']['p99']:.4f}), latent drift "
        f"{row['latent_drift']['mean']:.4g}, {row['bound']['violations']} of {row['bound']['contexts']} contexts over "
        f"the bound, NLL {row['nll_base']:.3f} -> {row['nll']:.3f}"
        for name, row in certificate.figures.items()
    ]
    emit(certificate.model_dump(mode="json"), as_json, "\n".join([*lines, f"certificate: {out}"]))


def verify(
    certificate: Annotated[Path, typer.Argument(help="A certificate written by certify or demo.")],
    as_json: JSON = False,
) -> None:
    """Check a certificate by its hashes and by recomputing it: exit 0 holds, 1 does not, 2 cannot be read."""
    quiet_libraries()
    from tether.delta.certificate import verify as verify_certificate

    with reporter() as steps:
        wrong = verify_certificate(certificate, on_step=steps("recomputing"))
    emit({"holds": not wrong, "differences": wrong}, as_json, "\n".join(wrong) or f"{certificate}: holds")
    if wrong:
        raise typer.Exit(1)
