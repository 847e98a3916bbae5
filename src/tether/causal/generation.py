"""Acting through the stock `generate()`: modes, noise, and numbers that feed the next step."""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin

from tether.causal.config import MODES
from tether.causal.memory import Memory, find
from tether.causal.mixture import Mixture
from tether.causal.noise import Noise, check_share
from tether.causal.streaming import NumericStreamer
from tether.causal.trail import Trail
from tether.causal.warping import WARPERS, each_expert
from tether.errors import ConfigError, ShapeError

__all__ = ["CausalGeneration", "Trail"]


def _to_the_left(mask: Tensor, *aligned: Tensor | None) -> list[Any]:
    # Generation goes on at the last column, so texts padded on the right are moved there.
    order = mask.long().argsort(dim=-1, stable=True)
    rows = torch.arange(len(mask), device=mask.device).unsqueeze(-1)
    return [None if tensor is None else tensor[rows, order] for tensor in (mask, *aligned)]


ALIGNED = ("inputs_embeds", "position_ids", "token_type_ids")
"""Keyword arguments of transformers' models that lie along the text as its mask does."""


REPLAYING = ("prefill_chunk_size", "prompt_lookup_num_tokens", "assistant_model")
"""Options of the stock loop that cut a text or take tokens back."""


OWN = ("trail", "mode", "noise", "truncation", "gate_state", "written_from", "warp", "numeric_values")
"""Keyword arguments of `forward` that other models do not have."""


class CausalGeneration(GenerationMixin):  # type: ignore[misc]
    """What `CausalQwenForCausalLM` adds to transformers' generation loop."""

    @property
    def latent_size(self) -> int:
        """Dimensions C of U."""
        return int(self.abduction.loc.out_features)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        inputs_embeds: Tensor | None = None,
        trail: Trail | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Slice the numbers as the ids are sliced.

        Args:
            input_ids: texts so far, shape (B, L).
            inputs_embeds: embeddings of the prompts instead of ids; the stock loop looks for this name.
            trail: their numbers.
            kwargs: as in transformers.

        Returns:
            Keyword arguments of `forward`.
        """
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, **kwargs
        )
        inputs["logits_to_keep"] = 1
        if trail is not None:
            values = trail.follow(input_ids)
            ids = inputs.get("input_ids")
            if ids is not None and bool(values[:, -ids.shape[1] :].any()):
                inputs["numeric_values"] = values[:, -ids.shape[1] :]
        return inputs

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], **kwargs: Any
    ) -> dict[str, Any]:
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)
        # The gates' memory is not part of the backbone's cache, so it travels with the keyword arguments.
        if outputs.gate_state is not None and model_kwargs.get("use_cache", True):
            model_kwargs["gate_state"] = outputs.gate_state
        if model_kwargs.get("trail") is not None:
            model_kwargs["trail"].expect(outputs.value[:, -1])
        return model_kwargs

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        mode: str | None = None,
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
            generation_config: as in transformers.
            args: as in transformers.
            mode: how to act; None takes the config's.
            noise: who acts, mode `causal` only: a `Noise` of one individual for each text, or uniform numbers
                of shape (C,) or (B, C) shared by all positions; None draws new individuals from torch's
                global state.
            truncation: smallest accepted density of U as a share of its peak, in [0, 1]; mode `causal` only.
            numeric_values: numbers of the prompts, shape (B, L).
            kwargs: as in transformers. `num_return_sequences` lets that many individuals go on from each
                prompt in mode `causal`.

        Returns:
            As in transformers. With `return_dict_in_generate=True` the result also has `numeric_values`,
            the numbers of the whole texts, shape (B, L + new), float64.

        Raises:
            ConfigError: unknown mode; noise or truncation in another mode; truncation outside [0, 1]; beam
                search with gates or numbers; numbers without `<NUM>`; with gates or adapters, assisted generation,
                prompts in chunks, or a cache without the gates' state.
            ShapeError: noise for another batch or latent size; numbers of another shape.
        """  # noqa: DOC502 - raised by what it calls
        own = self.config.mode
        mode = own if mode is None else mode
        if mode not in MODES:
            raise ConfigError(f"mode={mode!r}: expected one of {', '.join(MODES)}")
        if mode != "causal" and (noise is not None or truncation):
            raise ConfigError(
                f"noise or truncation with mode={mode!r}: only mode 'causal' samples U; leave them out"
            )

        def option(name: str) -> Any:
            given = (getattr(config, name, None) for config in (generation_config, self.generation_config))
            return next((each for each in (kwargs.get(name), *given) if each is not None), None)

        beams, returns = option("num_beams") or 1, option("num_return_sequences") or 1
        self._check_beams(beams, mode, option("suppress_tokens") or [])
        self._check_memory({name: kwargs.get(name) or option(name) for name in REPLAYING}, kwargs)
        self._check_caches(option("cache_implementation"))
        if mode != "softmax":
            kwargs = {"do_sample": False} | kwargs
        if mode != "softmax" or mode != own:
            kwargs["mode"] = mode
        if option("do_sample") and option("top_k") is None:
            # transformers' silent default would never draw most of the vocabulary.
            kwargs["top_k"] = 0
        ids = inputs if inputs is not None else kwargs.pop("input_ids", None)
        mask = kwargs.get("attention_mask")
        if ids is not None and numeric_values is not None:
            self._check_numbers(ids, numeric_values)
        embedded = ids is None or not ids.shape[1]
        text = kwargs.get("inputs_embeds") if embedded else ids
        whole = text is not None and mask is not None and mask.shape == text.shape[:2]
        if mask is not None and whole and not bool(mask[:, -1].all()):
            ids = None if embedded else ids
            given = {name: kwargs.get(name) for name in ALIGNED}
            lying = {
                name: each
                for name, each in given.items()
                if each is not None and each.shape[:2] == mask.shape
            }
            kwargs["attention_mask"], ids, numeric_values, *moved = _to_the_left(
                mask, ids, numeric_values, *lying.values()
            )
            kwargs |= dict(zip(lying, moved, strict=True))
        if mode == "causal":
            first = ids if ids is not None else kwargs.get("inputs_embeds")
            batch = 1 if first is None else len(first)
            kwargs |= {"noise": self._noise_for(noise, batch * returns), "truncation": truncation}
            check_share(truncation)
            if returns > 1 and not option("do_sample"):
                # The stock loop returns several texts only where it samples them itself.
                kwargs = {name: _repeated(value, batch, returns) for name, value in kwargs.items()}
                ids, numeric_values = (_repeated(value, batch, returns) for value in (ids, numeric_values))
                kwargs["num_return_sequences"] = 1
        kwargs["trail"] = trail = self._trail(ids, kwargs, numeric_values)
        if isinstance(self.fusion, Mixture):
            kwargs["written_from"] = _given_length(ids, kwargs)
            # How many experts are awake differs from token to token, which a compiled graph cannot follow.
            kwargs.setdefault("disable_compile", True)
            if option("do_sample") and mode == "softmax":
                kwargs |= each_expert({name: kwargs.get(name, option(name)) for name in WARPERS})
        result = super().generate(ids, generation_config, *args, **kwargs)
        if trail is not None and not isinstance(result, Tensor):
            result["numeric_values"] = trail.finish(result["sequences"], beams)
        _remember_text(result, kwargs.get("past_key_values"), beams)
        return result

    def generate_batch(self, *_: Any, **__: Any) -> Any:
        """Refuse continuous batching.

        Raises:
            ConfigError: always. All requests would arrive as one row, and the numbers, gates and weights of one text
                be those of another; even a sum without gates would write other text than `generate` does.
        """
        raise ConfigError(
            "continuous batching (generate_batch, init_continuous_batching) puts requests into one row, and this model "
            "would read them as one text: call generate with padding=True in the tokenizer, or start 'tether serve', "
            "which answers request by request"
        )

    init_continuous_batching = continuous_batching_context_manager = generate_batch

    def _trail(self, ids: Tensor | None, kwargs: dict[str, Any], values: Tensor | None) -> Trail | None:
        if self.config.num_token_id is None:
            return None
        if values is None:
            embeds = kwargs.get("inputs_embeds")
            # Embedded prompts come without ids, and no prompt at all is one start token.
            shape = ids.shape if ids is not None else (1, 1) if embeds is None else (len(embeds), 0)
            values = torch.zeros(shape, dtype=torch.float64, device=self.device)
        streamer = kwargs.get("streamer")
        if not isinstance(streamer, NumericStreamer):
            return Trail(values, self.config.num_token_id)
        if streamer.prompt_values is None and not streamer.skip_prompt:
            streamer.prompt_values = values
        return Trail(values, self.config.num_token_id, streamer.values)

    def _get_candidate_generator(self, *args: Any, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        # What only this model understands is not the assistant's, which has its own.
        others = {name: value for name, value in model_kwargs.items() if name not in OWN}
        return super()._get_candidate_generator(*args, model_kwargs=others, **kwargs)

    @property
    def _gated_sum(self) -> bool:
        # Its gates remember the text in a state of their own.
        return self.fusion is not None and self.fusion.gated and not isinstance(self.fusion, Mixture)

    @property
    def _adapters_sum(self) -> bool:
        # Their caches lie beside the base's, and do not follow what is done to it.
        described = self.config.fusion or {}
        return described.get("kind") == "adapters" and described.get("by") != "evidence"

    def _check_memory(self, replaying: dict[str, Any], kwargs: dict[str, Any]) -> None:
        gated = self._gated_sum
        if not gated and not self._adapters_sum:
            return
        what = "gates" if gated else "adapters"
        if asked := [name for name, value in replaying.items() if value]:
            raise ConfigError(
                f"{', '.join(asked)} with {what}, which remember the text token by token: these options cut it or take "
                "tokens back; leave them out"
            )
        self._check_gates_know(kwargs.get("past_key_values"), kwargs.get("gate_state"))

    def _check_caches(self, kind: str | None) -> None:
        if kind not in (None, "dynamic") and self._adapters_sum:
            raise ConfigError(
                f"cache_implementation={kind!r} with adapters: each has a growing cache of its own; leave it out"
            )

    def _check_known(self, memory: Memory | None, past: int) -> None:
        # Weights would be those of another text.
        if memory is not None and len(memory) > past:
            memory.keep(past)
        if past and (memory is None or len(memory) < past):
            known = 0 if memory is None else len(memory)
            raise ConfigError(
                f"past_key_values of {past} tokens of which a fusion by evidence has read {known}: the weights would "
                "be those of another text; pass the cache that this model filled, or the whole text again"
            )

    def _check_gates_know(self, cache: Any, gate_state: Tensor | None) -> None:
        if not self._gated_sum or cache is None or gate_state is not None:
            return
        if cache.get_seq_length():
            raise ConfigError(
                "past_key_values of an earlier text without its gate_state: the gates would not know that text; pass "
                "both, as the model's output gives them, or the whole text again"
            )

    def _check_beams(self, beams: int, mode: str, suppressed: list[int]) -> None:
        if beams <= 1:
            return
        if self._gated_sum:
            raise ConfigError(
                f"num_beams={beams} with a gated fusion: the gates remember one text per row; generate with "
                "num_beams=1, or fuse with --no-gate"
            )
        number = self.config.num_token_id
        if mode == "causal":
            raise ConfigError(
                f"num_beams={beams} with mode='causal': an individual writes one text; generate with num_beams=1, "
                "or in another mode"
            )
        if number is not None and number not in suppressed:
            raise ConfigError(
                f"num_beams={beams} for a model with <NUM>: beams would mix the numbers of several texts; generate "
                f"with num_beams=1, or with suppress_tokens=[{number}]"
            )

    def _noise_for(self, noise: Noise | Tensor | None, batch: int) -> Noise:
        size = self.latent_size
        if noise is None:
            return Noise.draw(batch, size)
        noise = noise if isinstance(noise, Noise) else Noise.of(noise)
        if len(noise) == 1 and batch > 1 and noise.known is not None:
            noise = noise.rows([0] * batch)
        if len(noise) != batch or noise.size != size:
            raise ShapeError(
                f"noise of {len(noise)} individuals with {noise.size} dimensions: expected {batch} with {size}; "
                f"draw it with Noise.draw({batch}, {size}), or pick individuals with noise.rows"
            )
        return noise


def _given_length(ids: Tensor | None, kwargs: dict[str, Any]) -> int:
    # Where the text that is given ends, which the model goes on from.
    memory = find(kwargs.get("past_key_values"))
    if memory is not None and memory.text is not None and memory.written is not None and ids is not None:
        same = ids.shape == memory.text.shape and bool((ids == memory.text.to(ids.device)).all())
        if same:  # nothing new is given: the text goes on
            return memory.written
    if ids is not None and ids.shape[1]:
        return ids.shape[1]
    embeds = kwargs.get("inputs_embeds")
    return 1 if embeds is None else int(embeds.shape[1])


def _remember_text(result: Any, cache: Any, beams: int) -> None:
    sequences = result if isinstance(result, Tensor) else result["sequences"]
    kept = cache if isinstance(result, Tensor) else result.get("past_key_values", cache)
    memory = find(kept)
    if memory is not None and beams == 1:
        memory.text = sequences


def _repeated(value: Any, batch: int, times: int) -> Any:
    rows = isinstance(value, Tensor) and value.dim() > 1 and len(value) == batch
    return value.repeat_interleave(times, dim=0) if rows else value
