"""What commands print: results on stdout, as text or JSON."""

import json
import math
import os
from collections.abc import Mapping
from typing import Any

import typer

__all__ = ["emit", "quiet_libraries"]


def emit(result: Any, as_json: bool, text: str) -> None:
    """Print a result.

    Args:
        result: anything JSON can hold.
        as_json: print it as JSON.
        text: what to print otherwise.
    """
    if as_json:
        text = json.dumps(_finite(result), indent=2, ensure_ascii=False, allow_nan=False)
    typer.echo(text)


# JSON has no NaN and no infinity: null stands for what is no number.
def _finite(result: Any) -> Any:
    if isinstance(result, Mapping):
        return {key: _finite(value) for key, value in result.items()}
    if isinstance(result, list | tuple):
        return [_finite(value) for value in result]
    return None if isinstance(result, float) and not math.isfinite(result) else result


def quiet_libraries() -> None:
    """Silence transformers' own progress bars and hints: tether shows progress and errors itself."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
