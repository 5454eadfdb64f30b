"""The pocket zoo: small pretrained models, trained here, measured, and the same for every page."""

from paperlab.zoo.shelf import ZooError, card, describe, load, names

__all__ = ["ZooError", "card", "describe", "load", "names"]
