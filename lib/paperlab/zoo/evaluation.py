"""Measuring the models of the shelf, each by its recipe's own measure."""

from paperlab.nn.transformer import Transformer
from paperlab.zoo import heads, shelf
from paperlab.zoo.recipes import RECIPES


def evaluate(name: str) -> dict[str, dict]:
    """Measure a model on held-out data and store its scores on its card, with a decoder's portrait; returns the scores.

    Raises:
        ValueError: an unknown name.
        paperlab.zoo.ZooError: no weights, or damaged ones.
    """
    told, model = shelf.card(name), shelf.load(name)
    told["scores"] = RECIPES[name].scores(model, RECIPES[name].build)
    if isinstance(model, Transformer) and model.config.causal:
        told |= heads.portrait(model)
    shelf.write_card(told)
    return told["scores"]
