"""The errors that tether raises on purpose.

Every message says what was given, what was expected and what to do next. Anything else that escapes
is a fault of tether: the command line exits with 3 then (`tether.cli.codes`).
"""

__all__ = [
    "CertificateError",
    "CheckpointError",
    "ConfigError",
    "GroupError",
    "IdentityError",
    "ShapeError",
    "TetherError",
]


class TetherError(Exception):
    """Base of all errors that tether raises on purpose; the command line prints it and exits with 2."""


class ConfigError(TetherError, ValueError):
    """An option, a recipe or an input text is not usable as given."""


class CheckpointError(TetherError):
    """A file of weights, a delta or a checkpoint is missing, damaged or made for another base."""


class IdentityError(CheckpointError):
    """Weights are not those that a file says they are: a check found it, and the command line exits with 1."""


class ShapeError(TetherError, ValueError):
    """A tensor has the wrong shape or type for what is asked of it."""


class CertificateError(TetherError):
    """A certificate cannot be read, or was asked for where it would not hold."""


class GroupError(TetherError):
    """Another process of a group has ended, so this one cannot go on with its share."""
