"""TODO: what this is, in one line.

TODO: why anyone should care, in two sentences.

TODO: authors, "Predicting Rare Events by Shrinking Towards Proportional Odds" (2023),
https://arxiv.org/abs/2306.00247.
"""


def method() -> None:
    """TODO: what it computes (equation), shapes, limits, errors."""
