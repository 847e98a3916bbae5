"""What commands print: results on stdout, as text or JSON."""

import json
import os
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
    typer.echo(json.dumps(result, indent=2, ensure_ascii=False) if as_json else text)


def quiet_libraries() -> None:
    """Silence transformers' own progress bars and hints: tether shows progress and errors itself."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
