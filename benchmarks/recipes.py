"""Training the one-vs-rest head on a frozen backbone, against cross-entropy on the same tokens: recipes and seeds.

States of the backbone are computed once; an arm trains the abduction head, and where it says so the classes'
weight, the threshold and the class noise, on the same tokens in an order of its seed.
"""

import math
import os
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tether.cauchy.functional import log_cdf, log_sf
from tether.causal.action import Action
from tether.causal.dataset import make_examples, shuffled
from tether.causal.layers import Abduction
from tether.causal.loading import load
from tether.causal.losses import IGNORE, ovr_log_prob, ovr_loss, softmax_loss
from tether.causal.modeling import CausalQwenForCausalLM
from tether.causal.normaliser import log_normaliser
from tether.demo.corpora import BASE_TEXTS, documents

__all__ = ["rows"]

Row = dict[str, Any]

_STEP, _ROWS = 512, 85
"""Tokens an optimizer step, and rows of scores held at once."""
_SAMPLES, _TOP, _FOCUS = 4096, 8, 2.0
"""Classes drawn beside the targets and the likeliest ones of each context, how many these are, gamma of focal loss."""
NLLS = ("softmax NLL", "normalised one-vs-rest NLL", "normalised NLL with power", "one-vs-rest loss")


@dataclass(frozen=True, kw_only=True)
class _Arm:
    name: str
    mode: str = "deterministic"
    form: str = "constant"
    threshold: float | None = None
    latent_scale: float | None = None
    learnt: bool = False
    untied: bool = False
    exact: bool = False
    passes: int = 2
    lr: float = 2e-4
    warm: int = 0
    """Passes of cross-entropy first."""
    loss: str = "one-vs-rest"
    """Or `focal`, `distilled` (from the base's softmax), `normalised` (P_k / sum P), `normalised power`."""


_CONTEXT = {"form": "context", "threshold": 10.0, "latent_scale": 1e-4, "learnt": True}
ARMS = (
    _Arm(name="start, calibrated", passes=0),
    _Arm(name="cross-entropy", mode="softmax", passes=1),
    _Arm(name="cross-entropy, head untied", mode="softmax", passes=1, untied=True),
    _Arm(name="one-vs-rest, constant threshold"),
    _Arm(name="one-vs-rest, threshold and noise learnt", learnt=True),
    _Arm(name="one-vs-rest, threshold per context, learnt", **_CONTEXT),
    _Arm(name="one-vs-rest, per context, lower rate", **_CONTEXT, lr=5e-5),
    _Arm(name="one-vs-rest, per context, exact loss", **_CONTEXT, exact=True),
    _Arm(name="one-vs-rest, per context, head untied", **_CONTEXT, untied=True),
    _Arm(name="one-vs-rest, per context, after cross-entropy", **_CONTEXT, warm=1),
    _Arm(name="focal, per context", **_CONTEXT, loss="focal"),
    _Arm(name="distilled from softmax, per context", **_CONTEXT, loss="distilled"),
    _Arm(name="one-vs-rest, thresholds at the classes' rates", form="class", latent_scale=1e-4, learnt=True),
    _Arm(
        name="distilled, thresholds at the classes' rates",
        form="class",
        latent_scale=1e-4,
        learnt=True,
        loss="distilled",
    ),
    _Arm(name="normalised, per context", **_CONTEXT, loss="normalised"),
    _Arm(
        name="normalised, thresholds at the classes' rates",
        form="class",
        latent_scale=1e-4,
        learnt=True,
        loss="normalised",
    ),
    _Arm(name="normalised with a learnt power, calibrated", learnt=True, loss="normalised power"),
)
"""`TETHER_ARMS` chooses some by number."""


def rows(*, fast: bool) -> list[Row]:
    """Train and measure every arm.

    Args:
        fast: a twelfth of the text, one seed.

    Returns:
        Rows of case, metric, ours, baseline, ratio, runs; the baseline is the softmax NLL of the head that was
        trained by cross-entropy with the same seed, `runs` the seeds.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model, tokenizer = load("smollm2-135m", dtype=torch.float32)
    held = 400 if fast else 2000
    seeds = tuple(map(int, os.environ.get("TETHER_SEEDS", "0" if fast else "0 1 2").split()))
    states, targets = _states(model, tokenizer, tokens=2000 if fast else 22500)
    bench = _Bench(model, states[:-held], targets[:-held], states[-held:], targets[-held:])
    chosen = [ARMS[int(at)] for at in os.environ.get("TETHER_ARMS", "").split()] or ARMS
    figures = {
        arm.name: [bench.run(arm, seed) for seed in seeds[: 1 if arm.exact else None]] for arm in chosen
    }
    torch.set_num_threads(threads)
    reference = [
        found["softmax NLL"] for found in figures[ARMS[1].name if ARMS[1] in chosen else chosen[0].name]
    ]
    return [
        {
            "case": f"{name}; baseline: softmax NLL of the head trained by cross-entropy",
            "metric": metric,
            "ours": statistics.mean(run[metric] for run in runs),
            "baseline": statistics.mean(reference[: len(runs)]),
            "ratio": statistics.mean(run[metric] / r for run, r in zip(runs, reference, strict=False)),
            "runs": [run[metric] for run in runs],
        }
        for name, runs in figures.items()
        for metric in NLLS
    ] + [
        {
            "case": f"{name}; baseline: always",
            "metric": "argmax P_k is argmax loc_S",
            "ours": statistics.mean(run["agreement"] for run in runs),
            "baseline": 1.0,
            "ratio": statistics.mean(run["agreement"] for run in runs),
            "runs": [run["agreement"] for run in runs],
            "power": [run["power"] for run in runs],
            "CPU seconds": [run["CPU seconds"] for run in runs],
        }
        for name, runs in figures.items()
    ]


@torch.no_grad()
def _states(model: CausalQwenForCausalLM, tokenizer: Any, *, tokens: int) -> tuple[Tensor, Tensor]:
    examples = make_examples(documents(BASE_TEXTS["news"]), tokenizer, window=256, tokens=tokens)
    states, targets = [], []
    for row in range(examples.windows):
        batch = examples.collate([row])
        hidden = model.backbone(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        kept = batch["labels"][0, 1:] != IGNORE
        states.append(hidden.last_hidden_state[0, :-1][kept])
        targets.append(batch["labels"][0, 1:][kept])
    return torch.cat(states), torch.cat(targets)


@dataclass
class _Bench:
    model: CausalQwenForCausalLM
    states: Tensor
    targets: Tensor
    held_states: Tensor
    held_targets: Tensor

    def run(self, arm: _Arm, seed: int) -> dict[str, float]:
        started = time.process_time()
        head = _Head(self.model, arm, torch.Generator().manual_seed(seed))
        if arm.form == "class":
            head.meet_rates(self.states[::16], self.targets)
            head.optimizer.param_groups[1]["peak"] = 2e-2
        warm = arm.warm * len(self.targets) // _STEP
        for step in range(steps := (arm.warm + arm.passes) * len(self.targets) // _STEP):
            here = torch.tensor(shuffled(len(self.targets), seed, step * _STEP, (step + 1) * _STEP))
            loss = head.loss(self.states[here], self.targets[here], warm=step < warm)
            head.step(loss, min((step + 1) / 4, 0.5 + 0.5 * math.cos(math.pi * step / steps)))
        power = head.power(self.states[:200], self.targets[:200])
        figures = head.figures(self.held_states, self.held_targets, power)
        return figures | {"power": power, "CPU seconds": time.process_time() - started}


class _Head:
    """Abduction and action of an arm, on states."""

    def __init__(self, model: CausalQwenForCausalLM, arm: _Arm, generator: torch.Generator) -> None:
        config, weight = model.config, model.action.weight.detach()
        classes, width = weight.shape
        scale = config.latent_scale if arm.latent_scale is None else arm.latent_scale
        threshold = config.threshold if arm.threshold is None else arm.threshold
        self.arm, self.generator = arm, generator
        self.log_power = nn.Parameter(torch.tensor(math.log(threshold)))
        self.abduction = Abduction(width, width, scale)
        self.abduction.reset_identity()
        self.action = Action(
            width, classes, config.class_noise, config.noise_form, threshold, arm.form, "signed-log", False
        )
        self.action.weight = nn.Parameter(weight.clone() if arm.untied else weight, requires_grad=arm.untied)
        self.action.reset_action()
        self.action.fill_noise(torch.full((width,), scale))
        levels = (self.action.threshold, self.action.class_noise)
        for level in levels:
            level.requires_grad_(arm.learnt)
        groups = [{"params": list(self.abduction.parameters()), "peak": arm.lr}]
        if arm.untied:
            groups.append({"params": [self.action.weight], "peak": arm.lr})
        if arm.learnt:
            groups += [
                {"params": [p], "peak": 2e-2 * max(1.0, float(p.detach().abs().median()))} for p in levels
            ]
        if arm.loss == "normalised power":
            groups.append({"params": [self.log_power], "peak": 1e-2})
        self.optimizer = torch.optim.AdamW(groups, lr=arm.lr, weight_decay=0.0)

    @torch.no_grad()
    def meet_rates(self, states: Tensor, targets: Tensor) -> None:
        """Set each class's threshold where it fires as often as it occurs, one more occurrence assumed for each."""
        score_loc, score_scale = self.action.scores(*self._law(states))
        count = torch.bincount(targets, minlength=len(self.action.weight)) + 1.0
        far = score_scale.mean(0) * count.sum() / (torch.pi * count)
        self.action.threshold.copy_(score_loc.mean(0) + far)

    def _law(self, states: Tensor) -> tuple[Tensor, Tensor]:
        loc, log_scale = self.abduction(states)
        return loc, log_scale.exp()

    def loss(self, states: Tensor, targets: Tensor, *, warm: bool = False) -> Tensor:
        loc, scale = self._law(states)
        if warm or self.arm.mode == "softmax":
            return softmax_loss(self.action.score_loc(loc), targets)
        level, noise = self.action.threshold, self.action.noise_scale
        if self.arm.form == "context":
            level = level + log_normaliser(loc, self.action.weight).reshape(-1, 1)
        if self.arm.loss != "one-vs-rest":
            return self._other(states, loc, scale, targets, level)
        level = level if self.arm.form == "class" or level.ndim > 1 else level.squeeze()
        form = {"impl": "chunked"} if self.arm.exact else {"impl": "sampled", "samples": _SAMPLES}
        return ovr_loss(loc, scale, self.action.weight, targets, threshold=level, class_noise=noise, **form)

    # Losses on the targets, the likeliest classes of each context, and a sample that stands for all others.
    def _other(self, states: Tensor, loc: Tensor, scale: Tensor, targets: Tensor, level: Tensor) -> Tensor:
        weight, noise = self.action.weight, self.action.noise_scale
        with torch.no_grad():
            base = torch.log_softmax(states @ weight.T, -1)
            always = torch.cat([targets, base.topk(_TOP).indices.flatten()]).unique()
            rest = torch.ones(len(weight), dtype=torch.bool)
            rest[always] = False
            others = rest.nonzero().squeeze(-1)
            drawn = others[torch.randperm(len(others), generator=self.generator)[:_SAMPLES]]
            some = torch.cat([always, drawn])
            stand = torch.ones(len(some))
            stand[len(always) :] = len(others) / len(drawn)
            place = torch.searchsorted(always, targets).unsqueeze(-1)
        level = level[some] if self.arm.form == "class" else level
        score, wide = (
            loc @ weight[some].T,
            scale @ weight[some].abs().T + (noise if len(noise) == 1 else noise[some]),
        )
        fires, silent = log_sf(level, score, wide), log_cdf(level, score, wide)
        if self.arm.loss.startswith("normalised"):
            power = self.log_power.exp() if self.arm.loss == "normalised power" else 1.0
            return (
                torch.logsumexp(power * fires + stand.log(), -1, keepdim=True)
                - power * fires.gather(1, place)
            ).mean()
        wanted = (
            base[:, some].exp()
            if self.arm.loss == "distilled"
            else torch.zeros_like(fires).scatter(1, place, 1.0)
        )
        hit, miss = -wanted * fires, -(1 - wanted) * silent
        if self.arm.loss == "focal":
            hit, miss = hit * (silent * _FOCUS).exp(), miss * (fires * _FOCUS).exp()
        return ((hit + miss) * stand).sum(-1).mean()

    def step(self, loss: Tensor, share: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * share
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([p for group in self.optimizer.param_groups for p in group["params"]], 1.0)
        self.optimizer.step()

    @torch.no_grad()
    def _scored(self, states: Tensor, targets: Tensor) -> Any:
        for part, wanted in zip(states.split(_ROWS), targets.split(_ROWS), strict=True):
            loc, log_scale = self.abduction(part)
            score_loc, score_scale = self.action.scores(loc, log_scale.exp())
            fires = ovr_log_prob(score_loc, score_scale, self.action.thresholds(score_loc))
            yield score_loc, fires.double(), wanted

    def power(self, states: Tensor, targets: Tensor) -> float:
        # The b of P_k^b / sum P^b, on training text, over a factor of sqrt(2) each.
        grid = [2 ** (half / 2) for half in range(34)]
        spent = [0.0] * len(grid)
        for _, fires, wanted in self._scored(states, targets):
            for place, power in enumerate(grid):
                spent[place] += float(cross_entropy(fires * power, wanted, reduction="sum"))
        return grid[min(range(len(grid)), key=spent.__getitem__)]

    def figures(self, states: Tensor, targets: Tensor, power: float) -> dict[str, float]:
        sums = dict.fromkeys((*NLLS, "agreement"), 0.0)
        for score_loc, fires, wanted in self._scored(states, targets):
            found = (
                cross_entropy(score_loc.double(), wanted, reduction="sum"),
                cross_entropy(fires, wanted, reduction="sum"),
                cross_entropy(fires * power, wanted, reduction="sum"),
                self._decisions(fires, wanted),
                (fires.argmax(-1) == score_loc.argmax(-1)).sum(),
            )
            for name, value in zip(sums, found, strict=True):
                sums[name] += float(value) / len(targets)
        return sums

    @staticmethod
    def _decisions(fires: Tensor, wanted: Tensor) -> Tensor:
        chosen = wanted.unsqueeze(-1)
        silent = torch.log(-torch.expm1(fires.clamp(max=-1e-15)))
        return -(silent.sum() - silent.gather(1, chosen).sum() + fires.gather(1, chosen).sum())
