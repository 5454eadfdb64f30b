"""Data that is already on the machine: bundled real sets, and generators with known ground truth."""

from paperlab.data.digits import digits_split, load_digits

__all__ = ["digits_split", "load_digits"]
