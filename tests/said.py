"""What a command printed about its work."""

import re

__all__ = ["complaints"]

FOUND = re.compile(r"^tether: .*: (?:one|[\d,]+) (?:document|prompt|conversation)", re.MULTILINE)


def complaints(err: str) -> int:
    """Count the messages of a command, those that tell what was found in a text left out."""
    return err.count("tether:") - len(FOUND.findall(err))
