"""What a server counts, in the text format of Prometheus."""

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, generate_latest

__all__ = ["Counts"]


class Counts:
    """Counters of one server.

    Args:
        models: names of those that are served; no other name becomes a label.
    """

    def __init__(self, models: Iterable[str]) -> None:
        self._models = frozenset(models)
        self._all = CollectorRegistry()
        self._requests = self._counter(
            "requests", "Requests that ended, by model and status.", "model", "status"
        )
        self._read = self._counter("read_tokens", "Tokens of prompts that were answered.", "model")
        self._written = self._counter("written_tokens", "Tokens that were written.", "model")
        self._seconds = self._counter("answering_seconds", "Seconds in which a model was at work.", "model")
        self._weights = self._counter(
            "weight_tokens",
            "Tokens that were written, shared among base and domains by weight.",
            "model",
            "domain",
        )

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        return Counter(f"tether_{name}", what, labels, registry=self._all)

    def ended(self, model: str | None, status: int) -> None:
        """Count a request.

        Args:
            model: that it named.
            status: of its answer; 499 where the client left before.
        """
        self._requests.labels(model if model in self._models else "", str(status)).inc()

    def answered(self, model: str, read: int, written: int, seconds: float) -> None:
        """Count an answer.

        Args:
            model: its name.
            read: tokens of the prompt.
            written: tokens of the answer.
            seconds: from the first token read to the last written.
        """
        self._read.labels(model).inc(read)
        self._written.labels(model).inc(written)
        self._seconds.labels(model).inc(seconds)

    def weighed(self, model: str, weights: Mapping[str, float]) -> None:
        """Count who spoke.

        Args:
            model: its name.
            weights: of the base and of each domain, added up over the tokens of an answer.
        """
        for domain, weight in weights.items():
            self._weights.labels(model, domain).inc(weight)

    def text(self) -> bytes:
        """Write all counters.

        Returns:
            The text of `/metrics`.
        """
        return bytes(generate_latest(self._all))
