"""Commands of the theory lab: statements, experiments, falsify, constants, enclose, plan."""

from pathlib import Path
from typing import Annotated

import typer

from tether.cli.enclosures import ENCLOSED
from tether.cli.output import emit
from tether.cli.progress import reporter
from tether.cli.tables import experiments_told, finding_told, table
from tether.errors import ConfigError

__all__ = ["app"]

app = typer.Typer(
    name="theory",
    help="What is true about the drift of fused deltas: refute, bound, enclose, plan.",
    no_args_is_help=True,
)
JSON = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@app.command()
def statements(as_json: JSON = False) -> None:
    """List every claim, the source's and tether's, with its verdict and what the verdict rests on."""
    from tether.theory.catalogue import STATEMENTS

    rows = [
        {key: getattr(s, key) for key in ("name", "verdict", "text", "assumptions", "source", "basis")}
        for s in STATEMENTS.values()
    ]
    columns = ("name", "verdict", "statement", "holds for", "source", "rests on")
    emit(rows, as_json, table(columns, [list(row.values()) for row in rows]))


@app.command()
def experiments(
    samples: Annotated[int, typer.Option(min=1000, help="Samples of each case beside the document's.")] = 10
    ** 6,
    seed: Annotated[int, typer.Option(help="Of all draws.")] = 0,
    figures: Annotated[
        Path | None, typer.Option(help="Folder for the figures of the page of proofs.")
    ] = None,
    as_json: JSON = False,
) -> None:
    """Repeat the source document's six experiments and show what random samples do not see."""
    import torch

    from tether.store.place import check_place
    from tether.theory.experiments import run_experiments

    if figures is not None:
        check_place(figures / "figure.png")
    torch.set_num_threads(1)  # the batches are small: a second thread only waits
    with reporter() as report:
        results = run_experiments(samples, seed, report("experiments"))
    if figures is not None:
        from tether.report.theory_figures import write_figures

        write_figures(figures)
    record = results.describe()
    emit(record, as_json, experiments_told(record))


@app.command()
def falsify(
    name: Annotated[str, typer.Argument(help="A statement: see 'tether theory statements'.")],
    n: Annotated[int, typer.Option("--n", min=1, help="Number of deltas; with --weights, of weights.")] = 2,
    dim: Annotated[int, typer.Option(min=1, help="Dimensions.")] = 1,
    weights: Annotated[
        str | None, typer.Option(help="Fixed weights, comma-separated; free where left out.")
    ] = None,
    points: Annotated[
        int, typer.Option(min=0, help="Random points to try as well; 1000000000 is practical for a chart.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Of all draws.")] = 0,
    as_json: JSON = False,
) -> None:
    """Search for the worst case of a statement; exit 1 if one that is not refuted fails."""
    import numpy as np
    import torch

    from tether.theory.catalogue import statement
    from tether.theory.search import falsify as search
    from tether.theory.sweep import PAIRED, sweep_pairs, sweep_points

    torch.set_num_threads(1)
    claim = statement(name)
    fixed = None if weights is None else _numbers("--weights", weights)
    with reporter() as report:
        count = n if fixed is None else len(fixed)
        finding = search(
            claim, count=count, dimension=dim, weights=fixed, seed=seed, on_step=report("search")
        )
        swept = None
        if points and name in PAIRED and (count, dim) == (2, 1) and fixed is None:
            swept = sweep_pairs(name, points, np.random.default_rng(seed), report("pairs"))
        elif points:
            shape = [(count, dim)]
            swept = sweep_points(claim, points, seed, shape, on_step=report("points"))
    record = finding.describe() | {"sweep": None if swept is None else swept._asdict()}
    violated = finding.violated or bool(swept and swept.violations)
    emit(record, as_json, finding_told(record))
    if violated and claim.verdict != "refuted":
        raise typer.Exit(1)


@app.command()
def constants(
    most: Annotated[int, typer.Option("--n", min=2, help="C_N for N from 2 to this.")] = 100,
    as_json: JSON = False,
) -> None:
    """Compute the sharp constants of the linear chart and the table of scaling bounds."""
    import torch

    from tether.theory import constants as sharp
    from tether.theory.bounds import scaling_bound

    equal = {str(n): sharp.equal_constant(n).value for n in range(2, most + 1)}
    drifts, factors = (1e-4, 0.01, 0.1, 1.0, 10.0, 100.0), (-1.0, 0.25, 0.5, 2.0)
    nats = torch.tensor(drifts, dtype=torch.float64)
    scaled = {f"{a:g}": (scaling_bound(nats, a) / nats).tolist() for a in factors}
    many, split = sharp.many_constant(), sharp.split_constant()
    turned, threshold = sharp.negation_constant(), sharp.shrinking_threshold()
    record = {
        "C": equal,
        "K_inf": many.value,
        "K_inf_at": [many.x, many.y],
        "K_split": split.value,
        "negation": turned.value,
        "shrinking_threshold": threshold.value,
        "local": {f"{r:g}": sharp.local_constant(r) for r in (0.1, 0.3, 0.5, 1.0)},
        "B_over_drift": {"drift": list(drifts), "weights": scaled},
    }
    shown = [n for n in equal if int(n) in {2, 3, 4, 5, 10, 20, 50, 100} or int(n) == most]
    text = [
        table(("N", "C_N"), [[n, f"{equal[n]:.10f}"] for n in shown]),
        f"K_inf {many.value:.10f} at x = {many.x:.9f}, y = {many.y:.9f}",
        f"K of the split {split.value:.8f}; negation {turned.value:.8f}",
        f"shrinking can raise drift from {threshold.value:.8f} nats a dimension on",
        "",
        "B(e, a) / e, the worst drift of a scaled delta over its own:",
        table(
            ("a \\ e", *(f"{e:g}" for e in drifts)),
            [[a, *(f"{v:.6g}" for v in row)] for a, row in scaled.items()],
        ),
    ]
    emit(record, as_json, "\n".join(text))


@app.command()
def enclose(
    what: Annotated[
        str, typer.Argument(help="constants, counterexamples, any (Theorem 1) or two (Theorem 2).")
    ] = "constants",
    fast: Annotated[
        bool, typer.Option("--fast", help="any, two: a region around the maximum alone.")
    ] = False,
    state: Annotated[
        Path | None, typer.Option(help="any, two: a file to go on from when the run is started again.")
    ] = None,
    as_json: JSON = False,
) -> None:
    """Enclose constants and prove the two theorems in ball arithmetic; exit 1 if a cell resists."""
    if what not in ENCLOSED:
        raise ConfigError(f"unknown enclosure {what!r}: choose one of {', '.join(ENCLOSED)}")
    if state is not None:
        from tether.store.place import check_place

        check_place(state)
    with reporter() as report:
        record, text = ENCLOSED[what](fast, state, report(what))
    emit(record, as_json, text)
    if not record["holds"]:
        raise typer.Exit(1)


@app.command()
def plan(
    budgets: Annotated[str, typer.Option(help="Drift of each delta alone, nats, comma-separated.")],
    weights: Annotated[str | None, typer.Option(help="A weight for each; 1 if left out.")] = None,
    chart: Annotated[str, typer.Option(help="linear, symmetric, geodesic or rootkl.")] = "symmetric",
    leash: Annotated[float, typer.Option(help="Drift that the fusion may have, nats.")] = 1.0,
    as_json: JSON = False,
) -> None:
    """Bound the drift of a fusion from its budgets, and count the domains that fit under a leash."""
    from tether.theory.plan import plan_fusion

    drifts = _numbers("--budgets", budgets)
    planned = plan_fusion(drifts, None if weights is None else _numbers("--weights", weights), chart, leash)
    rows = [
        [
            f"{d.budget:g}",
            f"{d.weight:g}",
            f"{d.alone:.4g}",
            f"{d.share:.1%}",
            "no limit" if d.fit is None else str(d.fit),
        ]
        for d in planned.domains
    ]
    rows_told = table(
        ("budget", "weight", "alone at most", "share of the root", f"how many fit under {leash:g}"), rows
    )
    verdict = "within" if planned.within else "above"
    text = f"Drift of the fusion, chart {chart}: at most {planned.bound:.4g} nats, {verdict} the leash of {leash:g}."
    emit(planned.describe(), as_json, f"{text}\n{rows_told}")


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(
            f"{option} {text!r}: expected numbers with commas between them, such as 0.1,0.2"
        ) from error
