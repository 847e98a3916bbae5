import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from tether.errors import CertificateError, ConfigError
from tether.stats import (
    bootstrap_mean,
    bootstrap_quantile,
    clopper_pearson,
    mean_upper_bound,
    quantile_rank,
    quantile_upper_bound,
    samples_needed,
    standard_error,
)


@pytest.mark.parametrize(
    ("quantile", "n", "rank"),
    [
        (0.95, 59, 59),
        (0.95, 300, 292),
        (0.95, 1000, 962),
        (0.95, 5000, 4776),
        (0.99, 299, 299),
        (0.99, 1000, 996),
        (0.99, 5000, 4962),
    ],
)
def test_published_ranks(quantile, n, rank):
    assert quantile_rank(n, quantile, 0.95) == rank
    shuffled = np.random.default_rng(0).permutation(np.arange(1.0, n + 1))
    assert quantile_upper_bound(shuffled, quantile, 0.95) == rank


@pytest.mark.parametrize("quantile", [0.05, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.999])
def test_rank_is_the_smallest_that_holds(quantile, confidence):
    # Exact rational sums by math.comb: independent of scipy.
    def holds(rank, n):
        total = math.fsum(math.comb(n, k) * quantile**k * (1 - quantile) ** (n - k) for k in range(rank))
        return total >= confidence

    for n in (1, 2, 10, 44, 230, 500):
        if not holds(n, n):
            assert n < samples_needed(quantile, confidence)
            continue
        rank = quantile_rank(n, quantile, confidence)
        assert holds(rank, n)
        assert rank == 1 or not holds(rank - 1, n)


@pytest.mark.parametrize(
    ("quantile", "confidence"), [(0.95, 0.95), (0.99, 0.95), (0.999, 0.99), (0.5, 0.5), (0.3, 0.9)]
)
def test_too_few_samples_say_how_many_are_needed(quantile, confidence):
    needed = samples_needed(quantile, confidence)
    assert 1 - quantile**needed >= confidence
    assert needed == 1 or 1 - quantile ** (needed - 1) < confidence
    assert quantile_upper_bound(range(needed), quantile, confidence) == needed - 1
    if needed > 1:
        with pytest.raises(
            CertificateError, match=rf"^{needed - 1} samples.*at least {needed}\. Measure more"
        ):
            quantile_upper_bound(range(needed - 1), quantile, confidence)


def test_needed_is_known():
    assert [samples_needed(quantile, 0.95) for quantile in (0.95, 0.99)] == [59, 299]
    with pytest.raises(CertificateError, match=r"^0 samples"):
        quantile_upper_bound([], 0.95, 0.95)


def test_infinite_values_sort_last_and_nan_is_refused():
    values = [math.inf] * 8 + [float(number) for number in range(292)]
    assert quantile_upper_bound(values, 0.95, 0.95) == 291.0
    assert quantile_upper_bound([math.inf, *values[:-1]], 0.95, 0.95) == math.inf
    with pytest.raises(CertificateError, match="1 of 301 values are NaN"):
        quantile_upper_bound([*values, math.nan], 0.95, 0.95)


@pytest.mark.parametrize("draw", ["exponential", "ties"])
def test_quantile_bound_covers_as_often_as_it_says(draw):
    rng = np.random.default_rng(1)
    quantile, confidence, n, runs = 0.9, 0.9, 100, 4000
    if draw == "exponential":
        samples, truth = rng.exponential(size=(runs, n)), -math.log(1 - quantile)
    else:
        samples, truth = rng.binomial(3, 0.5, size=(runs, n)).astype(float), 3.0
    bounds = np.array([quantile_upper_bound(sample, quantile, confidence) for sample in samples])
    coverage = np.mean(bounds >= truth)
    exact = scipy_stats.binom.cdf(quantile_rank(n, quantile, confidence) - 1, n, quantile)
    # Continuous: the coverage is exactly the binomial sum; ties can only raise it.
    assert coverage >= exact - 4 * math.sqrt(exact * (1 - exact) / runs)
    if draw == "exponential":
        assert coverage <= exact + 4 * math.sqrt(exact * (1 - exact) / runs)


@pytest.mark.parametrize(("successes", "high"), [(0, 0.00299), (1, 0.00473), (3, 0.00774), (10, 0.01690)])
def test_published_clopper_pearson(successes, high):
    interval = clopper_pearson(successes, 1000, 0.95)
    assert round(interval.high, 5) == high
    assert interval.estimate == successes / 1000
    assert interval.low == 0


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (1, 1), (0, 20), (3, 20), (19, 20), (20, 20)])
@pytest.mark.parametrize("sided", ["upper", "lower", "both"])
def test_clopper_pearson_inverts_the_binomial_test(successes, n, sided):
    interval = clopper_pearson(successes, n, 0.9, sided)
    tail = 0.05 if sided == "both" else 0.1
    if sided == "lower" or successes == n:
        assert interval.high == 1
    else:
        assert scipy_stats.binom.cdf(successes, n, interval.high) == pytest.approx(tail, rel=1e-9)
    if sided == "upper" or successes == 0:
        assert interval.low == 0
    else:
        assert scipy_stats.binom.sf(successes - 1, n, interval.low) == pytest.approx(tail, rel=1e-9)


@pytest.mark.parametrize("sided", ["upper", "lower", "both"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.97])
def test_clopper_pearson_covers(sided, share):
    # The sum over all outcomes, not a simulation.
    n = 60
    covered = 0.0
    for successes in range(n + 1):
        _, low, high = clopper_pearson(successes, n, 0.9, sided)
        covered += scipy_stats.binom.pmf(successes, n, share) * (low <= share <= high)
    assert covered >= 0.9


# Worked out by hand from the formula; the second is often quoted as 0.0948, rounded up.
@pytest.mark.parametrize(("b", "width"), [(1.0, 0.017205), (10.0, 0.094749)])
def test_published_empirical_bernstein(b, width):
    values = np.array([0.4, 0.6] * 500) * math.sqrt(999 / 1000)  # sample deviation exactly 0.1
    assert mean_upper_bound(values, 0.95, upper=b) - values.mean() == pytest.approx(width, abs=5e-7)


def test_mean_bound_shifts_with_the_range_and_stops_at_its_end():
    values = np.random.default_rng(0).uniform(size=200)
    bound = mean_upper_bound(values, 0.9, upper=1.0)
    assert mean_upper_bound(3 * values - 5, 0.9, upper=-2.0, lower=-5.0) == pytest.approx(3 * bound - 5)
    assert mean_upper_bound([0.5, 0.9], 0.99, upper=1.0) == 1.0


def test_mean_bound_covers():
    rng = np.random.default_rng(2)
    samples = rng.beta(0.3, 3, size=(2000, 150))
    bounds = np.array([mean_upper_bound(sample, 0.9, upper=1.0) for sample in samples])
    assert np.mean(bounds >= 0.3 / 3.3) >= 0.9
    assert bounds.mean() < 0.3 / 3.3 + 0.12


def test_mean_bound_refuses_what_it_does_not_cover():
    for values, message in [
        ([0.5], "1 values.*at least 2"),
        ([0.5, 1.5], r"span \[0\.5, 1\.5\].*in \[0, 1\]"),
        ([-0.1, 0.5], "span"),
        ([0.5, math.nan], "NaN"),
        ([0.5, math.inf], "span"),
    ]:
        with pytest.raises(CertificateError, match=message):
            mean_upper_bound(values, 0.95, upper=1.0)
    for upper in (0.0, math.inf, math.nan):
        with pytest.raises(ConfigError, match="range"):
            mean_upper_bound([0.0, 0.0], 0.95, upper=upper)


def documents(rng, count, spread=1.0):
    """Documents of unequal length whose tokens share a level: (values, groups), true mean 0."""
    lengths = rng.integers(1, 12, size=count)
    groups = np.repeat(np.arange(count), lengths)
    values = rng.normal(scale=spread, size=count)[groups] + rng.normal(size=groups.size)
    return values, groups


def test_standard_error_of_independent_values_is_the_usual_one():
    values = np.random.default_rng(0).normal(size=50)
    assert standard_error(values) == pytest.approx(scipy_stats.sem(values))


def test_standard_error_with_groups_is_the_spread_of_means():
    rng = np.random.default_rng(3)
    errors, means = [], []
    for _ in range(600):
        values, groups = documents(rng, 60)
        errors.append(standard_error(values, groups))
        means.append(values.mean())
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.1)
    values, groups = documents(rng, 60, spread=3.0)
    assert standard_error(values, groups) > 1.5 * standard_error(values)
    assert standard_error(values + 10, groups) == pytest.approx(standard_error(values, groups))


def test_bootstrap_agrees_with_the_standard_error_and_is_repeatable():
    values, groups = documents(np.random.default_rng(4), 200)
    labels = np.array([f"doc-{group}" for group in groups])
    interval = bootstrap_mean(values, labels, 0.95, np.random.default_rng(0), resamples=8000)
    assert interval == bootstrap_mean(values, labels, 0.95, np.random.default_rng(0), resamples=8000)
    assert interval.estimate == pytest.approx(values.mean())
    half = 1.96 * standard_error(values, groups)
    assert interval.high - interval.estimate == pytest.approx(half, rel=0.1)
    assert interval.estimate - interval.low == pytest.approx(half, rel=0.1)
    order = np.random.default_rng(5).permutation(len(values))
    shuffled = bootstrap_mean(values[order], labels[order], 0.95, np.random.default_rng(0), resamples=8000)
    assert shuffled == pytest.approx(interval)


def test_bootstrap_in_pieces_covers(monkeypatch):
    monkeypatch.setattr("tether.stats._CELLS", 10_000)
    rng = np.random.default_rng(6)
    runs, covered = 400, 0
    for _ in range(runs):
        values, groups = documents(rng, 60)
        _, low, high = bootstrap_mean(values, groups, 0.9, rng, resamples=500)
        covered += low <= 0 <= high
    assert 0.84 <= covered / runs <= 0.94


def test_bootstrap_draws_every_resample(monkeypatch):
    monkeypatch.setattr("tether.stats._CELLS", 7)
    seen = bootstrap_mean([5.0, 5.0, 5.0], ["a", "b", "c"], 0.5, np.random.default_rng(0), resamples=11)
    assert seen == (5.0, 5.0, 5.0)


def test_groups_that_do_not_do():
    generator = np.random.default_rng(0)
    with pytest.raises(CertificateError, match=r"1 groups.*at least 2"):
        bootstrap_mean([1.0, 2.0], ["a", "a"], 0.9, generator)
    with pytest.raises(ConfigError, match=r"\(1,\), values \(2,\)"):
        bootstrap_mean([1.0, 2.0], ["a"], 0.9, generator)
    with pytest.raises(CertificateError, match="infinite"):
        standard_error([1.0, math.inf])
    with pytest.raises(CertificateError, match="0 groups"):
        standard_error([])
    with pytest.raises(ConfigError, match="one axis"):
        standard_error([[1.0, 2.0]])
    with pytest.raises(ConfigError, match="resamples is 0"):
        bootstrap_mean([1.0, 2.0], ["a", "b"], 0.9, generator, resamples=0)


@pytest.mark.parametrize("wrong", [0.0, 1.0, -0.5, 95.0, math.nan])
def test_probabilities_outside_their_range(wrong):
    calls = [
        lambda: quantile_upper_bound(range(100), wrong, 0.95),
        lambda: quantile_upper_bound(range(100), 0.95, wrong),
        lambda: clopper_pearson(1, 10, wrong),
        lambda: mean_upper_bound([0.0, 1.0], wrong, upper=1.0),
        lambda: bootstrap_mean([0.0, 1.0], [0, 1], wrong, np.random.default_rng(0)),
    ]
    for call in calls:
        with pytest.raises(ConfigError, match=r"(quantile|confidence) is .*inside \(0, 1\)"):
            call()


@pytest.mark.parametrize(("successes", "n"), [(-1, 10), (11, 10), (0, 0)])
def test_counts_that_cannot_be(successes, n):
    with pytest.raises(ConfigError, match="Check the counts"):
        clopper_pearson(successes, n, 0.95)


def test_a_quantile_has_an_interval_over_documents():
    rng = np.random.default_rng(1)
    groups = np.repeat(np.arange(40), rng.integers(1, 60, size=40))
    values = rng.normal(size=40)[groups] + 0.3 * rng.normal(size=len(groups))
    found = bootstrap_quantile(values, groups, 0.9, 0.95, np.random.default_rng(0), resamples=4000)
    assert found.estimate == np.quantile(values, 0.9, method="inverted_cdf")
    # Oracle: whole documents drawn and put together, by numpy alone.
    parts = [values[groups == number] for number in range(40)]
    draws = [
        np.quantile(
            np.concatenate([parts[at] for at in rng.integers(40, size=40)]), 0.9, method="inverted_cdf"
        )
        for _ in range(4000)
    ]
    low, high = np.quantile(draws, [0.025, 0.975])
    assert found.low == pytest.approx(low, abs=0.1)
    assert found.high == pytest.approx(high, abs=0.1)
    order = rng.permutation(len(values))
    again = bootstrap_quantile(
        values[order], groups[order], 0.9, 0.95, np.random.default_rng(0), resamples=4000
    )
    assert again == found
    with pytest.raises(ConfigError, match="quantile is 1"):
        bootstrap_quantile(values, groups, 1.0, 0.95, rng)
