"""The files beside the weights: found, compared where it matters, and carried into the result."""

import hashlib
from pathlib import Path
from typing import Any, Final, NamedTuple

from tether.errors import CheckpointError, ConfigError
from tether.files import check_plain, read_bytes
from tether.reading import JSON_BYTES, parse_json

__all__ = ["TEMPLATES", "Folder", "config_for", "differing_tokens", "locate", "read_folder"]

_TOKENIZER: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
)
_MODEL: Final = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
_PARTS: Final = ("text_config", "backbone_config", "quantization_config")
TOKENIZER_BYTES: Final = 256 * 2**20
"""Size of a tokenizer's file at most: eight times that of Gemma's."""
TEMPLATES: Final = "additional_chat_templates"
"""Folder of the chat templates beside the default one."""
_PICKLES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class Folder(NamedTuple):
    """What lies beside a model's weights.

    Attributes:
        weights: the folder or safetensors file to read weights from.
        config: its ``config.json``; empty where there is none.
        tokenizer: files of its tokenizer and chat template.
        model: generation and processor configs.
        config_sha256: of the bytes that the config was read from; empty where there is none.
    """

    weights: Path
    config: dict[str, Any]
    tokenizer: tuple[Path, ...]
    model: tuple[Path, ...]
    config_sha256: str = ""


def locate(path: str) -> Path:
    """Turn a model's name into a local path: a path, an alias of the library, or a hub id.

    Args:
        path: as in a recipe.

    Returns:
        An existing folder or file.

    Raises:
        CheckpointError: If nothing is there, or it cannot be fetched.
        ConfigError: If it is a pickle or GGUF file, or a folder with no other weights.
    """
    try:
        local = Path(path).expanduser()
        there = local.exists()
    # A name that is too long, or of a user that there is none of.
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path[:400]!r} is no path ({error}); expected a folder or a file") from error
    if not there:
        return _fetched(path)
    if local.is_file() and local.suffix in _PICKLES:
        raise ConfigError(
            f"{path} is a pickle file, which can run code when it is read; convert it to safetensors"
        )
    if local.is_file() and local.suffix == ".gguf":
        raise ConfigError(f"{path} is a GGUF file, usually quantised; give the safetensors it was made from")
    if local.is_dir() and not any(local.glob("model*.safetensors*")):
        if (local / "adapter_config.json").is_file():
            raise ConfigError(f"{path} holds an adapter and no model; merge it into its base first")
        pickles = sorted(file.name for file in local.iterdir() if file.suffix in _PICKLES)
        if pickles:
            raise ConfigError(
                f"{path} holds its weights in pickle files ({', '.join(pickles[:3])}), which can run code when "
                "they are read; convert them to safetensors"
            )
    return local


def _fetched(name: str) -> Path:
    from tether.causal.loading import ALIASES, resolve

    if name in ALIASES:
        return Path(resolve(name))
    if name.count("/") != 1 or name.startswith((".", "~", "/")):
        raise CheckpointError(
            f"{name} does not exist; expected a folder, a safetensors file, a hub id (owner/name) or an alias "
            f"({', '.join(ALIASES)})"
        )
    from huggingface_hub import snapshot_download

    from tether.store.hub import hub_copy

    if (earlier := hub_copy(name)) is not None:
        return Path(earlier)
    try:
        return Path(
            snapshot_download(
                name, allow_patterns=["model*.safetensors*", "*.json", "*.jinja", "*.txt", "*.model"]
            )
        )
    except Exception as error:
        # httpx and huggingface_hub raise a dozen types here; the user needs one sentence.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{name} is not a local path and cannot be fetched ({reason}); check the path, or the hub id and network"
        ) from error


def read_folder(path: Path) -> Folder:
    """Look at what lies beside a model's weights.

    Args:
        path: from ``locate``.

    Returns:
        The files; a single safetensors file has none.

    Raises:
        CheckpointError: If ``config.json`` is damaged, or a file beside it is a device or a pipe.
    """  # noqa: DOC502 - raised by _json
    if path.is_file():
        return Folder(path, {}, (), ())
    config, sha256 = _config(path / "config.json") if (path / "config.json").exists() else ({}, "")
    there = {file.name: file for file in path.iterdir() if file.name in {*_TOKENIZER, *_MODEL}}
    for file in there.values():
        check_plain(file)
    return Folder(
        path,
        config,
        (*(there[name] for name in _TOKENIZER if name in there), *sorted((path / TEMPLATES).glob("*.jinja"))),
        tuple(there[name] for name in _MODEL if name in there),
        sha256,
    )


def _config(file: Path) -> tuple[dict[str, Any], str]:
    content, sha256 = _json(file, JSON_BYTES)
    wrong = [key for key in _PARTS if not isinstance(content.get(key) or {}, dict)]
    if wrong:
        raise CheckpointError(f"{file} is damaged: {', '.join(wrong)} is no mapping. Copy it again.")
    return content, sha256


def config_for(config: dict[str, Any], dtype: str | None, tied: bool | None = None) -> dict[str, Any]:
    """Give the config of a result: that of the model it goes into, with what its weights are.

    Args:
        config: of that model.
        dtype: type of the result's floats; None where it is unchanged.
        tied: whether the result's head is its embedding, where the config has it otherwise; None to keep it.

    Returns:
        A new config.
    """
    changes: dict[str, Any] = {}
    if dtype is not None:
        changes |= {key: dtype for key in ("dtype", "torch_dtype") if key in config}
    if tied is not None and config.get("tie_word_embeddings") not in {None, tied}:
        changes["tie_word_embeddings"] = tied
    parts = {
        key: config_for(value, dtype, tied)
        for key, value in config.items()
        if isinstance(value, dict) and key.endswith("_config")
    }
    return config | parts | changes


def differing_tokens(one: Folder, other: Folder) -> str | None:
    """Compare two vocabularies.

    Args:
        one: a model.
        other: another.

    Returns:
        None where they agree; else how they differ, or ``""`` where one of them has no tokenizer to compare.

    Raises:
        CheckpointError: If a tokenizer file is damaged.
    """  # noqa: DOC502 - raised by _vocabulary
    files = [{file.name: file for file in each.tokenizer} for each in (one, other)]
    for name in ("tokenizer.json", "vocab.json", "tokenizer.model"):
        if all(name in each for each in files):
            break
    else:
        return ""
    digests = [hashlib.sha256(each[name].read_bytes()).digest() for each in files]
    if digests[0] == digests[1]:
        return None
    if name == "tokenizer.model":
        return "their tokenizer.model files differ"
    first, second = (_vocabulary(each) for each in files)
    moved = sorted(token for token in first.keys() & second.keys() if first[token] != second[token])
    only = [sorted(first.keys() - second.keys()), sorted(second.keys() - first.keys())]
    if not moved and not only[0] and not only[1]:
        return None
    parts = [f"{len(moved)} tokens have other numbers ({', '.join(map(repr, moved[:3]))})"] if moved else []
    parts += [
        f"{len(tokens)} tokens are only in {where} ({', '.join(map(repr, tokens[:3]))})"
        for tokens, where in zip(only, ("the former", "the latter"), strict=True)
        if tokens
    ]
    return ", ".join(parts)


def _vocabulary(files: dict[str, Path]) -> dict[str, int]:
    try:
        if "tokenizer.json" in files:
            content, _ = _json(files["tokenizer.json"], TOKENIZER_BYTES)
            words = content["model"]["vocab"]
            if isinstance(words, list):  # Unigram: pairs of token and score
                words = {token: number for number, (token, _) in enumerate(words)}
            words = {**words, **{each["content"]: each["id"] for each in content.get("added_tokens", ())}}
        else:
            names = [name for name in ("vocab.json", "added_tokens.json") if name in files]
            words = {
                token: number
                for name in names
                for token, number in _json(files[name], TOKENIZER_BYTES)[0].items()
            }
        if wrong := [token for token, number in words.items() if (type(token), type(number)) != (str, int)]:
            raise TypeError(f"{wrong[0]!r} is no token with a number")
        return words
    except (LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the tokenizer in {next(iter(files.values())).parent} has no vocabulary that can be read "
            f"({type(error).__name__}: {str(error)[:400]}); copy it again from its source"
        ) from error


# By no schema: configs and tokenizers are those of any architecture, and what is used of them is checked where it is.
def _json(path: Path, most: int) -> tuple[dict[str, Any], str]:
    data = read_bytes(path, most)
    content = parse_json(data, f"{path} is damaged", foreign=True)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged: expected a JSON mapping. Copy it again.")
    return content, hashlib.sha256(data).hexdigest()
