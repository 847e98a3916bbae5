"""A stock client, lm-evaluation-harness, on a converted model and on its base: every figure must be the same."""

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tether.causal.loading import resolve
from tether.errors import ConfigError

__all__ = ["rows"]

Row = dict[str, Any]

BASE = "smollm2-135m"
TASKS = Path(__file__).parent / "lm_eval_tasks"
NAMES = ("tether_news_choice", "tether_news_word", "tether_news_perplexity")


def rows(*, fast: bool) -> list[Row]:
    """Convert the base as a user would, and let the harness's `hf` backend score both.

    Args:
        fast: 8 documents a task instead of 40.

    Returns:
        Rows of case, metric, ours, baseline, ratio, runs: the harness's own metrics, and how many of its
        log-likelihoods are the base's to the last bit.

    Raises:
        ConfigError: lm-evaluation-harness is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "lm_eval is not installed: run `make peers`, then PYTHONPATH=.venv/peers python -m benchmarks lm-eval"
        )
    # Nothing here needs a hub; without this the harness asks one for each path.
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    count = 8 if fast else 40
    with tempfile.TemporaryDirectory() as folder:
        converted = str(Path(folder) / "converted")
        command = [sys.executable, "-m", "tether.cli.app", "convert", BASE, "--out", converted]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        ours = _evaluate(converted, count)
    theirs = _evaluate(resolve(BASE), count)
    found: list[Row] = []
    for task in NAMES:
        case = f"lm-eval, backend hf, {task}, {count} documents; baseline: the base before conversion"
        for name, value in ours["results"][task].items():
            if isinstance(value, float) and "stderr" not in name:
                found.append(
                    _row(case, name.removesuffix(",none"), value, float(theirs["results"][task][name]))
                )
        pairs = list(zip(_likelihoods(ours, task), _likelihoods(theirs, task), strict=True))
        same = sum(mine == other for mine, other in pairs)
        found.append(
            _row(
                case.replace("the base before conversion", "all of them"),
                "log-likelihoods equal to the last bit",
                float(same),
                float(len(pairs)),
            )
        )
    return found


def _evaluate(model: str, count: int) -> dict[str, Any]:
    # Both after the check that it is there; tether makes itself known to transformers' Auto classes.
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    return simple_evaluate(
        model="hf",
        model_args={"pretrained": model, "dtype": "float32"},
        tasks=list(NAMES),
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        batch_size=8,
        device="cpu",
        limit=count,
        log_samples=True,
        bootstrap_iters=0,
    )


def _likelihoods(results: dict[str, Any], task: str) -> list[str]:
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return [repr(value) for sample in samples for value in sample["filtered_resps"]]


def _row(case: str, metric: str, ours: float, baseline: float) -> Row:
    return {
        "case": case,
        "metric": metric,
        "ours": ours,
        "baseline": baseline,
        "ratio": ours / baseline if baseline else 1.0 if ours == baseline else float("inf"),
        "runs": [ours],
    }
