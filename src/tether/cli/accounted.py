"""What `certify`, `ledger` and `fuse` say of a fusion by evidence, in sentences."""

from collections.abc import Mapping
from typing import Any

__all__ = ["account_lines", "fare_lines", "value_lines"]


def account_lines(name: str, row: Mapping[str, Any]) -> list[str]:
    """Put the account of one text into sentences.

    Args:
        name: of the text.
        row: figures from `tether.delta.regret.account_figures`.

    Returns:
        Lines, the first with the name.
    """
    kl, worst, change = row["softmax_kl"], row["worst_token"], row["nll_change"]["mean"]
    verdict = f"{abs(change):.3f} {'more' if change > 0 else 'less'} than" if abs(change) > 0.0005 else "as"
    lines = [
        f"{name}: the loss is {row['nll']:.3f} a token, {verdict} the base's {row['nll_base']:.3f}, on "
        f"{row['tokens']:,} tokens of {row['documents']} documents.",
        f"  The KL divergence from the base is {kl['mean']:.2g} in the mean, {kl['p99']:.2g} at the 99th percentile "
        f"and {kl['max']:.2g} at most.",
    ]
    if "regret" in row:
        base = row["regret"]["base"]
        broken = sum(party["violations"] for party in row["regret"].values())
        lines.append(
            f"  No text can cost more than the base and what is promised: the largest cost of a whole text is "
            f"{max(0.0, base['largest']):.2f} nats here, {base['allowed']:.2f} are allowed; the promise was broken "
            f"{broken} times, over the base and all domains."
        )
    lines.append(
        f"  The worst token lost {max(0.0, worst['lost']):.2f} nats against the base, of "
        f"{max(0.0, worst['allowed']):.2f} allowed there; {worst['violations']} tokens lost more than allowed."
    )
    spoken = ", ".join(f"{domain} {share:.0%}" for domain, share in row["shares"].items())
    return [*lines, f"  Who spoke: {spoken}."]


def fare_lines(fares: Mapping[str, Any], without: list[str]) -> list[str]:
    """Say how each domain fares in a fusion.

    Args:
        fares: from `tether.delta.fare.fare`, by domain.
        without: domains of which no documents are at hand.

    Returns:
        Lines of a table, with warnings after it.
    """
    lines = []
    if fares:
        width = max(len("domain"), *map(len, fares))
        shared = any(row.share is not None for row in fares.values())
        lines.append("Loss a token on text that no delta was learnt from:")
        lines.append(
            f"  {'domain':<{width}}  {'base':>7}  {'alone':>7}  {'fused':>7}" + ("  weight" if shared else "")
        )
        for name, row in fares.items():
            weight = "" if row.share is None else f"  {row.share:>6.0%}"
            lines.append(f"  {name:<{width}}  {row.base:>7.3f}  {row.alone:>7.3f}  {row.fused:>7.3f}{weight}")
    lines += [
        f"Warning: on {name} the fusion is at {row.fused:.3f}, its delta alone at {row.alone:.3f} and the base at "
        f"{row.base:.3f}: the other domains harm it."
        for name, row in fares.items()
        if row.harmed
    ]
    if without:
        lines.append(
            f"Not compared: {', '.join(without)}; the delta carries no documents. Give some with --check DOMAIN=FILE."
        )
    return lines


def value_lines(name: str, values: Mapping[str, Any]) -> list[str]:
    """Say what happened to the numbers of one text.

    Args:
        name: of the text.
        values: figures from `tether.delta.values.value_figures`.

    Returns:
        One line, or none where the text has no numbers.
    """
    if not values["numbers"]:
        return []
    return [
        f"{name}: the median error of {values['numbers']:,} numbers is {values['median_error_after']:.4g}, the base's "
        f"{values['median_error_before']:.4g}; their law is {values['drift']:.4g} nats from the base's."
    ]
