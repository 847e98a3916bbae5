"""Whether the hub answers, and what was fetched before: nobody waits for a network that is not there."""

import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tether.errors import CheckpointError

__all__ = ["answers", "hub_copy", "hub_folder", "unasked"]

WAIT = 3.0
"""Seconds that the hub has for its first answer."""


def hub_copy(name: str, *, revision: str | None = None, cache_dir: str | None = None) -> str | None:
    """Ask the hub for a sign of life before anything is fetched from it, and find an earlier copy if there is none.

    Args:
        name: a hub id.
        revision: branch, tag or commit; None for the newest.
        cache_dir: where copies lie; None for the usual place.

    Returns:
        None where the hub answers; else the folder of what was fetched before.

    Raises:
        CheckpointError: the hub does not answer, and nothing was fetched before.
    """
    from huggingface_hub import constants, snapshot_download

    offline = bool(constants.HF_HUB_OFFLINE)
    if not offline and answers(constants.ENDPOINT):
        return None
    try:
        return snapshot_download(name, revision=revision, cache_dir=cache_dir, local_files_only=True)
    except (OSError, ValueError) as error:
        # What is no hub id is told apart from one that was not fetched: the first is a ValueError.
        why = (
            "HF_HUB_OFFLINE is set" if offline else f"{constants.ENDPOINT} gave no answer in {WAIT:g} seconds"
        )
        raise CheckpointError(
            f"{name}: there is no such folder; as a hub id it was not fetched before, and {why}; check the name, "
            "or the network"
        ) from error


def hub_folder(name: str, options: Mapping[str, Any] | None = None) -> Path:
    """Give the folder of something that lies here or on the hub.

    Args:
        name: a folder, or a hub id.
        options: `revision`, `cache_dir` and `token`, as transformers takes them; others are passed over.

    Returns:
        The folder.

    Raises:
        CheckpointError: there is no such folder, and it is not on the hub or cannot be fetched.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    place: dict[str, Any] = {key: (options or {}).get(key) for key in ("revision", "cache_dir")}
    if (copy := hub_copy(name, **place)) is not None:
        return Path(copy)
    try:
        return Path(snapshot_download(name, token=(options or {}).get("token"), **place))
    except Exception as error:
        # httpx and huggingface_hub raise a dozen types here; the user needs one sentence.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{name}: there is no such folder, and the hub did not give it ({reason})"
        ) from error


def unasked(name: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Complete the options of a `from_pretrained`, so that it does nothing that nobody asked for.

    Code that a checkpoint brings is not run and not asked about, unless `trust_remote_code` is given; and of a hub that
    does not answer only earlier copies are looked for, since transformers would try again for minutes.

    Args:
        name: what shall be loaded: a path, a hub id, or None.
        options: as they were given.

    Returns:
        The options to use.

    Raises:
        CheckpointError: the hub does not answer, and nothing was fetched before.
    """  # noqa: DOC502 - raised by hub_copy
    from huggingface_hub import constants

    careful = {"trust_remote_code": False, **options}
    known = constants.HF_HUB_OFFLINE or options.get("local_files_only")
    if isinstance(name, str) and not known and not Path(name).exists():
        place = {option: options.get(option) for option in ("revision", "cache_dir")}
        if hub_copy(name, **place) is not None:
            careful["local_files_only"] = True
    return careful


def answers(endpoint: str) -> bool:
    """Tell whether a hub answers within `WAIT` seconds.

    Args:
        endpoint: its address.

    Returns:
        Whether it does, with anything but a proxy's or a server's answer that it cannot be reached.
    """
    # In a thread of its own: nothing else bounds how long a name is looked up.
    from huggingface_hub import get_session

    heard = threading.Event()

    def ask() -> None:
        with suppress(Exception):
            if get_session().head(endpoint, timeout=WAIT).status_code < 500:
                heard.set()

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(WAIT)
    return heard.is_set()
