"""Numbers in a text as fits and measurements see them: what Y should be, its law, its loss, how far it moved."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tether.cauchy.divergence import kl_divergence
from tether.cauchy.functional import log_prob, push_linear
from tether.delta.cache import hidden_states
from tether.delta.output_head import OutputHead, output_head
from tether.delta.windows import Windows

__all__ = ["ValueHead", "next_values", "served_values", "value_figures", "value_head"]


class ValueHead(NamedTuple):
    """What turns the law of U into that of Y, and the loss of a number into nats.

    Attributes:
        weight: of the value head, shape (C,), float32.
        bias: of the value head, a scalar, float32.
        output: the output head, which says how likely a number is.
        number: id of `<NUM>`.
        alpha: share of a number's loss that its probability does not gate, in [0, 1].
        share: lambda, of the mean loss of numbers in the total loss, >= 0.
    """

    weight: Tensor
    bias: Tensor
    output: OutputHead
    number: int
    alpha: float
    share: float

    def law(
        self, loc: Float[Tensor, "numbers latent"], scale: Float[Tensor, "numbers latent"]
    ) -> tuple[Float[Tensor, " numbers"], Float[Tensor, " numbers"]]:
        """Give the law of Y.

        Args:
            loc: of U, shape (k, C).
            scale: of U, shape (k, C), > 0.

        Returns:
            Location and scale of Y, shape (k,) each, in the units of the model's `value_transform`.
        """
        found = push_linear(loc.float(), scale.float(), self.weight[None], bias=self.bias[None])
        return found[0].squeeze(-1), found[1].squeeze(-1)

    def nll(
        self,
        loc: Float[Tensor, "numbers latent"],
        scale: Float[Tensor, "numbers latent"],
        values: Float[Tensor, " numbers"],
    ) -> Float[Tensor, " numbers"]:
        """Compute the gated loss of numbers, (alpha + (1 - alpha) P_NUM) (-log p(value)), as the model's own loss does.

        Cost: one product with the (V, C) output head a number.

        Args:
            loc: of U where the next token is a number, shape (k, C).
            scale: of U there, shape (k, C), > 0.
            values: what Y should be, shape (k,).

        Returns:
            Nats, shape (k,); differentiable in the law of U.

        Reference: source document 5, section 2.5.
        """
        prob = self.output.logits(loc).softmax(-1)[:, self.number]
        gate = self.alpha + (1 - self.alpha) * prob
        loss: Tensor = gate * -log_prob(values.float(), *self.law(loc, scale))
        return loss


def value_head(model: Any) -> ValueHead | None:
    """Give a model's value head, without gradients.

    Args:
        model: a CausalQwenForCausalLM.

    Returns:
        The head, or None for a model without numbers.
    """
    action, config = model.action, model.config
    if config.num_token_id is None:
        return None
    return ValueHead(
        action.value_weight.detach().float().flatten(),
        action.value_bias.detach().float().flatten()[0],
        output_head(model),
        config.num_token_id,
        config.gate_alpha,
        config.value_loss_weight,
    )


def next_values(model: Any, windows: Windows) -> Float[Tensor, " tokens"]:
    """Say what Y should be at each token.

    Args:
        model: a CausalQwenForCausalLM.
        windows: a text.

    Returns:
        The next token's number in the units of Y, nan where the next token is none, shape (n,), float32.
    """
    found = torch.full(windows.targets.shape, torch.nan)
    if windows.numeric_values is not None and model.config.num_token_id is not None:
        at = (windows.targets == model.config.num_token_id).nonzero().squeeze(-1)
        found[at] = model.action.transform(windows.numeric_values[at + 1]).float().cpu()
    return found


@torch.no_grad()
def served_values(fused: Any, windows: Windows, batch_size: int = 8) -> dict[str, Any]:
    """Measure what a fusion does to the numbers of a text, by running it; each window is a text of its own.

    Cost: nothing for a model or a text without numbers; else two passes of the backbone, and for a fusion by evidence
    the products with the output head that its weights need.

    Args:
        fused: the model.
        windows: the text.
        batch_size: windows a pass.

    Returns:
        As `value_figures`; the law served by evidence, a mixture, counts as the Cauchy law of its median and quartiles.
    """
    head, values = value_head(fused), next_values(fused, windows)
    laws: list[list[Tensor]] = [[torch.zeros(0)] for _ in range(5)]
    known = ~values.isnan()
    for batch in windows.batches(batch_size) if head is not None and bool(known.any()) else ():
        at = windows.positions(batch)
        here, device = known[at], fused.action.weight.device
        numbers = None if batch.numeric_values is None else batch.numeric_values.to(device)
        out = fused(
            input_ids=batch.input_ids.to(device), attention_mask=batch.mask.long().to(device), numeric_values=numbers,
            mode="softmax", use_cache=False, return_logits=False,
        )  # fmt: skip
        states = hidden_states(fused, batch, fused.fusion.layers)[..., : fused.fusion.hidden_size][
            batch.mask
        ][here]
        loc, log_scale = fused.abduction(states.to(fused.action.weight))
        own = (
            *fused.action.values(loc, log_scale.exp()),
            *(
                law.reshape(batch.mask.shape)[batch.mask.to(law.device)][here.to(law.device)]
                for law in (out.value_loc, out.value_scale)
            ),
        )
        for part, law in zip(laws, (*own, values[at][here]), strict=True):
            part.append(law.float().cpu())
    before_loc, before_scale, after_loc, after_scale, true = map(torch.cat, laws)
    return value_figures((before_loc, before_scale), (after_loc, after_scale), true, fused.action.number)


def value_figures(
    before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor], values: Tensor, number: Any
) -> dict[str, Any]:
    """Condense what happened to the numbers that a model expects.

    Args:
        before: location and scale of Y under the base, shape (k,) each.
        after: as they are served, likewise.
        values: what Y should be, shape (k,).
        number: turns Y into numbers, `Action.number`.

    Returns:
        `numbers` (k); of k > 0 also `median_error_before` and `median_error_after`, of the median of Y, in the numbers'
        own units; `covered_before` and `covered_after`, the share within the central half of the law, .5 where scales
        are right; `drift`, the mean of KL(base || served) of the law of Y, nats.
    """
    found: dict[str, Any] = {"numbers": len(values)}
    if not len(values):
        return found
    true = number(values)
    for name, (loc, scale) in (("before", before), ("after", after)):
        found[f"median_error_{name}"] = float((number(loc) - true).abs().median())
        found[f"covered_{name}"] = float(((values - loc).abs() <= scale).double().mean())
    drift: Tensor = kl_divergence(*(part.double() for part in (*before, *after)))
    return found | {"drift": float(drift.mean())}
