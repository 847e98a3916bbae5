"""The run itself: who may work in the folder, and which stages are still to do."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, final

from tether.errors import ConfigError
from tether.runs.config import CONFIG, read_config, refuse_other_config, write_config
from tether.runs.metrics import METRICS, append_metrics, cut_torn_line, mark_started, read_metrics
from tether.runs.record import (
    SCHEMA_VERSION,
    clean_temporaries,
    describe_outputs,
    hash_inputs,
    hash_json,
    is_temporary,
    outputs_stand,
    read_record,
    write_record,
)
from tether.runs.usage import Usage
from tether.store.system import alone_with

__all__ = ["Run", "RunHistory", "read_run"]

_LOCK: Final = "run.lock"
_STAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class RunHistory(NamedTuple):
    """What a run folder says, read without taking part in the run."""

    config: dict[str, Any]
    stages: dict[str, dict[str, Any]]
    """Stage name to its record: figures, outputs, inputs, cpu_seconds, wall_seconds, peak_rss_bytes."""
    metrics: list[dict[str, Any]]


@final
class Run:
    """A folder in which work goes on where it stopped. Use it in a ``with`` statement.

    One process works in it at a time; the lock goes with the process, also by ``kill -9``. Entering
    removes the temporary files and folders of killed writers anywhere in the folder.

    Args:
        folder: A new or empty folder, or the folder of a run with the same configuration.
        config: All that the results depend on, as JSON: text keys, finite numbers, lists, dicts.

    Raises:
        ConfigError: On construction, if the configuration cannot be JSON. On entering, if the folder
            belongs to another configuration (the message names the keys that differ), holds other files,
            cannot be made, or is in use by another process.
        CheckpointError: On entering, if ``run.json`` is damaged.

    Example:
        >>> import tempfile
        >>> def learn():
        ...     return [], {"nll": 2.5}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for _ in range(2):  # the second time, learn is not called
        ...         with Run(folder, {"seed": 0}) as run:
        ...             run.stage("learn", learn)
        {'nll': 2.5}
        {'nll': 2.5}
    """

    def __init__(self, folder: str | PathLike[str], config: Mapping[str, Any]) -> None:
        self._folder = Path(folder).absolute()
        try:
            self._config: dict[str, Any] = json.loads(json.dumps(dict(config), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"the configuration of run {folder} cannot be JSON ({error}). Expected text keys and text, "
                "finite numbers, booleans, None, lists or dicts as values. Convert the rest first."
            ) from error
        self._config_hash = hash_json(self._config)
        self._stage: str | None = None
        self._lock: ExitStack | None = None

    def __enter__(self) -> "Run":
        lock = ExitStack()
        lock.enter_context(_lock_of(self._folder))
        self._lock = lock
        try:
            clean_temporaries(self._folder)
            if (self._folder / CONFIG).exists():
                refuse_other_config(self._folder, read_config(self._folder), self._config)
            else:
                write_config(self._folder, self._config)
            cut_torn_line(self._folder / METRICS)
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    @property
    def folder(self) -> Path:
        """The folder, absolute."""
        return self._folder

    @property
    def config(self) -> dict[str, Any]:
        """The configuration, as JSON gives it back; a copy."""
        copy: dict[str, Any] = json.loads(json.dumps(self._config))
        return copy

    def stage(
        self,
        name: str,
        work: Callable[[], tuple[Sequence[Path], Mapping[str, Any]]],
        inputs: Iterable[Path] = (),
    ) -> dict[str, Any]:
        """Do a piece of work, unless it is done.

        Args:
            name: Letters, digits, ``.``, ``_`` and ``-``; it names the record.
            work: Writes its outputs, each whole (``store.writer``), and returns their paths and its figures.
                Outputs are files, or folders with files in them; a killed attempt may have published some
                of them already, so publish folders with ``replace=True``. Figures are JSON; NaN is kept.
            inputs: Files or folders that the work reads, known by their content: when that changes, the work
                is done again. List the outputs of earlier stages here.

        Returns:
            The figures, read back from the record: the same whether the work was done now or earlier.

        Raises:
            ConfigError: If the name or the figures cannot be recorded.
            CheckpointError: If an input is missing, an output is not there, or the disk is full.
        """  # noqa: DOC502 - raised by hash_inputs, describe_outputs and write_record
        self._check_entered()
        path = self._record_path(name)
        hashes = hash_inputs(self._folder, inputs)
        record = self.record(name)
        if record is not None and record["inputs"] == hashes and outputs_stand(self._folder, record):
            return dict(record["figures"])
        # From here on outputs may be half old, half new: the old record must not vouch for them.
        path.unlink(missing_ok=True)
        mark_started(self._folder / METRICS, name)
        outer, self._stage = self._stage, name
        try:
            with Usage() as usage:
                outputs, found = work()
        finally:
            self._stage = outer
        write_record(
            path,
            {
                "schema_version": SCHEMA_VERSION,
                "stage": name,
                "config_hash": self._config_hash,
                "inputs": hashes,
                "outputs": describe_outputs(self._folder, name, outputs),
                "figures": dict(found),
                "cpu_seconds": usage.cpu_seconds,
                "wall_seconds": usage.wall_seconds,
                "peak_rss_bytes": usage.peak_rss_bytes,
            },
        )
        # Not by the strict reader: these bytes were written a line above, with whatever figures the work gave.
        figures = json.loads(path.read_bytes())["figures"]
        return dict(figures)

    def done(self, name: str) -> bool:
        """Return whether a stage has a record that still holds.

        Args:
            name: The name of a stage.

        Returns:
            True if its record is of this configuration, and every output and every input exists with the content
            it had.

        Raises:
            ConfigError: If the name cannot be that of a stage.
        """  # noqa: DOC502 - raised by _record_path
        record = self.record(name)
        if record is None or not outputs_stand(self._folder, record):
            return False
        paths = [self._folder / path for path in record["inputs"]]
        return all(path.exists() for path in paths) and hash_inputs(self._folder, paths) == record["inputs"]

    def record(self, name: str) -> dict[str, Any] | None:
        """Return the record of a stage of this configuration, or None if there is none.

        Args:
            name: The name of a stage.

        Returns:
            Its inputs and outputs (path to SHA-256, path to size and SHA-256; paths inside the folder are
            relative to it), figures, cpu_seconds, wall_seconds and peak_rss_bytes. Whether the outputs
            still exist is not checked.

        Raises:
            ConfigError: If the name cannot be that of a stage.
        """  # noqa: DOC502 - raised by _record_path
        record = read_record(self._record_path(name))
        return record if record is not None and record["config_hash"] == self._config_hash else None

    def log(self, values: Mapping[str, Any]) -> None:
        """Append one line to ``metrics.jsonl``; inside a stage it carries the stage's name.

        Args:
            values: JSON; NaN is kept. The keys ``stage`` and ``stage_started`` are taken.

        Raises:
            ConfigError: If the values cannot be JSON, or use a key that is taken.
            CheckpointError: If the line cannot be written; then none of it is.
        """  # noqa: DOC502 - raised by append_metrics
        self._check_entered()
        append_metrics(self._folder / METRICS, self._stage, values)

    def metrics(self) -> list[dict[str, Any]]:
        """Read back what was logged, in order.

        Lines of attempts at a stage that was begun again later are left out, and so is a last line that a
        kill has torn.

        Returns:
            One dict a line.

        Raises:
            CheckpointError: If a line other than the last is damaged.
        """  # noqa: DOC502 - raised by read_metrics
        return read_metrics(self._folder / METRICS)

    def _check_entered(self) -> None:
        if self._lock is None:
            raise ConfigError(
                f"run {self._folder} is not open. Use it inside: with Run(folder, config) as run."
            )

    def _record_path(self, name: str) -> Path:
        if not _STAGE.fullmatch(name):
            raise ConfigError(
                f"a stage was named {name!r}; expected letters, digits, '.', '_' and '-', beginning with a "
                "letter or digit. Rename it."
            )
        return self._folder / "stages" / f"{name}.json"


def read_run(folder: str | PathLike[str]) -> RunHistory:
    """Read a run folder without locking or changing it, also while a process works in it.

    Args:
        folder: The folder of a run.

    Returns:
        Its configuration, the records of its finished stages, and its metrics.

    Raises:
        CheckpointError: If it is not a run folder, or ``run.json`` or ``metrics.jsonl`` is damaged.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with Run(folder, {"seed": 0}) as run:
        ...         run.log({"loss": 2.5})
        ...     read_run(folder).metrics
        [{'loss': 2.5}]
    """  # noqa: DOC502 - raised by read_config and read_metrics
    folder = Path(folder)
    config = read_config(folder)
    stages = {}
    for path in sorted((folder / "stages").glob("[!.]*.json")):
        record = read_record(path)
        if record is not None:
            stages[path.stem] = record
    return RunHistory(config, stages, read_metrics(folder / METRICS))


# Checks the folder; the lock is taken when what is returned is entered.
def _lock_of(folder: Path) -> AbstractContextManager[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run folder {folder} cannot be made ({error}). Choose another folder.") from error
    ours = {CONFIG, _LOCK}
    foreign = [path.name for path in folder.iterdir() if path.name not in ours and not is_temporary(path)]
    if foreign and not (folder / CONFIG).exists():
        raise ConfigError(
            f"{folder} is not the folder of a run, but holds {len(foreign)} other files or folders, such as "
            f"{min(foreign)}. Expected a new or empty folder, or that of an earlier run. Choose another one."
        )
    return alone_with(
        folder / _LOCK,
        f"run folder {folder} is in use by another process; expected one process at a time. Wait until it has ended, "
        "or choose another folder.",
    )
