"""Mutual information of many neurons with one scalar, from few samples."""

import numpy as np
import torch
from jaxtyping import Float
from scipy.special import ndtri
from scipy.stats import rankdata
from torch import Tensor

from tether.errors import ShapeError

__all__ = ["copula_information"]

FEWEST = 4


def copula_information(values: Float[Tensor, "n d"], target: Float[Tensor, "n"]) -> Float[Tensor, "d"]:
    """Estimate the mutual information of each column with the target by a Gaussian copula.

    Ranks are mapped to normal scores, whose correlation ``r`` gives ``-1/2 log(1 - r^2) - 1 / (2 (n - 1))``;
    the last term is the mean of the first under independence, so that the estimate is centred on zero there.
    It sees monotone dependence only, but at 16 to 64 samples histograms and nearest neighbours see less
    (docs/lape-tefm.md).

    Args:
        values: a sample a row, a neuron a column.
        target: the scalar of each sample.

    Returns:
        Nats; negative values (down to ``-1 / (2 (n - 1))``) mean nothing was found; 0 where a column or the
        target is constant; float64.

    Raises:
        ShapeError: the sample axes differ, or there are fewer than 4 samples.

    Reference:
        TEFM, TFI: the factor MI(phi[0], phi[2]); Ma and Sun 2011 (copula entropy).

    Example:
        >>> import torch
        >>> x = torch.arange(64.0)
        >>> bool(copula_information(torch.stack([x, x.flip(0)], 1), x).min() > 2)
        True
    """
    if len(values) != len(target) or len(target) < FEWEST:
        raise ShapeError(
            f"values have {len(values)} samples, the target {len(target)}: expected equal numbers, at least "
            f"{FEWEST}"
        )
    count = len(target)
    scores = _normal_scores(values.detach().cpu().double().numpy())
    aim = _normal_scores(target.detach().cpu().double().numpy()[:, None])
    size = np.sqrt((scores**2).sum(0) * (aim**2).sum())
    product = (scores * aim).sum(0)
    r = np.divide(product, size, out=np.zeros_like(product), where=size > 0)
    # At |r| = 1 the copula is degenerate; the finite sample bounds what can be claimed.
    limit = 1 - 1 / (2 * count**2)
    r = np.clip(r, -limit, limit)
    found = -0.5 * np.log1p(-(r**2)) - 1 / (2 * (count - 1))
    return torch.from_numpy(np.where(size > 0, found, 0.0))


# Ranks in (0, 1) mapped to standard normal quantiles, centred; ties share their mean rank.
def _normal_scores(
    values: "np.ndarray[tuple[int, ...], np.dtype[np.float64]]",
) -> "np.ndarray[tuple[int, ...], np.dtype[np.float64]]":
    scores = ndtri((rankdata(values, axis=0) - 0.5) / len(values))
    centred: np.ndarray[tuple[int, ...], np.dtype[np.float64]] = scores - scores.mean(0)
    return centred
