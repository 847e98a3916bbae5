"""Shaping routers: what it does to small trainings, against none and balancing, and what reading costs costs."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from benchmarks.router_tasks import ARMS, Arm, Outcome, byte_texts, language, regression
from tether.router import RoutingShaper
from tether.stats import standard_error

__all__ = ["rows"]

Row = dict[str, Any]
SEEDS = {
    "regression": range(500, 564),
    "regression, later seeds": range(600, 664),
    "starved": range(300, 310),
    "bytes": range(400, 420),
}
"""No setting was chosen on these (that was on 0 to 9), and all were named before their first run. 200 to 207 and 300 to
331, which the regression had before, are reported in the log."""
METRICS = ("loss", "eff_k", "effective_experts", "nrmi", "itjd", "max_violation", "dead")
STARVED = {
    "none": Arm("none"),
    "Switch": Arm("switch", lam=0.01),
    "KL-uniform": Arm("prior", "uniform", lam=0.05),
    "direction 2": Arm("tax", lam=0.05),
    "balance": Arm("balance", lam=0.025),
    "prior by cost": Arm("prior", lam=0.05),
}
LATER = ("none", "balance")


def rows(*, fast: bool) -> list[Row]:
    """Train every arm from the same seeds; differences to no shaping are paired, with their standard errors.

    Args:
        fast: two seeds and a third of the steps: shows that all runs, not what comes out.

    Returns:
        Rows of case, metric, ours, baseline, ratio, runs, and where arms are compared difference and error.
    """
    found = _overhead(fast)
    share = 3 if fast else 1
    seeds = {task: chosen[:2] if fast else chosen for task, chosen in SEEDS.items()}
    # What is claimed of goodness is that it does what its control does, so that is its baseline.
    arms = {name: arm for name, arm in ARMS.items() if name != "goodness"}
    entropies = {name: ARMS[name] for name in ("goodness, g=0", "goodness", "none")}
    texts = byte_texts(40_000 if fast else 400_000)
    found += _compare("regression", regression, arms, seeds["regression"], steps=1200 // share)
    later = "regression, later seeds"
    found += _compare(
        later, regression, {name: ARMS[name] for name in LATER}, seeds[later], steps=1200 // share
    )
    found += _compare(
        "starved regression", regression, STARVED, seeds["starved"], starved=True, steps=800 // share
    )
    found += _compare(
        "bytes", lambda arm, seed, **options: language(arm, seed, texts, **options), arms, seeds["bytes"],
        steps=300 // share,
    )  # fmt: skip
    found += _compare("regression, goodness", regression, entropies, seeds["regression"], steps=1200 // share)
    return found + _accepted(found)


def _compare(
    task: str, train: Callable[..., Outcome], arms: dict[str, Arm], seeds: Sequence[int], **options: Any
) -> list[Row]:
    """Run arms from the same seeds; the first arm is the baseline."""
    outcomes = {name: [train(arm, seed, **options) for seed in seeds] for name, arm in arms.items()}
    baseline = next(iter(arms))
    found = []
    for name, arm in arms.items():
        for metric in METRICS:
            mine, other = (_values(outcomes[key], metric) for key in (name, baseline))
            differences = [a - b for a, b in zip(mine, other, strict=True)]
            mean, against = statistics.mean(mine), statistics.mean(other)
            found.append({
                "case": f"{task}: {name} (lam {arm.lam:g}); baseline: {baseline}",
                "metric": metric, "ours": mean, "baseline": against, "ratio": mean / against if against else None,
                "difference": statistics.mean(differences), "error": float(standard_error(differences)),
                "runs": len(seeds),
            })  # fmt: skip
    return found


def _accepted(found: list[Row]) -> list[Row]:
    """Hold the arms of direction 2 against the acceptance figures 3 to 6 of the research notes (section 7)."""
    rows = {(row["case"].split(" (lam")[0], row["metric"]): row for row in found}
    reading = next(row for row in found if row["case"].startswith("one reading"))
    every = next(row for row in found if row["case"].startswith("readings at every=10;"))
    checks = [
        ("3: one reading, share of a step", reading["ratio"], 0.03, "<="),
        ("3: readings at every=10, share of a step", every["ratio"], 0.005, "<="),
    ]
    for arm in (
        "regression: direction 2",
        "regression: balance",
        "regression, later seeds: balance",
    ):
        loss, nrmi, used = (rows[arm, m] for m in ("loss", "nrmi", "effective_experts"))
        checks += [
            (
                f"4: {arm}: loss above none, of two standard errors",
                loss["difference"],
                2 * loss["error"],
                "<=",
            ),
            (f"4: {arm}: nRMI above none", nrmi["difference"], -0.01, ">="),
            (f"4: {arm}: load-effective experts above none", used["difference"], 1.0, ">="),
        ]
    for arm in ("direction 2", "balance"):
        starved = {m: rows[f"starved regression: {arm}", m] for m in ("loss", "dead")}
        checks += [
            (f"5: {arm}: dead of 8", starved["dead"]["ours"], 1.5, "<="),
            (f"5: {arm}: loss above none", starved["loss"]["difference"], -0.008, "<="),
        ]
    for arm in ("direction 2", "balance"):
        nats, violation = (rows[f"bytes: {arm}", m]["ours"] for m in ("loss", "max_violation"))
        checks += [
            (f"6: {arm}: loss above Switch", nats - rows["bytes: Switch", "loss"]["ours"], 0.01, "<="),
            (f"6: {arm}: MaxVio", violation, 0.4, "<="),
        ]
    return [
        {
            "case": f"acceptance figure {case}; baseline: the limit", "metric": f"measured {sign} limit", "ours": ours,
            "baseline": limit, "ratio": None, "runs": 1, "holds": ours <= limit if sign == "<=" else ours >= limit,
        }
        for case, ours, limit, sign in checks
    ]  # fmt: skip


def _values(outcomes: list[Outcome], metric: str) -> list[float]:
    return [o.loss if metric == "loss" else float(o.metrics[metric]) for o in outcomes]


def _overhead(fast: bool) -> list[Row]:
    """Reading costs, and all of shaping at every=10, against a step of training the same model."""
    config = Qwen3MoeConfig(
        vocab_size=256, hidden_size=1024, moe_intermediate_size=1024, num_hidden_layers=1, num_attention_heads=8,
        num_key_value_heads=8, head_dim=64, num_experts=24, num_experts_per_tok=2, bos_token_id=0, eos_token_id=0,
        pad_token_id=0,
    )  # fmt: skip
    config._experts_implementation = "grouped_mm"
    model = Qwen3MoeForCausalLM(config)
    size = sum(p.numel() for p in model.model.layers[0].mlp.experts.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    ids = torch.randint(256, (4, 256), generator=torch.Generator().manual_seed(0))
    steps, readings, terms = [], [], []
    with RoutingShaper(model, optimizer, every=1_000_000) as shaper:
        for number in range(4 if fast else 8):
            started = time.process_time()
            loss = model(input_ids=ids, labels=ids).loss
            middle = time.process_time()
            term = shaper.loss()
            after = time.process_time()
            optimizer.zero_grad()
            (loss + term).backward()
            optimizer.step()
            ended = time.process_time()
            shaper.costs()
            if number:  # the first step allocates the optimizer's state
                terms.append(after - middle)
                steps.append(ended - started - terms[-1])
                readings.append(time.process_time() - ended)
    reading, step, term = (statistics.median(values) for values in (readings, steps, terms))
    case = f"{size / 1e6:.0f}M expert parameters, 1,024 tokens; baseline: forward, backward and AdamW"
    return [
        {
            "case": f"{what}; {case}", "metric": "CPU seconds a step", "ours": ours, "baseline": step,
            "ratio": ours / step, "runs": len(steps),
        }
        for what, ours in (
            ("one reading of the costs", reading),
            ("readings at every=10", reading / 10),
            ("readings at every=10 and the term", reading / 10 + term),
        )
    ]  # fmt: skip
