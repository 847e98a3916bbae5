"""The models that a server has: loaded before it listens, known by name, and no others."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers.cli.serving.model_manager import ModelManager

from tether.errors import ConfigError
from tether.server.refusal import Refused

__all__ = ["Models", "Served", "names_of"]


class Served(NamedTuple):
    """A model that is served.

    Attributes:
        name: by which requests call it.
        model: a CausalQwenForCausalLM in evaluation mode.
        tokenizer: numeric where the model reads numbers.
        window: tokens that prompt and answer may have together; None where the backbone names no limit.
        created: seconds since 1970 when it was loaded.
    """

    name: str
    model: Any
    tokenizer: Any
    window: int | None
    created: int


def names_of(given: Sequence[str]) -> dict[str, str]:
    """Name models after their folders.

    Args:
        given: aliases, paths or hub ids, at least one.

    Returns:
        What was given, by name: that of the folder, or the alias or hub id itself.

    Raises:
        ConfigError: none is given, or two have the same name.
    """
    if not given:
        raise ConfigError("no model to serve: expected at least one folder, alias or hub id")
    named: dict[str, str] = {}
    for each in given:
        path = Path(each)
        name = path.resolve().name if path.exists() else each
        if name in named:
            raise ConfigError(
                f"{named[name]} and {each} are both named {name!r}: requests could not tell them apart; rename a folder"
            )
        named[name] = each
    return named


class Models(ModelManager):  # type: ignore[misc]
    """What transformers' handlers ask for models; nothing is loaded or fetched because a request names it.

    Args:
        given: aliases, paths or hub ids.
        load: gives model and tokenizer of one of them; `tether.load` on some device.

    Raises:
        ConfigError: two have the same name.
    """

    def __init__(self, given: Sequence[str], load: Callable[[str], tuple[Any, Any]]) -> None:
        super().__init__(device="cpu")
        self.served: dict[str, Served] = {}
        self.at_end: list[Callable[[], None]] = []
        for name, where in names_of(given).items():
            model, tokenizer = load(where)
            if getattr(tokenizer, "response_template", None) is not None:
                # What was written is given as it is, and not sorted into reasoning and calls of tools.
                tokenizer.response_template = None
            window = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
            self.served[name] = Served(name, model, tokenizer, window, int(time.time()))

    def find(self, name: str | None) -> Served:
        """Find a model.

        Args:
            name: as a request calls it; None where it calls none, which is enough where there is only one.

        Returns:
            The model.

        Raises:
            Refused: there is none of this name.
        """
        if name is None and len(self.served) == 1:
            return next(iter(self.served.values()))
        if name not in self.served:
            asked = "no model is named" if name is None else f"there is no model {ascii(name)[:80]} here"
            raise Refused(f"{asked}; expected one of {', '.join(self.served)}", 404, "model")
        return self.served[name]

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        """List the models, as `/v1/models` shows them.

        Args:
            cache_dir: of the hub; it is not looked at.

        Returns:
            Exactly those that are served.
        """
        return [self.described(each) for each in self.served.values()]

    def described(self, served: Served) -> dict[str, Any]:
        """Describe a model, as `/v1/models` shows it.

        Args:
            served: the model.

        Returns:
            Its entry.
        """
        return {"id": served.name, "object": "model", "created": served.created, "owned_by": "tether"}

    def load_model_and_processor(self, model_id_and_revision: str, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Give a model that is there.

        Args:
            model_id_and_revision: its name.

        Returns:
            Model and tokenizer.
        """
        found = self.find(model_id_and_revision)
        return found.model, found.tokenizer

    def shutdown(self) -> None:
        """Stop what still writes; called when the server ends."""
        for each in self.at_end:
            each()
