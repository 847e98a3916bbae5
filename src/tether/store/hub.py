"""Whether the hub answers, and what was fetched before: nobody waits for a network that is not there."""

import threading
from contextlib import suppress

from tether.errors import CheckpointError

__all__ = ["hub_copy"]

WAIT = 3.0
"""Seconds that the hub has for its first answer."""


def hub_copy(name: str) -> str | None:
    """Ask the hub for a sign of life before anything is fetched from it, and find an earlier copy if there is none.

    Args:
        name: a hub id.

    Returns:
        None where the hub answers; else the folder of what was fetched before.

    Raises:
        CheckpointError: the hub does not answer, and nothing was fetched before.
    """
    from huggingface_hub import constants, snapshot_download

    offline = bool(constants.HF_HUB_OFFLINE)
    if not offline and _answers(constants.ENDPOINT):
        return None
    try:
        return snapshot_download(name, local_files_only=True)
    except (OSError, ValueError) as error:
        # What is no hub id is told apart from one that was not fetched: the first is a ValueError.
        why = (
            "HF_HUB_OFFLINE is set" if offline else f"{constants.ENDPOINT} gave no answer in {WAIT:g} seconds"
        )
        raise CheckpointError(
            f"{name}: there is no such folder; as a hub id it was not fetched before, and {why}; check the name, "
            "or the network"
        ) from error


# In a thread of its own: nothing else bounds how long a name is looked up. Any answer is one but a proxy's or a
# server's that it cannot be given.
def _answers(endpoint: str) -> bool:
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
