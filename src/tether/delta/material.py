"""The texts of a fit: read, cut and checked before anything is computed, then their states."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tether.delta.cache import StateCache
from tether.delta.gate import check_windows
from tether.delta.shards import cached, read_states, together
from tether.delta.windows import Windows, reader, window_text
from tether.errors import ConfigError
from tether.names import check_name
from tether.store.documents import cut_documents, documents_of, text_hash
from tether.store.place import check_place

__all__ = ["HELD_OUT", "Material", "gather", "states_of"]

HELD_OUT = 0.4
"""Share of the base text on which the budget is met; the fit sees the rest."""


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

    Returns:
        The material.

    Raises:
        ConfigError: a text missing, empty or shorter than one context, too few windows for a gate, a name that is
            none for a domain, or a model that is fused already.
    """  # noqa: DOC502 - raised by what it calls
    _check_unfused(model)
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
    domain, fitted, held_out = (
        window_text(part, tokenizer, length=window, tokens=tokens, name=part_name)
        for part_name, part in parts.items()
    )
    if gate:
        check_windows(len(domain.starts) - 1)
    hashes = {"domain": text_hash(own), "base": text_hash(base)}
    return Material(called, (domain, fitted, held_out), hashes, own)


# What is learnt stands on a base.
def _check_unfused(model: Any) -> None:
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
        ConfigError: several processes without a folder that all of them see.
    """
    if together() > 1 and not cache_folder:
        raise ConfigError(
            "several processes share the states they compute: name a folder for them (--cache, cache_folder)"
        )
    if cache_folder:
        folder = Path(cache_folder)
        check_place(folder / "states")
        return [cached(model, text, folder, layers=layers, on_step=on_step) for text in windows]
    return [read_states(model, text, layers=layers, on_step=on_step) for text in windows]
