"""TODO: what this is, in one line.

TODO: why anyone should care, in two sentences.

TODO: authors, "Hierarchical multi-class segmentation of glioma images using networks with multi-level activation
function" (2018), https://arxiv.org/abs/1810.09488.
"""


def method() -> None:
    """TODO: what it computes (equation), shapes, limits, errors."""
