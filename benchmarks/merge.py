"""Merging three 540 MB files beside mergekit: processor time, memory, and whether the results agree."""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml
from safetensors import safe_open
from safetensors.numpy import save_file

from tether.causal.loading import resolve
from tether.errors import ConfigError
from tether.merge.plan import make_plan
from tether.merge.recipe import read_recipe

__all__ = ["rows"]

BASE = "smollm2-135m"
OURS = "import sys; from tether.cli.app import main; main()"
THEIRS = "import sys; from mergekit.scripts.run_yaml import main; main()"
SETTINGS = {
    "linear": {"weight": 0.5},
    "task_arithmetic": {"weight": 0.5},
    "slerp": {},
    "dare_ties": {"weight": 0.5, "density": 0.5},
    "ties": {"weight": 0.5, "density": 0.5},
}

ASKED = ("task_arithmetic", "ties")


def rows(*, fast: bool) -> list[dict[str, Any]]:
    """Run both tools in turns, one thread each, and compare.

    Args:
        fast: one run of task arithmetic and TIES, instead of three of these and one of every other operator.

    Returns:
        The rows.

    Raises:
        ConfigError: mergekit's environment is missing.
    """
    peers = Path(os.environ.get("TETHER_PEERS", ".venv-peers/bin/python"))
    if not peers.is_file():
        raise ConfigError(
            f"{peers} does not exist; expected a Python with requirements/mergekit.txt installed. Run `make peers`, or "
            "name one in TETHER_PEERS"
        )
    made: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        work = Path(folder)
        inputs = _inputs(work)
        for operator in ASKED if fast else SETTINGS:
            made += _compare(work, peers, operator, inputs, runs=3 if operator in ASKED and not fast else 1)
        made += _planning(work, peers, fast=fast)
    return made


def _compare(
    work: Path, peers: Path, operator: str, inputs: dict[str, Path], runs: int
) -> list[dict[str, Any]]:
    ours, theirs = _recipes(work, operator, inputs)
    costs: dict[str, list[dict[str, float]]] = {"ours": [], "baseline": []}
    outputs = {"ours": work / "ours", "baseline": work / "theirs"}
    for _ in range(runs):
        for output in outputs.values():
            shutil.rmtree(output, ignore_errors=True)
        command = [sys.executable, "-c", OURS, "merge", ours, "--out", outputs["ours"], "--threads", "1"]
        costs["ours"].append(_cost(command))
        costs["baseline"].append(_cost([peers, "-c", THEIRS, theirs, outputs["baseline"]]))
    made = []
    for metric in ("cpu_seconds", "wall_seconds", "peak_anonymous_mb"):
        samples = {who: [cost[metric] for cost in each] for who, each in costs.items()}
        middle = {who: statistics.median(each) for who, each in samples.items()}
        ratio = middle["ours"] / middle["baseline"]
        made.append({"case": operator, "metric": metric, **middle, "ratio": ratio, "runs": samples})
    if operator != "dare_ties":  # random masks cannot agree
        made.append({"case": operator, **_agreement(outputs, inputs, operator)})
    return made


# Two fine-tunes as synthetic deltas, rank 8 and 1 % sparse, about 0.9 % of the weights' norm.
def _inputs(work: Path) -> dict[str, Path]:
    base = Path(resolve(BASE))
    paths = {"base": base}
    for seed, name in enumerate("ab", start=1):
        draw = np.random.default_rng(seed)
        tensors = {}
        with safe_open(base / "model.safetensors", framework="numpy") as file:
            for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
                values = file.get_tensor(key).astype(np.float32)
                change = np.zeros_like(values)
                if values.ndim == 2:
                    left, right = (draw.standard_normal((size, 8), np.float32) for size in values.shape)
                    change = left @ right.T / np.float32(8**0.5)
                sparse = draw.random(values.shape, np.float32) < 0.01
                change += 10 * sparse * draw.standard_normal(values.shape, np.float32)
                tensors[key] = values + change * np.float32(0.006 * values.std() + 1e-6)
        paths[name] = work / name
        paths[name].mkdir()
        for file_ in base.iterdir():
            if file_.suffix != ".safetensors":
                shutil.copy(file_, paths[name])
        save_file(tensors, paths[name] / "model.safetensors", metadata={"format": "pt"})
    return paths


def _recipes(work: Path, operator: str, inputs: dict[str, Path]) -> tuple[Path, Path]:
    settings = SETTINGS[operator]
    ours: dict[str, Any] = {
        "operator": "ties/mergekit" if operator == "ties" else operator,
        "base": {"path": str(inputs["base"])},
        "models": {name: {"path": str(inputs[name]), **settings} for name in "ab"},
        "dtype": "float32",
    }
    models = [{"model": str(inputs[name]), "parameters": settings} for name in "ab"]
    theirs: dict[str, Any] = {
        "merge_method": operator,
        "base_model": str(inputs["base"]),
        "models": models,
        "dtype": "float32",
    }
    if operator == "linear":
        theirs.pop("base_model")
    if operator == "slerp":
        ours["options"] = {"t": 0.3}
        theirs |= {
            "base_model": str(inputs["a"]),
            "parameters": {"t": 0.3},
            "models": [{"model": str(inputs[name])} for name in "ab"],
        }
    paths = work / "ours.yaml", work / "theirs.yaml"
    for path, content in zip(paths, (ours, theirs), strict=True):
        path.write_text(yaml.safe_dump(content))
    return paths


# Run a command alone; its peak of anonymous memory is looked at every 5 ms.
def _cost(command: list[Any]) -> dict[str, float]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen([str(part) for part in command], env=environment, stdout=said, stderr=said)
        peak = 0
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            peak = max(peak, _anonymous(process.pid))
            time.sleep(0.005)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise RuntimeError(f"{command[:4]} failed:\n{said.read().decode()[-2000:]}")
    return {
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "wall_seconds": time.perf_counter() - start,
        "peak_anonymous_mb": peak / 1e3,
    }


def _anonymous(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)


# Compare all tensors; of TIES, also say which differences come from equal magnitudes at the threshold.
def _agreement(outputs: dict[str, Path], inputs: dict[str, Path], operator: str) -> dict[str, Any]:
    total = differing = untied = 0
    largest = 0.0
    files = {name: _open(path) for name, path in (outputs | inputs).items()}
    for key in sorted(files["ours"]):
        ours, theirs = (files[who][key]() for who in outputs)
        total += ours.size
        where = np.flatnonzero(ours.reshape(-1) != theirs.reshape(-1))
        if not len(where):
            continue
        largest = max(largest, float(np.abs(ours - theirs).max() / np.abs(ours).max()))
        differing += len(where)
        if operator == "ties":
            untied += int((~_tied(files, key, where)).sum())
    found: dict[str, Any] = {
        "metric": "elements_that_differ",
        "ours": differing,
        "baseline": total,
        "ratio": differing / total,
        "largest_relative_difference": largest,
    }
    if operator == "ties":
        found["differing_without_a_tie_at_the_threshold"] = untied
    return found | {"runs": {}}


def _tied(files: dict[str, dict[str, Any]], key: str, where: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    tied = np.zeros(len(where), np.bool_)
    base = files["base"][key]().reshape(-1)
    for name in "ab":
        magnitudes = np.abs(files[name][key]().reshape(-1) - base)
        keep = max(1, int(SETTINGS["ties"]["density"] * len(magnitudes)))
        threshold = np.partition(magnitudes, len(magnitudes) - keep)[len(magnitudes) - keep]
        tied |= magnitudes[where] == threshold
    return tied


# Name to a function that reads the tensor.
def _open(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as opened:
            names = list(opened.keys())
        found |= {name: lambda name=name, file=file: _tensor(file, name) for name in names}
    return found


def _tensor(file: Path, name: str) -> npt.NDArray[np.float32]:
    with safe_open(file, framework="numpy") as opened:
        return opened.get_tensor(name)


# Many small tensors: what planning takes here, and a whole merge of them in both tools.
def _planning(work: Path, peers: Path, *, fast: bool) -> list[dict[str, Any]]:
    layers = 100 if fast else 889
    config = json.loads((Path(resolve(BASE)) / "config.json").read_bytes())
    config |= {
        "num_hidden_layers": layers,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "vocab_size": 16,
    }
    inside = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
    names = [f"self_attn.{name}" for name in inside[0]] + [f"mlp.{name}" for name in inside[1]]
    tensors = {
        "model.embed_tokens.weight": np.ones((16, 8), np.float32),
        "model.norm.weight": np.ones(8, np.float32),
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        tensors |= {f"{prefix}.{name}.weight": np.ones((8, 8), np.float32) for name in names}
        tensors |= {
            f"{prefix}.{name}_layernorm.weight": np.ones(8, np.float32)
            for name in ("input", "post_attention")
        }
    inputs = {}
    for name in ("base", "a", "b"):
        inputs[name] = work / f"small-{name}"
        inputs[name].mkdir()
        (inputs[name] / "config.json").write_text(json.dumps(config))
        save_file(tensors, inputs[name] / "model.safetensors", metadata={"format": "pt"})
    recipe = read_recipe(_recipes(work, "task_arithmetic", inputs)[0])
    planning = []
    for _ in range(3):
        start = time.process_time()
        make_plan(recipe)
        planning.append(time.process_time() - start)
    made = [
        {
            "case": f"plan {len(tensors)} tensors",
            "metric": "cpu_seconds",
            "ours": statistics.median(planning),
            "baseline": None,
            "ratio": None,
            "runs": {"ours": planning},
        }
    ]
    merged = _compare(work, peers, "task_arithmetic", inputs, runs=1)
    return made + [row | {"case": f"merge {len(tensors)} tensors"} for row in merged]
