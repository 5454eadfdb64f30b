"""TODO: what this is, in one line.

TODO: why anyone should care, in two sentences.

TODO: authors, "Superposed Episodic and Semantic Memory via Sparse Distributed Representation" (2017),
https://arxiv.org/abs/1710.07829.
"""


def method() -> None:
    """TODO: what it computes (equation), shapes, limits, errors."""
