"""Certify how far a fused model has moved from its base, in figures that anyone can recompute."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tether.causal.fingerprint import fingerprint
from tether.causal.quantising import recorded
from tether.delta.claims import CLAIMS, SCHEMA_VERSION
from tether.delta.figures import budgeted, prepare, text_figures
from tether.delta.record import Certificate, Settings, model_files, read
from tether.delta.same_base import unlike
from tether.delta.windows import reader
from tether.errors import CertificateError
from tether.processes import joined
from tether.store.documents import documents_of, text_hash
from tether.store.hashing import sha256_file
from tether.store.manifest import versions
from tether.store.opened import Text

__all__ = ["Certificate", "Settings", "certify", "compose", "read"]


def certify(
    model: Any,
    fused: Any,
    tokenizer: Any,
    texts: Mapping[str, Path | Sequence[str]] | Sequence[str] | str | Path,
    *,
    on_step: Callable[[dict[str, float]], None] | None = None,
    **settings: Any,
) -> Certificate:
    """Measure a fused model against its base on texts and put it on record.

    Both models' weights are hashed first (`tether.causal.fingerprint.fingerprint`), whatever their files say of them.

    Cost: that, one backbone pass over the texts and one or two products with the output head; on a text that a budget
    was met on, a further pass (`tether.delta.declared`). Processes that `torchrun` or `accelerate launch` started
    together all call this: each measures a share of every text, and all get the same certificate.

    Args:
        model: the base.
        fused: made by `fuse` from that base, or loaded from a checkpoint.
        tokenizer: of the base.
        texts: a file, a list of documents, or several of either by name.
        on_step: called with `done` and `total` tokens of the current text.
        settings: fields of `Settings`.

    Returns:
        The certificate; `save` writes it when model and texts are files.

    Raises:
        CertificateError: `fused` has no fusion, or stands on another base, or the base is a fusion itself.
        CheckpointError: the weights of one of them are not those that its config names.
        ConfigError: a text that is empty or too short, or processes that differ in what they were given.
    """  # noqa: DOC502 - raised by what it calls
    chosen = Settings(**settings)
    if fused.fusion is None:
        raise CertificateError("the second model has no fused deltas: expected a model made by 'tether fuse'")
    if model.fusion is not None:
        raise CertificateError(
            f"the base has fused deltas itself ({', '.join(model.fusion.domains)}): expected the plain base, which the "
            "fused model is compared with"
        )
    own, other = fingerprint(model), fingerprint(fused)
    if own != other:
        raise CertificateError(
            f"base {own[:19]}... and fused {other[:19]}... stand on different backbones: drift between them is not "
            "defined here; name the base it was fused from"
        )
    if parts := unlike(model, fused):
        raise CertificateError(
            f"{', '.join(parts)}: not those of the base, so drift is not what its deltas do alone; name the base it "
            "was fused from, and load both in the number format that the checkpoint has"
        )
    named = texts if isinstance(texts, Mapping) else {_name(texts): texts}
    # Every text is read before the first one is measured, so that bad input is found at once.
    documents = {name: documents_of(text) for name, text in named.items()}
    tokenizer = reader(fused, tokenizer)
    hashes = {name: text_hash(documents[name]) for name in named}
    ready = {name: prepare(documents[name], tokenizer, chosen, name) for name in named}
    with joined() as group:
        group.agree(work="certifying", base=own, fusion=fused.config.fusion, texts=hashes, settings=chosen)
        figures = {
            name: text_figures(fused, *ready[name], chosen, documents=hashes[name], on_step=on_step)
            for name in named
        }
        return group.once(lambda: compose(fused, documents, figures, chosen))


def compose(
    fused: Any, texts: Mapping[str, Any], figures: dict[str, dict[str, Any]], chosen: Settings
) -> Certificate:
    """Put figures on record that `measure` and `summarise` gave for a fused model.

    Args:
        fused: the fused model; its `name_or_path` is the checkpoint to refer to.
        texts: the file or the documents of each text.
        figures: of each text.
        chosen: how they were measured.

    Returns:
        The sealed certificate.
    """
    listed = {}
    for name, text in texts.items():
        documents = documents_of(text)
        file = documents if isinstance(documents, Text) else None
        listed[name] = {
            "path": str(file.path.absolute()) if file and file.path else None,
            "sha256": file.sha256 if file else None,
            "documents": text_hash(documents),
            **({} if file is None else _as_asked(file)),
        }
    return Certificate(
        schema_version=SCHEMA_VERSION,
        versions=versions(),
        model=_describe_model(fused),
        fusion=fused.config.fusion,
        settings={name: getattr(chosen, name) for name in Settings.__dataclass_fields__},
        texts=listed,
        figures={name: budgeted(fused, row) for name, row in figures.items()},
        claims=CLAIMS,
    ).sealed()


# How a user asked for a text to be read; whoever checks it reads it so.
def _as_asked(text: Text) -> dict[str, Any]:
    asked = {"field": text.seen.field, "split": text.seen.split, "control_tokens": text.seen.control or None}
    return {key: value for key, value in asked.items() if value is not None}


def _name(text: Any) -> str:
    return Path(text).stem if isinstance(text, str | Path) else "text"


def _describe_model(fused: Any) -> dict[str, Any]:
    folder = Path(fused.name_or_path) if fused.name_or_path else None
    files: dict[str, str] = {}
    if folder is not None and folder.is_dir():
        files = {name: sha256_file(folder / name) for name in model_files(folder)}
    return {
        "path": str(folder.absolute()) if files and folder else None,
        "base_fingerprint": fingerprint(fused),
        "dtype": str(fused.action.weight.dtype).removeprefix("torch."),
        **({} if (packing := recorded(fused)) is None else {"quantised": packing}),
        "files": files,
    }
