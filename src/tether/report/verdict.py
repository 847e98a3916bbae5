"""What the numbers say, in one sentence and four checks; what does not hold is always said."""

from typing import NamedTuple

from tether.report.results import Results, fusions, sample_size, texts_of, title_of
from tether.report.table import change_text, nats_text

__all__ = ["BudgetLine", "Check", "budget_lines", "checks", "sentence"]

MEASURES = {"softmax": "softmax_kl", "latent": "latent_drift"}
"""Where the drift of a metric on this report's base text is found; the Fisher form is not measured there."""


class Check(NamedTuple):
    """Something a reader would want to hold.

    Attributes:
        title: what.
        holds: whether the numbers say so; None when they say nothing about it.
        detail: the numbers.
    """

    title: str
    holds: bool | None
    detail: str


class BudgetLine(NamedTuple):
    """A column against a budget.

    Attributes:
        title: of the column.
        metric: what the budget is in.
        allowed: mean drift on base text, nats per token, or None.
        learnt: drift measured when the delta was brought to its budget, nats per token, or None.
        learnt_tokens: on how many tokens.
        measured: drift on this report's base text, nats per token, or None.
    """

    title: str
    metric: str
    allowed: float | None
    learnt: float | None
    learnt_tokens: int | None
    measured: float | None

    @property
    def exceeded(self) -> bool:
        """Whether a drift that was measured is above what is allowed."""
        seen = [drift for drift in (self.learnt, self.measured) if drift is not None]
        return self.allowed is not None and any(drift > self.allowed for drift in seen)


def budget_lines(results: Results) -> list[BudgetLine]:
    """Hold every delta against its own budget.

    Args:
        results: the content of `table.json`, checked.

    Returns:
        One line a delta, in the order of the deltas.
    """
    return [
        BudgetLine(
            title_of(results, name),
            delta["metric"],
            delta["budget"],
            delta.get("drift_base"),
            delta.get("drift_tokens"),
            results["base_text"][name].get(MEASURES.get(delta["metric"], "")),
        )
        for name, delta in results["deltas"].items()
    ]


def checks(results: Results) -> tuple[Check, ...]:
    """Hold the numbers against what a reader hopes for.

    Args:
        results: the content of `table.json`, checked.

    Returns:
        Own text of each delta, domain texts of the fusion on show, budgets, bounds.
    """
    shown = fusions(results)[0]
    own = [(text, text) for text in texts_of(results, "domain") if text in results["deltas"]]
    lines = [line for line in budget_lines(results) if line.allowed is not None]
    over = [line for line in lines if line.exceeded]
    contexts, violations = (int(results["bounds"][key]) for key in ("contexts", "violations"))
    return (
        _better(results, "Each delta predicts its own domain better than the base", own),
        _better(
            results,
            f"{_capital(title_of(results, shown))} predicts every domain better than the base",
            [(text, shown) for text in texts_of(results, "domain")],
        ),
        Check(
            "Each delta keeps its budget on base text",
            not over if lines else None,
            _listed(over)
            if over
            else f"{len(lines)} of {len(results['deltas'])} deltas have a budget and keep it",
        ),
        Check(
            "Measured latent drift stays within its bound",
            violations == 0 if contexts else None,
            f"{violations:,} violations in {contexts:,} contexts",
        ),
    )


def sentence(results: Results) -> str:
    """Say what was measured.

    A text counts as better predicted only when the whole interval of the change lies below 0.

    Args:
        results: the content of `table.json`, checked.

    Returns:
        One sentence, with every failed check in it.
    """
    shown = fusions(results)[0]
    domains = texts_of(results, "domain")
    better = [text for text in domains if _change(results, text, shown)["high"] < 0]
    rest = [text for text in domains if text not in better]
    count = "all" if not rest and len(domains) > 1 else f"{len(better)} of" if better else "none of the"
    said = f"{_capital(title_of(results, shown))} predicts {count} {len(domains)} domain texts better "
    said += f"than {results['base']}"
    seen = " and ".join(dict.fromkeys(str(results["texts"][text]["seen"]) for text in domains))
    if better:
        said += f" ({', '.join(_mean(results, text, shown) for text in better)} nats per token, {seen})"
    if rest:
        named = _joined([_interval(results, text, shown) for text in rest])
        said += f", but not {named}" if better else f": {named} nats per token, {seen}"
    said += _base_clause(results, shown)
    faults = []
    alone = [t for t in domains if t in results["deltas"] and _change(results, t, t)["high"] >= 0]
    if alone:
        names = _joined([f"{title_of(results, t)} on {_interval(results, t, t)}" for t in alone])
        faults.append(f"not better than the base even alone: {names}")
    over = [line for line in budget_lines(results) if line.exceeded]
    if over:
        faults.append(f"the budget is exceeded by {_listed(over)}")
    contexts, violations = (results["bounds"][key] for key in ("contexts", "violations"))
    if violations:
        faults.append(f"the bound is violated in {violations:,} of {contexts:,} contexts")
    return "; ".join([said, *faults]) + "."


def _base_clause(results: Results, shown: str) -> str:
    value, metric = results["budget"]["value"], results["budget"]["metric"]
    kl = results["base_text"][shown]["softmax_kl"]
    said = f"; on base text ({sample_size(results, texts_of(results, 'base'))}) its output distribution "
    said += f"moves by {nats_text(kl)} nats per token"
    if value is None or metric != "softmax":
        return said
    if kl > value:
        return said + f", more than the budget of {value:g} of each delta"
    return said + f", where the budget of each delta is {value:g}"


def _better(results: Results, title: str, pairs: list[tuple[str, str]]) -> Check:
    if not pairs:
        return Check(title, None, "no such text was measured")
    short = [(text, column) for text, column in pairs if _change(results, text, column)["high"] >= 0]
    if not short:
        return Check(title, True, f"{len(pairs)} of {len(pairs)}, each with its whole interval below 0")
    named = _joined([_interval(results, text, column) for text, column in short])
    return Check(title, False, f"not shown for {named}")


def _change(results: Results, text: str, column: str) -> dict[str, float]:
    change: dict[str, float] = results["cells"][text][column]["nll_change"]
    return change


def _mean(results: Results, text: str, column: str) -> str:
    return f"{results['texts'][text]['title']} {change_text(_change(results, text, column)['mean'])}"


def _interval(results: Results, text: str, column: str) -> str:
    change = _change(results, text, column)
    mean, low, high = (change_text(change[key]) for key in ("mean", "low", "high"))
    return f"{results['texts'][text]['title']} ({mean}, interval {low} to {high})"


def _listed(over: list[BudgetLine]) -> str:
    parts = []
    for line in over:
        most = max(drift for drift in (line.learnt, line.measured) if drift is not None)
        # As many digits as show that it is above.
        digits = next((d for d in range(3, 9) if float(f"{most:.{d}g}") > (line.allowed or 0.0)), 9)
        parts.append(f"{line.title} ({most:.{digits}g} where {line.allowed:g} is allowed)")
    return _joined(parts)


def _joined(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
