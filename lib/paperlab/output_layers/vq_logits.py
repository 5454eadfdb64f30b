"""TODO: what this is, in one line.

TODO: why anyone should care, in two sentences.

TODO: authors, "VQ-Logits: Compressing the Output Bottleneck of Large Language Models via Vector Quantized Logits"
(2025), https://arxiv.org/abs/2505.10202.
"""


def method() -> None:
    """TODO: what it computes (equation), shapes, limits, errors."""
