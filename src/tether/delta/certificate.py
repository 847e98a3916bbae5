"""Certify how far a fused model has moved from its base, in figures that anyone can recompute, and verify."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tether.causal.mixture import Mixture
from tether.delta.account import account
from tether.delta.continuations import (
    PROMPT,
    Written,
    continue_texts,
    generated_account,
    generated_part,
    not_drawn,
    prompts,
    text_windows,
)
from tether.delta.measure import Variant, measure
from tether.delta.planned import budget_figures
from tether.delta.record import (
    CLAIMS,
    SCHEMA_VERSION,
    Certificate,
    Settings,
    check_fields,
    is_certificate,
    read,
)
from tether.delta.regret import account_figures
from tether.delta.summary import summarise
from tether.delta.windows import Windows, reader, window_text
from tether.errors import CertificateError, CheckpointError
from tether.names import inside
from tether.store.documents import documents_of, read_documents, text_hash
from tether.store.hashing import sha256_file
from tether.store.manifest import versions
from tether.store.opened import Text

__all__ = ["Certificate", "Settings", "certify", "compose", "read", "served_variant", "verify"]

ADDED = {1: ("token_law", "leash_pulled", "budgets"), 2: ("budgets",)}
"""Figures that certificates of older schemas do not have."""
WHOLE = 3
"""Up to this schema the document that reached the limit of tokens was measured whole."""
TOLERANCE = 2e-3
"""Relative difference allowed between two computations of a figure: another number of threads, another CPU."""


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

    Cost: one backbone pass over the texts and one or two products with the output head.

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
        CertificateError: `fused` has no fusion, or stands on another base.
    """
    chosen = Settings(**settings)
    if fused.fusion is None:
        raise CertificateError("the second model has no fused deltas: expected a model made by 'tether fuse'")
    if model.config.base_fingerprint != fused.config.base_fingerprint:
        raise CertificateError(
            f"base {str(model.config.base_fingerprint)[:19]}... and fused {str(fused.config.base_fingerprint)[:19]}... "
            "stand on different backbones: drift between them is not defined here; name the base it was fused from"
        )
    # Adapters change the backbone; their folders are bound to its fingerprint when they are served.
    parts = ["abduction", "action"] + ["backbone"] * (fused.config.fusion.get("kind") != "adapters")
    if unlike := [part for part in parts if not _equal(model, fused, part)]:
        raise CertificateError(
            f"{', '.join(unlike)}: the weights are not those of the base, so drift is not what its deltas do "
            "alone; name the base it was fused from, and load both in the number format that the checkpoint has"
        )
    named = texts if isinstance(texts, Mapping) else {_name(texts): texts}
    # Every text is read before the first one is measured, so that bad input is found at once.
    documents = {name: documents_of(text) for name, text in named.items()}
    tokenizer = reader(fused, tokenizer)
    ready = {name: _prepared(documents[name], tokenizer, chosen, name) for name in named}
    figures = {name: _figures(fused, *ready[name], chosen, on_step) for name in named}
    return compose(fused, documents, figures, chosen)


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
            "path": str(file.path.absolute()) if file else None,
            "sha256": file.sha256 if file else None,
            "documents": text_hash(documents),
        }
    return Certificate(
        schema_version=SCHEMA_VERSION,
        versions=versions(),
        model=_describe_model(fused),
        fusion=fused.config.fusion,
        settings={name: getattr(chosen, name) for name in Settings.__dataclass_fields__},
        texts=listed,
        figures={name: _budgeted(fused, row) for name, row in figures.items()},
        claims=CLAIMS,
    ).sealed()


def _equal(model: Any, fused: Any, part: str) -> bool:
    own, other = (dict(getattr(each, part).named_parameters()) for each in (model, fused))
    return own.keys() == other.keys() and all(
        values is other[name] or _same(name, values, other[name].to(values)) for name, values in own.items()
    )


def _same(name: str, values: Tensor, other: Tensor) -> bool:
    # Start values of the action are computed from the base's weights in their dtype, or rounded to it after that.
    derived = name in ("threshold", "class_noise", "value_weight", "value_bias")
    if derived:
        return bool(((values - other).abs() <= 2**-7 * values.abs()).all())
    return torch.equal(values, other)


def _name(text: Any) -> str:
    return Path(text).stem if isinstance(text, str | Path) else "text"


# A text's windows, and the beginnings of documents that the model shall go on from.
def _prepared(
    documents: Sequence[str], tokenizer: Any, chosen: Settings, name: str, *, whole: bool = False
) -> tuple[Windows, Written | None]:
    called = f"text {name}"
    windows = window_text(
        documents, tokenizer, length=chosen.window, tokens=chosen.tokens, per_document=chosen.per_document,
        name=called, whole=whole,
    )  # fmt: skip
    if not chosen.continuations:
        return windows, None
    return windows, prompts(documents, tokenizer, chosen.continuations, name=called)


def _figures(
    fused: Any,
    windows: Windows,
    begun: Written | None,
    chosen: Settings,
    on_step: Any,
    written: Written | None = None,
) -> dict[str, Any]:
    shares = {"quantile": chosen.quantile, "confidence": chosen.confidence}
    if isinstance(fused.fusion, Mixture):
        return _by_evidence(fused, windows, begun, chosen, on_step, written, shares)
    figures = summarise(
        measure(fused, fused.fusion, windows, [served_variant(fused)], on_step=on_step), 0, **shares
    )
    if begun is None:
        return figures
    if written is None:
        written = continue_texts(fused, begun, chosen.continuation_tokens, chosen.seed)
    result = measure(fused, fused.fusion, text_windows(written), [served_variant(fused)], on_step=on_step)
    own = summarise(generated_part(result, chosen.continuation_tokens), 0, **shares)
    return figures | {"continuations": own | _texts(written)}


def _texts(written: Written) -> dict[str, Any]:
    texts = {"prompt": PROMPT, "ids": written.ids.tolist()}
    return texts if written.values is None else texts | {"values": written.values.tolist()}


def _by_evidence(
    fused: Any,
    windows: Windows,
    begun: Written | None,
    chosen: Settings,
    on_step: Any,
    written: Any,
    shares: Any,
) -> dict[str, Any]:
    mixture, numbers = fused.fusion, None
    if fused.config.num_token_id is not None:
        numbers = windows.targets[windows.targets >= 0] == fused.config.num_token_id
    (found,) = account([fused], windows, on_step=on_step)
    figures = account_figures(mixture, found, numbers=numbers, **shares)
    if begun is None:
        return figures
    if written is None:
        written = continue_texts(fused, begun, chosen.continuation_tokens, chosen.seed)
    (found,) = account([fused], text_windows(written), written=PROMPT, on_step=on_step)
    own = account_figures(mixture, generated_account(found, chosen.continuation_tokens), **shares)
    # What is promised of regret is promised of text that is given.
    own.pop("regret")
    return figures | {"continuations": own | _texts(written)}


def _budgeted(fused: Any, row: dict[str, Any]) -> dict[str, Any]:
    if isinstance(fused.fusion, Mixture):
        return row
    return row | {"budgets": budget_figures(fused.config.fusion, row["latent_drift"]["mean"])}


def served_variant(fused: Any) -> Variant:
    """Say how a sum adds its deltas when it is served.

    Args:
        fused: a fusion by sum.

    Returns:
        The variant to measure.
    """
    fusion = fused.fusion
    leash = fusion.leash or (None, "softmax")
    return Variant(tuple(fused.config.fusion["weights"]), fusion.chart, fusion.gated, *leash)


def _model_files(folder: Path) -> list[str]:
    found = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    return [p.relative_to(folder).as_posix() for p in found if not is_certificate(p)]


def _describe_model(fused: Any) -> dict[str, Any]:
    folder = Path(fused.name_or_path) if fused.name_or_path else None
    files: dict[str, str] = {}
    if folder is not None and folder.is_dir():
        files = {name: sha256_file(folder / name) for name in _model_files(folder)}
    return {
        "path": str(folder.absolute()) if files and folder else None,
        "base_fingerprint": fused.config.base_fingerprint,
        "dtype": str(fused.action.weight.dtype).removeprefix("torch."),
        "files": files,
    }


def verify(path: str | Path, *, on_step: Callable[[dict[str, float]], None] | None = None) -> list[str]:
    """Check a certificate: its seal, the hash of every file it names, and every figure by recomputing it.

    Args:
        path: the certificate.
        on_step: called with `done` and `total` tokens of the current text.

    Returns:
        What differs, one sentence each; empty when the certificate holds. Figures are recomputed only when
        seal and files are right, since otherwise it is known not to hold.

    Raises:
        CertificateError: the certificate cannot be read.
    """  # noqa: DOC502 - raised by read
    certificate = read(path)
    check_fields(certificate)
    folder = Path(path).absolute().parent
    wrong = []
    if certificate.digest() != certificate.seal:
        wrong.append("the certificate was edited: its content does not match its seal")
    model = folder / certificate.model["path"]
    if certificate.model["files"] and (
        model.is_dir() and _model_files(model) != sorted(certificate.model["files"])
    ):
        wrong.append(f"{model} holds other files than those that are described")
    if certificate.figures.keys() != certificate.texts.keys():
        wrong.append(
            f"figures of {list(certificate.figures)}, texts {list(certificate.texts)}: expected the same"
        )
    if not certificate.claims_known():
        wrong.append("the claims are not those of this kind of certificate")
    named = {str(inside(model, file)): sha256 for file, sha256 in certificate.model["files"].items()}
    named |= {str(folder / text["path"]): text["sha256"] for text in certificate.texts.values()}
    for file, sha256 in named.items():
        if not Path(file).is_file():
            wrong.append(f"{file} is missing")
        elif sha256_file(file) != sha256:
            wrong.append(f"{file} has changed since the certificate was made")
    if wrong:
        return wrong
    return _recompute(certificate, folder, on_step)


def _recompute(certificate: Certificate, folder: Path, on_step: Any) -> list[str]:
    from tether.causal.loading import load

    # Figures of the same checkpoint in another dtype are others.
    stated_dtype = certificate.model.get("dtype")
    dtype = getattr(torch, stated_dtype) if stated_dtype else None
    fused, tokenizer = load(str(folder / certificate.model["path"]), dtype=dtype)
    if fused.fusion is None or fused.config.base_fingerprint != certificate.model["base_fingerprint"]:
        raise CheckpointError(
            f"{certificate.model['path']}: not the fused checkpoint that the certificate describes"
        )
    wrong = (
        []
        if fused.config.fusion == certificate.fusion
        else ["the checkpoint's fusion is not the one described"]
    )
    chosen = Settings(**certificate.settings)
    # Up to that schema numbers were read as other words.
    tokenizer = tokenizer if certificate.schema_version <= 4 else reader(fused, tokenizer)
    for name, text in certificate.texts.items():
        documents = read_documents(folder / text["path"])
        if text_hash(documents) != text["documents"]:
            wrong.append(f"text {name}: its documents are not the ones described")
        stated = certificate.figures[name]
        windows, begun = _prepared(
            documents, tokenizer, chosen, name, whole=certificate.schema_version <= WHOLE
        )
        written = None
        if "continuations" in stated and begun is not None:
            # What was written is stated, and checked: writing it again could part at a rounding error.
            said = stated["continuations"]
            values = torch.tensor(said["values"], dtype=torch.float64) if "values" in said else None
            written = Written(torch.tensor(said["ids"]), values)
            wrong += _not_written(fused, written, begun, chosen, name)
            if wrong:
                continue
        again = _budgeted(fused, _figures(fused, windows, begun, chosen, on_step, written))
        unknown = ADDED.get(certificate.schema_version, ())
        again = {key: value for key, value in again.items() if key not in unknown}
        wrong += _differences(stated, again, f"{name}")
    return wrong


def _not_written(fused: Any, written: Written, begun: Written, chosen: Settings, name: str) -> list[str]:
    shape = (len(begun.ids), PROMPT + chosen.continuation_tokens)
    pairs = [(written.ids, begun.ids)]
    if written.values is not None and begun.values is not None:
        pairs.append((written.values, begun.values))
    if (written.values is None) != (begun.values is None) or any(
        found.shape != shape or not torch.equal(found[:, :PROMPT], given) for found, given in pairs
    ):
        return [f"{name}.continuations: not {len(begun.ids)} continuations of the text's first documents"]
    ids = written.ids
    if not bool(((ids >= 0) & (ids < fused.vocab_size)).all()):
        return [f"{name}.continuations: ids outside the vocabulary"]
    count = not_drawn(fused, written, chosen.seed)
    return [f"{name}.continuations: {count} tokens are not what the model writes"] if count else []


def _differences(stated: Any, again: Any, where: str) -> list[str]:
    if isinstance(stated, dict) and isinstance(again, dict) and stated.keys() == again.keys():
        return [line for key in stated for line in _differences(stated[key], again[key], f"{where}.{key}")]
    if isinstance(stated, list) and isinstance(again, list) and len(stated) == len(again):
        pairs = zip(stated, again, strict=True)
        return [line for i, (a, b) in enumerate(pairs) for line in _differences(a, b, f"{where}[{i}]")]
    if isinstance(stated, float) and isinstance(again, float):
        same = math.isclose(stated, again, rel_tol=TOLERANCE, abs_tol=1e-4 * TOLERANCE)
    else:
        same = stated == again
    return [] if same else [f"{where}: stated {stated!s:.200}, recomputed {again!s:.200}"]
