"""TODO: what this is, in one line.

TODO: why anyone should care, in two sentences.

TODO: authors, "Utility-Probability Duality of Neural Networks" (2023), https://arxiv.org/abs/2305.14859.
"""


def method() -> None:
    """TODO: what it computes (equation), shapes, limits, errors."""
