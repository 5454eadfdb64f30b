"""TODO: what this is, in one line.

TODO: why anyone should care, in two sentences.

TODO: authors, "Dual-Encoders for Extreme Multi-Label Classification" (2023), https://arxiv.org/abs/2310.10636.
"""


def method() -> None:
    """TODO: what it computes (equation), shapes, limits, errors."""
