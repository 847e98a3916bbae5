"""What the demo does and how much of it; part of the run's identity."""

from dataclasses import dataclass

__all__ = ["FUSIONS", "PIECE", "PROMPTS", "TITLES", "Plan"]

TITLES = {
    "bible": "King James text",
    "code": "Python's library source",
    "tables": "table rows as sentences",
    "news": "news items",
    "wiki": "Wikipedia articles",
}
FUSIONS = ("evidence", "symmetric", "linear")
"""By evidence, as `fuse` does it, and for comparison the sums in two charts, where every delta acts everywhere."""
PIECE = 1200
"""Characters of a base document: about one context."""
PROMPTS = {
    "bible": "And it came to pass in those days, that",
    "code": 'def read_header(path):\n    """Read the header of a file."""\n',
    "tables": "Patient: age 52, sex 1, body mass index",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How much the demo does; part of the run's identity.

    Attributes:
        base: alias, path or hub id of the base model.
        budget: mean drift allowed on base text, nats per token.
        metric: what the budget is in.
        train_tokens: domain tokens learnt from, each.
        test_tokens: domain tokens measured on, each.
        base_documents: base documents that fits and budgets see.
        base_test_documents: other base documents measured on, of each kind.
        window: tokens a context.
        new_tokens: length of the samples.
    """

    base: str = "smollm2-135m"
    budget: float = 0.01
    metric: str = "softmax"
    train_tokens: int = 30_000
    test_tokens: int = 5_000
    base_documents: int = 150
    base_test_documents: int = 60
    window: int = 256
    new_tokens: int = 48

    @staticmethod
    def fast() -> "Plan":
        """Give the small version for tests: the same steps on a fraction of the text.

        Returns:
            The plan.
        """
        return Plan(
            train_tokens=4_000, test_tokens=1_000, base_documents=30, base_test_documents=8, new_tokens=16
        )
