"""TODO: what this is, in one line.

TODO: why anyone should care, in two sentences.

TODO: authors, "DeepSpeed Ulysses: System Optimizations for Enabling Training of Extreme Long Sequence Transformer
Models" (2023), https://arxiv.org/abs/2309.14509.
"""


def method() -> None:
    """TODO: what it computes (equation), shapes, limits, errors."""
