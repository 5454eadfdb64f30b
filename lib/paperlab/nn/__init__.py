"""Building blocks that several papers share."""

from paperlab.nn.stacked import StackedLinear, stacked_mlp

__all__ = ["StackedLinear", "stacked_mlp"]
