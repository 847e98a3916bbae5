"""Figures of one trial, kept as they come."""

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.lape_trial import State, Trial

__all__ = ["Kept", "Table"]

logger = logging.getLogger(__name__)


class Kept:
    """Figures on disk as they come, so that an interrupted run goes on.

    Args:
        file: JSON of earlier results.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}

    def value(self, name: str, make: Callable[[], Any]) -> Any:
        """Look up a figure, or compute and keep it.

        Args:
            name: its name.
            make: computes it.

        Returns:
            The figure.
        """
        if name not in self.found:
            start = time.process_time()
            self.found[name] = make()
            logger.info("%s: %s (%.0f CPU s)", name, str(self.found[name])[:90], time.process_time() - start)
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text(json.dumps(self.found))
        return self.found[name]


class Table(Kept):
    """Measured merges of one trial.

    Args:
        trial: the models.
        file: JSON of earlier results.
    """

    def __init__(self, trial: Trial, file: Path) -> None:
        super().__init__(file)
        self.trial = trial

    def test(self, name: str, make: Callable[[], State]) -> list[list[float]]:
        """Measure a merge on the held-out windows of both domains and on general text.

        Args:
            name: its name.
            make: merges.

        Returns:
            Losses of the windows of each text.
        """
        trial = self.trial
        sets = [*trial.test, trial.general]
        return self.value(
            f"test {name}", lambda: [part.tolist() for part in trial.measure(make(), sets, f"test {name}")]
        )
