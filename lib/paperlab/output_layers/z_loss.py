"""TODO: what this is, in one line.

TODO: why anyone should care, in two sentences.

TODO: authors, "The Z-loss: a shift and scale invariant classification loss belonging to the Spherical Family" (2016),
https://arxiv.org/abs/1604.08859.
"""


def method() -> None:
    """TODO: what it computes (equation), shapes, limits, errors."""
