"""The recipes of the pocket models: which network, which task, how long, and how it is measured."""

from collections.abc import Callable
from functools import partial

from torch import nn

from paperlab.nn.resnet import ResNet
from paperlab.nn.vit import ViT
from paperlab.zoo import examine, heads, images, masked, matching, painting, seeing
from paperlab.zoo.language import LanguageTask, decoder
from paperlab.zoo.training import Recipe


def _language(name: str, build: Callable[[], nn.Module] = decoder, **changes: object) -> Recipe:
    """The same tokens in the same order, the same rates: siblings differ in what is built alone."""
    usual = {"task": LanguageTask, "scores": examine.scores, "portrait": heads.portrait}
    rates = {"steps": 6000, "matrix_lr": 0.01, "other_lr": 2e-3, "decay_from": 0.6}
    return Recipe(name, build, **(usual | rates | changes))


def _glyphs(name: str, build: Callable[[], nn.Module]) -> Recipe:
    return Recipe(name, build, images.GlyphTask, images.scores, steps=2000, decay_from=0.3, unit="images")


RECIPES = {
    recipe.name: recipe
    for recipe in (
        _language("pocket-gpt"),
        _language("pocket-gpt-2l", partial(decoder, layers=2, width=224, heads=7, hidden=896)),
        _language("pocket-gpt-12l", partial(decoder, layers=12, width=96, heads=3, hidden=384)),
        _language("pocket-gpt-relu", partial(decoder, activation="relu")),
        _language("pocket-moe", partial(decoder, experts=8)),
        _language(
            "pocket-bert", partial(decoder, causal=False), task=masked.MaskedTask, scores=masked.scores, portrait=None
        ),
        _glyphs("pocket-resnet", lambda: ResNet(images.CLASSES)),
        _glyphs("pocket-vit", lambda: ViT(images.CLASSES)),
        Recipe(
            "pocket-clip", matching.clip, matching.MatchingTask, matching.scores, steps=1000, warmup=50, unit="pairs"
        ),
        Recipe(
            "pocket-diffusion",
            painting.painter,
            painting.PaintingTask,
            painting.scores,
            steps=5000,
            decay_from=0.3,
            unit="images",
            portrait=painting.portrait,
        ),
        Recipe(
            "pocket-lvlm",
            seeing.seer,
            seeing.SeeingTask,
            seeing.scores,
            steps=4500,
            warmup=50,
            unit="pictures",
            base="pocket-clip",
        ),
    )
}
