"""What is put on a hub: the files of a checkpoint, an adapter or a delta, and its model card."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tether.causal.card import CARD, CERTIFICATE, MARK, fused_card, learnt_card
from tether.delta.adapter import Adapter, is_adapter
from tether.delta.delta import Delta
from tether.delta.record import is_certificate, read
from tether.errors import CheckpointError, ConfigError
from tether.files import is_plain, read_bytes
from tether.reading import JSON_BYTES, read_json
from tether.store.hub import answers
from tether.store.manifest import MANIFEST, read_manifest

__all__ = ["Parcel", "pack", "send"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Parcel:
    """Files and their card.

    Attributes:
        kind: `delta`, `adapter` or `checkpoint`.
        files: where each lies, by its name in the repository, with slashes.
        card: Markdown; the user's own where there is one.
        sample: how many pieces of text it carries.
    """

    kind: str
    files: dict[str, Path]
    card: str
    sample: int = 0


def pack(path: str | Path, *, name: str | None = None, base: str | None = None) -> Parcel:
    """Gather what shall be put on a hub; nothing is written.

    Args:
        path: a delta, or the folder of an adapter or a checkpoint.
        name: what the card calls it; None takes the file's name.
        base: name of the base for the card, where others can follow it; None takes what the files say.

    Returns:
        The parcel. A folder's own `README.md` is its card, unless tether wrote it, as `save_checkpoint` does.

    Raises:
        CheckpointError: it is nothing that tether wrote, or damaged.
        ConfigError: it holds links or devices, which could be anything.
    """
    path = Path(path)
    if path.is_file():
        delta = Delta.load(path)
        card = learnt_card(
            "delta", name or delta.name, delta.record, file=path.name, sample=delta.sample, base=base
        )
        return Parcel(kind="delta", files={path.name: path}, card=card, sample=len(delta.sample))
    if not (path / MANIFEST).is_file():
        raise CheckpointError(
            f"{path}: expected a delta, or a folder of an adapter or a checkpoint that tether wrote (with {MANIFEST})"
        )
    files = {}
    for found in sorted(path.rglob("*")):
        inside = found.relative_to(path).as_posix()
        a_folder = found.is_dir() and not found.is_symlink()
        if a_folder or inside == CARD or inside.startswith(".cache/"):
            continue
        if found.is_symlink() or not is_plain(found):
            raise ConfigError(f"{found}: expected a plain file; put a copy there, or take it away")
        files[inside] = found
    if is_adapter(path):
        adapter = Adapter.load(path)
        named = base or _public(adapter.config.base_model_name_or_path)
        card = learnt_card(
            "adapter",
            name or adapter.name,
            adapter.record,
            file=path.resolve().name,
            sample=adapter.sample,
            base=named,
        )
        return Parcel(kind="adapter", files=files, card=_own(path, card), sample=len(adapter.sample))
    if read_manifest(path).kind not in ("checkpoint", "adapted"):
        raise CheckpointError(f"{path}: expected a delta, an adapter or a checkpoint, as tether wrote it")
    # A fusion of adapters holds their folders.
    within = [found.parent for found in files.values() if found.name == MANIFEST and is_adapter(found.parent)]
    sample = sum(len(Adapter.load(folder).sample) for folder in within)
    card = _of_checkpoint(path, name, base, sample)
    return Parcel(kind="checkpoint", files=files, card=_own(path, card), sample=sample)


def _of_checkpoint(path: Path, name: str | None, base: str | None, sample: int) -> str:
    config: Any = read_json(path / "config.json")
    certificate = path / CERTIFICATE
    figures = None
    if certificate.is_file() and is_certificate(certificate):
        figures = read(certificate).figures
    source = base or _public(config.get("base") or (config.get("backbone_config") or {}).get("_name_or_path"))
    return fused_card(
        name or path.resolve().name, config.get("fusion"), base=source, figures=figures, sample=sample,
        apart=config.get("model_type") == "causal_qwen_adapted", packed=bool(config.get("quantised")),
    )  # fmt: skip


# A name that others can follow: no path.
def _public(name: Any) -> str | None:
    if not isinstance(name, str) or not name or name.startswith(".") or Path(name).is_absolute():
        return None
    return None if Path(name).exists() else name


# A card that somebody wrote stays; one of ours is made anew.
def _own(path: Path, made: str) -> str:
    own = path / CARD
    if not own.is_file():
        return made
    text = read_bytes(own, JSON_BYTES).decode(errors="replace")
    return made if MARK in text else text


def send(parcel: Parcel, repository: str, *, private: bool = True, message: str | None = None) -> str:
    """Put a parcel on the hub, in one commit.

    Args:
        parcel: from `pack`.
        repository: `OWNER/NAME`; made if there is none.
        private: whether a new one is private; one that exists stays as it is.
        message: of the commit.

    Returns:
        Where it can be seen.

    Raises:
        ConfigError: the hub does not answer, does not know who asks, or refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ConfigError(
            f"{repository}: expected OWNER/NAME, of letters, digits, '-', '_' and '.'"
        ) from error
    if constants.HF_HUB_OFFLINE or not answers(constants.ENDPOINT):
        raise ConfigError(
            f"{constants.ENDPOINT} cannot be reached (or HF_HUB_OFFLINE is set): nothing was sent"
        )
    if get_token() is None:
        raise ConfigError(
            f"nobody is logged in to {constants.ENDPOINT}: type 'hf auth login', or set HF_TOKEN"
        )
    api = HfApi()
    operations = [CommitOperationAdd(CARD, parcel.card.encode())]
    operations += [CommitOperationAdd(name, path) for name, path in parcel.files.items()]
    try:
        place = api.create_repo(repository, private=private, exist_ok=True)
        api.create_commit(place.repo_id, operations, commit_message=message or f"A {parcel.kind} of tether")
    except Exception as error:
        # httpx and huggingface_hub raise a dozen types here; the user needs one sentence.
        raise ConfigError(
            f"{repository}: the hub did not take it ({str(error).splitlines()[0][:300]})"
        ) from error
    return str(place)
