"""TODO: what this is, in one line.

TODO: why anyone should care, in two sentences.

TODO: authors, "Geometry-Aware Adaptation for Pretrained Models" (2023), https://arxiv.org/abs/2307.12226.
"""


def method() -> None:
    """TODO: what it computes (equation), shapes, limits, errors."""
