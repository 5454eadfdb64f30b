r"""Pixels of scenes: signed distances, drawn from the back to the front and softened over one pixel.

Every shape is described in its own disc of radius 1 by a function that is negative inside: a maximum of half-planes for
what is convex, a minimum where two parts are joined. What covers a pixel is $\mathrm{clamp}(1/2 - d)$, with $d$ the
distance in pixels; exact masks ask for the sign of $d$ at the pixel's centre.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from paperlab.checks import require_between
from paperlab.data.scenes.layout import COLOURS, SHAPES, Scenes

SQUARE = math.sqrt(0.5)  # half its side
ARM = 0.3  # half the breadth of a cross' arms; their length lets the corners touch the disc
HOLE = 0.45
FLAT = 0.35  # half the height of a bar, whose corners touch the disc
PALETTE = torch.tensor(
    [
        [0.90, 0.12, 0.12],
        [1.00, 0.55, 0.05],
        [0.95, 0.90, 0.15],
        [0.10, 0.65, 0.20],
        [0.15, 0.30, 0.95],
        [0.55, 0.15, 0.75],
        [1.00, 0.55, 0.78],
        [1.00, 1.00, 1.00],
    ]
)  # in the order of COLOURS


def _reach(breadth: float) -> float:
    """Half the length of a bar of half that breadth with its corners on the unit circle."""
    return math.sqrt(1 - breadth**2)


def _distance(shape: str, x: Tensor, y: Tensor) -> Tensor:
    """Negative inside a shape of radius 1, positive outside; the distance wherever its edge is the nearest thing."""
    if shape == "triangle":  # equilateral, its base down
        return torch.maximum(y, math.sqrt(0.75) * x.abs() - 0.5 * y) - 0.5
    if shape in ("circle", "ring"):
        away = torch.hypot(x, y)
        return away - 1 if shape == "circle" else (away - (1 + HOLE) / 2).abs() - (1 - HOLE) / 2
    x, y = x.abs(), y.abs()
    if shape == "square":
        return torch.maximum(x, y) - SQUARE
    if shape == "bar":
        return torch.maximum(x - _reach(FLAT), y - FLAT)
    return torch.maximum(torch.maximum(x, y) - _reach(ARM), torch.minimum(x, y) - ARM)  # cross


def _distances(scenes: Scenes, size: int) -> Float[Tensor, "n most size size"]:
    """Distance to each object's edge in pixels, of every pixel's centre; 1 where there is no object."""
    found = scenes.radius.new_ones(*scenes.shape.shape, size, size)
    axis = (torch.arange(size, device=found.device, dtype=found.dtype) + 0.5) / size
    for k, shape in enumerate(SHAPES):
        i, j = (scenes.shape == k).nonzero(as_tuple=True)
        centre, radius = scenes.centre[i, j], scenes.radius[i, j]
        x = ((axis - centre[:, :1]) / radius[:, None])[:, None, :]
        y = ((axis - centre[:, 1:]) / radius[:, None])[:, :, None]
        cos, sin = scenes.turn[i, j].cos()[:, None, None], scenes.turn[i, j].sin()[:, None, None]
        away = _distance(shape, cos * x + sin * y, cos * y - sin * x)
        found[i, j] = away * (size * radius)[:, None, None]
    return found


def render(
    scenes: Scenes, size: int = 32, *, palette: Float[Tensor, "colours 3"] | None = None
) -> Float[Tensor, "n 3 size size"]:
    """Pictures between 0 and 1, on the device of the scenes; ``palette`` replaces the usual colours.

    Raises:
        ValueError: ``size`` outside 8 to 512, or a palette without 8 rows.
    """
    require_between(8, 512, size=size)
    palette = PALETTE if palette is None else palette
    if len(palette) != len(COLOURS):
        raise ValueError(f"palette must have {len(COLOURS)} rows, got {len(palette)}")
    colour = (palette.to(scenes.tint)[scenes.colour.clamp_min(0)] + scenes.tint).clamp(0, 1)
    image = scenes.ground[:, None, None, None].expand(-1, 3, size, size).clone()
    cover = (0.5 - _distances(scenes, size)).clamp_(0, 1)
    for k in range(cover.shape[1]):
        image.lerp_(colour[:, k, :, None, None].expand_as(image), cover[:, k, None])
    return image


def front(scenes: Scenes, size: int = 32) -> Int[Tensor, "n size size"]:
    """The number of the object that is seen at each pixel's centre, −1 for the background.

    Raises:
        ValueError: ``size`` outside 8 to 512.
    """
    require_between(8, 512, size=size)
    number = torch.arange(scenes.shape.shape[1], device=scenes.shape.device)[:, None, None]
    return number.expand(*scenes.shape.shape, size, size).masked_fill(_distances(scenes, size) >= 0, -1).amax(1)


def masks(scenes: Scenes, size: int = 32, *, hidden: bool = False) -> Bool[Tensor, "n most size size"]:
    """The pixels whose centre shows each object; with ``hidden`` also those where another object is in front of it.

    Raises:
        ValueError: ``size`` outside 8 to 512.
    """
    require_between(8, 512, size=size)
    if hidden:
        return _distances(scenes, size) < 0
    number = torch.arange(scenes.shape.shape[1], device=scenes.shape.device)[:, None, None]
    return front(scenes, size)[:, None] == number


def boxes(scenes: Scenes) -> Float[Tensor, "n most 4"]:
    """The least box around each whole object, hidden parts as well: (left, top, right, bottom) in picture sides.

    Exact, from the corners of the shape or the disc; zeros where there is no object.
    """
    cos, sin = scenes.turn.cos()[..., None], scenes.turn.sin()[..., None]
    low, high = [], []
    for shape in SHAPES:
        corners = _corners(shape).to(scenes.centre)
        if len(corners):
            x, y = corners.T
            turned = torch.stack([cos * x - sin * y, sin * x + cos * y], -1)
            low.append(turned.amin(2))
            high.append(turned.amax(2))
        else:
            low.append(-torch.ones_like(scenes.centre))
            high.append(torch.ones_like(scenes.centre))
    which = scenes.shape.clamp_min(0)[None, ..., None].expand(1, -1, -1, 2)
    low, high = (torch.stack(side).gather(0, which)[0] * scenes.radius[..., None] for side in (low, high))
    return torch.cat([scenes.centre + low, scenes.centre + high], -1).masked_fill(~scenes.present[..., None], 0.0)


def _corners(shape: str) -> Float[Tensor, "corners 2"]:
    """The outer corners of a shape of radius 1; none of a round one."""
    if shape == "triangle":
        side = math.sqrt(0.75)
        return torch.tensor([[0, -1], [side, 0.5], [-side, 0.5]])
    half = {"square": (SQUARE, SQUARE), "bar": (_reach(FLAT), FLAT), "cross": (_reach(ARM), ARM)}.get(shape)
    if half is None:
        return torch.zeros(0, 2)
    found = [(a * half[0], b * half[1]) for a in (-1, 1) for b in (-1, 1)]
    return torch.tensor(found + [(y, x) for x, y in found] if shape == "cross" else found)
