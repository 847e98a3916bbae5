"""Acting through the stock `generate()`: modes, noise, and numbers that feed the next step."""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin

from tether.causal.config import MODES
from tether.causal.noise import Noise
from tether.errors import ConfigError, ShapeError

__all__ = ["CausalGeneration", "Trail", "text_positions"]


def text_positions(
    attention_mask: Tensor | None, position_ids: Tensor | None, shape: tuple[int, int], past: int, device: Any
) -> Tensor:
    """Give the place of each token in its text, padding not counted.

    Args:
        attention_mask: shape (B, past + T), or None.
        position_ids: shape (B, T), or None; taken as they are when given.
        shape: (B, T).
        past: tokens seen before.
        device: of the result.

    Returns:
        Positions from 0, shape (B, T); 0 at padding on the left.
    """
    if position_ids is not None and position_ids.dim() == 2:
        return position_ids.expand(shape)
    if attention_mask is not None and attention_mask.dim() == 2:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -shape[1] :]
    return torch.arange(past, past + shape[1], device=device).expand(shape)


class Trail:
    """The numbers of the texts being written: those of the prompt, and each `<NUM>`'s as it is chosen.

    A step predicts the next token and the value it would have; which token it was is known one step later.

    Attributes:
        values: numbers so far, shape (B, L), float64.
        pending: what the last step predicts as the next value, shape (B,), or None.
    """

    def __init__(self, values: Tensor, num_token_id: int | None) -> None:
        self.values, self.num_token_id = values.double(), num_token_id
        self.pending: Tensor | None = None

    def follow(self, input_ids: Tensor) -> Tensor:
        """Take in the token chosen since the last call.

        Args:
            input_ids: texts so far, shape (B, L) or (B, L + 1).

        Returns:
            The numbers of these texts, of the same shape.

        Raises:
            ConfigError: several tokens were added at once.
        """
        new = input_ids.shape[1] - self.values.shape[1]
        if new == 0:
            return self.values
        if new != 1 or self.pending is None:
            raise ConfigError(
                f"{new} tokens came at once: numbers are written one token at a time; generate without an "
                "assistant and without prompt lookup"
            )
        is_number = input_ids[:, -1] == (-1 if self.num_token_id is None else self.num_token_id)
        self.values = torch.cat(
            [self.values, torch.where(is_number, self.pending, 0.0).unsqueeze(-1)], dim=-1
        )
        return self.values


def _to_the_left(mask: Tensor, *aligned: Tensor | None) -> list[Tensor | None]:
    # Generation goes on at the last column, so texts padded on the right are moved there.
    order = mask.long().argsort(dim=-1, stable=True)
    return [None if tensor is None else tensor.gather(1, order) for tensor in (mask, *aligned)]


class CausalGeneration(GenerationMixin):  # type: ignore[misc]
    """What `CausalQwenForCausalLM` adds to transformers' generation loop."""

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        numeric_values: Tensor | None = None,
        trail: Trail | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Slice the numbers as the ids are sliced.

        Args:
            input_ids: texts so far, shape (B, L).
            numeric_values: numbers of the prompt; the trail has them too.
            trail: numbers so far.
            kwargs: as in transformers.

        Returns:
            Keyword arguments of `forward`.
        """
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, **kwargs)
        inputs["logits_to_keep"] = 1
        if trail is not None and inputs.get("input_ids") is not None:
            values = trail.follow(input_ids)[:, -inputs["input_ids"].shape[1] :]
            if bool(values.any()):
                inputs["numeric_values"] = values
        return inputs

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], **kwargs: Any
    ) -> dict[str, Any]:
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)
        # The gates' memory is not part of the backbone's cache, so it travels with the keyword arguments.
        if outputs.gate_state is not None and model_kwargs.get("use_cache", True):
            model_kwargs["gate_state"] = outputs.gate_state
        trail = model_kwargs.get("trail")
        if trail is not None:
            trail.pending = outputs.value[:, -1]
            if model_kwargs.get("value_listener") is not None:
                model_kwargs["value_listener"].append(trail.pending)
        return model_kwargs

    def generate(
        self,
        inputs: Tensor | None = None,
        *args: Any,
        mode: str = "softmax",
        noise: Noise | Tensor | None = None,
        truncation: float = 0.0,
        numeric_values: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate with the stock loop, in any of three modes.

        - `softmax`: as the base model, with its sampling options (`do_sample`, `top_k`, `top_p`, ...);
        - `deterministic`: the class with the largest P(S_k > C_k), and the median of Y;
        - `causal`: U is sampled from `noise`, and acts deterministically.

        The last two take `do_sample=False` unless told otherwise, and sampling keeps the whole vocabulary
        unless `top_k` is given (the loop's own silent default is 50). A batch padded on the right is moved to
        the left first.

        Args:
            inputs: token ids of the prompts, shape (B, L); or pass `input_ids`.
            args: as in transformers.
            mode: how to act.
            noise: who acts, mode `causal` only: a `Noise`, or uniform numbers of shape (C,) or (B, C) shared by
                all positions; None draws new individuals from torch's global state, one draw a step.
            truncation: smallest accepted density of U as a share of its peak, in [0, 1]; mode `causal` only.
            numeric_values: numbers of the prompts, shape (B, L).
            kwargs: as in transformers.

        Returns:
            As in transformers. With `return_dict_in_generate=True` the result also has `numeric_values`,
            the numbers of the whole texts, shape (B, L + new), float64.

        Raises:
            ConfigError: unknown mode; noise or truncation in another mode; beam search with gates or numbers.
            ShapeError: noise for another batch or latent size.
        """  # noqa: DOC502 - ShapeError is raised by _noise_for
        if mode not in MODES:
            raise ConfigError(f"mode={mode!r}: expected one of {', '.join(MODES)}")
        ids = inputs if inputs is not None else kwargs.pop("input_ids", None)
        config = kwargs.get("generation_config") or self.generation_config
        self._check_beams(kwargs.get("num_beams") or getattr(config, "num_beams", 1) or 1, mode, kwargs)
        if mode != "softmax":
            kwargs.setdefault("do_sample", False)
            kwargs["mode"] = mode
        sampling = kwargs.get("do_sample") or (kwargs.get("do_sample") is None and config.do_sample)
        if sampling and config.top_k in {None, 50}:
            # transformers' silent default would never draw most of the vocabulary.
            kwargs.setdefault("top_k", 0)
        mask = kwargs.get("attention_mask")
        if ids is not None and mask is not None and mask.shape == ids.shape and not bool(mask[:, -1].all()):
            kwargs["attention_mask"], ids, numeric_values = _to_the_left(mask, ids, numeric_values)
        returns = kwargs.get("num_return_sequences") or getattr(config, "num_return_sequences", 1) or 1
        if mode == "causal":
            batch = (ids if ids is not None else kwargs["inputs_embeds"]).shape[0] * returns
            kwargs["noise"] = self._noise_for(noise, batch)
            kwargs["truncation"] = truncation
        elif noise is not None or truncation:
            raise ConfigError(
                f"noise or truncation with mode={mode!r}: only mode 'causal' samples U; leave them out"
            )
        trail = None
        if self.config.num_token_id is not None and ids is not None:
            values = torch.zeros_like(ids, dtype=torch.float64) if numeric_values is None else numeric_values
            trail = Trail(values.repeat_interleave(returns, dim=0), self.config.num_token_id)
            kwargs["trail"] = trail
            streamer = kwargs.get("streamer")
            kwargs["value_listener"] = getattr(streamer, "values", None)
        elif numeric_values is not None:
            kwargs["numeric_values"] = numeric_values
        result = super().generate(ids, *args, **kwargs)
        if trail is not None and not isinstance(result, Tensor):
            result["numeric_values"] = trail.follow(result["sequences"])
        return result

    def _check_beams(self, beams: int, mode: str, kwargs: dict[str, Any]) -> None:
        if beams <= 1:
            return
        if self.fusion is not None and self.fusion.gated:
            raise ConfigError(
                f"num_beams={beams} with a gated fusion: the gates remember one text per row; generate with "
                "num_beams=1, or fuse with --no-gate"
            )
        number = self.config.num_token_id
        if mode == "causal" or (number is not None and number not in (kwargs.get("suppress_tokens") or [])):
            raise ConfigError(
                f"num_beams={beams}: beams would mix the individuals and numbers of several texts; generate with "
                f"num_beams=1, or in another mode with suppress_tokens=[{number}]"
            )

    def _noise_for(self, noise: Noise | Tensor | None, batch: int) -> Noise:
        size = self.abduction.loc.out_features
        if noise is None:
            return Noise.draw(batch, size)
        noise = copy.copy(noise) if isinstance(noise, Noise) else Noise.of(noise)
        if len(noise) == 1 and batch > 1 and noise.known is not None:
            noise = noise.rows([0] * batch)
        if len(noise) != batch or noise.size != size:
            raise ShapeError(
                f"noise of {len(noise)} individuals with {noise.size} dimensions: expected {batch} with {size}; "
                f"draw it with Noise.draw({batch}, {size})"
            )
        return noise
