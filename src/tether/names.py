"""Names that come from files: of domains, by one rule, and of files, which stay in their folder."""

import re
from pathlib import Path, PurePosixPath, PureWindowsPath

from tether.errors import CheckpointError, ConfigError

__all__ = ["LONGEST", "check_name", "inside"]

LONGEST = 64
"""Characters of a name at most."""
_RULE = re.compile(rf"[A-Za-z0-9_-](?:[A-Za-z0-9._-]{{0,{LONGEST - 2}}}[A-Za-z0-9_-])?")
_DEVICES = re.compile(r"(?:con|prn|aux|nul|com[0-9]|lpt[0-9])(?:\..*)?", re.IGNORECASE)
"""What Windows takes for a device, whatever follows after a dot."""


def check_name(name: str) -> str:
    """Refuse a domain's name that is no plain name.

    A name consists of 1 to 64 ASCII letters, digits, dots, underscores and hyphens. It does not begin or end with a
    dot, and is none that Windows keeps for its devices. So it is the name of one file or folder on every system,
    leaves no folder that it is joined to, and shows on a terminal what it is.

    Args:
        name: of a domain, from a user or from a file.

    Returns:
        The name.

    Raises:
        ConfigError: it is another one.

    Example:
        >>> check_name("case-law_v1.2")
        'case-law_v1.2'
    """
    if isinstance(name, str) and _RULE.fullmatch(name) and not _DEVICES.fullmatch(name):
        return name
    shown = ascii(name if len(str(name)) <= LONGEST else str(name)[:LONGEST] + "...")
    raise ConfigError(
        f"{shown} is no name for a domain: expected 1 to {LONGEST} letters (a to z, A to Z), digits, '.', '_' and '-', "
        "no dot at either end, and no device of Windows (con, nul, ...); choose another name"
    )


def inside(folder: Path, name: str) -> Path:
    """Join a file's name that a file gives to the folder that it must be in.

    Args:
        folder: the folder.
        name: path relative to it, with slashes.

    Returns:
        The path.

    Raises:
        CheckpointError: the name leads out of the folder, on any system.

    Example:
        >>> inside(Path("fused"), "gates/law.safetensors").as_posix()
        'fused/gates/law.safetensors'
    """
    windows = PureWindowsPath(name)
    parts = {*PurePosixPath(name).parts, *windows.parts}
    if not parts or ".." in parts or name.startswith("/") or windows.drive or windows.root or "\0" in name:
        raise CheckpointError(
            f"{folder}: {ascii(name)[:200]} leads out of it; expected a path inside; take another copy"
        )
    return folder / name
