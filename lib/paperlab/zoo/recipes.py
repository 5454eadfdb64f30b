"""The recipes of the pocket models: which network, which task, how long."""

from paperlab.nn.resnet import ResNet
from paperlab.nn.vit import ViT
from paperlab.zoo.images import CLASSES, GlyphTask
from paperlab.zoo.language import LanguageTask, decoder
from paperlab.zoo.training import Recipe

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("pocket-gpt", decoder, LanguageTask, steps=6000, matrix_lr=0.01, other_lr=2e-3),
        Recipe("pocket-resnet", lambda: ResNet(CLASSES), GlyphTask, steps=2000, decay_from=0.3, unit="images"),
        Recipe("pocket-vit", lambda: ViT(CLASSES), GlyphTask, steps=2000, decay_from=0.3, unit="images"),
    )
}
