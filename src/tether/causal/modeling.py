"""CausalQwenForCausalLM: a backbone that infers a cause U at every token and acts from it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from tether.causal.config import MODES, PRESETS, CausalQwenConfig
from tether.causal.fused import Fusion
from tether.causal.layers import Abduction, Action
from tether.causal.losses import ovr_log_prob, ovr_loss, softmax_loss
from tether.errors import ConfigError

__all__ = ["CausalOutput", "CausalQwenForCausalLM"]


@dataclass
class CausalOutput(ModelOutput):  # type: ignore[misc]
    """What one forward pass gives.

    Attributes:
        loss: mean loss in nats, when labels were given: softmax cross-entropy in mode `softmax`,
            one-vs-rest in mode `deterministic`.
        logits: loc_S in mode `softmax`, log P(S_k > C) in mode `deterministic`; shape (B, T, V).
        past_key_values: the backbone's cache.
        latent_loc: loc of U after fusion, shape (B, T, C), float32.
        latent_log_scale: log scale of U after fusion, shape (B, T, C), float32.
        value_loc: median of the value Y, shape (B, T), float32.
        value_scale: scale of Y, shape (B, T), float32.
        gates: weight factor of each fused domain, shape (N, B, T), or None.
        gate_state: what the gates remember for the next call, or None.
        hidden_states: the backbone's, when asked for.
        attentions: the backbone's, when asked for.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Any = None
    latent_loc: Tensor | None = None
    latent_log_scale: Tensor | None = None
    value_loc: Tensor | None = None
    value_scale: Tensor | None = None
    gates: Tensor | None = None
    gate_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class CausalQwenForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """Backbone -> abduction -> (fused deltas) -> action.

    The forward pass costs the backbone plus two H x C products a token beside the output head; each fused
    delta adds two more (one when location-only).

    Args:
        config: see `CausalQwenConfig`.

    Example:
        >>> from transformers import Qwen2Config
        >>> tiny = Qwen2Config(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...                    num_attention_heads=2, num_key_value_heads=1)
        >>> model = CausalQwenForCausalLM(CausalQwenConfig(backbone_config=tiny))
        >>> model(input_ids=torch.tensor([[1, 2, 3]])).logits.shape
        torch.Size([1, 3, 32])
    """

    config_class = CausalQwenConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    def __init__(self, config: CausalQwenConfig) -> None:
        super().__init__(config)
        backbone_config = config.backbone_config
        self.backbone = AutoModel.from_config(backbone_config)
        text = config.get_text_config(decoder=True)
        self.vocab_size: int = text.vocab_size
        latent_size = config.latent_size or text.hidden_size
        self.abduction = Abduction(text.hidden_size, latent_size, config.latent_scale)
        self.action = Action(latent_size, text.vocab_size, config.class_noise)
        self.fusion = Fusion(text.hidden_size, latent_size, config.fusion) if config.fusion else None
        embedding = self.backbone.get_input_embeddings().weight
        # The name of the embedding differs between architectures; tying must know it.
        name = next(name for name, parameter in self.named_parameters() if parameter is embedding)
        self._tied_weights_keys = {"action.weight": name}
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Abduction):
            module.reset_identity()
        elif isinstance(module, Action):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            module.reset_value()

    @classmethod
    def from_backbone(
        cls, backbone: str | PreTrainedModel, preset: str = "calibrated", **overrides: float
    ) -> "CausalQwenForCausalLM":
        """Wrap a causal LM so that softmax mode equals it exactly.

        Args:
            backbone: alias, path or hub id of a causal LM, or the loaded model (its modules are taken over,
                not copied).
            preset: `calibrated` or `paper`, see `tether.causal.config.PRESETS`.
            overrides: latent_scale, class_noise or threshold in place of the preset's value.

        Returns:
            The wrapped model in evaluation mode.

        Raises:
            ConfigError: unknown preset or override, or a model without input embeddings and an output head.
        """
        from tether.causal.loading import load_backbone, weights_fingerprint

        if preset not in PRESETS:
            raise ConfigError(f"preset={preset!r}: expected one of {', '.join(PRESETS)}")
        unknown = set(overrides) - set(PRESETS[preset])
        if unknown:
            raise ConfigError(f"{sorted(unknown)}: a preset holds {', '.join(PRESETS[preset])}")
        model = load_backbone(backbone)[0] if isinstance(backbone, str) else backbone
        head = model.get_output_embeddings()
        if head is None or getattr(head, "bias", None) is not None:
            raise ConfigError(
                f"{type(model).__name__}: expected a causal LM with an output head without bias; load it with "
                "AutoModelForCausalLM"
            )
        tied = head.weight is model.get_input_embeddings().weight
        config = CausalQwenConfig(
            backbone_config=model.config,
            preset=preset,
            tie_word_embeddings=tied,
            base_fingerprint=weights_fingerprint(model),
            **(PRESETS[preset] | overrides),
        )
        # On the meta device nothing is allocated twice: the backbone and the head are taken over as they are.
        with torch.device("meta"):
            wrapped = cls(config)
        hidden_size, latent_size = wrapped.abduction.loc.in_features, wrapped.abduction.loc.out_features
        dtype, device = head.weight.dtype, head.weight.device
        wrapped.backbone = model.base_model
        wrapped.abduction = Abduction(hidden_size, latent_size, config.latent_scale).to(device, dtype)
        wrapped.abduction.reset_identity()
        wrapped.action = Action(latent_size, wrapped.vocab_size, config.class_noise).to(device, dtype)
        wrapped.action.weight = head.weight
        wrapped.action.reset_value()
        wrapped.generation_config = model.generation_config
        wrapped.name_or_path = ""
        wrapped.eval()
        return wrapped

    def get_input_embeddings(self) -> nn.Module:
        """Give the backbone's token embedding.

        Returns:
            The embedding module.
        """
        embedding: nn.Module = self.backbone.get_input_embeddings()
        return embedding

    def latent(
        self, hidden_states: Tensor, mask: Tensor, gate_state: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Infer the law of U from hidden states, fusion included.

        Args:
            hidden_states: z, shape (B, T, H).
            mask: which positions carry a token, shape (B, T), bool.
            gate_state: what the gates remember of the text before.

        Returns:
            loc and log scale of U, shape (B, T, C) each; gates, shape (N, B, T), or None; gate state or None.
        """
        loc, log_scale = self.abduction(hidden_states)
        if self.fusion is None:
            return loc, log_scale, None, None
        moved = self.fusion(hidden_states, loc, log_scale, mask, gate_state)
        return moved.loc, moved.log_scale, moved.gates, moved.gate_state

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        mode: str = "softmax",
        gate_state: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalOutput:
        """Run the model.

        Args:
            input_ids: token ids, shape (B, T).
            attention_mask: 1 for tokens, 0 for padding, shape (B, past + T).
            position_ids: positions, shape (B, T).
            past_key_values: the backbone's cache.
            inputs_embeds: embeddings instead of ids, shape (B, T, H).
            labels: next-token targets, shape (B, T), aligned with input_ids (shifted inside), -100 ignored.
            use_cache: return the cache.
            logits_to_keep: compute scores for this many last positions only; 0 for all.
            mode: `softmax` or `deterministic`.
            gate_state: gate memory returned by the call for the text before.
            kwargs: passed to the backbone.

        Returns:
            See `CausalOutput`.

        Raises:
            ConfigError: unknown mode.
        """
        if mode not in MODES:
            raise ConfigError(f"mode={mode!r}: expected one of {', '.join(MODES)}")
        kwargs.pop("return_dict", None)
        outputs = self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        time = hidden_states.shape[1]
        if attention_mask is not None and attention_mask.dim() == 2:
            mask = attention_mask[:, -time:].bool()
        else:
            mask = torch.ones(hidden_states.shape[:2], dtype=torch.bool, device=hidden_states.device)
        loc, log_scale, gates, gate_state = self.latent(hidden_states, mask, gate_state)
        kept = slice(-logits_to_keep, None) if logits_to_keep else slice(None)
        loc, log_scale = loc[:, kept], log_scale[:, kept]
        scale = log_scale.exp()
        if mode == "softmax":
            logits = self.action.score_loc(loc)
        else:
            logits = ovr_log_prob(*self.action.scores(loc, scale), self.config.threshold)
        loss = None if labels is None else self._loss(mode, loc, scale, logits, labels[:, kept])
        value_loc, value_scale = self.action.values(loc, scale)
        return CausalOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            latent_loc=loc,
            latent_log_scale=log_scale,
            value_loc=value_loc,
            value_scale=value_scale,
            gates=gates,
            gate_state=gate_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _loss(self, mode: str, loc: Tensor, scale: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        targets = labels[:, 1:].reshape(-1)
        if mode == "softmax":
            return softmax_loss(logits[:, :-1].flatten(0, 1), targets)
        return ovr_loss(
            loc[:, :-1].flatten(0, 1),
            scale[:, :-1].flatten(0, 1),
            self.action.weight,
            targets,
            threshold=self.config.threshold,
            class_noise=self.config.class_noise,
        )

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], **kwargs: Any
    ) -> dict[str, Any]:
        # The gates' memory is not part of the backbone's cache, so it travels with the keyword arguments.
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)
        if outputs.gate_state is not None and model_kwargs.get("use_cache", True):
            model_kwargs["gate_state"] = outputs.gate_state
        return model_kwargs

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate with the stock loop; `mode="softmax"` (default) or `mode="deterministic"` is added.

        Args:
            args: as in transformers.
            kwargs: as in transformers, and `mode`.

        Returns:
            As in transformers.

        Raises:
            ConfigError: unknown mode, or beam search with a gated fusion (beams would mix gate memories).
        """
        if kwargs.get("mode", "softmax") not in MODES:
            raise ConfigError(f"mode={kwargs['mode']!r}: expected one of {', '.join(MODES)}")
        config = kwargs.get("generation_config") or self.generation_config
        beams = kwargs.get("num_beams") or getattr(config, "num_beams", 1) or 1
        if beams > 1 and self.fusion is not None and self.fusion.gated:
            raise ConfigError(
                f"num_beams={beams} with a gated fusion: the gates remember one text per row; generate with "
                "num_beams=1, or fuse with --no-gate"
            )
        return super().generate(*args, **kwargs)


AutoModelForCausalLM.register(CausalQwenConfig, CausalQwenForCausalLM, exist_ok=True)
