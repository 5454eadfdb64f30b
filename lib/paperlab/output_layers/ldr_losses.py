"""TODO: what this is, in one line.

TODO: why anyone should care, in two sentences.

TODO: authors, "Label Distributionally Robust Losses for Multi-class Classification: Consistency, Robustness and
Adaptivity" (2021), https://arxiv.org/abs/2112.14869.
"""


def method() -> None:
    """TODO: what it computes (equation), shapes, limits, errors."""
