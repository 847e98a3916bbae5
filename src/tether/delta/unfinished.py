"""A fit of an adapter that is not finished: kept on disk as it goes, so that whoever is stopped goes on from there."""

import hashlib
import json
import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import AllowInfNan, NonNegativeFloat, PositiveInt
from torch import Tensor

from tether.causal.fingerprint import weights_fingerprint
from tether.delta.cache import StateCache, backbone_print
from tether.delta.windows import Windows
from tether.errors import CheckpointError, TetherError
from tether.names import check_name
from tether.reading import Strict, parse_as, parse_json
from tether.store.manifest import versions
from tether.store.place import check_place
from tether.store.publish import clean_stale
from tether.store.reader import CheckpointReader
from tether.store.writer import write_safetensors

__all__ = ["SECONDS", "State", "Unfinished", "beside", "fit_settings"]

logger = logging.getLogger(__name__)

SECONDS = 60.0
"""A fit is kept every so many seconds; whoever is stopped loses what was done since."""
SHARE = 0.02
"""Of the time of a fit, at most, that keeping it takes."""
SUFFIX = ".unfinished"
"""Ends the name of a folder for one fit alone."""
WITHOUT_EFFECT = frozenset({"gradient_checkpointing"})
"""Options of a fit that change no figure: it goes on with another choice of them."""


class _Progress(Strict):
    """What the header of a kept fit says of its steps; a loss may be NaN."""

    step: PositiveInt
    multiplier: Annotated[float, AllowInfNan(True)]
    drift: Annotated[float, AllowInfNan(True)] | None
    curve: list[dict[str, Annotated[float, AllowInfNan(True)]]]
    cpu_seconds: NonNegativeFloat


class State(NamedTuple):
    """Where a fit stands between two steps.

    Attributes:
        tensors: what is learnt, what the optimizer remembers of it, the order of the windows that are left, and the
            state of the generator; on any device.
        step: the last step that was taken, >= 1.
        multiplier: of the drift on base text.
        drift: running mean of what the budget limits, or None.
        curve: figures so far.
        cpu_seconds: that the fit has taken.
    """

    tensors: dict[str, Tensor]
    step: int
    multiplier: float
    drift: float | None
    curve: list[dict[str, float]]
    cpu_seconds: float


class Unfinished:
    """The place where a fit is kept until it is finished: one file, which appears whole or not at all.

    It is known by what the fit is of: base, texts and options. A fit of anything else neither takes it nor touches it.

    Args:
        folder: where the file lies; made when it is first written. One from `beside` goes with its last file.

    Attributes:
        path: of the file, once `begin` has been called.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        check_place(self.folder / "fit")
        self.path: Path | None = None
        self._about: dict[str, str] = {}
        self._last, self._took = time.monotonic(), 0.0
        self._step = 0

    def begin(self, name: str, settings: Mapping[str, Any]) -> State | None:
        """Say which fit it is, and find what is kept of it.

        Args:
            name: of the domain.
            settings: all that the fit depends on, as JSON holds it, by names that a user knows.

        Returns:
            Where the fit stood, or None where nothing is kept of it or what is kept is damaged.
        """
        text = json.dumps(dict(settings), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.path = self.folder / f"fit-{digest}.safetensors"
        self._about = {"kind": "fit", "name": check_name(name), "settings": text}
        self._last = time.monotonic()
        if self.folder.is_dir():
            clean_stale(self.folder)
        for other in sorted(self.folder.glob("fit-*.safetensors")):
            if other != self.path:
                self._say_what_differs(other, settings)
        if not self.path.is_file():
            return None
        try:
            state = self._read(self.path)
        except CheckpointError as error:
            logger.warning("%s; the fit begins anew", error)
            return None
        self._step = state.step
        return state

    def is_due(self) -> bool:
        """Tell whether it is time to keep the fit again.

        Returns:
            Whether.
        """
        return time.monotonic() - self._last >= max(SECONDS, self._took / SHARE)

    def keep(self, state: State) -> None:
        """Keep a fit as it stands; what was kept before is replaced. Where there is no room for it, the fit goes on.

        Args:
            state: between two steps.
        """
        assert self.path is not None
        began = time.monotonic()
        progress = json.dumps({key: value for key, value in state._asdict().items() if key != "tensors"})
        tensors = {name: values.detach().cpu() for name, values in state.tensors.items()}
        about = self._about | {"progress": progress}
        try:
            write_safetensors(self.path, tensors, about | {"sha256": _checksum(tensors, about)})
            self._step = state.step
        except (TetherError, OSError) as error:
            logger.warning("the fit goes on, but is not kept meanwhile: %s", error)
        self._last = time.monotonic()
        self._took = self._last - began

    def remove(self) -> None:
        """Take the file away, and its folder where that is of this fit alone."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
        if self.folder.suffix == SUFFIX:
            with suppress(OSError):
                self.folder.rmdir()

    def step(self) -> int:
        """Tell how far the fit is kept.

        Returns:
            The last step that is kept; 0 where nothing is.
        """
        # Whoever is asked to end is asked twice by some launchers: the file is not read for this.
        return self._step if self.path is not None and self.path.is_file() else 0

    def _read(self, path: Path) -> State:
        reader = CheckpointReader(path)
        about = reader.metadata()
        said = about.pop("sha256", "")
        tensors = {name: reader.tensor(name) for name in reader.names}
        if {key: about.get(key) for key in self._about} != self._about or said != _checksum(tensors, about):
            raise CheckpointError(f"{path}: damaged, its content is not that of its checksum")
        progress = parse_as(_Progress, about.get("progress", ""), path, foreign=True)
        return State(tensors, **progress.model_dump())

    def _say_what_differs(self, other: Path, settings: Mapping[str, Any]) -> None:
        try:
            about = CheckpointReader(other).metadata()
            held = parse_json(about.get("settings", "{}"), other)
        except CheckpointError:
            return
        if about.get("name") != self._about["name"] or not isinstance(held, dict):
            return
        logger.warning(
            "%s: a fit of %s that was stopped had other settings: %s; it is not used and stays there, remove it if it "
            "is not wanted", other, self._about["name"], "; ".join(_differences(held, settings)),
        )  # fmt: skip


# Hashes tell a reader nothing but that they differ.
def _differences(held: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    found = []
    for name, value in json.loads(json.dumps(dict(now))).items():
        was = held.get(name)
        if was == value:
            continue
        if isinstance(value, dict) and isinstance(was, dict):
            found += [f"{name} {each}" for each in _differences(was, value)]
        elif "sha256:" in str(value):
            found.append(name)
        else:
            found.append(f"{name} {ascii(was)[:40]}, now {value}")
    return found


def beside(out: str | Path) -> Path:
    """Name a folder for an unfinished fit beside what it will be.

    Args:
        out: what the fit will write.

    Returns:
        The folder.
    """
    out = Path(out)
    return out.with_name(out.name + SUFFIX)


def fit_settings(model: Any, domain: StateCache, base: StateCache, fit: Any) -> dict[str, Any]:
    """Say what a fit depends on.

    Args:
        model: the base.
        domain: the part of the domain's text that is learnt.
        base: base text.
        fit: options, an `AdapterFit`.

    Returns:
        By names that a user knows: hashes, and every option that changes a figure.
    """
    options = {key: value for key, value in asdict(fit).items() if key not in WITHOUT_EFFECT}
    heads = [getattr(model, part) for part in ("numeric", "abduction", "action")]
    return {
        "base": backbone_print(model),
        "heads": [weights_fingerprint(head) for head in heads],
        "number format": str(model.action.weight.dtype).removeprefix("torch."),
        "domain text": _text_print(domain.windows),
        "base text": _text_print(base.windows),
        **options,
        "versions": versions() | {"peft": version("peft")},
    }


def _text_print(windows: Windows) -> str:
    digest = hashlib.sha256()
    for values in windows:
        digest.update(b"" if values is None else values.contiguous().numpy().data)
    return f"sha256:{digest.hexdigest()}"


def _checksum(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(dict(sorted(about.items()))).encode())
    for name, values in sorted(tensors.items()):
        digest.update(f"{name} {values.dtype} {tuple(values.shape)} ".encode())
        digest.update(values.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()}"
