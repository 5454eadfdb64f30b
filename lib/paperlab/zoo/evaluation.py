"""Measuring the models of the shelf, each by its recipe's own measure."""

from paperlab.zoo import shelf
from paperlab.zoo.recipes import RECIPES


def evaluate(name: str) -> dict[str, dict]:
    """Measure a model on held-out data and store its scores on its card, with its portrait; returns the scores.

    Raises:
        ValueError: an unknown name.
        paperlab.zoo.ZooError: no weights, or damaged ones.
    """
    told, model, recipe = shelf.card(name), shelf.load(name), RECIPES[name]
    told["scores"] = recipe.scores(model, recipe.build)
    if recipe.portrait:
        told |= recipe.portrait(model)
    shelf.write_card(told)
    return told["scores"]
