"""`ledger`, and what `fuse` does with deltas: fuse, add to a fusion, take out of one, within a budget."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from tether.cli.accounted import account_lines, fare_lines, value_lines
from tether.cli.output import emit, quiet_libraries, tell
from tether.cli.placing import load
from tether.cli.progress import reporter
from tether.cli.texts import open_text, open_texts
from tether.errors import CertificateError, ConfigError
from tether.names import check_name

__all__ = ["fuse_domains", "ledger"]


def ledger(
    fused: Annotated[Path, typer.Argument(help="Folder of the fused checkpoint.")],
    text: Annotated[str, typer.Option(help="Text to account on, customarily the budgets' base text.")],
    next_drift: Annotated[
        float | None, typer.Option("--next", help="What would another delta of this latent drift do? Nats.")
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of the text to measure, in whole windows.")
    ] = 4000,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Account for a fusion's drift: each domain's share, what pairs do to each other, what room is left."""
    quiet_libraries()
    from tether.delta.ledger import keep_ledger

    documents = open_text(text)
    model, tokenizer = load(str(fused))
    with reporter() as steps:
        figures = keep_ledger(
            model, tokenizer, documents, next_drift=next_drift, tokens=tokens, on_step=steps("accounting")
        )
    emit(figures, as_json, "\n".join([*_lines(figures), *value_lines("this text", figures["values"])]))


def _lines(figures: dict[str, Any]) -> list[str]:
    if figures.get("by") == "evidence":
        limit = figures["allowance"]
        spoken = [
            f"  {name}: the largest cost of a whole text against it is {party['largest']:.2f} nats, "
            f"{party['allowed']:.2f} are allowed there."
            for name, party in figures["regret"].items()
        ]
        spare = [] if limit is None else [f"  The budget is {limit['nats']:g} nats ({limit['metric']})."]
        return [*account_lines("this text", figures), *spoken, *spare]
    lines = [
        f"latent drift, mean over {figures['tokens']} contexts, nats; chart {figures['chart']}",
        f"{'domain':<16}{'weight':>8}{'open':>7}{'alone':>11}{'share':>11}{'removal':>11}",
    ]
    lines += [
        f"{name:<16}{row['weight']:>8.3g}{row['gate_open']:>7.1%}{row['alone']:>11.5g}{row['share']:>11.5g}"
        f"{row['removal']:>11.5g}"
        for name, row in figures["domains"].items()
    ]
    lines += [f"{pair}: {nats:+.5g} together" for pair, nats in figures["interactions"].items()]
    lines.append(f"all: {_ratio(figures['total'])}; softmax KL {figures['softmax_kl']:.5g} measured")
    if figures["budgets"] is not None:
        lines.append(f"  from the budgets alone: {_ratio(figures['budgets'])}")
    lines += [f"  in {chart}: {_ratio(row)}" for chart, row in figures["charts"].items()]
    if figures["leash"] is not None:
        lines.append(
            f"leash {figures['leash']['nats']:g} nats ({figures['leash']['metric']}): pulls "
            f"{figures['leash_pulled']:.2%} of contexts back, leaves {figures['total']['leashed']:.5g}"
        )
    if figures["allowance"] is not None:
        lines.append(f"budget {figures['allowance']['nats']:g} nats ({figures['allowance']['metric']})")
    if figures["room"] is not None:
        lines.append(f"room for another delta of latent drift {figures['room']:.5g} at weight 1")
    if figures["next"] is not None:
        after = figures["next"]
        lines.append(f"with another delta of drift {after['drift']:g}: at most {after['allowed']:.5g}")
    return lines


def _ratio(row: dict[str, float]) -> str:
    return f"allowed {row['allowed']:.5g}, measured {row['measured']:.5g}, ratio {row['ratio']:.3f}"


def fuse_domains(
    model: str,
    paths: dict[str, float],
    out: Path,
    *,
    by: str | None,
    prior: float | None,
    chart: str | None,
    gated: bool | None,
    gate: str | None,
    leash: float | None,
    leash_metric: str,
    remove: Sequence[str],
    budget: float | None,
    budget_metric: str,
    text: str | None,
    check: Sequence[str],
    as_json: bool,
) -> None:
    """Fuse deltas into a base, or change a fusion, and write the checkpoint; see `fuse` for the arguments.

    What is not given is taken over from a fusion that is changed.

    Raises:
        ConfigError: options that do not fit together, or a domain that is not there.
        Exit: the fusion breaks its budget; nothing is written.
    """
    from tether.causal.checkpoint import save_checkpoint
    from tether.causal.evidence import Rule
    from tether.causal.leash import METRICS, check_leash
    from tether.delta.delta import Delta
    from tether.delta.fare import fare
    from tether.delta.fusion import fuse, manner, unfuse
    from tether.store.documents import text_hash

    if leash:
        check_leash(leash, leash_metric)
    if budget is not None and text is None:
        raise ConfigError(f"--budget {budget:g} without --text: expected the general text it is checked on")
    if budget is not None and not (budget > 0 and budget_metric in METRICS):
        raise ConfigError(
            f"budget {budget:g} in {budget_metric!r}: expected nats > 0 in one of {', '.join(METRICS)}"
        )
    checked = dict(map(_named_text, check))
    opened = open_texts([*([] if text is None else [text]), *checked.values()])
    general = opened.pop(0) if text is not None else None
    documents = text_hash(general) if general is not None else None
    texts = dict(zip(checked, opened, strict=True))
    rule = None if prior is None else Rule(prior=prior)
    of_sums = {"chart": chart, "gate": gate, "leash": leash or None}
    manner(by, rule, of_sums)
    added = {Delta.load(path): weight for path, weight in paths.items()}
    base, tokenizer = load(model)
    before: dict[str, Any] = base.config.fusion or {}
    kept: dict[Delta, float] = {}
    inputs = {delta.name: delta.path for delta in added if delta.path is not None}
    if before:
        base, kept = unfuse(base)
        inputs["fused"] = Path(model) / "model.safetensors"
    if missing := set(remove) - {delta.name for delta in kept}:
        has = ", ".join(delta.name for delta in kept) or "none"
        raise ConfigError(f"no domain {', '.join(sorted(missing))} to remove: the model has {has}")
    kept = {delta: weight for delta, weight in kept.items() if delta.name not in remove}
    held: dict[str, Any] | None = before.get("leash")
    if leash is not None:
        held = {"nats": leash, "metric": leash_metric} if leash else None
    allowance: dict[str, Any] | None = before.get("allowance")
    if budget is not None:
        allowance = {"nats": budget, "metric": budget_metric, "text": documents}
    elif (
        allowance is not None
        and _may_drift(before, added, chart, gated, gate, leash, remove)
        and documents != allowance["text"]
    ):
        raise ConfigError(
            f"the fusion has a budget of {allowance['nats']:g} nats ({allowance['metric']}), and "
            f"{'no --text' if text is None else f'another text ({text})'} was given: expected the text it was "
            "declared on, to check the change; or declare a new --budget"
        )
    if text is not None and allowance is None:
        raise ConfigError(
            f"--text {text} without --budget: expected the nats that it is to be checked for too"
        )
    chosen = by or ("sum" if any(value is not None for value in of_sums.values()) else before.get("by"))
    if before and chosen is None:
        chosen = "sum"  # of a checkpoint that does not say
    chosen = manner(chosen, rule, of_sums)
    if unknown := set(texts) - {delta.name for delta in (*kept, *added)}:
        raise ConfigError(f"--check {', '.join(sorted(unknown))}: no such domain in the fusion")
    gates = before.get("gated") if gated is None else gated
    if chosen == "evidence":
        if rule is None and before.get("by") == "evidence":
            rule = Rule.of(before)
        fused = fuse(base, kept | added, by="evidence", rule=rule, gated=gates, allowance=allowance)
        held = None
    else:
        fused = fuse(
            base, kept | added, by="sum", chart=chart or before.get("chart"), gated=gates,
            gate=gate or before.get("gate"), allowance=allowance,
            leash=held["nats"] if held else None, leash_metric=held["metric"] if held else "softmax",
        )  # fmt: skip
    drift = None
    if allowance is not None and general is not None:
        drift = _checked(fused, tokenizer, general, allowance)
    save_checkpoint(
        fused, tokenizer, out, inputs={role: path for role, path in inputs.items() if path.is_file()}
    )
    described: dict[str, Any] = fused.config.fusion
    with reporter() as steps:
        samples = {delta.name: delta for delta in added}
        fares = fare(fused, tokenizer, texts, samples=samples, on_step=steps("comparing domains"))
    said = f"{out}: {_parts(described)}"
    if held:
        said += f", leash {held['nats']:g} nats ({held['metric']})"
    if drift is not None and allowance is not None:
        said += f"; mean drift {drift:.5g} of {allowance['nats']:g} nats ({allowance['metric']})"
    without = [name for name in described["domains"] if name not in fares]
    result = {
        "path": str(out),
        **described,
        "drift": drift,
        "fares": {name: row._asdict() for name, row in fares.items()},
    }
    emit(result, as_json, "\n".join([said, *fare_lines(fares, without)]))


def _parts(described: dict[str, Any]) -> str:
    if described.get("by") == "evidence":
        sleeping = "each sleeps where the text is unlike its own" if described["gated"] else "none sleeps"
        return (
            f"the base and {', '.join(described['domains'])}, weighted by evidence; the base begins with a weight of "
            f"{described['prior']:g}, {sleeping}"
        )
    parts = " + ".join(f"{w:g} {n}" for n, w in zip(described["domains"], described["weights"], strict=True))
    return f"{parts}, chart {described['chart']}, " + (
        f"{described['gate']} gates" if described["gated"] else "ungated"
    )


def _named_text(text: str) -> tuple[str, str]:
    """Read `DOMAIN=FILE`."""
    name, equals, path = text.partition("=")
    if not equals or not name or not path:
        raise ConfigError(f"--check {text!r}: expected DOMAIN=FILE, as --check law=law-test.jsonl")
    return check_name(name), path


def _may_drift(
    before: dict[str, Any],
    added: Mapping[Any, float],
    chart: str | None,
    gated: bool | None,
    gate: str | None,
    leash: float | None,
    remove: Sequence[str],
) -> bool:
    # A tighter leash alone cannot add drift. Anything else can, a removal too: deltas may have cancelled.
    held = before.get("leash")
    looser = leash is not None and (leash == 0 or (held is not None and leash > held["nats"]))
    chosen = {"chart": chart, "gate": gate, "gated": gated}
    changed = any(value is not None and value != before.get(key, value) for key, value in chosen.items())
    return bool(added or remove or looser or changed)


def _checked(fused: Any, tokenizer: Any, text: Sequence[str], allowance: dict[str, Any]) -> float:
    from tether.delta.ledger import check_allowance

    with reporter() as steps:
        try:
            return check_allowance(fused, tokenizer, text, allowance, on_step=steps("checking the budget"))
        except CertificateError as error:
            tell(str(error))
            raise typer.Exit(1) from error
