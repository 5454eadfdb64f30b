"""TODO: what this is, in one line.

TODO: why anyone should care, in two sentences.

TODO: authors, "An Architecture Combining Convolutional Neural Network (CNN) and Support Vector Machine (SVM) for
Image Classification" (2017), https://arxiv.org/abs/1712.03541.
"""


def method() -> None:
    """TODO: what it computes (equation), shapes, limits, errors."""
