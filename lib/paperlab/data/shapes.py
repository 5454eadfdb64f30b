"""Rendered scenes of ellipses and rectangles, with boxes, classes and an overlap that is set and not left to chance.

Photographs come with whatever crowding they have; here it is a parameter. In a crowded scene objects come in pairs of
one class, each pair shifted until its two boxes overlap by a drawn amount; all other objects keep apart. Boxes are
*amodal*: they enclose the whole object, also the part that another one hides.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from paperlab.checks import require_at_least, require_between
from paperlab.detection import box_iou
from paperlab.devices import generator

CLASSES = ("ellipse", "rectangle")
TRIES = 24  # random places tried for every object, all at once
APART = 0.05  # the overlap that strangers may have
OUTLINE = 1.2  # pixels


class Scenes(NamedTuple):
    """``n`` scenes: pixels in [0, 1], boxes as (left, top, right, bottom) in pixels, labels with −1 where none is."""

    images: Float[Tensor, "n 3 size size"]
    boxes: Float[Tensor, "n most 4"]
    labels: Int[Tensor, "n most"]


def _uniform(g: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    return low + (high - low) * torch.rand(*shape, generator=g)


def _around(centre: Float[Tensor, "*b 2"], sides: Float[Tensor, "*b 2"]) -> Float[Tensor, "*b 4"]:
    return torch.cat([centre - sides / 2, centre + sides / 2], -1)


def shifted(
    boxes: Float[Tensor, "*b 4"],
    sides: Float[Tensor, "*b 2"],
    direction: Float[Tensor, "*b 2"],
    overlap: Float[Tensor, "*b"],
) -> Float[Tensor, "*b 4"]:
    r"""Boxes of the given sides, moved from the centre of ``boxes`` along ``direction`` until they overlap so much.

    At distance $t$ the two share a rectangle of sides $\min(m_x, p_x - t|d_x|)$ and $\min(m_y, p_y - t|d_y|)$, with $m$
    the smaller of the two sides and $p$ their mean, and the overlap $o$ asks for the area $S = o/(1+o)$ of the sum of
    both areas. A product of two minima is the least of four products: the answer is the least of their distances, zero
    where even concentric boxes overlap by less.
    """
    wide = boxes[..., 2:] - boxes[..., :2]
    least, mean, speed = torch.minimum(wide, sides), (wide + sides) / 2, direction.abs().clamp(min=1e-6)
    area = overlap / (1 + overlap) * (wide.prod(-1) + sides.prod(-1))
    one = (mean - area[..., None] / least.flip(-1)) / speed  # the other side is fully covered
    b, c = (mean * speed.flip(-1)).sum(-1), mean.prod(-1) - area
    both = 2 * c / (b + (b**2 - 4 * speed.prod(-1) * c).clamp(min=0).sqrt())  # the smaller root
    distance = torch.minimum(one.amin(-1), both).clamp(min=0)
    distance = distance.masked_fill(least.prod(-1) < area, 0.0)
    return _around((boxes[..., 2:] + boxes[..., :2]) / 2 + direction * distance[..., None], sides)


def place(
    n: int,
    *,
    size: int,
    objects: tuple[int, int],
    sides: tuple[float, float],
    crowded: float,
    overlap: tuple[float, float],
    g: torch.Generator,
) -> tuple[Float[Tensor, "n most 4"], Int[Tensor, "n most"]]:
    """Boxes and labels of ``n`` scenes: object after object, all scenes at once, the best of `TRIES` places each."""
    most = objects[1]
    count = torch.randint(objects[0], most + 1, (n,), generator=g)
    pairs = torch.rand(n, generator=g) < crowded
    boxes, labels = torch.zeros(n, most, 4), torch.randint(len(CLASSES), (n, most), generator=g)
    for k in range(most):
        extent = _uniform(g, *sides, n, TRIES, 2)
        tried = _around(extent / 2 + torch.rand(n, TRIES, 2, generator=g) * (size - extent), extent)
        clash = box_iou(tried, boxes[:, :k]).amax(-1) if k else torch.zeros(n, TRIES)
        if k % 2:  # the second of a pair, beside the first
            first = boxes[:, k - 1, None].expand(n, TRIES, 4)
            similar = ((first[..., 2:] - first[..., :2]) * _uniform(g, 0.92, 1.08, n, TRIES, 2)).clamp(*sides)
            angle = _uniform(g, 0, 2 * torch.pi, n, TRIES)
            direction = torch.stack([angle.cos(), angle.sin()], -1)
            beside = shifted(first, similar, direction, _uniform(g, *overlap, n, 1).expand(n, TRIES))
            inside = (beside >= 0).all(-1) & (beside <= size).all(-1)
            others = box_iou(beside, boxes[:, : k - 1]).amax(-1) if k > 1 else torch.zeros(n, TRIES)
            usable = inside & (others <= APART)
            use = pairs & usable.any(1)
            tried = torch.where(use[:, None, None], beside, tried)
            clash = torch.where(use[:, None], torch.where(usable, others, torch.inf), clash)
            labels[:, k] = torch.where(use, labels[:, k - 1], labels[:, k])
        boxes[:, k] = tried[torch.arange(n), clash.argmin(1)]
    absent = torch.arange(most) >= count[:, None]
    return boxes.masked_fill(absent[..., None], 0.0), labels.masked_fill(absent, -1)


def paint(
    boxes: Float[Tensor, "n most 4"], labels: Int[Tensor, "n most"], *, size: int, g: torch.Generator
) -> Float[Tensor, "n 3 size size"]:
    """Draw the objects in order, later ones on top, each in a colour of its own with a dark outline, then add noise."""
    n, most = labels.shape
    ground = _uniform(g, 0.25, 0.75, n, 3, 1, 1)
    slope = _uniform(g, -0.15, 0.15, n, 2, 3, 1, 1)
    ramp = torch.linspace(-1, 1, size)
    image = (ground + slope[:, 0] * ramp + slope[:, 1] * ramp[:, None]).flatten(2)
    window = min(size, int((boxes[..., 2:] - boxes[..., :2]).max().ceil()) + 3)
    steps = torch.arange(window)
    for k in range(most):
        corner = (boxes[:, k, :2].floor().long() - 1).clamp(0, size - window)
        x, y = corner[:, :1] + steps, corner[:, 1:] + steps
        centre, half = (boxes[:, k, :2] + boxes[:, k, 2:]) / 2, (boxes[:, k, 2:] - boxes[:, k, :2]) / 2
        half = half.clamp(min=1.0)
        dx = ((x + 0.5 - centre[:, :1]) / half[:, :1])[:, None, :].abs()
        dy = ((y + 0.5 - centre[:, 1:]) / half[:, 1:])[:, :, None].abs()
        scale = half.amin(1)[:, None, None]
        rectangle = torch.maximum((dx - 1) * half[:, :1, None], (dy - 1) * half[:, 1:, None])
        distance = torch.where((labels[:, k] == 1)[:, None, None], rectangle, ((dx**2 + dy**2).sqrt() - 1) * scale)
        cover = (0.5 - distance).clamp(0, 1) * (labels[:, k] >= 0)[:, None, None]  # 1 inside, 0 outside
        rim = (distance + OUTLINE + 0.5).clamp(0, 1)
        colour = torch.rand(n, 3, 1, 1, generator=g) * (1 - 0.65 * rim[:, None])
        index = (y[:, :, None] * size + x[:, None, :]).flatten(1)[:, None].expand(n, 3, window**2)
        below, cover = image.gather(2, index), cover.flatten(1)[:, None]
        image.scatter_(2, index, below + cover * (colour.flatten(2) - below))
    image = image.view(n, 3, size, size)
    return (image + 0.04 * torch.randn(image.shape, generator=g)).clamp(0, 1)


def make_scenes(
    n: int,
    *,
    seed: int,
    size: int = 48,
    objects: tuple[int, int] = (3, 8),
    sides: tuple[float, float] = (10.0, 20.0),
    crowded: float = 0.5,
    overlap: tuple[float, float] = (0.1, 0.7),
) -> Scenes:
    """``n`` scenes of ``objects[0]`` to ``objects[1]`` shapes with sides in pixels; a share ``crowded`` holds pairs.

    The two objects of a pair are of one class, and their boxes overlap by an amount drawn evenly from ``overlap``.
    Where no try finds room for the second, it stands alone; a scene too full for all its objects lets some of them
    overlap.

    Raises:
        ValueError: ``n`` or an object count below 1, a share outside 0 to 1, an overlap outside 0 to 0.8, bounds in the
            wrong order, or sides that do not fit the image.
    """
    require_at_least(1, n=n, objects=objects[0])
    require_between(0, 1, crowded=crowded)
    require_between(0, 0.8, overlap=overlap)
    require_between(2, size, sides=sides)
    for name, (low, high) in {"objects": objects, "sides": sides, "overlap": overlap}.items():
        if low > high:
            raise ValueError(f"{name} must be given as (low, high), got {(low, high)}")
    g = generator(seed)
    boxes, labels = place(n, size=size, objects=objects, sides=sides, crowded=crowded, overlap=overlap, g=g)
    return Scenes(paint(boxes, labels, size=size, g=g), boxes, labels)
