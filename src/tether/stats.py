"""Confidence bounds from measured samples: quantiles, proportions and means."""

from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import bdtr, betaincinv

from tether.errors import CertificateError, ConfigError

__all__ = [
    "Interval",
    "bootstrap_mean",
    "bootstrap_quantile",
    "clopper_pearson",
    "mean_upper_bound",
    "quantile_rank",
    "quantile_upper_bound",
    "samples_needed",
    "standard_error",
]

_CELLS = 1_000_000  # resampled documents held at once by the bootstrap: 24 MB


class Interval(NamedTuple):
    """An estimate and the ends of its confidence interval, in the unit of the values."""

    estimate: float
    low: float
    high: float


def samples_needed(quantile: float, confidence: float) -> int:
    r"""Return the fewest samples from which a quantile can be bounded at all.

    .. math:: 1 - q^n \ge 1 - \beta

    Args:
        quantile: q, inside (0, 1).
        confidence: 1 - β, inside (0, 1).

    Returns:
        The smallest n for which the largest of n samples is a valid bound.

    Raises:
        ConfigError: If an argument is outside its range.

    Reference:
        Wilks 1941, Determination of sample sizes for setting tolerance limits.

    Example:
        >>> samples_needed(0.95, 0.95), samples_needed(0.99, 0.95)
        (59, 299)
    """  # noqa: DOC502 - raised by _check_probability
    _check_probability("quantile", quantile)
    _check_probability("confidence", confidence)
    n = max(1, int(np.log1p(-confidence) / np.log(quantile)) - 1)
    while 1 - quantile**n < confidence:
        n += 1
    return n


def quantile_rank(n: int, quantile: float, confidence: float) -> int:
    r"""Return which order statistic bounds a quantile from above, whatever the distribution.

    .. math:: r = \min\{r : P(\mathrm{Bin}(n, q) \le r - 1) \ge 1 - \beta\}

    Args:
        n: Number of independent samples.
        quantile: q, inside (0, 1).
        confidence: 1 - β, inside (0, 1).

    Returns:
        The rank r in 1..n: the r-th smallest sample is at least the q-quantile with the confidence asked.

    Raises:
        CertificateError: If n is too small for any rank to do.
        ConfigError: If an argument is outside its range.

    Reference:
        David and Nagaraja 2003, Order Statistics, section 7.1.

    Example:
        >>> [quantile_rank(n, 0.95, 0.95) for n in (59, 300, 1000, 5000)]
        [59, 292, 962, 4776]
    """  # noqa: DOC502 - ConfigError is raised by samples_needed
    needed = samples_needed(quantile, confidence)
    if n < needed:
        raise CertificateError(
            f"{n} samples were given to bound the {quantile:g} quantile with confidence {confidence:g}; "
            f"expected at least {needed}. Measure more independent documents, or lower the quantile or the "
            "confidence."
        )
    reached = bdtr(np.arange(n), n, quantile) >= confidence
    # samples_needed answers for the last rank, by a formula that rounds differently.
    return int(np.argmax(reached)) + 1 if reached[-1] else n


def quantile_upper_bound(values: npt.ArrayLike, quantile: float, confidence: float) -> float:
    """Bound a quantile from above by an order statistic.

    No assumption on the distribution (ties and jumps included), only that the values are independent and
    of one distribution, and were not used to choose what is measured. Use documents, not tokens, as the
    unit. Infinite values are allowed: they sort last.

    Args:
        values: Shape ``(n,)``, any unit.
        quantile: Which quantile, inside (0, 1).
        confidence: How often, over repeated samples, the bound must hold; inside (0, 1).

    Returns:
        A number that is at least the true quantile with the confidence asked, in the unit of the values.

    Raises:
        CertificateError: If there are too few values (the message says how many are needed), or a NaN.
        ConfigError: If an argument is outside its range.

    Reference:
        David and Nagaraja 2003, Order Statistics, section 7.1.

    Example:
        >>> quantile_upper_bound(range(1, 301), 0.95, 0.95)
        292.0
    """  # noqa: DOC502 - ConfigError is raised by samples_needed
    sample = _vector(values)
    rank = quantile_rank(sample.size, quantile, confidence)
    return float(np.partition(sample, rank - 1)[rank - 1])


def clopper_pearson(
    successes: int, n: int, confidence: float, sided: Literal["upper", "lower", "both"] = "upper"
) -> Interval:
    """Bound a probability from the number of times that an event was seen.

    Args:
        successes: How often it was seen, 0..n.
        n: How often it could have been seen, at least 1.
        confidence: Coverage of the interval, inside (0, 1).
        sided: ``upper`` spends all of 1 - confidence on the high end (low is 0), ``lower`` all on the low
            end (high is 1), ``both`` half on each.

    Returns:
        The observed share and the exact, conservative interval, within [0, 1].

    Raises:
        ConfigError: If an argument is outside its range.

    Reference:
        Clopper and Pearson 1934, The use of confidence or fiducial limits.

    Example:
        >>> round(clopper_pearson(3, 1000, 0.95).high, 5)
        0.00774
    """
    _check_probability("confidence", confidence)
    if not 0 <= successes <= n or n < 1:
        raise ConfigError(
            f"{successes} successes in {n} trials were given; expected 0 <= successes <= n and n >= 1. Check "
            "the counts."
        )
    if sided not in {"upper", "lower", "both"}:
        raise ConfigError(f"sided is {sided!r}; expected upper, lower or both.")
    tail = (1 - confidence) / (2 if sided == "both" else 1)
    low, high = 0.0, 1.0
    if sided != "upper" and successes > 0:
        low = float(betaincinv(successes, n - successes + 1, tail))
    if sided != "lower" and successes < n:
        high = float(betaincinv(successes + 1, n - successes, 1 - tail))
    return Interval(successes / n, low, high)


def mean_upper_bound(values: npt.ArrayLike, confidence: float, upper: float, lower: float = 0.0) -> float:
    r"""Bound a mean from above when the range of the values is known beforehand.

    .. math:: \bar v + \sqrt{2 V \log(2/\beta) / n} + 7 b \log(2/\beta) / (3 (n - 1)), \quad b = upper - lower

    V is the unbiased sample variance. The range must come from a proof or from clipping, never from the
    sample itself. The result is cut at ``upper``, which no mean exceeds.

    Args:
        values: Shape ``(n,)``, n at least 2, independent and of one distribution, within [lower, upper].
        confidence: 1 - β, inside (0, 1).
        upper: The largest value that can occur, in the unit of the values.
        lower: The smallest value that can occur.

    Returns:
        A number that is at least the true mean with the confidence asked.

    Raises:
        CertificateError: If there are fewer than 2 values, a NaN, or a value outside the range.
        ConfigError: If the confidence is outside (0, 1), or the range is empty or infinite.

    Reference:
        Maurer and Pontil 2009, Empirical Bernstein bounds, theorem 4.

    Example:
        >>> round(mean_upper_bound([0.0, 1.0] * 500, 0.95, upper=1.0), 3)
        0.552
    """
    _check_probability("confidence", confidence)
    if not (np.isfinite([lower, upper]).all() and lower < upper):
        raise ConfigError(f"the range is [{lower}, {upper}]; expected finite ends with lower < upper.")
    sample = _vector(values)
    if sample.size < 2:
        raise CertificateError(
            f"{sample.size} values were given; expected at least 2. Measure more documents."
        )
    if sample.min() < lower or sample.max() > upper:
        raise CertificateError(
            f"the values span [{sample.min():g}, {sample.max():g}]; expected all of them in [{lower:g}, "
            f"{upper:g}]. Give a range that is proven, or clip the values and report the clipped mean."
        )
    log_term = np.log(2 / (1 - confidence))
    spread = np.sqrt(2 * sample.var(ddof=1) * log_term / sample.size)
    bound = sample.mean() + spread + 7 * (upper - lower) * log_term / (3 * (sample.size - 1))
    return float(min(bound, upper))


def standard_error(values: npt.ArrayLike, groups: npt.ArrayLike | None = None) -> float:
    """Estimate the standard error of the mean of the values.

    Args:
        values: Shape ``(n,)``.
        groups: Shape ``(n,)``, the document of each value: values of one document may then depend on each
            other. Without it, all values are taken as independent.

    Returns:
        The standard error, in the unit of the values; with groups, that of the ratio total / count to first
        order.

    Raises:
        CertificateError: If there are fewer than 2 values (2 groups), or one is not finite.
        ConfigError: If values and groups have different lengths.

    Reference:
        Cochran 1977, Sampling Techniques, equation 6.13 (ratio of totals).

    Example:
        >>> round(standard_error([1.0, 2.0, 3.0]), 4)
        0.5774
        >>> standard_error([1.0, 1.0, 3.0, 3.0], groups=[0, 0, 1, 1])
        1.0
    """  # noqa: DOC502 - raised by _totals
    sample = _vector(values)
    totals, counts = _totals(sample, np.arange(sample.size) if groups is None else groups)
    residuals = totals - counts * (totals.sum() / counts.sum())
    k = len(totals)
    return float(np.sqrt(k / (k - 1) * np.square(residuals).sum()) / counts.sum())


def bootstrap_mean(
    values: npt.ArrayLike,
    groups: npt.ArrayLike,
    confidence: float,
    generator: np.random.Generator,
    resamples: int = 2000,
) -> Interval:
    """Estimate a mean and its interval by resampling whole documents.

    Draws documents with replacement and takes total / count of each draw; the interval is between the
    percentiles of those means. It is approximate, and somewhat short below about 30 documents: for a
    certificate use ``mean_upper_bound``.

    Args:
        values: Shape ``(n,)``, for example one per token.
        groups: Shape ``(n,)``, the document of each value, numbers or text.
        confidence: Coverage of the two-sided interval, inside (0, 1).
        generator: Source of randomness.
        resamples: How many draws.

    Returns:
        The mean over all values and the ends of its interval, in the unit of the values.

    Raises:
        CertificateError: If there are fewer than 2 documents, or a value is not finite.
        ConfigError: If values and groups have different lengths, or an argument is outside its range.

    Reference:
        Davison and Hinkley 1997, Bootstrap Methods, section 3.8 (resampling clusters).

    Example:
        >>> bootstrap_mean([1.0, 1.0, 1.0], ["a", "a", "b"], 0.95, np.random.default_rng(0))
        Interval(estimate=1.0, low=1.0, high=1.0)
    """  # noqa: DOC502 - CertificateError is raised by _totals
    _check_probability("confidence", confidence)
    if resamples < 1:
        raise ConfigError(f"resamples is {resamples}; expected at least 1. Try 2000.")
    totals, counts = _totals(_vector(values), groups)
    k = len(totals)
    step = max(1, _CELLS // k)
    means = np.empty(resamples)
    for start in range(0, resamples, step):
        drawn = generator.integers(k, size=(min(step, resamples - start), k))
        means[start : start + step] = totals[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(totals.sum() / counts.sum()), float(low), float(high))


def bootstrap_quantile(
    values: npt.ArrayLike,
    groups: npt.ArrayLike,
    quantile: float,
    confidence: float,
    generator: np.random.Generator,
    resamples: int = 1000,
) -> Interval:
    """Estimate a quantile of values and its interval by resampling whole documents.

    Costs resamples x values; approximate, as ``bootstrap_mean`` is.

    Args:
        values: Shape ``(n,)``, for example one per token.
        groups: Shape ``(n,)``, the document of each value, numbers or text.
        quantile: Which, inside (0, 1): the smallest value that at least this share of the values does not exceed.
        confidence: Coverage of the two-sided interval, inside (0, 1).
        generator: Source of randomness.
        resamples: How many draws.

    Returns:
        The quantile of all values and the ends of its interval, in the unit of the values.

    Raises:
        CertificateError: If there are fewer than 2 documents, or a value is not finite.
        ConfigError: If values and groups have different lengths, or an argument is outside its range.

    Reference:
        Davison and Hinkley 1997, Bootstrap Methods, section 3.8 (resampling clusters).

    Example:
        >>> bootstrap_quantile([1.0, 1.0, 1.0], ["a", "a", "b"], 0.9, 0.95, np.random.default_rng(0))
        Interval(estimate=1.0, low=1.0, high=1.0)
    """  # noqa: DOC502 - CertificateError is raised by _totals
    _check_probability("quantile", quantile)
    _check_probability("confidence", confidence)
    array = _vector(values)
    _totals(array, groups)
    order = np.argsort(array, kind="stable")
    _, member = np.unique(np.asarray(groups), return_inverse=True)
    member, k = member[order], int(member.max()) + 1

    def at_rank(times: npt.NDArray[np.int64]) -> float:
        reached = np.cumsum(times[member])  # how many values there are up to each, with repeated documents
        return float(array[order[np.searchsorted(reached, np.ceil(quantile * reached[-1]))]])

    found = [
        at_rank(np.bincount(generator.integers(k, size=k), minlength=k)) for _ in range(max(1, resamples))
    ]
    low, high = np.quantile(found, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(at_rank(np.ones(k, np.int64)), float(low), float(high))


def _check_probability(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise ConfigError(f"{name} is {value}; expected a number inside (0, 1), for example 0.95.")


def _vector(values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1:
        raise ConfigError(
            f"values have shape {sample.shape}; expected one axis (n,). Flatten or select first."
        )
    if np.isnan(sample).any():
        raise CertificateError(
            f"{int(np.isnan(sample).sum())} of {sample.size} values are NaN; expected numbers. Find out "
            "where they come from: dropping them would bias the bound."
        )
    return sample


# Sum and number of values of each group.
def _totals(
    sample: npt.NDArray[np.float64], groups: npt.ArrayLike
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.intp]]:
    labels: npt.NDArray[Any] = np.asarray(groups)
    if labels.shape != sample.shape:
        raise ConfigError(
            f"groups have shape {labels.shape}, values {sample.shape}; expected equal. Give one group per "
            "value."
        )
    _, index = np.unique(labels, return_inverse=True)
    counts = np.bincount(index)
    if len(counts) < 2:
        raise CertificateError(
            f"{len(counts)} groups were given; expected at least 2. Measure more documents."
        )
    if not np.isfinite(sample).all():
        raise CertificateError(
            "some values are infinite; expected finite ones. A mean of them says nothing: report a quantile."
        )
    totals = np.bincount(index, weights=sample).astype(np.float64)
    return totals, counts
