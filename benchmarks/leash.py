"""The leash on the real base: whether it holds, what it costs, and what it does to a domain's text."""

import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tether.cauchy.charts import CHARTS
from tether.cauchy.charts import fuse as fuse_moves
from tether.cauchy.divergence import drift, kl_divergence
from tether.causal.fused import Fusion
from tether.causal.loading import load
from tether.causal.modeling import CausalQwenForCausalLM
from tether.delta.delta import Delta
from tether.delta.fusion import fuse
from tether.delta.measure import Variant, measure
from tether.delta.shards import load_shards
from tether.delta.token_law import check_token_law
from tether.delta.windows import window_text
from tether.demo.plan import TITLES
from tether.errors import CheckpointError
from tether.store.documents import read_documents
from tether.theory.bounds import fused_drift_bound

__all__ = ["rows"]

Row = dict[str, Any]
LIMITS = (0.5, 2.0, 8.0)
TOLERANCE = 1e-5
WEIGHTS = ((1.0, 1.0, 1.0), (0.5, -1.0, 2.0))


def rows(*, fast: bool) -> list[Row]:
    """Measure.

    Args:
        fast: a tenth of the contexts.

    Returns:
        Rows of case and figures.

    Raises:
        CheckpointError: no finished demo to take deltas and texts from.
    """
    folder = Path(os.environ.get("TETHER_DEMO", "demo"))
    if not (folder / "deltas").is_dir():
        raise CheckpointError(
            f"{folder}: no deltas; run 'tether demo' first, or set TETHER_DEMO to its folder"
        )
    share = 10 if fast else 1
    parts = {
        "holds": lambda: _tiny_holds(1_000_000 // share),
        "holds-real": lambda: _real_holds(folder, 2000 // share),
        "synthetic": lambda: _synthetic_bounds(10_000_000 // share),
        "contexts": lambda: _real_bounds(folder, share),
        "time": lambda: [*_generation(folder, 3 if fast else 7), *_alone(folder, 3 if fast else 7)],
        "nll": lambda: _nll(folder, 1000 // share),
        "tokens": lambda: _token_law(folder, 400 if fast else 600, 4 if fast else 10),
    }
    # One thread: CPU seconds then count work, not the waiting of threads for each other on a busy machine.
    torch.set_num_threads(1)
    chosen = os.environ.get("TETHER_LEASH_PARTS", ",".join(parts)).split(",")
    return [row for name in chosen for row in parts[name]()]


def _deltas(folder: Path) -> dict[Delta, float]:
    return {Delta.load(path): 1.0 for path in sorted((folder / "deltas").glob("*.delta"))}


def _tiny(dtype: torch.dtype) -> CausalQwenForCausalLM:
    """A small random base, so that a million contexts take minutes."""
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.25)
    return CausalQwenForCausalLM.from_backbone(model.to(dtype).eval())


def _random_delta(model: CausalQwenForCausalLM, name: str, seed: int, reach: float) -> Delta:
    generator = torch.Generator().manual_seed(seed)
    width = model.abduction.loc.in_features
    first, second = torch.randn(2, width, width, generator=generator) / width
    return Delta(
        name=name,
        chart="symmetric",
        first=first,
        second=reach * second,
        gate=None,
        base=str(model.config.base_fingerprint),
    )


def _contexts(
    model: CausalQwenForCausalLM, fusion: Fusion, count: int, generator: torch.Generator
) -> Iterator[tuple[str, Tensor]]:
    """Yield hidden states: random of all sizes, extreme, searched by gradient, and right at the limit."""
    width = model.abduction.loc.in_features
    some = torch.randn(count // 4, width, generator=generator)
    size = 10 ** (6 * torch.rand(len(some), 1, generator=generator) - 3)
    yield "random, size 1e-3 to 1e3", some * size
    sign = torch.randint(3, some.shape, generator=generator) - 1
    yield (
        "extreme, entries 0 or +-1e3 to 1e30",
        sign * 10 ** (27 * torch.rand(some.shape, generator=generator) + 3),
    )
    # The direction of steepest drift, by gradient ascent with the size held.
    search = some.clone().requires_grad_()
    for _ in range(10):
        x, y = fusion.sum.add(*fusion.deltas(search), torch.ones(len(fusion.domains), len(search)))
        gradient = torch.autograd.grad(drift(x, y).sum(), search)[0]
        step = gradient / gradient.norm(dim=-1, keepdim=True).clamp(min=1e-30)
        found = search.detach() + 0.3 * search.detach().norm(dim=-1, keepdim=True) * step
        scale = search.detach().norm(dim=-1, keepdim=True) / found.norm(dim=-1, keepdim=True)
        search = (found * scale).requires_grad_()
    adversarial = search.detach()
    yield "searched for the largest drift by gradient", adversarial
    # Shrunk until the drift without a leash is the limit, give or take 1e-4.
    low, high = torch.full((len(some), 1), -12.0), torch.full((len(some), 1), 3.0)
    for _ in range(18):
        middle = (low + high) / 2
        over = _unleashed(model, fusion, adversarial * 10**middle) > (fusion.leash or (1.0,))[0]
        low, high = torch.where(over[:, None], low, middle), torch.where(over[:, None], middle, high)
    jitter = 1 + 1e-4 * torch.randn(len(some), 1, generator=generator)
    yield "searched, at the limit give or take 1e-4", adversarial * 10**low * jitter


@torch.no_grad()
def _unleashed(model: CausalQwenForCausalLM, fusion: Fusion, states: Tensor) -> Tensor:
    loc, log_scale = model.abduction(states.to(model.action.weight.dtype))
    x, y = fusion.sum.add(*fusion.deltas(states), torch.ones(len(fusion.domains), len(states)))
    if fusion.leash is not None and fusion.leash[1] == "latent":
        return drift(x, y).sum(-1)
    found = [
        _softmax_kl(model.action.score_loc(a), model.action.score_loc(a + b))
        for a, b in zip(loc.split(4096), (log_scale.exp() * y).split(4096), strict=True)
    ]
    return torch.cat(found).float()


def _softmax_kl(base: Tensor, moved: Tensor) -> Tensor:
    p, q = base.double().log_softmax(-1), moved.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


@torch.no_grad()
def _excess(model: CausalQwenForCausalLM, fusion: Fusion, states: Tensor) -> tuple[Tensor, Tensor]:
    """Return drift over limit of what is served, and the leash's factors."""
    nats, metric = fusion.leash or (1.0, "latent")
    ratios, factors = [], []
    for part in states.split(4096):
        loc, log_scale = model.abduction(part.to(model.action.weight.dtype))
        gates = torch.ones(len(fusion.domains), len(part))
        head = model.action.weight, model.action.bias
        law = fusion.sum.law(loc, log_scale, *fusion.deltas(part), gates, head, keep_scores=True)
        if metric == "latent":
            laws = (
                v.double() for v in (loc, log_scale.double().exp(), law.loc, law.log_scale.double().exp())
            )
            got = kl_divergence(*laws).sum(-1)
        else:
            if law.scores is None:
                raise RuntimeError("a leash in softmax that computed no scores")
            got = _softmax_kl(model.action.score_loc(loc), law.scores)
        # A base that is no law itself (scores of 1e30 overflow) must come back bit for bit.
        same = (law.loc == loc).all(-1) & (law.log_scale == log_scale).all(-1)
        ratios.append(torch.where(same, 0, got / nats))
        factors.append(law.factor)
    return torch.cat(ratios), torch.cat(factors)


def _held(case: str, ratio: Tensor, factor: Tensor) -> Row:
    return {
        "case": case,
        "contexts": len(ratio),
        "over": int((~(ratio <= 1 + TOLERANCE)).sum()),
        "largest_ratio": float(ratio.max()),
        "pulled": float((factor < 1).double().mean()),
    }


def _tiny_holds(count: int) -> list[Row]:
    found = []
    each = count // (len(CHARTS) * 2 * 2)
    for dtype in (torch.float32, torch.bfloat16):
        model = _tiny(dtype)
        for metric, reach in (("latent", 1.0), ("softmax", 200.0)):
            gathered: dict[str, list[tuple[Tensor, Tensor]]] = {}
            for number, chart in enumerate(CHARTS):
                nats = (0.01, 0.5, 2.0, 8.0)[number]
                deltas = {_random_delta(model, name, seed, reach): 1.0 for seed, name in enumerate("abc")}
                fusion = fuse(model, deltas, chart=chart, gated=False, leash=nats, leash_metric=metric).fusion
                generator = torch.Generator().manual_seed(number)
                for kind, states in _contexts(model, fusion, each, generator):
                    gathered.setdefault(kind, []).append(_excess(model, fusion, states))
            name = str(dtype).removeprefix("torch.")
            for kind, results in gathered.items():
                ratio, factor = (torch.cat(part) for part in zip(*results, strict=True))
                found.append(_held(f"tiny base, {name}, {metric} leash, all charts: {kind}", ratio, factor))
    return found


def _real_holds(folder: Path, count: int) -> list[Row]:
    model, _ = load("smollm2-135m")
    found = []
    states = load_shards(folder / "states" / "tables").states
    for nats, metric in ((0.5, "softmax"), (2.0, "latent")):
        fusion = fuse(model, _deltas(folder), gated=False, leash=nats, leash_metric=metric).fusion
        some = states[:: max(1, len(states) // count)][:count].float()
        for kind, size in (("", 1.0), (" times 30", 30.0), (" times 1e6", 1e6)):
            case = f"SmolLM2-135M, {metric} leash of {nats:g}, states of tables text{kind}"
            found.append(_held(case, *_excess(model, fusion, some * size)))
    return found


@torch.no_grad()
def _synthetic_bounds(count: int) -> list[Row]:
    """Fused drift against its bound for deltas in one dimension, of all sizes, numbers and weights."""
    found = []
    for chart in CHARTS:
        generator = torch.Generator().manual_seed(0)
        violations, largest, done = 0, 0.0, 0
        while done < count:
            deltas = int(torch.randint(1, 51, (), generator=generator))
            contexts = 400_000 // deltas
            size = 10 ** (6 * torch.rand(2, 1, contexts, generator=generator, dtype=torch.float64) - 4)
            x, y = torch.randn(2, deltas, contexts, generator=generator, dtype=torch.float64) * size
            # Beyond this the sums leave the range of a float64.
            x, y = x.clamp(-100 / deltas, 100 / deltas).unsqueeze(-1), y.unsqueeze(-1)
            weights = 2 * torch.randn(deltas, generator=generator, dtype=torch.float64)
            if done % 2:
                weights = torch.ones(deltas, dtype=torch.float64)
            moved = drift(*fuse_moves(x, y, weights, chart))[..., 0]
            bound = fused_drift_bound(drift(x, y)[..., 0], weights, chart)
            ratio = moved / bound.clamp(min=1e-300)
            # Drift below 1e-20 is rounding of coordinates near 1.
            violations += int(((ratio > 1 + 1e-9) & (moved > 1e-20)).sum())
            largest = max(largest, float(ratio[moved > 1e-20].max()))
            done += deltas * contexts + 1 - (deltas * contexts) % 2
        found.append(
            {
                "case": f"synthetic deltas, {chart}",
                "deltas": done,
                "over": violations,
                "largest_ratio": largest,
            }
        )
    return found


@torch.no_grad()
def _real_bounds(folder: Path, stride: int) -> list[Row]:
    """Fused drift against its bound on cached states of the demo's texts, gates open."""
    model, _ = load("smollm2-135m")
    fusion = fuse(model, _deltas(folder), gated=False, by="sum").fusion
    count, over, largest = 0, dict.fromkeys(CHARTS, 0), dict.fromkeys(CHARTS, 0.0)
    for path in sorted((folder / "states").iterdir()):
        for number, part in enumerate(load_shards(path).states[::stride].split(512)):
            x, y = fusion.deltas(part.float())
            alone = drift(x, y).sum(-1)
            count += len(part)
            weights = torch.tensor(WEIGHTS[number % len(WEIGHTS)])
            for chart in CHARTS:
                moved = drift(*fuse_moves(x, y, weights, chart)).sum(-1).double()
                ratio = moved / fused_drift_bound(alone, weights, chart)
                over[chart] += int((ratio > 1 + TOLERANCE).sum())
                largest[chart] = max(largest[chart], float(ratio.max()))
    return [
        {
            "case": f"SmolLM2-135M, demo deltas, {chart}, weights 1 1 1 and 0.5 -1 2 on every other 512 contexts",
            "contexts": count,
            "over": over[chart],
            "largest_ratio": largest[chart],
        }
        for chart in CHARTS
    ]


def _generation(folder: Path, repeats: int) -> list[Row]:
    """CPU seconds a token of greedy generation, one text at a time, no gates: every token is moved."""
    model, tokenizer = load("smollm2-135m")
    deltas = _deltas(folder)
    leashes: dict[str, dict[str, Any]] = {"no leash": {}}
    for nats in (0.01, 0.5, 8.0):
        leashes[f"softmax {nats:g}"] = {"leash": nats}
    for nats in (2.0, 1e5):
        leashes[f"latent {nats:g}"] = {"leash": nats, "leash_metric": "latent"}
    models = {name: fuse(model, deltas, gated=False, **options) for name, options in leashes.items()}
    prompt = tokenizer("In the beginning God created the heaven and the earth.", return_tensors="pt")
    seconds: dict[str, list[float]] = {name: [] for name in models}
    length = 48
    for run in range(repeats + 1):  # the first one warms up
        for name, writer in models.items():
            started = time.process_time()
            writer.generate(
                **prompt, do_sample=False, min_new_tokens=length, max_new_tokens=length, pad_token_id=0
            )
            if run:
                seconds[name].append((time.process_time() - started) / length)
    base = statistics.median(seconds["no leash"])
    return [
        {
            "case": f"generate {length} tokens, three deltas, {name}",
            "metric": "CPU seconds a token",
            "ours": statistics.median(values),
            "baseline": base,
            "ratio": statistics.median(a / b for a, b in zip(values, seconds["no leash"], strict=True)),
            "spread": [min(values), max(values)],
            "runs": repeats,
        }
        for name, values in seconds.items()
    ]


@torch.no_grad()
def _alone(folder: Path, repeats: int) -> list[Row]:
    """CPU seconds of moving one context's law and scoring it, with and without a leash, the rest left out."""
    model, _ = load("smollm2-135m")
    state = load_shards(folder / "states" / "tables").states[100:101].float()
    loc, log_scale = model.abduction(state)
    head = model.action.weight, model.action.bias
    seconds: dict[str, list[float]] = {}
    works = {}
    leashes: list[tuple[float, str] | None] = [
        None,
        (0.01, "softmax"),
        (50.0, "softmax"),
        (2.0, "latent"),
        (1e5, "latent"),
    ]
    for leash in leashes:
        nats, metric = leash or (None, "softmax")
        fusion = fuse(model, _deltas(folder), gated=False, leash=nats, leash_metric=metric).fusion
        x, y = fusion.deltas(state)

        def work(fusion: Fusion = fusion, x: Tensor = x, y: Tensor = y) -> None:
            gates = torch.ones(len(fusion.domains), 1)
            law = fusion.sum.law(loc, log_scale, x, y, gates, head, keep_scores=True)
            if law.scores is None:
                model.action.score_loc(law.loc)

        works["no leash" if leash is None else f"{metric} {nats:g}"] = work
    for run in range(5 * repeats + 1):
        for name, work in works.items():
            started = time.process_time()
            work()
            if run:
                seconds.setdefault(name, []).append(time.process_time() - started)
    base = statistics.median(seconds["no leash"])
    return [
        {
            "case": f"law and scores of one context, {name}",
            "metric": "CPU seconds",
            "ours": statistics.median(values),
            "more": statistics.median(values) - base,
            "runs": len(values),
        }
        for name, values in seconds.items()
    ]


def _nll(folder: Path, tokens: int) -> list[Row]:
    """What leashes take of a domain's gain, and of the drift on base text, in the demo's gated fusion."""
    model, tokenizer = load("smollm2-135m")
    deltas = _deltas(folder)
    fusion = fuse(model, deltas, gated=True, by="sum").fusion
    weights = (1.0,) * len(deltas)
    variants = {"no leash": Variant(weights, "symmetric", True)}
    for metric, limits in (("softmax", (0.05, *LIMITS)), ("latent", (*LIMITS, 500.0))):
        for nats in limits:
            variants[f"{metric} {nats:g}"] = Variant(weights, "symmetric", True, nats, metric)
    found = []
    for name in TITLES:
        windows = window_text(read_documents(folder / "texts" / f"{name}.jsonl"), tokenizer, tokens=tokens)
        result = measure(model, fusion, windows, list(variants.values()))
        for row, leash in enumerate(variants):
            found.append(
                {
                    "case": f"{name}, gated fusion, leash {leash}",
                    "tokens": len(windows.input_ids),
                    "nll_base": float(result.base_nll.double().mean()),
                    "nll": float(result.nll[row].double().mean()),
                    "softmax_kl_mean": float(result.softmax_kl[row].double().mean()),
                    "softmax_kl_max": float(result.softmax_kl[row].max()),
                    "latent_drift_mean": float(result.latent_drift[row].double().mean()),
                    "pulled": float((result.leash[row] < 1).double().mean()),
                }
            )
    return found


def _token_law(folder: Path, draws: int, contexts: int) -> list[Row]:
    """Token laws under causal sampling, by drawing, against the drift, in contexts of the demo's texts."""
    model, tokenizer = load("smollm2-135m")
    found = []
    for nats in (0.05, 0.5, 5.0):
        fused = fuse(model, _deltas(folder), gated=False, leash=nats, leash_metric="latent")
        generator = torch.Generator().manual_seed(0)
        laws: list[list[Tensor]] = [[], [], [], []]
        for name in TITLES:
            text = read_documents(folder / "texts" / f"{name}.jsonl")[0]
            ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :256]
            with torch.no_grad():
                outputs = [m(ids, logits_to_keep=0, return_logits=False) for m in (model, fused)]
            place = torch.randint(ids.shape[1], (-(-contexts // len(TITLES)),), generator=generator)
            for at, output in enumerate(outputs):
                laws[2 * at].append(output.latent_loc[0, place])
                laws[2 * at + 1].append(output.latent_log_scale[0, place].exp())
        base_loc, base_scale, loc, scale = (torch.cat(part) for part in laws)
        check = check_token_law(
            lambda u: torch.cat([model.action.score_loc(part).argmax(-1) for part in u.split(64)]),
            (base_loc, base_scale),
            (loc, scale),
            draws=draws,
            generator=generator,
        )
        found.append(
            {
                "case": f"token law by {draws} draws, contexts of the demo's texts, latent leash {nats:g}",
                "contexts": len(check.drift),
                "over": check.violations(),
                "drift_mean": float(check.drift.mean()),
                "kl_mean": float(check.kl.mean()),
                "kl_max": float(check.kl.max()),
                "total_variation_max": float(check.total_variation.max()),
                "error_max": float(check.total_variation_error.max()),
            }
        )
    return found
