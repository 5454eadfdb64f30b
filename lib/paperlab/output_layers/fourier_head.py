"""TODO: what this is, in one line.

TODO: why anyone should care, in two sentences.

TODO: authors, "Fourier Head: Helping Large Language Models Learn Complex Probability Distributions" (2024),
https://arxiv.org/abs/2410.22269.
"""


def method() -> None:
    """TODO: what it computes (equation), shapes, limits, errors."""
