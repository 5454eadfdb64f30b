"""Statistics over seeds: intervals, paired differences, fitted lines and monotone trends.

With three to twenty replicates the choice of interval matters more than anything else on a results table. Student's
interval keeps its promise at n = 3 (given roughly normal differences); a bootstrap of three numbers does not: it
excludes the truth about a quarter of the time.
"""

from dataclasses import dataclass
from itertools import permutations
from math import factorial

import numpy as np
from numpy.typing import ArrayLike
from scipy import special  # not scipy.stats, whose import takes longer than many a page's statistics

from paperlab.checks import (
    require_at_least,
    require_between,
    require_finite,
    require_ndim,
    require_one_of,
    require_positive,
    require_same_length,
)

EXACT_POINTS = 8  # up to here all n! orders are enumerated (8! = 40,320), beyond a permutation sample is drawn


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval, from ``n`` replicates. Prints as ``1.23 [1.10, 1.36]``."""

    estimate: float
    low: float
    high: float
    n: int

    @property
    def half_width(self) -> float:
        """Half the distance between the ends."""
        return (self.high - self.low) / 2

    def __format__(self, spec: str) -> str:
        spec = spec or ".3g"
        return f"{self.estimate:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"

    def __str__(self) -> str:
        return format(self)


@dataclass(frozen=True)
class LineFit:
    """Least-squares line ``y = intercept + slope * x``; ``low`` and ``high`` bound the slope at 95%."""

    slope: float
    intercept: float
    r2: float
    low: float
    high: float


@dataclass(frozen=True)
class Trend:
    """Spearman's rank correlation ``rho`` with its one-sided p-value and the number of points."""

    rho: float
    p: float
    n: int


def mean_interval(values: ArrayLike, level: float = 0.95) -> Interval:
    r"""Mean of ``values`` with Student's interval, $\bar x \pm t_{n-1}\, s / \sqrt n$.

    Raises:
        ValueError: fewer than 2 values, a value that is not finite, or a level outside (0, 1).
    """
    x = np.asarray(values, dtype=float)
    require_ndim(1, values=x)
    if len(x) < 2:
        raise ValueError(f"values must hold at least 2 replicates, got {len(x)}")
    require_finite(values=x)
    require_between(1e-9, 1 - 1e-9, level=level)
    mean = x.mean()
    half = special.stdtrit(len(x) - 1, (1 + level) / 2) * x.std(ddof=1) / np.sqrt(len(x))
    return Interval(float(mean), float(mean - half), float(mean + half), len(x))


def paired_interval(a: ArrayLike, b: ArrayLike, level: float = 0.95) -> Interval:
    """Student's interval of the mean of ``a - b``, replicate by replicate.

    Raises:
        ValueError: lengths differ, or as in `mean_interval`.
    """
    require_same_length(a=a, b=b)
    return mean_interval(np.asarray(a, dtype=float) - np.asarray(b, dtype=float), level)


def bootstrap_interval(values: ArrayLike, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> Interval:
    """Percentile bootstrap of the mean: for many units (images, queries), never for a handful of seeds.

    Raises:
        ValueError: fewer than 20 values (use `mean_interval`), or a value that is not finite.
    """
    x = np.asarray(values, dtype=float)
    if len(x) < 20:
        raise ValueError(f"values must hold at least 20 units for a bootstrap, got {len(x)}; use mean_interval")
    require_finite(values=x)
    picks = np.random.default_rng(seed).integers(0, len(x), (resamples, len(x)))
    low, high = np.quantile(x[picks].mean(1), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(x.mean()), float(low), float(high), len(x))


def line_fit(x: ArrayLike, y: ArrayLike, level: float = 0.95) -> LineFit:
    """Ordinary least squares of ``y`` on ``x`` with Student's interval for the slope.

    Raises:
        ValueError: fewer than 3 points, different lengths, equal x, or values that are not finite.
    """
    require_same_length(x=x, y=y)
    require_finite(x=x, y=y)
    if len(x) < 3:
        raise ValueError(f"x must hold at least 3 points for a line with an interval, got {len(x)}")
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    dx, dy = x - x.mean(), y - y.mean()
    if not dx.any():
        raise ValueError("x must hold at least two different values")
    slope = dx @ dy / (dx @ dx)
    left = dy - slope * dx
    error = np.sqrt(left @ left / (len(x) - 2) / (dx @ dx))
    half = special.stdtrit(len(x) - 2, (1 + level) / 2) * error
    r2 = 1 - left @ left / (dy @ dy) if dy.any() else 0.0
    return LineFit(*map(float, (slope, y.mean() - slope * x.mean(), r2, slope - half, slope + half)))


def scaling_exponents(sizes: ArrayLike, costs: ArrayLike) -> np.ndarray:
    r"""For each replicate the p of $\text{cost} \propto \text{size}^p$: the slope of a line through the logarithms.

    ``costs`` is (…, sizes), seconds or bytes; the result has the leading axes, and `mean_interval` can take it.

    Raises:
        ValueError: fewer than 3 sizes, another number of costs, or a number that is not positive.
    """
    sizes, costs = np.asarray(sizes, dtype=float), np.asarray(costs, dtype=float)
    require_at_least(3, **{"number of sizes": len(sizes)})
    require_positive(sizes=sizes, costs=costs)
    if costs.shape[-1] != len(sizes):
        raise ValueError(f"costs must have {len(sizes)} sizes on their last axis, got shape {costs.shape}")
    x = np.log(sizes) - np.log(sizes).mean()
    return np.log(costs) @ x / (x @ x)


def crossover(sizes: ArrayLike, costs: ArrayLike, rival: ArrayLike) -> float:
    """The size from which ``costs`` stay below ``rival``'s, between two sizes on straight lines through logarithms.

    The smallest size if they are below everywhere, infinity if not at the largest.

    Raises:
        ValueError: different lengths, or a number that is not positive.
    """
    require_same_length(sizes=sizes, costs=costs, rival=rival)
    require_positive(sizes=sizes, costs=costs, rival=rival)
    lead = np.log(np.asarray(costs, dtype=float) / np.asarray(rival, dtype=float))
    behind = np.flatnonzero(lead >= 0)
    if len(behind) == 0:
        return float(sizes[0])
    last = behind[-1]
    if last == len(lead) - 1:
        return float("inf")
    return float(
        np.exp(np.interp(0, -lead[[last, last + 1]], np.log(np.asarray(sizes, dtype=float)[[last, last + 1]])))
    )


def spearman_trend(
    x: ArrayLike, y: ArrayLike, direction: str = "rising", resamples: int = 20_000, seed: int = 0
) -> Trend:
    """Is ``y`` a monotone function of ``x``? Spearman's rho, with the share of orders at least as extreme.

    ``y`` may be (points,) or (replicates, points); replicates are ranked one by one and their ranks averaged, so that a
    replicate with a large scale does not outvote the others. The p-value is exact up to 8 points, else by permutation.

    Raises:
        ValueError: fewer than 5 points (p < 0.05 would hang on one swap), values not finite, or an unknown direction.
    """
    require_one_of(("rising", "falling"), direction=direction)
    y = np.atleast_2d(np.asarray(y, dtype=float))
    require_finite(x=x, y=y)
    n = len(x)
    if y.shape[1] != n:
        raise ValueError(f"y must have {n} points to match x, got {y.shape[1]}")
    require_at_least(5, **{"number of points": n})
    a = _ranks(np.asarray(x, dtype=float))
    b = _ranks(_ranks(y).mean(0))
    if a.std() == 0 or b.std() == 0:
        return Trend(0.0, 1.0, n)
    a, b = (a - a.mean()) / a.std(), (b - b.mean()) / b.std()
    rho = float(a @ b / n)
    sign = 1 if direction == "rising" else -1
    if n <= EXACT_POINTS:
        orders = np.array(list(permutations(range(n))))
        hits, total = int((sign * (b[orders] @ a) / n >= sign * rho - 1e-12).sum()), factorial(n)
    else:
        rng = np.random.default_rng(seed)
        orders = rng.permuted(np.tile(np.arange(n), (resamples, 1)), axis=1)
        hits, total = int((sign * (b[orders] @ a) / n >= sign * rho - 1e-12).sum()) + 1, resamples + 1
    return Trend(rho, hits / total, n)


def _ranks(values: np.ndarray) -> np.ndarray:
    """From 1 along the last axis; equal values share the mean of their ranks."""
    mine, others = values[..., :, None], values[..., None, :]
    return (others < mine).sum(-1) + ((others == mine).sum(-1) + 1) / 2
