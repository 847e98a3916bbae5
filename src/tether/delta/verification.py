"""Verify a certificate: signature, seal, files, the base that is served, every figure, and what is declared."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tether.causal.fingerprint import fingerprint
from tether.causal.loading import load
from tether.causal.numbers import without_numbers
from tether.causal.quantising import packed, recorded, told
from tether.delta import claims
from tether.delta.continuations import PROMPT, Written, not_drawn
from tether.delta.declared import broken, unmeasured
from tether.delta.figures import prepare, text_figures
from tether.delta.record import Certificate, Settings, check_fields, model_files, read
from tether.delta.same_base import unlike
from tether.delta.windows import reader
from tether.errors import CertificateError, CheckpointError, IdentityError
from tether.names import inside
from tether.store.documents import read_documents, source_hash, text_hash
from tether.store.signing import check

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

__all__ = ["not_checked", "verify"]

ADDED = {
    1: ("token_law", "leash_pulled", "budgets", "alone", "values"),
    2: ("budgets", "alone", "values"),
    **dict.fromkeys(range(3, 7), ("alone", "values")),
    7: ("values",),
}
"""Figures that certificates of older schemas do not have."""
WHOLE = 3
"""Up to this schema the document that reached the limit of tokens was measured whole."""
CONTROL = 9
"""Up to this schema control tokens in plain texts and in prompts were read as such."""
MEANS = 8
"""Up to this schema `alone` held means of deltas, and of adapters fused as a sum."""
TOLERANCE = 2e-3
"""Relative difference allowed between two computations of a figure: another number of threads, another CPU."""


def verify(
    path: str | Path,
    *,
    base: str | None = None,
    key: "Ed25519PublicKey | None" = None,
    device: str | torch.device | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    offload_folder: str | Path | None = None,
    on_step: Callable[[dict[str, float]], None] | None = None,
) -> list[str]:
    """Check a certificate: its seal, the hash of every file it names, its base, and every figure by recomputing it.

    The fingerprint of the base is computed from the weights that are served; one that is stored anywhere is only
    compared with it. Cost: one pass over the weights (0.4 CPU seconds for SmolLM2-135M), and that of measuring.

    Args:
        path: the certificate.
        base: alias, folder, `.gguf` file or hub id of the model that the base should be. It is loaded beside the fused
            one, and every weight and setting is compared. None leaves open which model the fingerprint is of.
        key: whose signature the certificate should have, from `tether.store.signing.public_key`. None leaves open who
            made it.
        device: where to compute the figures again; None computes on the CPU.
        device_map: where layers lie that have no room there, as of `tether.load`.
        offload_folder: as of `tether.load`.
        on_step: called with `done` and `total` tokens of the current text.

    Returns:
        What differs, one sentence each; empty when the certificate holds. Figures are recomputed only when everything
        else is right, since otherwise it is known not to hold.

    Raises:
        CertificateError: the certificate cannot be read, or `base` is a fusion.
        CheckpointError: the model or `base` cannot be loaded.
    """  # noqa: DOC502 - raised by what it calls
    certificate = read(path)
    check_fields(certificate)
    folder = Path(path).absolute().parent
    wrong = _unsigned(certificate, key)
    if certificate.digest() != certificate.seal:
        wrong.append("the certificate was edited: its content does not match its seal")
    model = folder / certificate.model["path"]
    if certificate.model["files"] and (
        model.is_dir() and model_files(model) != sorted(certificate.model["files"])
    ):
        wrong.append(f"{model} holds other files than those that are described")
    if certificate.figures.keys() != certificate.texts.keys():
        wrong.append(
            f"figures of {list(certificate.figures)}, texts {list(certificate.texts)}: expected the same"
        )
    if not claims.are_known(certificate.claims, certificate.schema_version):
        wrong.append("the claims are not those of this kind of certificate")
    named = {inside(model, file): sha256 for file, sha256 in certificate.model["files"].items()}
    named |= {folder / text["path"]: text["sha256"] for text in certificate.texts.values()}
    for file, sha256 in named.items():
        if not (file.is_file() or file.is_dir()):
            wrong.append(f"{file} is missing")
        elif source_hash(file) != sha256:
            wrong.append(f"{file} has changed since the certificate was made")
    if wrong:
        return wrong
    where = {"device": device, "device_map": device_map, "offload_folder": offload_folder}
    return _recompute(certificate, folder, base, where, on_step)


def not_checked(path: str | Path, *, base: bool, key: bool) -> list[str]:
    """Say what `verify` leaves open, for a reader who sees only that a certificate holds.

    Args:
        path: the certificate.
        base: whether the base was given.
        key: whether a key was given.

    Returns:
        What is left open and how to have it checked; empty where nothing is.
    """
    certificate = read(path)
    left = []
    if not base:
        stated = str(certificate.model.get("base_fingerprint"))
        left.append(f"which model the base {stated[:19]}... is, and its settings (--base BASE)")
    if not key:
        left.append("who made the certificate (--key KEY)")
    if names := unmeasured(certificate.fusion, certificate.figures):
        left.append(f"the declared drift of {', '.join(names)} (no text is the base text that it was met on)")
    return left


def _unsigned(certificate: Certificate, key: "Ed25519PublicKey | None") -> list[str]:
    if key is None:
        return []
    if not certificate.signature:
        return ["the certificate has no signature, so nobody vouches for it: expected one of the key given"]
    if check(key, certificate.signature, certificate.signed_content()):
        return []
    return [
        "the signature is not of the key given, or the certificate was edited after it was signed: get it again from "
        "whoever should have signed it"
    ]


def _recompute(
    certificate: Certificate, folder: Path, base: str | None, where: dict[str, Any], on_step: Any
) -> list[str]:
    # Figures of the same checkpoint in another dtype are others.
    stated_dtype = certificate.model.get("dtype")
    dtype = getattr(torch, stated_dtype) if stated_dtype else None
    place = str(folder / certificate.model["path"])
    try:
        fused, tokenizer = load(place, dtype=dtype, **where)
        own = fingerprint(fused)
    except IdentityError as error:
        return [str(error)]
    if fused.fusion is None:
        raise CheckpointError(f"{certificate.model['path']}: not a fused checkpoint, as the certificate says")
    wrong = []
    if own != certificate.model["base_fingerprint"]:
        wrong.append(
            f"the base of the fused model is {own[:19]}..., the certificate says "
            f"{certificate.model['base_fingerprint'][:19]!a}"
        )
    if fused.config.fusion != certificate.fusion:
        wrong.append("the checkpoint's fusion is not the one described")
    if certificate.model.get("quantised") != recorded(fused):
        wrong.append(
            f"the base of the fused model is in {told(recorded(fused))}, the certificate says "
            f"{told(certificate.model.get('quantised'))}"
        )
    if base is not None and not wrong:
        wrong += _not_the_base(base, fused, dtype, where)
    if wrong:
        return wrong
    wrong += _figures_again(certificate, folder, fused, tokenizer, on_step)
    return wrong or broken(certificate.fusion, certificate.texts, certificate.figures)


def _not_the_base(base: str, fused: Any, dtype: torch.dtype | None, where: dict[str, Any]) -> list[str]:
    # On the CPU unless it has no room there.
    at = {} if where["device_map"] is None else where
    real, _ = load(base, dtype=dtype, quantization_config=packed(fused), **at)
    if real.fusion is not None:
        raise CertificateError(f"{base}: a fusion itself; expected the base that it should stand on")
    if (own := fingerprint(real)) != fused.config.base_fingerprint:
        return [
            f"the base of the fused model is {fused.config.base_fingerprint[:19]}..., {base} is {own[:19]}...: another "
            "model"
        ]
    parts = unlike(real, fused)
    return [f"the fused model is not {base} with deltas: {', '.join(parts)} differ"] if parts else []


def _figures_again(
    certificate: Certificate, folder: Path, fused: Any, tokenizer: Any, on_step: Any
) -> list[str]:
    wrong = []
    chosen = Settings(**certificate.settings)
    # Up to that schema numbers were read as other words.
    tokenizer = without_numbers(tokenizer) if certificate.schema_version <= 4 else reader(fused, tokenizer)
    for name, text in certificate.texts.items():
        split = f":{text['split']}" if "split" in text else ""
        control = text.get("control_tokens", False)
        documents = read_documents(
            f"{folder / text['path']}{split}", field=text.get("field"), control=control, fetch=False
        )
        if certificate.schema_version <= CONTROL and documents.kind != "messages":
            documents = documents.with_control()
        if text_hash(documents) != text["documents"]:
            wrong.append(f"text {name}: its documents are not the ones described")
        stated = certificate.figures[name]
        windows, begun = prepare(
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
        again = text_figures(
            fused, windows, begun, chosen, documents=text["documents"], on_step=on_step, written=written
        )
        unknown = ADDED.get(certificate.schema_version, ())
        again = {key: value for key, value in again.items() if key not in unknown}
        if "alone" in again and certificate.schema_version <= MEANS:
            again["alone"] = _means(again["alone"], certificate.fusion)
        wrong += _differences(stated, again, f"{name}")
    return wrong


# What was measured of each delta alone before quantiles and adapters by evidence were.
def _means(alone: dict[str, Any], fusion: dict[str, Any]) -> dict[str, Any]:
    if fusion.get("kind") == "adapters" and fusion.get("by") == "evidence":
        return {}
    kept = {
        domain: {name: figures for name, figures in declared.items() if "quantile" not in figures}
        for domain, declared in alone.items()
    }
    return {domain: declared for domain, declared in kept.items() if declared}


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
