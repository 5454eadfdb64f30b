"""Measuring the models of the shelf, each as its family is measured."""

from paperlab.zoo import examine, images, shelf
from paperlab.zoo.recipes import RECIPES

FAMILIES = {"pocket-resnet": images.scores, "pocket-vit": images.scores, "pocket-gpt": examine.scores}


def evaluate(name: str) -> dict[str, dict]:
    """Measure a model on held-out data and store its scores on its card; returns them.

    Raises:
        ValueError: an unknown name.
        paperlab.zoo.ZooError: no weights, or damaged ones.
    """
    told, model = shelf.card(name), shelf.load(name)
    told["scores"] = FAMILIES[name](model, RECIPES[name].build)
    shelf.write_card(told)
    return told["scores"]
