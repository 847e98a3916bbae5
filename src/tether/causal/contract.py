"""What transformers and its trainers do to a model beside calling it: load it, resize it, patch it."""

import inspect
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from tether.causal.config import CausalQwenConfig
from tether.causal.resizing import resize
from tether.causal.wrapping import CONSTANTS
from tether.errors import ConfigError
from tether.store.hub import unasked

__all__ = ["TransformersContract"]

_HUB = (
    "cache_dir", "force_download", "gguf_file", "local_files_only", "proxies", "revision", "subfolder", "token",
    "trust_remote_code",
)  # fmt: skip
"""Options that say where a config is found."""


class TransformersContract:
    """Methods of transformers' models that a wrapper has to answer in its own way."""

    config: Any
    fusion: Any

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **options: Any) -> Any:
        """Load a checkpoint, or load a plain causal LM and wrap it.

        Args:
            pretrained_model_name_or_path: folder or hub id, of a converted or fused checkpoint or of a plain causal LM.
            args: as in transformers.
            options: as in transformers, but that `trust_remote_code` is False unless it is given; where a plain model
                is wrapped also `preset` and its overrides, see `CausalQwenForCausalLM.from_backbone`.

        Returns:
            The model in evaluation mode, or what transformers returns with the options given.

        Raises:
            ConfigError: a plain model that cannot be wrapped exactly, or options of wrapping for one that is wrapped.
            CheckpointError: a hub id that was not fetched before, where the hub does not answer.
        """  # noqa: DOC502 - raised by what it calls
        options = unasked(pretrained_model_name_or_path, options)
        wrapping = {option: options.pop(option) for option in ("preset", *CONSTANTS) if option in options}
        if _is_plain(pretrained_model_name_or_path, options):
            from transformers import AutoModelForCausalLM

            loaded = AutoModelForCausalLM.from_pretrained(pretrained_model_name_or_path, *args, **options)
            base, *rest = loaded if isinstance(loaded, tuple) else (loaded,)
            made = base if isinstance(base, cls) else cls.from_backbone(base, **wrapping)  # type: ignore[attr-defined]
            return (made, *rest) if rest else made
        return super().from_pretrained(pretrained_model_name_or_path, *args, **options | wrapping)  # type: ignore[misc]

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Module:
        """Give the model another number of tokens, in every part that has one entry for each.

        Args:
            new_num_tokens: how many; None leaves the number, but for padding.
            pad_to_multiple_of: rounds the number up to a multiple of this, >= 1.
            mean_resizing: whether new rows are drawn around the mean of the others.

        Returns:
            The embedding.

        Raises:
            ConfigError: no number of tokens, a fused model, fewer tokens than `<NUM>` needs, or a backbone that could
                not be loaded again.
        """
        embedding: nn.Module = self.get_input_embeddings()  # type: ignore[attr-defined]
        rows = len(embedding.weight)  # type: ignore[arg-type]
        size = rows if new_num_tokens is None else new_num_tokens
        if not isinstance(size, int) or size < 1:
            raise ConfigError(f"{size!r} tokens: expected an integer of at least 1")
        if pad_to_multiple_of is not None:
            if not isinstance(pad_to_multiple_of, int) or pad_to_multiple_of < 1:
                # The words of transformers, since callers look for them.
                raise ConfigError(
                    f"Asking to pad the embedding matrix to a multiple of `{pad_to_multiple_of}`, which is not and "
                    "integer. Please make sure to pass an integer of at least 1"
                )
            size = -(-size // pad_to_multiple_of) * pad_to_multiple_of
        return embedding if size == rows else resize(self, size, mean_resizing=mean_resizing)

    def __setattr__(self, name: str, value: Any) -> None:
        # TRL's trainers put a forward in place that multiplies the backbone's states with an output head.
        if name == "forward" and "fused_lm_head" in _parameters(value):
            raise ConfigError(
                "TRL's trainers compute the loss from the backbone's states and an output head, which would leave out "
                "abduction, fusion and values: train this model with transformers.Trainer or with tether train"
            )
        super().__setattr__(name, value)


def _is_plain(name: Any, options: dict[str, Any]) -> bool:
    config = options.get("config")
    if isinstance(config, PreTrainedConfig):
        return not isinstance(config, CausalQwenConfig)
    source = name if config is None else config
    if source is None:
        return False
    try:
        found, _ = PreTrainedConfig.get_config_dict(
            source, **{option: options[option] for option in _HUB if option in options}
        )
    except OSError:
        return False  # transformers says what is missing
    return bool(found.get("model_type") != CausalQwenConfig.model_type)


def _parameters(function: Any) -> Any:
    try:
        return inspect.signature(function, follow_wrapped=False).parameters
    except (TypeError, ValueError):
        return ()
