"""What if: abduct the noise of what was written, change the context, let the same individual act again."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tether.causal.memory import attach
from tether.causal.mixture import Mixture
from tether.causal.noise import Noise
from tether.causal.posterior import Posterior, sample_posterior
from tether.causal.walk import Reading
from tether.errors import ConfigError, ShapeError

__all__ = ["Abducted", "abduct", "replay"]


class Abducted(NamedTuple):
    """Individuals who would have written what was observed.

    Attributes:
        posterior: noise of S individuals at the N observed steps (or one for all, when shared), with the
            sampler's diagnostics; of a fusion by evidence also the numbers that decide who speaks.
        shared: whether one noise serves all steps.
        tokens: what was observed, shape (N,).
    """

    posterior: Posterior
    shared: bool
    tokens: Tensor

    def noise(self, context: int, *, seed: int = 0) -> Noise:
        """Put the individuals into a context: step k of the writing gets the noise abducted at step k.

        Args:
            context: tokens before the first written one, >= 1.
            seed: of the steps beyond those observed; fresh noise, as nothing is known of them.

        Returns:
            Noise of S individuals.
        """
        drawn, told = self.posterior.noise, self.posterior.speaker
        seeds = torch.arange(seed, seed + len(drawn))
        if self.shared:
            return Noise(seeds=seeds, size=drawn.shape[-1], shared=True, known=drawn, known_speaker=told)
        # Noise within the context decides nothing: those tokens are given.
        before = torch.full((len(drawn), context - 1, drawn.shape[-1]), 0.5, dtype=drawn.dtype)
        known = torch.cat([before, drawn.cpu()], dim=1)
        told = None if told is None else torch.cat([before[..., 0], told.cpu()], dim=1)
        return Noise(seeds=seeds, size=drawn.shape[-1], known=known, known_speaker=told)


@torch.no_grad()
def abduct(
    model: Any,
    input_ids: Tensor,
    context: int,
    *,
    numeric_values: Tensor | None = None,
    shared: bool = False,
    samples: int = 16,
    burn_in: int = 20,
    thin: int = 1,
    generator: torch.Generator | None = None,
) -> Abducted:
    """Draw the noise of the individuals who write, after a context, what was observed.

    At each written step the observed token is the argmax of W u + b (less C_k where thresholds are per
    class), and where it is `<NUM>` the value of u is the observed number. Prior: the law of U the model
    infers from the factual text. See `tether.causal.posterior` for the sampler and its cost.

    Args:
        model: a CausalQwenForCausalLM.
        input_ids: context and what was written after it, shape (L,) or (1, L).
        context: tokens of the context, in [1, L).
        numeric_values: numbers of the text, same shape; needed where something written is `<NUM>`.
        shared: one noise for all steps of the text.
        samples: individuals to draw, S >= 1.
        burn_in: sweeps before the first.
        thin: sweeps for each.
        generator: of the sampler; None starts one at 0.

    Returns:
        The individuals.

    Raises:
        ShapeError: more than one text.
        ConfigError: nothing written, a number without its value, or text that no individual would write.
    """
    ids = input_ids.reshape(1, -1) if input_ids.dim() == 1 else input_ids
    if len(ids) != 1:
        raise ShapeError(f"input_ids {tuple(input_ids.shape)}: expected one text, shape (L,) or (1, L)")
    if not 1 <= context < ids.shape[1]:
        raise ConfigError(
            f"context={context} of a text of {ids.shape[1]} tokens: expected at least one token of context and one "
            "written after it"
        )
    values = None if numeric_values is None else numeric_values.reshape(1, -1)
    number, action = model.config.num_token_id, model.action
    tokens = ids[0, context:]
    seen = tokens == (-1 if number is None else number)
    if bool(seen.any()) and values is None:
        raise ConfigError("the observed text holds <NUM> but numeric_values is missing: expected its numbers")
    laws = _laws(model, ids, values, context)
    observed: dict[str, Any] = {}
    if values is not None and bool(seen.any()):
        observed = {
            "values": action.transform(values[0, context:]),
            "value_mask": seen,
            "value_weight": action.value_weight.detach(),
            "value_bias": action.value_bias.item(),
        }
    posterior = sample_posterior(
        laws[0],
        laws[1].exp(),
        action.weight.detach(),
        log_weights=laws[2],
        tokens=tokens,
        bias=None if action.bias is None else action.bias.detach(),
        threshold=action.threshold.detach() if model.config.threshold_form == "class" else None,
        shared=shared,
        samples=samples,
        burn_in=burn_in,
        thin=thin,
        generator=torch.Generator().manual_seed(0) if generator is None else generator,
        **observed,
    )
    return Abducted(posterior, shared, tokens)


def _laws(
    model: Any, ids: Tensor, values: Tensor | None, context: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Infer the laws of U at the N written steps, as the model had them while it wrote.

    Returns:
        loc and log scale, shape (N, C) each and no weights; of a fusion by evidence those of K experts, shape
        (N, K, C) each, and their log weights, shape (N, K).
    """
    steps = slice(context - 1, ids.shape[1] - 1)
    if not isinstance(model.fusion, Mixture):
        output = model(input_ids=ids, numeric_values=values, return_logits=False)
        return output.latent_loc[0, steps], output.latent_log_scale[0, steps], None
    output = model(
        input_ids=ids,
        numeric_values=values,
        written_from=context,
        logits_to_keep=1,
        return_logits=False,
        use_cache=True,
    )
    places = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
    # What the experts read was remembered for the next call.
    features = attach(output.past_key_values).held["features"]
    reading = Reading(
        features=features,
        mask=torch.ones_like(ids, dtype=torch.bool),
        places=places,
        ids=ids,
        values=values,
        number=model.config.num_token_id,
        written=context,
    )
    parts = []
    for block in model.fusion.serve(model.abduction, model.action, reading, kept=context - 1):
        experts = block.experts
        entry = torch.where(experts.awake, experts.entry, experts.entry[:, :1])
        parts.append((experts.loc[entry], experts.log_scale[entry], block.log_weights))
    loc, log_scale, log_weights = (torch.cat(column)[:-1] for column in zip(*parts, strict=True))
    return loc, log_scale, log_weights


def replay(
    model: Any,
    abducted: Abducted,
    input_ids: Tensor,
    *,
    numeric_values: Tensor | None = None,
    new_tokens: int | None = None,
    seed: int = 0,
    **options: Any,
) -> Any:
    """Let abducted individuals write after a context, the factual one or another.

    Args:
        model: the same model.
        abducted: from `abduct`.
        input_ids: the context, shape (L,) or (1, L).
        numeric_values: its numbers, same shape.
        new_tokens: how many to write; None writes as many as were observed.
        seed: see `Abducted.noise`.
        options: further options of `generate`.

    Returns:
        What `generate` returns with `return_dict_in_generate`, one row for each individual.
    """
    ids = input_ids.reshape(1, -1)
    noise = abducted.noise(ids.shape[1], seed=seed)
    rows = ids.expand(len(noise), -1)
    count = len(abducted.tokens) if new_tokens is None else new_tokens
    if numeric_values is not None:
        options["numeric_values"] = numeric_values.reshape(1, -1).expand(len(noise), -1)
    return model.generate(
        rows,
        attention_mask=torch.ones_like(rows),
        mode="causal",
        noise=noise,
        max_new_tokens=count,
        return_dict_in_generate=True,
        **options,
    )
