"""Scenes of a few coloured shapes, with everything that is true of them: the world of the models that see.

`draw_scenes` decides what stands where; `render`, `masks` and `boxes` show it; `captions`, `questions` and `referring`
talk about it; `move` sets it in motion. Synthetic, and named as such where it is used.
"""

from paperlab.data.scenes.asking import KINDS, questions
from paperlab.data.scenes.captioning import TEMPLATES, captions
from paperlab.data.scenes.layout import (
    COLOURS,
    DIRECTIONS,
    FAVOURITE,
    MARGIN,
    PARTNER,
    SHAPES,
    SIZES,
    Object,
    Scenes,
    directions,
    draw_scenes,
    move,
    places,
    relations,
)
from paperlab.data.scenes.pointing import referring
from paperlab.data.scenes.rendering import PALETTE, boxes, front, masks, render
from paperlab.data.scenes.wording import words

__all__ = [
    "COLOURS",
    "DIRECTIONS",
    "FAVOURITE",
    "KINDS",
    "MARGIN",
    "PALETTE",
    "PARTNER",
    "SHAPES",
    "SIZES",
    "TEMPLATES",
    "Object",
    "Scenes",
    "boxes",
    "captions",
    "directions",
    "draw_scenes",
    "front",
    "masks",
    "move",
    "places",
    "questions",
    "referring",
    "relations",
    "render",
    "words",
]
