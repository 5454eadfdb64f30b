"""Shared statistics against SciPy, NumPy and counting by hand."""

from itertools import permutations

import numpy as np
import pytest
from scipy import stats

from paperlab.stats import (
    bootstrap_interval,
    crossover,
    line_fit,
    mean_interval,
    paired_interval,
    scaling_exponents,
    spearman_trend,
)


def test_mean_interval_is_scipys_t_interval():
    x = np.random.default_rng(0).normal(3, 2, 7)
    ours = mean_interval(x)
    low, high = stats.t.interval(0.95, 6, loc=x.mean(), scale=stats.sem(x))
    assert np.allclose([ours.low, ours.high, ours.estimate], [low, high, x.mean()])
    assert ours.n == 7
    assert f"{ours:.1f}" == f"{x.mean():.1f} [{low:.1f}, {high:.1f}]"
    assert np.isclose(ours.half_width, (high - low) / 2)


@pytest.mark.parametrize("n", [3, 12])
def test_the_interval_covers_the_truth_19_times_in_20(n):
    rng = np.random.default_rng(1)
    hits = sum((i := mean_interval(rng.normal(size=n))).low <= 0 <= i.high for _ in range(3000))
    assert abs(hits / 3000 - 0.95) < 0.012  # three standard errors


def test_pairs_cancel_what_they_share():
    shared = np.array([0.0, 100.0, -50.0])
    assert np.isclose(paired_interval(shared + 1, shared).half_width, 0)


def test_bootstrap_agrees_with_the_normal_theory_on_many_units():
    x = np.random.default_rng(2).exponential(size=4000)
    ours = bootstrap_interval(x)
    assert np.isclose(ours.high - ours.low, 2 * 1.96 * x.std() / np.sqrt(4000), rtol=0.08)


def test_line_fit_is_polyfit_with_linregress_error():
    rng = np.random.default_rng(3)
    x = np.arange(9.0)
    y = 2 * x - 1 + rng.normal(size=9)
    fit = line_fit(x, y)
    assert np.allclose([fit.slope, fit.intercept], np.polyfit(x, y, 1))
    assert np.isclose(fit.r2, np.corrcoef(x, y)[0, 1] ** 2)
    peer = stats.linregress(x, y)
    assert np.isclose(fit.high - fit.low, 2 * stats.t.ppf(0.975, 7) * peer.stderr)
    assert np.isclose(fit.high + fit.low, 2 * peer.slope)
    with pytest.raises(ValueError, match="x must"):
        line_fit([1, 1, 1], [1, 2, 3])


def test_trend_is_scipys_rho_with_a_counted_p():
    x, y = [1, 2, 3, 4, 5, 6], [2, 1, 3, 6, 4, 5]
    found = spearman_trend(x, y)
    rho = stats.spearmanr(x, y).statistic
    assert np.isclose(found.rho, rho)
    as_extreme = sum(stats.spearmanr(x, order).statistic >= rho - 1e-12 for order in permutations(y))
    assert np.isclose(found.p, as_extreme / 720)


def test_ties_share_their_rank():
    x, y = [1, 2, 2, 3, 4, 6], [2, 1, 3, 3, 3, 9]
    assert np.isclose(spearman_trend(x, y).rho, stats.spearmanr(x, y).statistic)


def test_many_points_use_permutations():
    x = np.arange(30)
    y = x + np.random.default_rng(4).normal(0, 15, 30)
    p = stats.spearmanr(x, y, alternative="greater").pvalue
    assert np.isclose(spearman_trend(x, y).p, p, atol=5e-3)


def test_replicates_are_ranked_one_by_one():
    small, large = np.arange(6.0), 1e6 * np.array([0, 2, 1, 3, 4, 5])
    assert spearman_trend(range(6), np.stack([small, large])).rho > 0.9
    assert spearman_trend(range(6), np.stack([-small, -large]), "falling").p < 0.01


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: mean_interval([1.0]), "values must hold at least 2"),
        (lambda: mean_interval([1.0, np.nan]), "values must be finite"),
        (lambda: mean_interval([[1.0, 2.0]]), "values must have 1 axes"),
        (lambda: mean_interval([1.0, 2.0], level=1.5), "level must be between"),
        (lambda: paired_interval([1, 2], [1, 2, 3]), "a has 2, b has 3"),
        (lambda: bootstrap_interval([1, 2, 3]), "at least 20 units"),
        (lambda: line_fit([1, 2], [1, 2]), "x must hold at least 3"),
        (lambda: line_fit([1, 2, 3], [1, 2]), "same length"),
        (lambda: spearman_trend([1, 2, 3], [1, 2, 3]), "number of points must be at least 5"),
        (lambda: spearman_trend(range(5), range(6)), "y must have 5 points"),
        (lambda: spearman_trend(range(5), range(5), "up"), "direction must be one of"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_scaling_exponents_of_power_laws_and_of_noise():
    sizes = np.array([64, 128, 512, 4096])
    np.testing.assert_allclose(scaling_exponents(sizes, [3 * sizes**2.0, 0.1 * sizes**0.5]), [2, 0.5])
    noisy = sizes * np.exp(np.random.default_rng(0).normal(0, 0.1, (5, 4)))
    wanted = [stats.linregress(np.log(sizes), np.log(row)).slope for row in noisy]
    np.testing.assert_allclose(scaling_exponents(sizes, noisy), wanted)


def test_crossover_of_two_power_laws():
    sizes = np.array([10.0, 100.0, 1000.0])
    assert crossover(sizes, 50 * sizes, sizes**2) == pytest.approx(50)
    assert crossover(sizes, sizes**2, 50 * sizes) == float("inf")
    assert crossover(sizes, sizes, 2 * sizes) == 10
    assert crossover(sizes, [1, 3, 1], [2, 2, 2]) == pytest.approx(10 ** (2 + np.log(1.5) / np.log(3)))


def test_scaling_rejects_bad_input():
    with pytest.raises(ValueError, match="number of sizes"):
        scaling_exponents([1, 2], [1, 2])
    with pytest.raises(ValueError, match="costs"):
        scaling_exponents([1, 2, 3], [1, 0, 2])
    with pytest.raises(ValueError, match="costs"):
        scaling_exponents([1, 2, 3], [[1, 2]])
    with pytest.raises(ValueError, match="same length"):
        crossover([1, 2], [1, 2], [1, 2, 3])
