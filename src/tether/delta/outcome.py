"""What a fit came to, in the sentences that its record keeps and `tether learn` prints."""

from tether.delta.budget import Budget

__all__ = ["NO_HELP", "budget_share", "why_no_more"]

NO_HELP = (
    "This domain was not learnt: on the documents that were kept aside the loss is at no strength below the base's. "
    "More text of the domain, or a larger budget, may help; a fusion is better off without it."
)
"""The warning of a delta or an adapter that does not help its own held-out documents."""


def budget_share(budget: Budget | None, drift: float | None) -> float | None:
    """Tell how much of a budget is used.

    Args:
        budget: the constraint of the fit, or None.
        drift: what was measured, in the budget's metric, nats.

    Returns:
        The share, in [0, 1]; None where there is no budget.
    """
    return None if budget is None or budget.value is None or drift is None else drift / budget.value


def why_no_more(
    budget: Budget | None, used: float | None, *, factor_budget: float, share: float = 1.0, helps: bool = True
) -> str:
    """Say why a delta or an adapter does not use more of its budget.

    Args:
        budget: the constraint of the fit, or None.
        used: share of the budget that is used.
        factor_budget: the factor that meets the budget.
        share: of that factor that was taken.
        helps: whether it lowers the loss on documents kept aside.

    Returns:
        One sentence.
    """
    if budget is None or budget.value is None or used is None:
        if share == 1:
            return "No budget was set."
        return (
            f"No budget was set, and {share:.4g} of the learnt strength was best on the documents kept aside."
        )
    if factor_budget == 0:
        return "No strength was found that keeps the drift within the budget, so the domain is switched off."
    if not helps and share < 1:
        return (
            f"Only {share:.4g} of the strength that the budget allows was taken, the least that is looked at, because "
            "no strength lowered the loss on the documents kept aside."
        )
    if share < 1:
        return (
            f"{share:.4g} of the strength that the budget allows was taken, because more of it raised the loss on the "
            "documents kept aside."
        )
    if used >= 0.95:
        return "The budget is used up."
    if factor_budget >= budget.stretch:
        return (
            "The fit stopped by itself before it reached the budget, and what was learnt is made at most "
            f"{budget.stretch:g} times as strong as it was."
        )
    return "No strength was found that comes closer to the budget without exceeding it."
