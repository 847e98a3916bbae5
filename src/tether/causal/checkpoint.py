"""Write models as checkpoints that `AutoModelForCausalLM` loads."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tether.causal.card import CARD, fused_card
from tether.causal.modeling import CausalQwenForCausalLM
from tether.causal.numbers import NumericTokenizer
from tether.errors import ConfigError
from tether.store.hashing import sha256_file
from tether.store.manifest import Input, Manifest, write_manifest
from tether.store.publish import publish_folder

__all__ = ["save_checkpoint"]


def save_checkpoint(
    model: CausalQwenForCausalLM,
    tokenizer: Any,
    folder: str | Path,
    *,
    inputs: Mapping[str, Path] | None = None,
    replace: bool = False,
) -> Path:
    """Write a model with its tokenizer, manifest and model card, loadable by `AutoModelForCausalLM`.

    Args:
        model: converted or fused.
        tokenizer: the base's tokenizer; where the model reads numbers, the numeric one is made of a plain one.
        folder: where to; must be absent or empty.
        inputs: files the model was made from, by role, recorded with their hashes.
        replace: whether a folder with content is replaced.

    Returns:
        The folder, which becomes the model's `name_or_path`.

    Raises:
        ConfigError: no tokenizer, a numeric one for a model without `<NUM>`, another model's, or the folder is not
            empty.
    """
    if tokenizer is None:
        raise ConfigError("tokenizer=None: expected the base model's tokenizer; tether.load returns both")
    if model.config.num_token_id is not None:
        tokenizer = model.add_numbers(tokenizer)
    elif isinstance(tokenizer, NumericTokenizer):
        raise ConfigError(
            "a numeric tokenizer for a model without <NUM>: call model.add_numbers(tokenizer) first, or give its plain "
            "one (tokenizer.plain())"
        )
    folder = Path(folder)
    listed = [
        Input(role=role, path=str(path), sha256=sha256_file(path)) for role, path in (inputs or {}).items()
    ]
    with publish_folder(folder, replace=replace) as target:
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
        recipe = {"fusion": model.config.fusion, "preset": model.config.preset}
        write_manifest(target, Manifest(kind="checkpoint", inputs=tuple(listed), recipe=recipe))
        card = fused_card(folder.resolve().name, model.config.fusion)
        (target / CARD).write_text(card, encoding="utf-8", newline="\n")
    model.name_or_path = str(folder)
    return folder
