"""Fusion by evidence on texts that no setting was chosen on: twelve domains, eight foreign kinds, two of base text.

They are those of the fourth list of fresh texts; TETHER_LIST=first, second or third takes an earlier one, on which
settings were chosen.

Every fit and every measurement is kept in the folder that TETHER_STATES names, so that a run can be resumed. Loss of
any group of domains by evidence follows from what each expert gave to each token, which is measured once; that it is
the loss that the group serves is checked on one group in every run.
"""

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.corpus import states_folder
from benchmarks.fresh_texts import LISTS, split
from benchmarks.heard import Heard, by_evidence, posterior
from tether.causal.evidence import Rule
from tether.causal.loading import load
from tether.delta.account import account
from tether.delta.cache import cache_states
from tether.delta.delta import Delta
from tether.delta.fusion import fuse
from tether.delta.learning import learn_delta
from tether.delta.measure import Variant, measure
from tether.delta.windows import Windows, window_text
from tether.demo import corpora
from tether.errors import ConfigError
from tether.router.deltas import DeltaRouterFit, route_deltas

__all__ = ["GROUPS", "NAMES", "STRANGE", "Trial", "rows"]

Row = dict[str, Any]
LIST = os.environ.get("TETHER_LIST", "fourth")
if LIST not in LISTS:
    raise ConfigError(f"TETHER_LIST={LIST}: no such list of fresh texts; give one of {', '.join(LISTS)}")
NAMES, STRANGE = map(tuple, LISTS[LIST])
"""Kinds of text that are never learnt."""
GROUPS = {size: [NAMES[at : at + size] for at in range(0, len(NAMES), size)] for size in (3, 6, 12)}
"""Fused together, in the order of the list of domains."""
BASE = {"news": corpora.news, "wiki": corpora.wikipedia}
PIECE = 1200
"""Characters of a base document, as in the demo."""
TESTED = 16
"""Documents of each text that are measured."""
SUMMED = 8
"""Documents of each text on which rivals are measured."""
SUMS: dict[str, tuple[str, bool, float | None]] = {
    "sum, one-class gates": ("one-class", True, None),
    "sum, one-class gates, leash .5": ("one-class", True, 0.5),
    "sum, no gates": ("one-class", False, None),
    "sum, softmax gates": ("softmax", True, None),
}
"""Kind of gate, whether it acts, and a leash in nats of softmax KL."""


class Trial:
    """One seed: its fits and what was measured.

    Args:
        folder: where everything is kept.
        seed: of the split and of the fits.
        fast: a fraction of the text.
    """

    def __init__(self, folder: Path, seed: int, *, fast: bool) -> None:
        self.folder, self.seed, self.fast = folder / f"{LIST}-{seed}{'-fast' if fast else ''}", seed, fast
        self.folder.mkdir(parents=True, exist_ok=True)
        self.model, self.tokenizer = load("smollm2-135m")
        self.routers: dict[str, Any] = {}
        self.general, pieces = {}, []
        for name, recipe in BASE.items():
            every = corpora.documents(recipe)
            self.general[name] = [text[:PIECE] for text in every[:TESTED]]
            # As in the demo: up to three contexts of each other document, as many of every kind.
            cut = [text[at : at + PIECE] for text in every[TESTED:] for at in range(0, 3 * PIECE, PIECE)]
            pieces.append([piece for piece in cut if len(piece) > PIECE // 2][:75])
        self.base = [piece for pair in zip(*pieces, strict=True) for piece in pair]

    def delta(self, name: str) -> Delta:
        """Learn a domain with the defaults, or find it.

        Args:
            name: of the domain.

        Returns:
            Its delta.
        """
        path = self.folder / f"{name}.delta"
        if not path.exists():
            learn_delta(
                self.model, self.tokenizer, list(split(name, self.seed, self.tokenizer).train), base_texts=self.base,
                name=name, tokens=2_000 if self.fast else 10_000, cache_folder=self.folder.parent / "cache",
                seed=self.seed,
            ).save(path)  # fmt: skip
        return Delta.load(path)

    def windows(self, name: str, most: int = TESTED) -> Windows:
        """Cut the held-out documents of a text to one window each.

        Args:
            name: of a domain, a foreign kind or a kind of base text.
            most: documents.

        Returns:
            Windows of 256 tokens.
        """
        documents = self.general.get(name) or list(split(name, self.seed, self.tokenizer).held_out)
        return window_text(documents[: 2 if self.fast else most], self.tokenizer, per_document=1, name=name)

    def fused(self, group: Sequence[str], **options: Any) -> Any:
        """Fuse some domains.

        Args:
            group: names of the domains.
            options: of `fuse`.

        Returns:
            The model.
        """
        return fuse(self.model, {self.delta(name): 1.0 for name in group}, **options)

    def kept(self, key: str, make: Any) -> dict[str, Tensor]:
        """Measure something, or find it.

        Args:
            key: what to call it.
            make: measures it.

        Returns:
            Tensors by name.
        """
        path = self.folder / f"{key}.safetensors"
        if not path.exists():
            part = path.with_suffix(f".{os.getpid()}")
            save_file({name: value.contiguous() for name, value in make().items()}, part)
            part.rename(path)
        found: dict[str, Tensor] = load_file(path)
        return found

    def heard(self, name: str, *, sleeping: bool = True) -> Heard:
        """Account for all twelve domains on a text.

        Args:
            name: of the text.
            sleeping: whether gates let domains sleep; else all are awake.

        Returns:
            What each expert gave to each token.
        """

        def make() -> dict[str, Tensor]:
            windows = self.windows(name, TESTED if sleeping else SUMMED)
            (found,) = account([self.fused(NAMES, gated=sleeping)], windows)
            kept = {"documents": found.documents[found.scored], "base_nll": found.base_nll, "nll": found.nll}
            awake = found.log_weights[found.scored] > -torch.inf
            return kept | {
                "gain": found.gain.float(), "awake": awake, "density": found.density[found.scored],
                "softmax_kl": found.softmax_kl,
            }  # fmt: skip

        found = self.kept(f"{name}-{'sleeping' if sleeping else 'open'}", make)
        return Heard(**{key: value for key, value in found.items() if key in Heard._fields})

    def drift(self, name: str, group: Sequence[str]) -> Tensor:
        """Measure how far a group drifts on a text.

        Args:
            name: of the text.
            group: names of the domains.

        Returns:
            KL(base || served) in each context, nats.
        """
        if tuple(group) == NAMES:
            return self.kept(f"{name}-sleeping", dict)["softmax_kl"]  # `heard` measured it

        def make() -> dict[str, Tensor]:
            return {"kl": account([self.fused(group)], self.windows(name))[0].softmax_kl}

        return self.kept(f"{name}-kl-{len(group)}-{group[0]}", make)["kl"]

    def alone(self, name: str) -> Tensor:
        """Measure a domain's delta alone, always on.

        Args:
            name: of the domain.

        Returns:
            Loss of each token, nats.
        """

        def make() -> dict[str, Tensor]:
            single = fuse(self.model, {self.delta(name): 1.0}, by="sum", gated=False)
            variant = Variant((1.0,), "symmetric", False)
            return {"nll": measure(self.model, single.fusion, self.windows(name), [variant]).nll[0]}

        return self.kept(f"{name}-alone", make)["nll"]

    def routed(self, group: Sequence[str]) -> Any:
        """Learn a router over a group, on the documents that its deltas were learnt from.

        Args:
            group: names of the domains.

        Returns:
            The routed model.
        """
        key = " ".join(group)
        if key not in self.routers:
            texts = {name: list(split(name, self.seed, self.tokenizer).train) for name in group}
            texts |= {"base": self.base[::2], "held out": self.base[1::2]}
            states = {}
            for name, text in texts.items():
                windows = window_text(text, self.tokenizer, tokens=6_000, name=name)
                states[name] = cache_states(self.model, windows, self.folder / f"{name}-routed.st")
            fit = DeltaRouterFit(budget=0.05, seed=self.seed)
            parts = states.pop("base"), states.pop("held out")
            deltas = [self.delta(name) for name in group]
            self.routers[key] = route_deltas(self.model, deltas, states, *parts, fit)
        return self.routers[key]

    def sums(self, group: Sequence[str], name: str) -> dict[str, Tensor]:
        """Measure the sums and the learned router of a group on a text.

        Args:
            group: names of the domains.
            name: of the text.

        Returns:
            Loss of each token by kind of sum, nats.
        """

        def make() -> dict[str, Tensor]:
            found: dict[str, Tensor] = {}
            for gate in ("one-class", "softmax"):
                model = self.fused(group, by="sum", gate=gate)
                kinds = {kind: (gated, leash) for kind, (own, gated, leash) in SUMS.items() if own == gate}
                ones = (1.0,) * len(group)
                variants = [Variant(ones, "symmetric", gated, leash) for gated, leash in kinds.values()]
                result = measure(self.model, model.fusion, self.windows(name, SUMMED), variants)
                found |= dict(zip(kinds, result.nll, strict=True))
            fusion = self.routed(group).fusion
            routed = Variant(tuple(fusion.weights), fusion.chart, True)
            found["learned router"] = measure(self.model, fusion, self.windows(name, SUMMED), [routed]).nll[0]
            return found

        return self.kept(f"{name}-sums-{len(group)}-{group[0]}", make)


def rows(*, fast: bool) -> Iterator[Row]:
    """Fit, measure, compare.

    Args:
        fast: a fraction of the text and one seed.

    Yields:
        Rows of case, metric, ours, baseline, ratio, runs.
    """
    seeds = [int(seed) for seed in os.environ.get("TETHER_SEEDS", "0" if fast else "0 1").split()]
    parts = os.environ.get("TETHER_PARTS", "evidence sums open").split()
    with states_folder() as folder:
        for seed in seeds:
            trial = Trial(folder, seed, fast=fast)
            started = time.process_time()
            for name in NAMES:
                trial.delta(name)
            yield _row(f"seed {seed}", "CPU seconds of twelve fits", time.process_time() - started, None, 1)
            if "evidence" in parts:
                yield from _evidence(trial)
            if "sums" in parts:
                yield from _sums(trial)
            if "open" in parts:
                yield from _open(trial)
            if "stay" in parts:
                yield from _stay(trial)


def _mean(values: Tensor) -> float:
    return float(values.double().mean())


def _row(case: str, metric: str, ours: float, baseline: float | None, runs: int) -> Row:
    ratio = None if not baseline else ours / baseline
    return {"case": case, "metric": metric, "ours": ours, "baseline": baseline, "ratio": ratio, "runs": runs}


def _evidence(trial: Trial) -> Iterator[Row]:
    seed = f"seed {trial.seed}"
    for size, groups in GROUPS.items():
        for group in groups:
            columns = [NAMES.index(name) for name in group]
            for name in group:
                nll = by_evidence(trial.heard(name), columns, Rule())
                alone = _mean(trial.alone(name))
                yield _row(
                    f"{seed}, {size} domains", f"NLL {name}, own delta alone", _mean(nll), alone, len(nll)
                )
                yield _row(
                    f"{seed}, {size} domains", f"NLL {name}, base", _mean(nll), _mean(trial.heard(name).base_nll),
                    len(nll),
                )  # fmt: skip
            for name in (*NAMES, *STRANGE, *BASE):
                heard = trial.heard(name)
                nll = by_evidence(heard, columns, Rule())
                yield _row(
                    f"{seed}, {size} domains from {group[0]}", f"NLL of any text less the base's: {name}",
                    _mean(nll - heard.base_nll), 0.005, len(nll),
                )  # fmt: skip
    for name in BASE:
        for groups in GROUPS.values():
            for group in groups:
                kl = trial.drift(name, group)
                yield _row(f"{seed}, {len(group)} domains from {group[0]}", f"KL {name}", _mean(kl), 0.001, 1)
    group = GROUPS[3][0]
    (served,) = account([trial.fused(group)], trial.windows(group[0]))
    derived = by_evidence(trial.heard(group[0]), [NAMES.index(name) for name in group], Rule())
    yield _row(
        seed,
        "largest difference of served and derived loss",
        float((served.nll - derived).abs().max()),
        1e-4,
        1,
    )


def _sums(trial: Trial) -> Iterator[Row]:
    for size in (3, 12):
        for group in GROUPS[size]:
            columns = [NAMES.index(each) for each in group]
            for name in group:
                heard = trial.heard(name)
                first = heard.documents < SUMMED
                case = f"seed {trial.seed}, {size} domains, {SUMMED} documents"
                base, alone = _mean(heard.base_nll[first]), _mean(trial.alone(name)[first])
                arms = {"evidence": by_evidence(heard, columns, Rule())[first], **trial.sums(group, name)}
                for arm, nll in arms.items():
                    yield _row(f"{case}, {arm}", f"NLL {name}, own delta alone", _mean(nll), alone, len(nll))
                    yield _row(f"{case}, {arm}", f"NLL {name}, base", _mean(nll), base, len(nll))


def _stay(trial: Trial) -> Iterator[Row]:
    """Weigh what a domain loses by its gate against what it moves on base text, in the first group of three."""
    group = GROUPS[3][0]
    rules = {f"an open gate closes at {stay:g}": {"rule": Rule(stay=stay)} for stay in (1.0, 1.5, 2.0)}
    for said, options in {**rules, "nobody sleeps": {"gated": False}}.items():
        fused = trial.fused(group, **options)
        for name in (group[0], *BASE):
            (found,) = account([fused], trial.windows(name))
            case = f"seed {trial.seed}, 3 domains from {group[0]}, {said}"
            if name == group[0]:
                yield _row(
                    case, f"NLL {name}, own delta alone", _mean(found.nll), _mean(trial.alone(name)), 1
                )
                continue
            yield _row(case, f"KL {name}", _mean(found.softmax_kl), 0.001, 1)
            yield _row(case, f"NLL {name}, base", _mean(found.nll), _mean(found.base_nll), 1)


def _open(trial: Trial) -> Iterator[Row]:
    """Compare with nobody asleep, and with the posterior without base and restarts."""
    for size, groups in GROUPS.items():
        for group in groups:
            columns = [NAMES.index(each) for each in group]
            for name in group:
                heard = trial.heard(name, sleeping=False)
                case = f"seed {trial.seed}, {size} domains, {SUMMED} documents"
                alone = _mean(trial.alone(name)[: len(heard.base_nll)])
                arms = {
                    "evidence, nobody sleeps": by_evidence(heard, columns, Rule(), gated=False),
                    "posterior without base and restarts": posterior(heard, columns),
                }
                for arm, nll in arms.items():
                    yield _row(f"{case}, {arm}", f"NLL {name}, own delta alone", _mean(nll), alone, len(nll))
                    yield _row(
                        f"{case}, {arm}", f"NLL {name}, base", _mean(nll), _mean(heard.base_nll), len(nll)
                    )
