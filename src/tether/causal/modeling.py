"""CausalQwenForCausalLM: a backbone that infers a cause U at every token and acts from it."""

from collections.abc import Callable
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import TransformersKwargs, can_return_tuple

from tether.causal.action import Action
from tether.causal.balance import balance_of
from tether.causal.config import MODES, CausalQwenConfig
from tether.causal.contract import TransformersContract
from tether.causal.counterfactual import Abducted, abduct
from tether.causal.features import join_features
from tether.causal.fingerprint import Fingerprinted
from tether.causal.fused import Fusion
from tether.causal.generation import CausalGeneration
from tether.causal.layers import Abduction, NumericEmbedding
from tether.causal.memory import attach
from tether.causal.mixture import Mixture
from tether.causal.noise import Noise
from tether.causal.numbers import NumericTokenizer
from tether.causal.output import CausalOutput
from tether.causal.placeholder import check_numeric
from tether.causal.positions import served_positions, text_mask, text_positions
from tether.causal.routed import make_fusion
from tether.causal.serving import CausalServing
from tether.causal.vocabulary import add_numbers
from tether.causal.walk import Reading
from tether.causal.wrapping import make_head, wrap_backbone
from tether.errors import ConfigError

__all__ = ["CausalOutput", "CausalQwenForCausalLM"]


class CausalQwenForCausalLM(
    TransformersContract,
    Fingerprinted,
    CausalGeneration,
    CausalServing,
    PreTrainedModel,  # type: ignore[misc]
    GenerationMixin,  # type: ignore[misc]
):
    """Numbers -> backbone -> abduction -> (fused deltas) -> action.

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
    # The deltas of a fusion are float32 whatever the base is: they were measured so, and are taken out bit for bit.
    # So are thresholds and noise: in float16 they would overflow.
    _keep_in_fp32_modules_strict: tuple[str, ...] = ("fusion", "threshold", "class_noise")
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    def __init__(self, config: CausalQwenConfig) -> None:
        super().__init__(config)
        config.check_logits()
        backbone_config = config.backbone_config
        self.backbone = AutoModel.from_config(backbone_config, trust_remote_code=False)
        text = config.get_text_config(decoder=True)
        self.vocab_size: int = text.vocab_size
        latent_size = config.latent_size or text.hidden_size
        self.numeric = NumericEmbedding(text.hidden_size)
        self.abduction, self.action = make_head(config)
        self.fusion = make_fusion(text.hidden_size, latent_size, config.fusion) if config.fusion else None
        if self.fusion is None:
            # What is named has to be there.
            names = self._keep_in_fp32_modules_strict
            self._keep_in_fp32_modules_strict = tuple(name for name in names if name != "fusion")
        embedding = self.backbone.get_input_embeddings().weight
        # The name of the embedding differs between architectures; tying must know it.
        name = next(name for name, parameter in self.named_parameters() if parameter is embedding)
        self._tied_weights_keys = {"action.weight": name}
        self.post_init()

    def initialize_weights(self) -> None:
        """Set what a checkpoint does not hold, the backbone's own part by the backbone's own rules.

        transformers passes over modules without own weights in models that are not its own, and with them buffers that
        a module sets in its children (Falcon-H1).
        """
        self.backbone.initialize_weights()
        super().initialize_weights()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Abduction):
            module.reset_identity()
        elif isinstance(module, Action):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            module.reset_action()
        elif isinstance(module, NumericEmbedding):
            module.reset_direction()
        elif isinstance(module, Fusion):
            # Nothing is moved by a delta that a checkpoint lacks.
            for part in module.parameters(recurse=False):
                nn.init.zeros_(part)

    @classmethod
    def from_backbone(
        cls, backbone: str | PreTrainedModel, preset: str = "calibrated", **overrides: Any
    ) -> "CausalQwenForCausalLM":
        """Wrap a causal LM so that softmax mode equals it, or refuse it.

        What the base does to its logits after its head is found and kept: a multiplier goes into abduction
        (`CausalQwenConfig.logit_scale`), a cap into the action head (`CausalQwenConfig.logit_cap`). Then the logits of
        base and wrapper are compared, always; they must agree to 1e-5 of the largest logit in float32, to rounding in
        a shorter type, and so must those of two tokens that both write. Cost: three passes of 8 tokens and two texts of
        two tokens, beside a hash of the weights.

        Args:
            backbone: alias, path or hub id of a causal LM, or the loaded model (its modules are taken over,
                not copied).
            preset: `calibrated` or `paper`, see `tether.causal.config.PRESETS`.
            overrides: fields of the preset in place of its values, `abduction_size`, or fields of the losses.

        Returns:
            The wrapped model in evaluation mode.

        Raises:
            ConfigError: unknown preset or override, or a model that cannot be wrapped exactly: no output head, one
                with a bias, or logits that differ, with the reason and the difference.
        """  # noqa: DOC502 - raised by what it calls
        return wrap_backbone(cls, backbone, preset, overrides)

    def get_input_embeddings(self) -> nn.Module:
        """Give the backbone's token embedding.

        Returns:
            The embedding module.
        """
        embedding: nn.Module = self.backbone.get_input_embeddings()
        return embedding

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        numeric_values: Tensor | None = None,
        target_values: Tensor | None = None,
        mode: str | None = None,
        noise: Noise | Tensor | None = None,
        truncation: float = 0.0,
        gate_state: Tensor | None = None,
        return_logits: bool = True,
        written_from: int | None = None,
        warp: Callable[[Tensor], Tensor] | None = None,
        output_weights: bool = False,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],  # type: ignore[misc]
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
            logits_to_keep: compute scores for this many last positions only, 0 for all; or for these positions,
                shape (K,) or (B, K). Labels are then scored there only.
            numeric_values: the number at each `<NUM>`, 0 elsewhere, shape (B, T).
            target_values: numbers that labels which are `<NUM>` should have, shape (B, T), aligned with labels;
                None takes `numeric_values`.
            mode: `softmax`, `deterministic` or `causal`; None takes that of the config.
            noise: who acts, mode `causal` only; see `generate`.
            truncation: smallest accepted density of U as a share of its peak, in [0, 1]; mode `causal` only.
            gate_state: gate memory returned by the call for the text before.
            return_logits: False saves the scores of all classes where only the loss is wanted.
            written_from: first position of the whole text that the model wrote itself, for a fusion by evidence; None
                where all is given.
            warp: made to the scores of each expert of a fusion by evidence before they are mixed; see `generate`.
            output_weights: return the weights of the experts. They are likelihood ratios, and tell whether a text
                was learnt from.
            num_items_in_batch: how many tokens are scored in the whole step that this call is a part of. The mean
                losses of this call are then multiplied by its share of them, so that the losses of a step's parts add
                up to the step's, as with transformers' own models.
            kwargs: passed to the backbone, but `shift_labels`: next-token targets that are shifted already, shape
                (B, T), read in place of `labels` where both are given.

        Returns:
            See `CausalOutput`; with `return_dict=False` a tuple of what there is of it, in its order.

        Raises:
            ConfigError: unknown mode, noise outside mode `causal`, numbers where there is no `<NUM>`, or a cache
                without what gates remember of its text.
            ShapeError: numbers or noise of another shape.
        """  # noqa: DOC502 - ShapeError is raised by what it calls
        mode = self.config.mode if mode is None else mode
        if mode not in MODES:
            raise ConfigError(f"mode={mode!r}: expected one of {', '.join(MODES)}")
        if mode != "causal" and (noise is not None or truncation):
            raise ConfigError(
                f"noise or truncation with mode={mode!r}: only mode 'causal' samples U; leave them out"
            )
        self._check_gates_know(past_key_values, gate_state)
        shift_labels = kwargs.pop("shift_labels", None)
        layers = () if self.fusion is None else self.fusion.layers
        asked = kwargs.get("output_hidden_states", self.config.output_hidden_states)
        if layers:
            kwargs["output_hidden_states"] = True
        ids = input_ids if inputs_embeds is None else None
        if numeric_values is not None:
            given = input_ids if inputs_embeds is None else None
            input_ids, inputs_embeds = None, self.embed(given, numeric_values)
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
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
        hidden_states = join_features(outputs.last_hidden_state, outputs.hidden_states, layers)
        shape, device = (hidden_states.shape[0], hidden_states.shape[1]), hidden_states.device
        mask = text_mask(attention_mask, shape, past, device)
        places = text_positions(attention_mask, position_ids, shape, past, device)
        served = served_positions(logits_to_keep, shape[1])
        wanted = self._wanted(served, labels, shift_labels, numeric_values, target_values, num_items_in_batch)
        called: dict[str, Any] = {
            "inputs_embeds": inputs_embeds, "attention_mask": attention_mask, "position_ids": position_ids
        }  # fmt: skip
        number = self.config.num_token_id
        reading = Reading(hidden_states, mask, places, ids, numeric_values, number, written_from, called)
        asked_for: dict[str, Any] = {
            "mode": mode, "noise": noise, "truncation": truncation, "return_logits": return_logits, "wanted": wanted
        }  # fmt: skip
        if isinstance(self.fusion, Mixture):
            cache = outputs.past_key_values
            memory = None if cache is None else attach(cache, self.fusion.remembers)
            self._check_known(memory, past)
            fields = self._serve_mixture(
                reading, served, memory, warp=warp, output_weights=output_weights, **asked_for
            )
        else:
            fields = self._serve(reading, served, gate_state=gate_state, **asked_for)
        router_logits = getattr(outputs, "router_logits", None)
        text = self.config.get_text_config(decoder=True)
        balance = balance_of(
            self.backbone, text, router_logits, kwargs.get("output_router_logits"), attention_mask
        )
        if balance is not None:
            fields |= {"aux_loss": balance.aux_loss, "router_logits": router_logits}
            if labels is not None:
                fields["loss"] = fields["loss"] + balance.weight * balance.aux_loss.to(fields["loss"].device)
        return CausalOutput(
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states if asked or not layers else None,
            attentions=outputs.attentions,
            **fields,
        )

    def embed(self, input_ids: Tensor | None, numeric_values: Tensor) -> Tensor:
        """Embed a text with the sizes of its numbers.

        Args:
            input_ids: token ids, shape (B, T).
            numeric_values: the number at each `<NUM>`, 0 elsewhere, shape (B, T).

        Returns:
            Embeddings, shape (B, T, H), for the backbone.

        Raises:
            ConfigError: no ids, a model without `<NUM>`, or numbers elsewhere than at `<NUM>`.
            ShapeError: numbers of another shape.
        """  # noqa: DOC502 - raised by what it calls
        if input_ids is None:
            raise ConfigError(
                "numeric_values without input_ids: expected the ids, so that <NUM> can be found"
            )
        self._check_numbers(input_ids, numeric_values)
        embedded: Tensor = self.numeric(self.get_input_embeddings()(input_ids), numeric_values)
        return embedded

    def _check_numbers(self, input_ids: Tensor, numeric_values: Tensor) -> None:
        number = self.config.num_token_id
        if number is None and bool((numeric_values != 0).any()):
            raise ConfigError(
                "numeric_values for a model without <NUM>: expected none; enable numbers with "
                "model.add_numbers(tokenizer), or convert with --numbers"
            )
        check_numeric(input_ids, numeric_values, -1 if number is None else number)

    def add_numbers(self, tokenizer: Any) -> "NumericTokenizer":
        """Let the model read and write numbers; does nothing to a model that already does.

        See `tether.causal.vocabulary.add_numbers`.

        Args:
            tokenizer: the model's tokenizer.

        Returns:
            The tokenizer that makes `input_ids` and `numeric_values`.
        """
        return add_numbers(self, tokenizer)

    def abduct(self, input_ids: Tensor, context: int, **options: Any) -> Abducted:
        """Draw the noise of the individuals who write, after a context, what was observed.

        Args:
            input_ids: context and what was written after it, shape (L,) or (1, L).
            context: tokens of the context, in [1, L).
            options: see `tether.causal.counterfactual.abduct`.

        Returns:
            The individuals, with diagnostics; `tether.causal.counterfactual.replay` lets them write again.
        """
        return abduct(self, input_ids, context, **options)


AutoModelForCausalLM.register(CausalQwenConfig, CausalQwenForCausalLM, exist_ok=True)
# Where labels are smoothed, Trainer shifts them only for the causal LMs that are named here.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[CausalQwenConfig.model_type] = CausalQwenForCausalLM.__name__
