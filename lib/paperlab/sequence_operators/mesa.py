"""TODO: what this is, in one line.

TODO: why anyone should care, in two sentences.

TODO: authors, "Mesa: A Memory-saving Training Framework for Transformers" (2021), https://arxiv.org/abs/2111.11124.
"""


def method() -> None:
    """TODO: what it computes (equation), shapes, limits, errors."""
