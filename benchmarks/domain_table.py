"""Tables of the benchmark of domains: means over seeds, differences by seed, costs."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from benchmarks.domain_plan import DELTAS, OTHER
from benchmarks.trial_texts import TRIAL as DOMAINS
from tether.demo.corpora import BASE_TEXTS

__all__ = ["TEXTS", "Table"]

TEXTS = [*DOMAINS, *BASE_TEXTS, OTHER]


def rate(cell: dict[str, Any], figure: str) -> float:
    """Mean of a figure over the tokens of a text.

    Args:
        cell: of `Bench`.
        figure: `nll` or `kl`.

    Returns:
        Nats.
    """
    return sum(cell[figure]) / sum(cell["scored" if figure == "nll" else "tokens"])


class Table:
    """Figures of the arms, means over seeds.

    Args:
        results: of `Results.run`.
        seeds: which.
    """

    def __init__(self, results: dict[str, Any], seeds: Sequence[int]) -> None:
        self.results, self.seeds = results, seeds
        self.cells: dict[str, dict[str, Any]] = results["cells"]
        every = [self.cells[f"{TEXTS[0]}-{seed}"] for seed in seeds]
        self.arms = list(dict.fromkeys(arm for cells in every for arm in cells))

    def figure(self, text: str, arm: str, figure: str) -> float:
        """Mean over seeds.

        Args:
            text: which.
            arm: which.
            figure: `nll`, `kl`, `kl_p99` or `kl_max`.

        Returns:
            Nats.
        """
        cells = [self.cells[f"{text}-{seed}"] for seed in self.seeds]
        found = [every[arm] for every in cells if arm in every]  # some arms have the first seed only
        return float(np.mean([rate(c, figure) if figure in ("nll", "kl") else c[figure] for c in found]))

    def runs(self, arm: str) -> int:
        """Count the seeds that an arm was measured on.

        Args:
            arm: of `single` or `fused`.

        Returns:
            How many.
        """
        every = [self.cells[f"{TEXTS[0]}-{seed}"] for seed in self.seeds]
        return sum(any(name == arm or name.startswith(f"{arm}:") for name in cells) for cells in every)

    def single(self) -> Iterable[dict[str, Any]]:
        """Give a line for every way to learn one domain.

        Yields:
            NLL of each domain with its own, change of the other domains, KL on base texts, costs.
        """
        names = [arm for arm in self.arms if ":" in arm]
        for arm in dict.fromkeys(arm.partition(":")[0] for arm in names):
            base = {name: self.figure(name, "base", "nll") for name in DOMAINS}
            own = {name: self.figure(name, f"{arm}:{name}", "nll") for name in DOMAINS}
            others = [
                self.figure(text, f"{arm}:{name}", "nll") - base[text]
                for name in DOMAINS
                for text in DOMAINS
                if text != name
            ]
            line: dict[str, Any] = {"arm": arm, **own, "mean": float(np.mean(list(own.values())))}
            line["gain"] = float(np.mean([base[name] - own[name] for name in DOMAINS]))
            line["others"] = float(np.mean(others))
            for text in (*BASE_TEXTS, OTHER):
                for figure, gather in (("kl", np.mean), ("kl_p99", np.max), ("kl_max", np.max)):
                    found = [self.figure(text, f"{arm}:{name}", figure) for name in DOMAINS]
                    line[f"{text} {figure}"] = float(gather(found))
            yield line | self.costs(arm)

    def costs(self, arm: str) -> dict[str, Any]:
        """Give what an arm cost, a domain.

        Args:
            arm: as in `single`.

        Returns:
            CPU seconds with all states cached, with the domain's own text to read (cold), and with base text to
            read as well, as for the very first domain (first); peak memory, bytes.
        """
        arm = arm.removesuffix("*s")
        found = [v for k, v in self.results["learnt"].items() if k.rsplit("-", 2)[0] == arm]
        read, features = self.results["read"], DELTAS.get(arm, ("last", False))[0]
        base = read[f"base-{features}"]["cpu"] + read[f"held-out-{features}"]["cpu"]
        own = float(np.mean([read[f"{name}-{features}"]["cpu"] for name in DOMAINS]))
        fit = float(np.mean([v["cpu_fit"] for v in found]))
        # Plain LoRA reads no states; adapters held to base text read its states, deltas their domain's too.
        kind = arm.partition("-")[0]
        ready = float(np.mean([v["cpu_ready"] for v in found])) if arm in DELTAS else 0.0
        cold = fit + ready + (own if kind == "delta" else 0.0)
        return {
            "cpu_cached": fit,
            "cpu_cold": cold,
            "cpu_first": cold + (0.0 if kind == "lora" else base),
            "peak_rss": max(v["peak_rss"] for v in found),
            "bytes": found[0]["bytes"],
        }

    def share(self, arm: str) -> tuple[dict[str, float], list[float]]:
        """Compare an arm with plain LoRA.

        Args:
            arm: as in `single`.

        Returns:
            Its share of LoRA's gain by domain, and of LoRA's CPU seconds: cached, cold and first.
        """
        gains = {}
        for name in DOMAINS:
            base = self.figure(name, "base", "nll")
            mine, plain = (base - self.figure(name, f"{a}:{name}", "nll") for a in (arm, "lora"))
            gains[name] = mine / plain
        mine_costs, plain_costs = self.costs(arm), self.costs("lora")
        costs = ("cpu_cached", "cpu_cold", "cpu_first")
        return gains, [mine_costs[cost] / plain_costs[cost] for cost in costs]

    def fused(self) -> Iterable[dict[str, Any]]:
        """Give a line for every way to combine the domains.

        Yields:
            NLL of each domain, NLL and KL on base texts.
        """
        for arm in self.arms:
            if ":" in arm:
                continue
            line: dict[str, Any] = {"arm": arm}
            line |= {name: self.figure(name, arm, "nll") for name in DOMAINS}
            line["mean"] = float(np.mean([line[name] for name in DOMAINS]))
            for text in (*BASE_TEXTS, OTHER):
                line |= {
                    f"{text} {figure}": self.figure(text, arm, figure)
                    for figure in ("nll", "kl", "kl_p99", "kl_max")
                }
            yield line

    def matrix(self, arm: str) -> dict[str, dict[str, float]]:
        """Give R(i, j): NLL of text j after learning domain i.

        Args:
            arm: as in `single`.

        Returns:
            By domain, then by text; `base` is the first line.
        """
        found = {"base": {text: self.figure(text, "base", "nll") for text in TEXTS}}
        return found | {
            name: {text: self.figure(text, f"{arm}:{name}", "nll") for text in TEXTS} for name in DOMAINS
        }

    def paired(self, arm: str, other: str) -> list[float]:
        """Compare two arms on the same text: difference of the mean NLL of domains, each with its own.

        Args:
            arm: as in `single`.
            other: likewise.

        Returns:
            arm minus other for each seed that has both, nats.
        """
        found = []
        for seed in self.seeds:
            cells = {name: self.cells[f"{name}-{seed}"] for name in DOMAINS}
            if all({f"{arm}:{name}", f"{other}:{name}"} <= cell.keys() for name, cell in cells.items()):
                gaps = [
                    rate(cell[f"{arm}:{name}"], "nll") - rate(cell[f"{other}:{name}"], "nll")
                    for name, cell in cells.items()
                ]
                found.append(float(np.mean(gaps)))
        return found

    def markdown(self) -> str:
        """Write all tables.

        Returns:
            Markdown.
        """
        single = list(self.single())
        text = (
            "NLL with a domain's own adapter or delta, nats; KL(base || tuned): mean, worst p99 and max.\n\n"
        )
        head = ["arm", *DOMAINS, "mean", "other domains"]
        head += [f"{name} KL mean / p99 / max" for name in (*BASE_TEXTS, OTHER)]
        lines = [[*head, "CPU s cached", "cold", "first", "peak GB", "MB"]]
        for line in single:
            cells = [line["arm"], *(f"{line[name]:.3f}" for name in DOMAINS), f"{line['mean']:.3f}"]
            cells.append(f"{line['others']:+.3f}")
            for name in (*BASE_TEXTS, OTHER):
                cells.append(" / ".join(f"{line[f'{name} {f}']:.3g}" for f in ("kl", "kl_p99", "kl_max")))
            cells += [f"{line[cost]:.0f}" for cost in ("cpu_cached", "cpu_cold", "cpu_first")]
            lines.append([*cells, f"{line['peak_rss'] / 1e9:.1f}", f"{line['bytes'] / 1e6:.1f}"])
        text += _table(lines)
        arms = [line["arm"] for line in single]
        text += "\nMean NLL of domains at matched base KL, paired by seed:\n\n"
        for arm in (name for name in ("leashed", "delta", "delta-multi") if name in arms):
            for other in (name for name in arms if name.endswith("*s")):
                gaps = self.paired(arm, other)
                each = ", ".join(f"{gap:+.3f}" for gap in gaps)
                text += f"- {arm} minus {other}: {np.mean(gaps):+.3f} (by seed {each})\n"
        text += "\nShare of plain LoRA's gain on each domain, and of its CPU seconds:\n\n"
        lines = [["arm", *DOMAINS, "cached", "cold", "first"]]
        for arm in (name for name in DELTAS if name in arms):
            shares, costs = self.share(arm)
            cells = [arm, *(f"{share:.2f}" for share in shares.values())]
            lines.append([*cells, *(f"1/{1 / cost:.1f}" for cost in costs)])
        text += _table(lines)
        text += "\nAll three domains in one model: NLL of domains; NLL / mean KL of base texts.\n\n"
        lines = [["arm", *DOMAINS, "mean", *BASE_TEXTS, OTHER]]
        for line in self.fused():
            cells = [line["arm"], *(f"{line[name]:.3f}" for name in DOMAINS), f"{line['mean']:.3f}"]
            for name in (*BASE_TEXTS, OTHER):
                cells.append(f"{line[f'{name} nll']:.3f} / {line[f'{name} kl']:.4f}")
            lines.append(cells)
        text += _table(lines)
        for arm in dict.fromkeys(line["arm"] for line in single):
            text += f"\nR(i, j) of {arm}: NLL of the column's text after learning the row's domain.\n\n"
            matrix = self.matrix(arm)
            text += _table(
                [["", *TEXTS], *([row, *(f"{v[t]:.3f}" for t in TEXTS)] for row, v in matrix.items())]
            )
        return text


def _table(lines: list[list[str]]) -> str:
    head, *body = lines
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "".join("| " + " | ".join(line) + " |\n" for line in (head, rule, *body))
