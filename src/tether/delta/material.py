"""The texts of a fit: read, cut and checked before anything is computed, then their states."""

import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tether.delta.cache import StateCache
from tether.delta.gate import check_windows
from tether.delta.shards import cached, read_states
from tether.delta.source import spread
from tether.delta.windows import Windows, reader, window_text
from tether.errors import ConfigError
from tether.names import check_name
from tether.processes import current
from tether.store.documents import cut_documents, documents_of, text_hash
from tether.store.nameless import Nameless
from tether.store.place import check_place

__all__ = ["DISK", "HELD_OUT", "Material", "check_unfused", "gather", "states_of"]

logger = logging.getLogger(__name__)

HELD_OUT = 0.4
"""Share of the base text on which the budget is met; the fit sees the rest."""
DISK = 16e9
"""Bytes of hidden states that are kept of a text at most, 2 for each number of a state: 1,152 a token at a width of
576, 8,192 at 4,096, and four times that with middle layers."""


class Material(NamedTuple):
    """What a fit is made from.

    Attributes:
        name: of the domain.
        windows: of the domain's text, of base text for the fit, and of base text to meet the budget on.
        hashes: of the documents, under `domain` and `base`.
        documents: of the domain, as its windows number them.
    """

    name: str
    windows: tuple[Windows, Windows, Windows]
    hashes: dict[str, str]
    documents: Sequence[str] = ()


def gather(
    model: Any,
    tokenizer: Any,
    texts: str | Path | Sequence[str],
    base_texts: str | Path | Sequence[str],
    *,
    name: str | None = None,
    window: int = 256,
    tokens: int | None = None,
    gate: bool = True,
    layers: Sequence[int] = (),
    disk: float = DISK,
) -> Material:
    """Read the texts of a fit and find what is wrong with them.

    Base text of one document is cut in two at a word, so that a plain file serves too.

    Args:
        model: the base.
        tokenizer: its tokenizer.
        texts: the domain's text: a file or a list of documents.
        base_texts: general text, likewise.
        name: the domain; None takes the file's name.
        window: tokens a context.
        tokens: of each text at most.
        gate: whether a gate is fitted to the domain's windows.
        layers: middle layers that are read beside the last.
        disk: bytes of hidden states that may be kept of each text; of a longer one, windows spread over it are taken.

    Returns:
        The material.

    Raises:
        ConfigError: a text missing, empty or shorter than one context, too few windows for a gate, a name that is
            none for a domain, or a model that is fused already.
    """  # noqa: DOC502 - raised by what it calls
    check_unfused(model)
    called = name or (Path(texts).stem if isinstance(texts, str | Path) else "domain")
    check_name(called)
    own, base = documents_of(texts), documents_of(base_texts)
    first, second = cut_documents(base, 1 - HELD_OUT)
    parts = {
        "the domain text": own,
        f"the base text's part for the fit ({1 - HELD_OUT:.0%} of it)": first,
        f"the base text's part to meet the budget on ({HELD_OUT:.0%} of it)": second,
    }
    tokenizer = reader(model, tokenizer)
    width = 2 * int(model.abduction.loc.in_features) * (1 + len(layers))
    domain, fitted, held_out = (
        _thinned(
            window_text(part, tokenizer, length=window, tokens=tokens, name=part_name), width, disk, part_name
        )
        for part_name, part in parts.items()
    )
    if gate:
        check_windows(len(domain.starts) - 1)
    hashes = {"domain": text_hash(own), "base": text_hash(base)}
    return Material(called, (domain, fitted, held_out), hashes, own)


# As many windows, spread over the text, as the disk may hold the states of.
def _thinned(windows: Windows, width: int, disk: float, name: str) -> Windows:
    total, count = len(windows.input_ids), len(windows.starts) - 1
    if width * total <= disk:
        return windows
    fewer = int(disk / width / total * count)
    if fewer < 1:
        raise ConfigError(
            f"disk={disk:g}: expected room for the states of a window at least, {width} bytes a token; allow more"
        )
    some = windows.some(spread(count, fewer))
    logger.warning(
        "%s has %s tokens, whose hidden states would take %.1f GB of disk, %s bytes each; %s of them are used, spread "
        "over the text. More may be allowed (--disk GB, disk=BYTES), or less be used (--tokens)",
        name, f"{total:,}", width * total / 1e9, f"{width:,}", f"{len(some.input_ids):,}",
    )  # fmt: skip
    return some


def check_unfused(model: Any) -> None:
    """Refuse a fusion: what is learnt stands on a base.

    Args:
        model: a CausalQwenForCausalLM.

    Raises:
        ConfigError: it is fused.
    """
    if model.config.fusion:
        domains = ", ".join(model.config.fusion["domains"])
        raise ConfigError(
            f"the model is fused ({domains}): expected the base; deltas are learnt there, and added with 'tether fuse'"
        )


def states_of(
    model: Any,
    windows: Sequence[Windows],
    cache_folder: str | Path | None,
    *,
    layers: Sequence[int] = (),
    on_step: Callable[[dict[str, float]], None] | None = None,
) -> list[StateCache]:
    """Compute the states of some texts, or find them.

    Args:
        model: the base.
        windows: the texts.
        cache_folder: where states are kept for the next fit; None keeps them for this process alone.
        layers: middle layers beside the last.
        on_step: called with `done` and `total` tokens of the text that is read.

    Returns:
        The caches in that order.

    Raises:
        ConfigError: several processes without a folder that all of them see, or no room on the disk.
    """
    if current().count > 1 and not cache_folder:
        raise ConfigError(
            "several processes share the states they compute: name a folder for them (--cache, cache_folder)"
        )
    if cache_folder:
        folder = Path(cache_folder)
        check_place(folder / "states")
        current().see(folder)
        # What is there already takes no more room, and how much that is, is not known yet.
        return [cached(model, text, folder, layers=layers, on_step=on_step) for text in windows]
    width = 2 * int(model.abduction.loc.in_features) * (1 + len(layers))
    needed, there = width * sum(len(text.input_ids) for text in windows), Nameless.folder()
    if needed > (free := shutil.disk_usage(there).free):
        raise ConfigError(
            f"{there}: {free / 1e9:.1f} GB are free, and hidden states take {needed / 1e9:.1f} GB, {width:,} bytes a "
            "token; free some space, name another folder for temporary files (TMPDIR), or use fewer tokens"
        )
    return [read_states(model, text, layers=layers, on_step=on_step) for text in windows]
