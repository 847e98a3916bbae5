"""Run a benchmark by name, print its rows, and write them as JSON."""

import argparse
import json
from pathlib import Path

from benchmarks import (
    adapter_cost,
    budgets,
    causal,
    coverage,
    delta,
    domains,
    evidence,
    evidence_adapters,
    evidence_bounds,
    evidence_speed,
    evidence_written,
    fars_overfitting,
    fars_upcycled,
    lape,
    lape_merge,
    lape_tefm,
    leash,
    lm_eval_check,
    long_text,
    many,
    merge,
    number_deltas,
    numbers,
    presets,
    recipes,
    router,
    router_deltas,
    scale,
    serve_speed,
    shared_noise,
    theory,
    three_ways,
    together,
    trainer,
    vlm,
    widths,
)
from benchmarks.record import write_rows

BENCHMARKS = {
    "adapter-cost": adapter_cost.rows,
    "budgets": budgets.rows,
    "causal": causal.rows,
    "coverage": coverage.rows,
    "delta": delta.rows,
    "domains": domains.rows,
    "evidence": evidence.rows,
    "evidence-adapters": evidence_adapters.rows,
    "evidence-bounds": evidence_bounds.rows,
    "evidence-speed": evidence_speed.rows,
    "evidence-written": evidence_written.rows,
    "fars-overfitting": fars_overfitting.rows,
    "fars-upcycled": fars_upcycled.rows,
    "lape": lape.rows,
    "lape-merge": lape_merge.rows,
    "lape-tefm": lape_tefm.rows,
    "leash": leash.rows,
    "lm-eval": lm_eval_check.rows,
    "long-text": long_text.rows,
    "many": many.rows,
    "merge": merge.rows,
    "number-deltas": number_deltas.rows,
    "three-ways": three_ways.rows,
    "numbers": numbers.rows,
    "presets": presets.rows,
    "recipes": recipes.rows,
    "router": router.rows,
    "router-deltas": router_deltas.rows,
    "scale": scale.rows,
    "serve-speed": serve_speed.rows,
    "shared-noise": shared_noise.rows,
    "theory": theory.rows,
    "together": together.rows,
    "trainer": trainer.rows,
    "vlm": vlm.rows,
    "widths": widths.rows,
}


def main() -> None:
    """Parse, run, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", choices=sorted(BENCHMARKS))
    parser.add_argument("--fast", action="store_true", help="a fraction of the text")
    parser.add_argument("--json", type=Path, help="write the rows here, stamped with machine and versions")
    arguments = parser.parse_args()
    rows = []
    for row in BENCHMARKS[arguments.name](fast=arguments.fast):
        print(json.dumps(row), flush=True)
        rows.append(row)
    if arguments.json:
        write_rows(arguments.json, arguments.name, rows)


if __name__ == "__main__":
    main()
