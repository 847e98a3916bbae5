"""The value head in closed form: the ridge regression of numbers on loc_U, as wide as rows left out miss it."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tether.causal.dataset import Examples
from tether.errors import ConfigError

__all__ = ["Readout", "fit_readout", "fit_values"]

_FITTED = 2048
"""Numbers, at least, after which no more are read to fit the value head."""


class Readout(NamedTuple):
    """A linear map from loc_U to loc_Y.

    Attributes:
        weight: w, shape (C,), float64.
        bias: b, a scalar, float64.
        error: median absolute error of rows that were left out of the fit, in the units of Y.
    """

    weight: Tensor
    bias: Tensor
    error: float


@torch.no_grad()
def fit_readout(latent_loc: Float[Tensor, "rows latent"], values: Float[Tensor, " rows"]) -> Readout:
    """Fit a value head to states.

    w, b = argmin sum_i (y_i - w z_i - b)^2 + s |w|^2. Of 37 strengths s between 1e-8 and 10 times the
    largest eigenvalue of the states' scatter the one is taken whose mean absolute error is smallest where each
    row is predicted by the fit to all others. That error has a closed form, r_i / (1 - h_ii) with the residual r
    and the leverage h of the row, so the cost is one singular value decomposition.

    Args:
        latent_loc: z, loc of U where numbers are predicted, shape (n, C).
        values: y, the numbers in the units of Y (`Action.transform`), shape (n,).

    Returns:
        The fit.

    Raises:
        ConfigError: fewer than three rows.

    Reference: Allen 1974, The relationship between variable selection and data augmentation and a method for
        prediction (rows left out).

    Example:
        >>> z = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
        >>> fit = fit_readout(z, 2 * z.squeeze(-1) + 1)
        >>> round(float(fit.weight), 4), round(float(fit.bias), 4)
        (2.0, 1.0)
    """
    count = len(latent_loc)
    if count < 3:
        raise ConfigError(f"{count} numbers to fit a value head to: expected at least 3; give more text")
    z, y = latent_loc.double(), values.double()
    left, sizes, right = torch.linalg.svd(z - z.mean(0), full_matrices=False)
    power, aligned = sizes.square(), left.mT @ (y - y.mean())
    # States that are all alike have no direction to fit, and any strength gives w = 0.
    largest = power[0].clamp(min=torch.finfo(z.dtype).tiny ** 0.5)
    strengths = largest * torch.logspace(-8, 1, 37, dtype=z.dtype, device=z.device)
    kept = power / (power + strengths.unsqueeze(-1))
    leverage = 1 / count + kept @ left.square().mT
    # A row that decides its own fit alone has leverage 1 up to rounding: its error is then huge, not free.
    errors = (y - y.mean() - (kept * aligned) @ left.mT).abs() / (1 - leverage).clamp(min=1e-9)
    best = errors.mean(-1).argmin()
    weight = (sizes / (power + strengths[best]) * aligned) @ right
    return Readout(weight, y.mean() - weight @ z.mean(0), float(errors[best].median()))


@torch.no_grad()
def fit_values(model: Any, examples: Examples, batch: int = 8) -> float:
    """Fit the value head of a model to the numbers of a text, in place.

    w and b_Y from `fit_readout`. The scale of a Cauchy law is its median absolute deviation, so scale_Y
    should be the median error of rows left out; scale_Y = |w| scale_U, and U has one scale for scores and
    numbers. It is moved by that factor where a number follows and kept elsewhere: the log scale gets the factor's
    logarithm times a second ridge regression on z, of whether a number follows.

    Args:
        model: a model with numbers; changed in place: the value head, and the log scale of U.
        examples: the text, with at least three numbers to learn.
        batch: windows at a time.

    Returns:
        Median absolute error of rows left out, in the units of Y.

    Raises:
        ConfigError: fewer than three numbers.
    """  # noqa: DOC502 - raised by fit_readout
    states: list[Tensor] = []
    here: list[Tensor] = []
    values: list[Tensor] = []
    for rows in torch.arange(examples.windows).split(batch):
        inputs = {name: tensor.to(model.device) for name, tensor in examples.collate(rows.tolist()).items()}
        lengths = examples.starts.diff()[rows].unsqueeze(-1)
        mask = (torch.arange(1, inputs["input_ids"].shape[1]) < lengths).to(model.device)
        follows = inputs.pop("labels")[:, 1:] == model.config.num_token_id
        out = model(**inputs, use_cache=False, return_logits=False, output_hidden_states=True)
        states.append(out.hidden_states[-1][:, :-1][mask].float())
        here.append(follows[mask])
        values.append(inputs["numeric_values"][:, 1:][follows])
        if sum(map(len, values)) >= _FITTED:
            break
    z, follows = torch.cat(states), torch.cat(here)
    loc, log_scale = model.abduction(z)
    action, linear = model.action, model.abduction.log_scale
    fit = fit_readout(loc[follows], action.transform(torch.cat(values)))
    action.value_weight.copy_(fit.weight)
    action.value_bias.copy_(fit.bias)
    _, wide = action.values(loc[follows], log_scale[follows].exp())
    where = fit_readout(z, follows.double())
    factor = torch.as_tensor(fit.error, dtype=torch.float64).clamp(min=1e-6) / wide.double().median()
    linear.weight.add_((factor.log() * where.weight).to(linear.weight))
    linear.bias.add_((factor.log() * where.bias).to(linear.bias))
    return fit.error
