"""A run folder: one configuration, stages that are done once, measurements line by line.

``run.json`` holds the configuration, ``stages/{name}.json`` what each finished stage used, wrote and
found, ``metrics.jsonl`` what was logged on the way. A stage's record is written last: a run that was
killed at any moment goes on with the first stage that has none.
"""

from tether.runs.run import Run, RunHistory, read_run
from tether.runs.usage import Usage

__all__ = ["Run", "RunHistory", "Usage", "read_run"]
