"""TODO: what this is, in one line.

TODO: why anyone should care, in two sentences.

TODO: authors, "Statistical Perspective of Top-K Sparse Softmax Gating Mixture of Experts" (2023),
https://arxiv.org/abs/2309.13850.
"""


def method() -> None:
    """TODO: what it computes (equation), shapes, limits, errors."""
