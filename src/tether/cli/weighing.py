"""The command that finds the weights of a fusion."""

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from tether.cli.output import emit, quiet_libraries
from tether.cli.progress import reporter
from tether.errors import ConfigError

__all__ = ["weigh"]


def weigh(
    model: Annotated[str, typer.Argument(help="The base the deltas were learnt on.")],
    deltas: Annotated[list[str], typer.Argument(help="Delta files, each with its text: law.delta=law.jsonl")],
    base_text: Annotated[Path, typer.Option(help="General text on which the drift is held.")],
    budget: Annotated[float, typer.Option(help="Drift allowed on base text, nats per token.")] = 0.05,
    metric: Annotated[
        str, typer.Option(help="What the budget is in: softmax, fisher or latent.")
    ] = "softmax",
    quantile: Annotated[
        float | None, typer.Option(help="Limit this quantile of the drift instead of its mean.")
    ] = None,
    chart: Annotated[str, typer.Option(help="symmetric, linear, geodesic or rootkl.")] = "symmetric",
    gate: Annotated[
        bool, typer.Option("--gate/--no-gate", help="Let each delta act only where its gate is open.")
    ] = False,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of each domain to use, in whole windows.")
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="Keep hidden states here for the next time.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Find the weights with the least loss on the domains under a drift budget, for 'tether fuse'."""
    quiet_libraries()
    from tether.causal.loading import load
    from tether.delta.budget import Budget
    from tether.delta.delta import Delta
    from tether.delta.weights import weigh_texts
    from tether.store.documents import read_documents

    limit = Budget(value=budget, metric=metric, quantile=quantile)
    pairs = [_pair(text) for text in deltas]
    for path in [base_text, *(text for _, text in pairs)]:
        read_documents(path)
    loaded = [Delta.load(path) for path, _ in pairs]
    texts = {delta.name: text for delta, (_, text) in zip(loaded, pairs, strict=True)}
    base, tokenizer = load(model)
    with reporter() as steps:
        found = weigh_texts(
            base, tokenizer, loaded, texts, base_text, budget=limit, chart=chart, gated=gate, tokens=tokens,
            cache_folder=cache, on_step=steps("reading"),
        )  # fmt: skip
    record: dict[str, Any] = found.record
    losses = record["losses"]
    given = " ".join(shlex.quote(f"{delta.path}={weight:.4g}") for delta, weight in found.weights.items())
    lines = [
        f"tether fuse {shlex.quote(model)} {given} --chart {chart} "
        f"{'--gate one-class' if gate else '--no-gate'} --out FUSED",
        *(
            f"{delta.path}={weight:.4g}   loss {losses['base'][delta.name]:.3f} -> "
            f"{losses['optimised'][delta.name]:.3f} (equal weights {losses['equal'][delta.name]:.3f})"
            for delta, weight in found.weights.items()
        ),
    ]
    certificate = record["certificate"]
    bound = certificate["at_most"]
    lines.append(
        f"drift {record['drift']:.4g} of {budget} nats ({metric}); on {certificate['documents']} documents not used "
        f"before: mean {certificate['mean']:.4g}, {certificate['quantile']:g} quantile "
        + (f"at most {bound:.4g}" if bound is not None else "not bounded, too few documents")
        + f" ({certificate['confidence']:g} confidence)"
    )
    emit(record, as_json, "\n".join(lines))


def _pair(text: str) -> tuple[Path, Path]:
    """Read `file.delta=text.jsonl`; either may have `=` in it."""
    parts = text.split("=")
    cuts = [("=".join(parts[:n]), "=".join(parts[n:])) for n in range(1, len(parts))]
    path, domain = next((cut for cut in cuts if Path(cut[0]).is_file()), cuts[0] if cuts else ("", ""))
    if not path or not domain:
        raise ConfigError(
            f"{text!r}: expected a delta file and the text of its domain, as law.delta=law.jsonl"
        )
    return Path(path), Path(domain)
