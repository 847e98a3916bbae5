"""The backbone of a model served with adapters: one pass without and one with each, side by side as features."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from tether.causal.fused import Fusion
from tether.delta.attached import Attached

__all__ = ["AdaptedBackbone", "AdapterFusion", "but_meta"]


class AdapterFusion(Fusion):
    """Gates, chart, weights and leash of a fusion whose moves come from adapters.

    Its features are z, then z' of each adapter, shape (..., H (1 + N)): what `AdaptedBackbone` gives.

    Args:
        abduction: the base's, frozen.
        description: as of `Fusion`.
    """

    def __init__(self, abduction: nn.Module, description: dict[str, Any]) -> None:
        head: Any = abduction
        # The heads of deltas are not needed: on the meta device they take no memory.
        with torch.device("meta"):
            super().__init__(head.loc.in_features, head.loc.out_features, description)
        self.kept: tuple[Any] = (abduction,)  # not a submodule: it is the model's

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AdapterFusion":
        super()._apply(but_meta(fn), recurse)
        return self

    def deltas(self, hidden_states: Tensor, log_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Express each adapter's change of the hidden state as a move of the law of U.

        Args:
            hidden_states: z and each z', shape (..., H (1 + N)).
            log_scale: not read; it is computed from z.

        Returns:
            x and y, shape (N, ..., C) each, float32.
        """
        abduction, width = self.kept[0], self.hidden_size
        dtype = abduction.loc.weight.dtype
        loc, log_scale = abduction(hidden_states[..., :width].to(dtype))
        adapted = hidden_states[..., width:].unflatten(-1, (len(self.domains), width)).movedim(-2, 0)
        moved_loc, moved_log_scale = abduction(adapted.to(dtype))
        return moved_log_scale - log_scale, (moved_loc - loc) / log_scale.exp()


def but_meta(move: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Leave tensors that hold no values where they are: they cannot be brought anywhere.

    Args:
        move: what is done to the others.

    Returns:
        A function of a tensor.
    """
    return lambda values: torch.empty_like(values) if values.is_meta else move(values)


class AdaptedBackbone(nn.Module):
    """A backbone that runs once without and once with each adapter, on the same tokens.

    Each pass has its own cache. Without a cache, and with gates, an adapter's pass is left out for texts in
    which its gate is closed throughout; its z' is z there, so measure gated fusions gated.

    Args:
        backbone: the base's own.
        attached: its twin with the adapters.
        names: of the adapters, in the order of the fusion.
        fusion: whose gates tell which passes can be left out.
    """

    def __init__(
        self, backbone: nn.Module, attached: Attached, names: list[str], fusion: AdapterFusion
    ) -> None:
        super().__init__()
        self.base, self.names = backbone, names
        self.config: Any = backbone.config
        self.kept = (attached, fusion)

    def get_input_embeddings(self) -> nn.Module:
        """Give the token embedding.

        Returns:
            The base's.
        """
        base: Any = self.base
        embedding: nn.Module = base.get_input_embeddings()
        return embedding

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **options: Any,
    ) -> BaseModelOutputWithPast:
        """Run all passes.

        Args:
            input_ids: shape (B, T).
            attention_mask: shape (B, past + T).
            past_key_values: the base's cache; the adapters' lie beside it.
            inputs_embeds: embeddings instead of ids, shape (B, T, H).
            use_cache: whether to keep caches; None does as the config says.
            options: for the backbone.

        Returns:
            z and each z' side by side as the last hidden state, shape (B, T, H (1 + N)).
        """
        attached, fusion = self.kept
        caching = self.config.use_cache if use_cache is None else use_cache
        if caching and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        given = {"attention_mask": attention_mask, "use_cache": caching, **options}
        text = {"input_ids": input_ids} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
        output = self.base(**text, past_key_values=past_key_values, **given)
        states = [output.last_hidden_state]
        caches = vars(past_key_values).setdefault("adapters", {}) if past_key_values is not None else {}
        open_rows = (
            None if caching or past_key_values is not None else _open_rows(fusion, states[0], attention_mask)
        )
        for number, name in enumerate(self.names):
            if caching and name not in caches:
                caches[name] = DynamicCache(config=self.config)
            rows = slice(None) if open_rows is None else open_rows[number]
            made = states[0].clone()
            if open_rows is None or len(open_rows[number]):
                some = {key: value[rows] for key, value in text.items() if value is not None}
                if attention_mask is not None:
                    some["attention_mask"] = attention_mask[rows]
                passed = {**given, **some, "past_key_values": caches.get(name)}
                made[rows] = attached.states(name, passed.pop("input_ids", None), **passed).last_hidden_state
            states.append(made)
        return BaseModelOutputWithPast(
            last_hidden_state=torch.cat(states, dim=-1),
            past_key_values=past_key_values,
            hidden_states=output.hidden_states,
        )


# Rows of the batch in which each gate opens anywhere; None where all passes are needed.
def _open_rows(fusion: AdapterFusion, states: Tensor, attention_mask: Tensor | None) -> list[Tensor] | None:
    if not fusion.gated:
        return None
    mask = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
    if attention_mask is not None and attention_mask.dim() == 2:
        mask = attention_mask.bool()
    return [gates.any(-1).nonzero().squeeze(-1) for gates in fusion.gates(states, mask)[0]]
