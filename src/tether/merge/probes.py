"""The meta-dataset: samples of text, or of images and text, and their tokens under one model."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from tether.causal.folder import check_size
from tether.causal.loading import load_backbone, resolve
from tether.errors import CheckpointError, ConfigError, TetherError
from tether.files import LINE_BYTES, is_plain, read_bytes
from tether.names import inside
from tether.reading import Strict, parse_as
from tether.store.documents import read_documents
from tether.store.named import is_saved
from tether.store.tables import TABLES, suffixes

__all__ = [
    "EncodedProbe",
    "Probe",
    "encode_probes",
    "load_reader",
    "probes_hash",
    "read_probes",
    "tokenizers_agree",
]

METADATA = "metadata.jsonl"


class Probe(BaseModel):
    """One sample of the meta-dataset: what a model is asked to go on from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: str
    """The prompt; models continue it."""
    image: Path | None = None
    """A file that Pillow reads, shown before the text unless the text holds an image token."""


class _Line(Strict):
    """A line of a file of probes, or of a folder's metadata."""

    text: str
    image: str | None = None
    file_name: str | None = None


class EncodedProbe(NamedTuple):
    """A probe as one model reads it.

    Attributes:
        input_ids: tokens, image placeholders expanded, shape (P,), int64, P >= 1.
        extras: further inputs of the model's first pass, for example `pixel_values`; empty for text.
    """

    input_ids: Tensor
    extras: dict[str, Tensor]


def read_probes(path: str | Path) -> list[Probe]:
    """Read probes: JSON lines, or a folder in the `datasets` ImageFolder layout.

    A line has `text` and, optionally, `image`, a path inside the file's folder. A folder holds
    `metadata.jsonl` whose lines have `text` and `file_name` (the name ImageFolder gives the image). A table, and a
    folder written by `save_to_disk`, give probes of text alone, see `tether.store.documents.read_documents`.

    Args:
        path: the file or folder.

    Returns:
        The probes in the order of the lines, images as paths that exist.

    Raises:
        ConfigError: nothing there, a line is no such object, a text is empty, or images are missing (all are
            named).
    """
    path = Path(path)
    folder = path.is_dir()
    if is_saved(path) if folder else suffixes(path)[0] in TABLES:
        return _of_text(path)
    if folder and not (path / METADATA).is_file():
        raise ConfigError(
            f"{path}: expected {METADATA} in the folder (ImageFolder layout); write it with text and file_name a line"
        )
    file = path / METADATA if folder else path
    if not file.is_file():
        raise ConfigError(f"{path}: no such probe file; expected JSON lines with text and, optionally, image")
    probes, problems = [], []
    try:
        lines = read_bytes(file, LINE_BYTES, error=ConfigError).decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: expected JSON lines in UTF-8 that can be read ({error})") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"line {number}"
        try:
            fields = parse_as(_Line, line, where)
            name = fields.file_name if folder and fields.file_name is not None else fields.image
            image = None if name is None else inside(file.parent, name)
        except TetherError as error:
            said = str(error).removeprefix(f"{where}: ")
            problems.append(f"{where}: {said[:400]}, got {line[:60]!r}")
            continue
        if not fields.text.strip():
            problems.append(f"{where}: the text is empty")
        if image is not None and not is_plain(image):
            problems.append(f"{where}: no image {str(image)[:400]}")
        probes.append(Probe(text=fields.text, image=image))
    if problems:
        shown = "; ".join(problems[:10]) + (f"; and {len(problems) - 10} more" if len(problems) > 10 else "")
        raise ConfigError(f"{file}: expected objects with text and, optionally, image; {shown}")
    if not probes:
        raise ConfigError(f"{file}: no probes in it; expected at least one line")
    return probes


def _of_text(path: Path) -> list[Probe]:
    text = read_documents(path, fetch=False)
    if text.kind != "text":
        raise ConfigError(f"{text.recognised}; expected probes with a field 'text'")
    return [Probe(text=document) for document in text]


def encode_probes(
    probes: Sequence[Probe], tokenizer: Any, *, longest: int = 32, processor: Any = None
) -> list[EncodedProbe]:
    """Tokenise probes for one model.

    Args:
        probes: the meta-dataset.
        tokenizer: the model's tokenizer.
        longest: tokens kept of a text probe, >= 1; image probes are never cut, so that no image is.
        processor: the model's image and text processor; needed where a probe has an image.

    Returns:
        The probes in order.

    Raises:
        ConfigError: an image without a processor, an image that cannot be read, or a prompt that is empty or
            ends in an image token.
    """
    if longest < 1:
        raise ConfigError(f"longest={longest}: expected at least one token of a probe")
    images = [probe.image for probe in probes if probe.image is not None]
    if images and processor is None:
        raise ConfigError(
            f"{len(images)} probes have images, the first {images[0]}, but the model has no processor; give text "
            "probes or a model with AutoProcessor files"
        )
    encoded = []
    for number, probe in enumerate(probes):
        if probe.image is None:
            ids = tokenizer(probe.text, truncation=True, max_length=longest, return_tensors="pt")[
                "input_ids"
            ][0]
            one = EncodedProbe(ids, {})
        else:
            one = _encode_image(probe, processor)
        if len(one.input_ids) == 0:
            raise ConfigError(f"probe {number}: no tokens in {probe.text[:60]!r}; give text")
        encoded.append(one)
    return encoded


def _encode_image(probe: Probe, processor: Any) -> EncodedProbe:
    from PIL import Image

    try:
        with Image.open(str(probe.image)) as opened:
            image = opened.convert("RGB")
    # Pillow raises a dozen types for what is none, and for one of too many pixels.
    except Exception as error:
        raise ConfigError(
            f"{probe.image}: not an image that Pillow reads ({error}); replace the file"
        ) from error
    text = probe.text if processor.image_token in probe.text else processor.image_token + probe.text
    found = dict(processor(text=text, images=image, return_tensors="pt"))
    ids = found.pop("input_ids")[0]
    found.pop("attention_mask", None)
    if int(ids[-1]) == processor.tokenizer.convert_tokens_to_ids(processor.image_token):
        raise ConfigError(f"probe {probe.text[:60]!r}: the prompt ends in an image token; add text after it")
    return EncodedProbe(ids, found)


def load_reader(name: str, *, images: bool) -> tuple[Any, Any, Any]:
    """Load a model with what encodes probes for it.

    Args:
        name: alias, path or hub id.
        images: whether probes have images; then a vision-language model with its processor is loaded.

    Returns:
        The model in evaluation mode, its tokenizer, and its processor (None for text).

    Raises:
        CheckpointError: nothing loadable under that name.
    """
    if not images:
        return (*load_backbone(name), None)
    from transformers import AutoModelForImageTextToText, AutoProcessor

    place = resolve(name)
    check_size(place, name, AutoModelForImageTextToText)
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            place, trust_remote_code=False, dtype="auto"
        ).eval()
        processor = AutoProcessor.from_pretrained(place, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{name}: the probes have images, but no vision-language model with a processor loads from there "
            f"({str(error).splitlines()[0]}); give text probes, or a checkpoint with processor files"
        ) from error
    return model, processor.tokenizer, processor


def probes_hash(probes: Iterable[EncodedProbe]) -> str:
    """Hash what a model is shown.

    Args:
        probes: encoded probes in order.

    Returns:
        `sha256:` and 64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for probe in probes:
        for name, tensor in (("input_ids", probe.input_ids), *sorted(probe.extras.items())):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(tensor.contiguous().numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def tokenizers_agree(first: Any, second: Any) -> bool:
    """Say whether two tokenizers give the same tokens to every text, so that paths can be shared.

    Fast tokenizers are compared by their whole pipeline (vocabulary, merges, normaliser, splitting, added
    tokens), others by their vocabulary and class.

    Args:
        first: a transformers tokenizer.
        second: another.

    Returns:
        True where recorded tokens of one can be fed to the model of the other.
    """
    if first.get_vocab() != second.get_vocab():
        return False
    if not (first.is_fast and second.is_fast):
        return type(first) is type(second)
    parts = []
    for tokenizer in (first, second):
        # Not by the strict reader: no file, but what the library in memory says of itself.
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        parts.append({key: state[key] for key in ("model", "normalizer", "pre_tokenizer", "added_tokens")})
    return parts[0] == parts[1]
