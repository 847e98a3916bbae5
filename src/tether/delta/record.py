"""The certificate as a document: its fields, its seal, how it is written and read."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictInt

from tether.causal.card import CARD
from tether.causal.description import check_description
from tether.delta.claims import SCHEMA_VERSION
from tether.errors import CertificateError, CheckpointError, ConfigError, TetherError
from tether.files import read_bytes
from tether.names import inside
from tether.processes import writes
from tether.reading import JSON_BYTES, Strict, checked, parse_json, read_json
from tether.store.opened import Text
from tether.store.publish import write_json
from tether.store.signing import sign

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

__all__ = [
    "DTYPES",
    "Certificate",
    "Settings",
    "check_fields",
    "check_referable",
    "is_certificate",
    "model_files",
    "read",
]

DTYPES = ("float32", "float64", "bfloat16", "float16")
"""In which a model may have been measured."""


class Certificate(BaseModel):
    """A measured drift with everything needed to measure it again.

    Attributes:
        schema_version: of this layout.
        versions: of what computed it.
        model: path, base fingerprint, dtype and sha256 of every file of the fused checkpoint.
        fusion: chart, weights, gates and domains, as the checkpoint says.
        settings: window, tokens, documents, confidence, quantile.
        texts: for each text its path, sha256 and document hash; `field`, `split` and `control_tokens` where it was read
            with them.
        figures: for each text what `summarise` gives.
        claims: what the figures mean.
        seal: sha256 over all of the above; shows accidental or careless edits, not forgery, which
            recomputing shows.
        signature: over the same content (`content`), of whoever vouches for it; empty where nobody does.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: StrictInt = Field(ge=1, le=SCHEMA_VERSION)
    versions: dict[str, str]
    model: dict[str, Any]
    fusion: dict[str, Any]
    settings: dict[str, Any]
    texts: dict[str, dict[str, Any]]
    figures: dict[str, dict[str, Any]]
    claims: tuple[str, ...]
    seal: str = ""
    signature: Annotated[str, Field(max_length=1024)] = ""

    def sealed(self) -> "Certificate":
        """Put the seal on.

        Returns:
            The certificate with its seal.
        """
        return self.model_copy(update={"seal": self.digest()})

    def content(self) -> bytes:
        """Give what a seal and a signature are over.

        Returns:
            Everything but those two (the seal is over the signature too), as JSON with sorted keys in UTF-8. It is made
            of what was read, so nothing that `verify` looks at is outside of it.
        """
        content = self.model_dump(mode="json", exclude={"seal", "signature"})
        return json.dumps(content, sort_keys=True, ensure_ascii=False).encode()

    def digest(self) -> str:
        """Hash everything but the seal.

        Returns:
            64 hexadecimal digits.
        """
        return hashlib.sha256(self.content() + self.signature.encode()).hexdigest()

    def signed_content(self) -> bytes:
        """Give what a signature is over: the content, after a line that no other file of ours begins with.

        Returns:
            The bytes.
        """
        return b"tether certificate\n" + self.content()

    def save(self, path: str | Path, *, key: "Ed25519PrivateKey | None" = None) -> Path:
        """Write the certificate; paths in it become relative to its folder. Of several processes the main one writes.

        Args:
            path: the JSON file.
            key: to sign it with, from `tether.store.signing.private_key`, or None.

        Returns:
            The path.

        Raises:
            CertificateError: the model or a text was given from memory, so nobody could check it again.
        """
        path = Path(path).absolute()
        loose = [name for name, text in self.texts.items() if text["path"] is None]
        if self.model["path"] is None or loose:
            raise CertificateError(
                f"model path {self.model['path']}, texts in no file {loose}: a certificate refers to files; "
                "write the model with save_checkpoint and the texts as JSON lines, and certify those"
            )
        content = self.model_dump()
        for entry in [content["model"], *content["texts"].values()]:
            entry["path"] = Path(os.path.relpath(entry["path"], path.parent)).as_posix()
        made = Certificate(**content)
        if key is not None:
            made = made.model_copy(update={"signature": sign(key, made.signed_content())})
        if writes():
            write_json(path, made.sealed().model_dump(mode="json"))
        return path


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How texts are measured; part of the certificate.

    Attributes:
        window: tokens a context.
        tokens: stop a text after this many tokens, or None.
        per_document: windows taken of one document, or None.
        quantile: share of documents that the certified bound covers.
        confidence: of the certified bound and of intervals.
        continuations: texts that the fused model writes itself and is measured on, for each text; 0 for none.
        continuation_tokens: how many tokens it writes.
        seed: of the noise it writes with.
    """

    window: int = 256
    tokens: int | None = None
    per_document: int | None = None
    quantile: float = 0.95
    confidence: float = 0.95
    continuations: int = 0
    continuation_tokens: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if not (0 < self.quantile < 1 and 0 < self.confidence < 1 and self.window >= 2):
            raise ConfigError(
                f"window={self.window}, quantile={self.quantile}, confidence={self.confidence}: expected a window of "
                "at least 2 tokens, and shares between 0 and 1"
            )
        if self.continuations < 0 or self.continuation_tokens < 1:
            raise ConfigError(
                f"continuations={self.continuations} of {self.continuation_tokens} tokens: expected 0 or more texts of "
                "at least 1 token"
            )


class _Settings(Strict):
    """What a certificate's settings may be."""

    window: int = Field(2, ge=2, le=2**20)
    tokens: int | None = Field(None, ge=1, le=2**40)
    per_document: int | None = Field(None, ge=1, le=2**40)
    quantile: float = Field(0.5, gt=0, lt=1)
    confidence: float = Field(0.5, gt=0, lt=1)
    continuations: int = Field(0, ge=0, le=2**20)
    continuation_tokens: int = Field(1, ge=1, le=2**20)
    seed: int = Field(0, ge=0, lt=2**63)


class _Written(Strict):
    """What a certificate says that the model wrote; its figures are compared with those of `verify`."""

    model_config = ConfigDict(extra="allow")

    ids: list[list[Annotated[int, Field(ge=0, lt=2**62)]]]
    values: list[list[float]] | None = None


def read(path: str | Path) -> Certificate:
    """Read a certificate.

    Args:
        path: the JSON file.

    Returns:
        The certificate, its seal unchecked.

    Raises:
        CertificateError: it is missing, not JSON, of a newer schema, or has wrong fields.
    """
    try:
        return checked(Certificate, read_json(path), path)
    except CheckpointError as error:
        raise CertificateError(
            f"{error}: not a certificate of schema {SCHEMA_VERSION} or below; expected one written by 'tether certify'"
        ) from error


def check_fields(certificate: Certificate) -> None:
    """Check that the parts of a certificate have the fields that `verify` needs.

    Args:
        certificate: as it was read.

    Raises:
        CertificateError: one is missing or of another type; the message names it.
    """
    model: dict[str, type] = {"path": str, "base_fingerprint": str, "files": dict}
    if certificate.schema_version >= 5:
        model["dtype"] = str
    if "quantised" in certificate.model:
        model["quantised"] = dict
    parts = [("model", certificate.model, model)]
    of_text: dict[str, type] = {"path": str, "sha256": str, "documents": str}
    asked: dict[str, type] = {"field": str, "split": str, "control_tokens": bool}
    parts += [
        (f"texts.{name}", text, of_text | {key: kind for key, kind in asked.items() if key in text})
        for name, text in certificate.texts.items()
    ]
    if certificate.schema_version >= 5 and certificate.model.get("dtype") not in DTYPES:
        raise CertificateError(
            f"model.dtype: {certificate.model.get('dtype')!r}, expected one of {', '.join(DTYPES)}"
        )
    for where, part, fields in parts:
        for key, kind in fields.items():
            if not isinstance(part.get(key), kind):
                raise CertificateError(f"{where}.{key}: {part.get(key)!a:.80}, expected a {kind.__name__}")
        if unknown := part.keys() - fields.keys():
            raise CertificateError(f"{where}: unknown fields {sorted(unknown)}, expected {sorted(fields)}")
    if not certificate.texts or not certificate.model["files"]:
        raise CertificateError("no texts or no files of the model: expected at least one of each to check")
    try:
        for file in certificate.model["files"]:
            inside(Path("model"), file)
        checked(_Settings, certificate.settings, "settings")
        check_description(certificate.fusion)
        for name, row in certificate.figures.items():
            if "continuations" in row:
                written = checked(_Written, row["continuations"], f"figures.{name}.continuations")
                if len({len(ids) for ids in (*written.ids, *(written.values or written.ids))}) > 1:
                    raise CertificateError(f"figures.{name}.continuations: texts of different lengths")
                if "values" in row["continuations"] and len(written.values or ()) != len(written.ids):
                    raise CertificateError(f"figures.{name}.continuations.values: not one for each of ids")
    except (CheckpointError, ConfigError) as error:
        raise CertificateError(str(error)) from error


def check_referable(texts: Mapping[str, Text]) -> None:
    """Refuse texts that a certificate cannot refer to, before they are measured.

    Args:
        texts: by name.

    Raises:
        CertificateError: one is in no file or folder.
    """
    if loose := [text.seen.name for text in texts.values() if text.path is None]:
        raise CertificateError(
            f"{', '.join(loose)}: a certificate refers to files, which whoever checks it reads again; write the text "
            "down first, as with Dataset.to_json or save_to_disk of datasets, and certify that"
        )


def is_certificate(path: Path) -> bool:
    """Tell whether a file is a certificate, which is no part of a model it may lie beside.

    Args:
        path: an existing file.

    Returns:
        Whether it is.
    """
    if path.suffix != ".json":
        return False
    try:
        text = read_bytes(path, JSON_BYTES)
        content = parse_json(text, path) if b'"seal"' in text else None
    except TetherError:
        return False
    return isinstance(content, dict) and {"seal", "claims", "figures"} <= content.keys()


def model_files(folder: Path) -> list[str]:
    """List the files of a model's folder that a certificate describes.

    Args:
        folder: of the model.

    Returns:
        Paths relative to it, with slashes, without certificates, and without what a hub puts beside a model: a card,
        which tells of the certificate, `.gitattributes`, and its own notes in `.cache`.
    """
    found = [p for p in sorted(folder.rglob("*")) if p.is_file() and not is_certificate(p)]
    return [name for name in (p.relative_to(folder).as_posix() for p in found) if not _of_hub(name)]


def _of_hub(name: str) -> bool:
    return name in (CARD, ".gitattributes") or name.startswith(".cache/")
