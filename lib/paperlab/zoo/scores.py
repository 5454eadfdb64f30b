"""Scores with their intervals: what stands on a pocket model's card."""

from collections.abc import Iterable

import numpy as np

from paperlab.checks import require_nonempty
from paperlab.stats import mean_interval


def share(hits: Iterable[bool], bar: float | None = None) -> dict:
    """A share of right answers with Wilson's 95% interval; ``bar`` is what was asked for.

    Raises:
        ValueError: no answer.
    """
    hits = np.asarray(list(hits), dtype=bool)
    require_nonempty(hits=hits)
    from scipy.stats import binomtest  # here: who only loads a model should not wait for it

    found = binomtest(int(hits.sum()), len(hits)).proportion_ci(method="wilson")
    return _score(hits.mean(), found.low, found.high, len(hits), bar)


def mean(values: Iterable[float], bar: float | None = None) -> dict:
    """A mean with Student's 95% interval; ``bar`` is what was asked for.

    Raises:
        ValueError: fewer than two values.
    """
    found = mean_interval(np.asarray(list(values), dtype=float))
    return _score(found.estimate, found.low, found.high, found.n, bar)


def _score(value: float, low: float, high: float, n: int, bar: float | None) -> dict:
    rounded = {"value": round(float(value), 4), "low": round(float(low), 4), "high": round(float(high), 4), "n": n}
    return rounded if bar is None else {**rounded, "bar": bar}
