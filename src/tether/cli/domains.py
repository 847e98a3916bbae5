"""Commands on domains: fuse, certify, verify, and the demo of all of them."""

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from tether.cli.accounted import account_lines, value_lines
from tether.cli.adapters import fuse_adapters
from tether.cli.leash import refuse_raw
from tether.cli.ledger import fuse_domains
from tether.cli.output import emit, quiet_libraries, tell
from tether.cli.placing import load, place, refuse_quantise, spread
from tether.cli.progress import reporter
from tether.cli.texts import open_texts, text_name
from tether.errors import ConfigError

__all__ = ["certify", "demo", "fuse", "verify"]

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
    from tether.store.place import check_place

    check_place(out)
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


def fuse(
    model: Annotated[
        str, typer.Argument(help="The base the deltas were learnt on, or a fused checkpoint to change.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the fused checkpoint; must be new or empty.")],
    deltas: Annotated[
        list[str] | None, typer.Argument(help="Delta files, each with a weight if not 1: code.delta=0.5")
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(
            help="evidence (the default): the base and each delta alone, weighted by how well each predicted the "
            "text so far; sum: the deltas' moves are added."
        ),
    ] = None,
    prior: Annotated[
        float | None,
        typer.Option(help="Weight of the base at the start of a text, in (0, 1).", show_default="0.9"),
    ] = None,
    chart: Annotated[
        str | None,
        typer.Option(
            help="Of a sum: symmetric (the default), linear, geodesic or rootkl; matrix (the default where all deltas "
            "are matrices)."
        ),
    ] = None,
    gate: Annotated[
        str | None,
        typer.Option(
            help="Of a sum: one-class (the default): each delta acts where its own gate is open; softmax: open gates "
            "share a context by how likely each domain is."
        ),
    ] = None,
    no_gate: Annotated[
        bool, typer.Option("--no-gate", help="Let no delta sleep; in a sum, let every delta act everywhere.")
    ] = False,
    leash: Annotated[
        float | None,
        typer.Option(
            help="Of a sum: largest drift of any context when the model runs, nats; 0 takes it off."
        ),
    ] = None,
    leash_metric: Annotated[
        str, typer.Option(help="What the leash is in: softmax, or latent (the drift of U).")
    ] = "softmax",
    remove: Annotated[
        list[str] | None, typer.Option(help="Domain to take out of a fused checkpoint; repeat for several.")
    ] = None,
    budget: Annotated[
        float | None, typer.Option(help="Refuse a fusion whose mean drift on --text is larger, nats.")
    ] = None,
    budget_metric: Annotated[str, typer.Option(help="What the budget is in: softmax or latent.")] = "softmax",
    text: Annotated[str | None, typer.Option(help="General text on which the budget is checked.")] = None,
    check: Annotated[
        list[str] | None,
        typer.Option(
            help="Text of a domain to compare on (8,192 tokens of it), DOMAIN=FILE; else what its delta carries."
        ),
    ] = None,
    as_json: JSON = False,
) -> None:
    """Combine deltas in one checkpoint that AutoModelForCausalLM loads, or change such a checkpoint."""
    quiet_libraries()
    from tether.cauchy.charts import NATIVE
    from tether.causal.gates import GATES
    from tether.delta.adapter import is_adapter
    from tether.store.place import check_free

    check_free(out)
    if chart is not None and chart not in NATIVE:
        raise ConfigError(f"chart={chart!r}: expected one of {', '.join(NATIVE)}")
    if gate is not None and (gate not in GATES or no_gate):
        beside = " with --no-gate" if no_gate else ""
        raise ConfigError(f"--gate {gate}{beside}: expected one of {', '.join(GATES)}, or --no-gate")
    paths = dict(map(_weighted, deltas or []))
    if len(paths) < len(deltas or []):
        raise ConfigError("a delta is given twice: expected each once, with the weight that it shall have")
    if leash is None and leash_metric != "softmax":
        raise ConfigError(f"--leash-metric {leash_metric} without --leash: give the nats too")
    if budget is None and budget_metric != "softmax":
        raise ConfigError(f"--budget-metric {budget_metric} without --budget: give the nats too")
    refuse_raw(paths, model)
    if any(map(is_adapter, paths)):
        beyond = {
            "remove": remove, "budget": budget, "text": text, "gate softmax": gate == "softmax", "check": check,
        }  # fmt: skip
        if asked := [f"--{name}" for name, value in beyond.items() if value]:
            raise ConfigError(f"{', '.join(asked)} with adapters: expected deltas; leave it out")
        fuse_adapters(
            model, paths, out, by=by or ("sum" if gate else None), prior=prior, chart=chart, gate=not no_gate,
            leash=leash or None, leash_metric=leash_metric, as_json=as_json,
        )  # fmt: skip
        return
    refuse_quantise("fusing deltas")
    fuse_domains(
        model, paths, out, by=by, prior=prior, chart=chart, gated=False if no_gate else (True if gate else None),
        gate=gate, leash=leash, leash_metric=leash_metric, remove=remove or [], budget=budget,
        budget_metric=budget_metric, text=text, check=check or [], as_json=as_json,
    )  # fmt: skip


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
    text: Annotated[list[str], typer.Option(help="Text to measure on; repeat for several.")],
    out: Annotated[Path, typer.Option(help="The certificate to write, JSON.")],
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of each text to measure, in whole windows.")
    ] = None,
    continuations: Annotated[
        int, typer.Option(min=0, help="Texts of 256 tokens the model writes after each text's beginnings.")
    ] = 4,
    sign: Annotated[
        Path | None, typer.Option(help="Private key to sign with: Ed25519, PEM or of ssh-keygen.")
    ] = None,
    as_json: JSON = False,
) -> None:
    """Measure how far a fused model has moved from its base and put it on record."""
    quiet_libraries()
    from tether.causal.quantising import packed
    from tether.delta.certificate import certify as certify_model
    from tether.delta.declared import broken, metric_of
    from tether.delta.record import check_referable, is_certificate
    from tether.store.place import check_file, check_place
    from tether.store.signing import private_key

    key = None if sign is None else private_key(sign)
    check_place(out)
    if not (out.is_file() and is_certificate(out)):  # an older certificate may be made again
        check_file(out)
    names = list(map(text_name, text))
    if len(set(names)) < len(text):
        raise ConfigError(f"texts {', '.join(text)}: expected files of different names; rename one")
    opened = dict(zip(names, open_texts(text), strict=True))
    check_referable(opened)
    moved, _ = load(str(fused))
    base, tokenizer = load(model, packing=packed(moved))
    with reporter() as steps:
        certificate = certify_model(
            base,
            moved,
            tokenizer,
            opened,
            tokens=tokens,
            continuations=continuations,
            on_step=steps("measuring"),
        )
    if wrong := broken(certificate.fusion, certificate.texts, certificate.figures):
        tell("\n".join([*wrong, f"{out} is not written: it would not hold"]))
        raise typer.Exit(1)
    certificate.save(out, key=key)
    lines = [
        line
        for name, row in _with_continuations(certificate.figures).items()
        for line in (account_lines(name, row) if "parts" in row else [_sum_line(name, row)])
    ]
    lines += [
        f"{name}: {domain} alone drifts by {found['mean']:.4g} nats ({metric_of(found)}), declared "
        f"{found['declared']:.4g}"
        for name, row in certificate.figures.items()
        for domain, declared in row["alone"].items()
        for found in declared.values()
    ]
    lines += [line for name, row in certificate.figures.items() for line in value_lines(name, row["values"])]
    emit(certificate.model_dump(mode="json"), as_json, "\n".join([*lines, f"certificate: {out}"]))


def _sum_line(name: str, row: dict[str, Any]) -> str:
    return (
        f"{name}: softmax KL {row['softmax_kl']['mean']:.5f} (p99 {row['softmax_kl']['p99']:.4f}), latent drift "
        f"{row['latent_drift']['mean']:.4g} ({_allowed(row)}), {row['bound']['violations']} of "
        f"{row['bound']['contexts']} contexts over the bound, NLL {row['nll_base']:.3f} -> {row['nll']:.3f}"
    )


def _allowed(row: dict[str, Any]) -> str:
    allowed, measured = row["bound"]["mean_allowed"], row["latent_drift"]["mean"]
    said = f"allowed {allowed:.4g}, ratio {measured / allowed if allowed > 0 else 0:.3f}"
    planned = row.get("budgets")
    return said + (
        f"; budgets alone allow {planned['allowed']:.4g}, ratio {planned['ratio']:.3f}" if planned else ""
    )


def _with_continuations(figures: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Put what the model wrote itself beside each text."""
    rows = {}
    for name, row in figures.items():
        rows[name] = row
        if "continuations" in row:
            rows[f"{name}, continued"] = row["continuations"]
    return rows


def verify(
    certificate: Annotated[Path, typer.Argument(help="A certificate written by certify or demo.")],
    base: Annotated[
        str | None,
        typer.Option(help="The model that the base should be: it is loaded, and every weight compared."),
    ] = None,
    key: Annotated[
        Path | None, typer.Option(help="Public key of whoever should have signed: Ed25519, PEM or ssh.")
    ] = None,
    as_json: JSON = False,
) -> None:
    """Check a certificate by its hashes and by recomputing it: exit 0 holds, 1 does not, 2 cannot be used."""
    quiet_libraries()
    from tether.delta.verification import not_checked
    from tether.delta.verification import verify as verify_certificate
    from tether.store.signing import public_key

    signer = None if key is None else public_key(key)
    with reporter() as steps:
        wrong = verify_certificate(
            certificate, base=base, key=signer, device=place()[0], on_step=steps("recomputing"), **spread()
        )
    left = not_checked(certificate, base=base is not None, key=key is not None)
    told = wrong or [f"{certificate}: holds", *([f"not checked: {'; '.join(left)}"] if left else [])]
    emit({"holds": not wrong, "differences": wrong, "not_checked": left}, as_json, "\n".join(told))
    if wrong:
        raise typer.Exit(1)
