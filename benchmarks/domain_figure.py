"""Figure of the benchmark of domains: what a domain gains against what the base loses."""

import io
from typing import Any

from benchmarks.domain_measure import FACTORS
from benchmarks.domain_table import rate
from benchmarks.trial_texts import TRIAL as DOMAINS
from tether.demo.corpora import BASE_TEXTS

__all__ = ["tradeoff_png"]


def tradeoff_png(curves: dict[str, Any]) -> bytes:
    """Draw the domain's NLL against the mean KL on base texts, a panel a domain, a curve an arm over factors.

    Args:
        curves: cells by `text-domain`, from `measure_curve`.

    Returns:
        A PNG file.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    panels = figure.subplots(1, len(DOMAINS))
    for panel, name in zip(panels, DOMAINS, strict=True):
        own = curves[f"{name}-{name}"]
        arms = dict.fromkeys(key.rpartition("*")[0] for key in own if "*" in key)
        for arm in arms:
            keys = [f"{arm}*{factor:g}" for factor in FACTORS]
            drift = [
                sum(rate(curves[f"{text}-{name}"][key], "kl") for text in BASE_TEXTS) / len(BASE_TEXTS)
                for key in keys
            ]
            loss = [rate(own[key], "nll") for key in keys]
            style = "o-" if arm.startswith("delta") else "s--"
            panel.plot(drift, loss, style, label=arm, markersize=4, linewidth=1.2)
        panel.axhline(rate(own["base"], "nll"), color="grey", linewidth=0.8, linestyle=":")
        panel.set_xscale("log")
        panel.set_title(name)
        panel.set_xlabel("mean KL(base || tuned) on base texts, nats")
    panels[0].set_ylabel("NLL of the domain, nats a token")
    panels[-1].legend(fontsize=7)
    figure.suptitle("Each point scales what was learnt by 1/4, 1/2, 3/4 or 1; dotted: the base", fontsize=9)
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=110)
    return target.getvalue()
