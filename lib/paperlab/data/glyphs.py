r"""Glyphs and textures: a source task with as many classes as one likes, for image models that other tasks borrow.

A glyph class is a small alphabet letter that nobody has seen: two to four curved strokes whose control points are drawn
once, from the class's own number. Its images differ by the hand that writes: control points tremble, the letter is
turned, sheared, scaled and moved, the pen is thick or thin. A texture class is a plane wave, a plaid or a field of
rings with a frequency and an orientation of its own. Light, contrast, noise and, where asked, colour vary for all.

Every fourth class is a texture. Synthetic, and named as such where it is used.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from paperlab.checks import require_at_least, require_between
from paperlab.devices import generator

STROKES, POINTS = 4, 7  # most strokes of a glyph; points at which a stroke is sampled
ALPHABET = 7_919  # the seed from which all class shapes follow, the same for everybody


def class_strokes(classes: int) -> Float[Tensor, "classes strokes 3 2"]:
    """Control points of each class's quadratic Bézier strokes, in the square from -1 to 1.

    Class k is the same for every number of classes. Most letters are written in one go, each stroke beginning where
    the one before ended, and some of these are closed. A letter with fewer strokes repeats its last.

    Raises:
        ValueError: no class.
    """
    require_at_least(1, classes=classes)
    found = []
    for k in range(classes):
        g = generator(ALPHABET + k)
        count = 2 + int(torch.randint(0, STROKES - 1, (), generator=g))
        points = 2 * torch.rand(count, 3, 2, generator=g) - 1
        joined, closed = torch.rand(2, generator=g) < torch.tensor([0.7, 0.4])
        if joined:
            points[1:, 0] = points[:-1, 2]
        if joined and closed:
            points[-1, 2] = points[0, 0]
        low, high = points.flatten(0, 1).amin(0), points.flatten(0, 1).amax(0)
        points = (2 * points - low - high) / (high - low).clamp_min(0.5)  # the letter fills its box
        found.append(torch.cat([points, points[-1:].expand(STROKES - count, -1, -1)]))
    return torch.stack(found)


def class_waves(classes: int) -> Float[Tensor, "classes 3"]:
    """Frequency (periods over the image), orientation (radians) and kind (0 wave, 1 plaid, 2 rings) of each texture.

    Raises:
        ValueError: no class.
    """
    require_at_least(1, classes=classes)
    k = torch.arange(classes) // 4  # every fourth class is a texture; k counts them
    return torch.stack([1.5 + 0.75 * (k // 3 % 6), math.pi * ((k // 18) / 4 + 0.1), k % 3], dim=1).float()


def draw_glyphs(
    n: int,
    *,
    seed: int,
    classes: int = 128,
    size: int = 16,
    coloured: float = 0.0,
    device: torch.device | str = "cpu",
) -> tuple[Float[Tensor, "n 3 size size"], Int[Tensor, " n"]]:
    """``n`` images between 0 and 1 with their classes, reproducible from ``seed``.

    A share ``coloured`` of them has an ink and a paper of random colour, which say nothing about the class; the others
    are grey, light on dark.

    Raises:
        ValueError: no image, fewer than 4 classes or more than 288, a size outside 8 … 64, or a share outside 0 … 1.
    """
    require_at_least(1, n=n)
    require_between(0, 1, coloured=coloured)
    require_between(4, 288, classes=classes)
    require_between(8, 64, size=size)
    g = generator(seed)
    labels = torch.randint(classes, (n,), generator=g)
    tremble = torch.randn(n, STROKES, 3, 2, generator=g)
    uniform = torch.rand(n, 10, generator=g)
    noise = torch.randn(n, 1, size, size, generator=g)
    inks = torch.rand(n, 2, 3, 1, 1, generator=g)
    inks[torch.rand(n, generator=g) >= coloured] = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)
    labels, tremble, uniform, noise, inks = (t.to(device) for t in (labels, tremble, uniform, noise, inks))
    grid = _grid(uniform, size)
    lines = class_strokes(classes).to(device)[labels] + 0.08 * tremble
    ink = _ink(grid, lines, 0.10 + 0.10 * uniform[:, 5])
    waves = _waves(grid, class_waves(classes).to(device)[labels], 2 * math.pi * uniform[:, 6])
    picture = torch.where((labels % 4 == 3)[:, None, None], waves, ink)
    contrast, floor = 0.6 + 0.4 * uniform[:, 7, None, None], 0.15 * uniform[:, 8, None, None]
    share = (floor + contrast * (1 - floor) * picture)[:, None]
    picture = (1 - share) * inks[:, 0] + share * inks[:, 1] + (0.02 + 0.06 * uniform[:, 9, None, None, None]) * noise
    return picture.clamp(0, 1), labels


def _grid(uniform: Float[Tensor, "n 10"], size: int) -> Float[Tensor, "n size size 2"]:
    """Where each pixel lies on the undistorted page: the inverse of a turn, a shear, a scale and a shift."""
    signed = 2 * uniform - 1
    turn, shear, scale = 0.3 * signed[:, 0], 0.25 * signed[:, 1], 0.66 * 1.2 ** signed[:, 2]
    shift = 0.15 * signed[:, 3:5]
    axis = (torch.arange(size, device=uniform.device) + 0.5) * 2 / size - 1
    page = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1) - shift[:, None, None]
    cos, sin = turn.cos() / scale, turn.sin() / scale
    rows = torch.stack([cos, sin + shear * cos, -sin, cos - shear * sin], dim=1).view(-1, 2, 2)
    return torch.einsum("nij,nyxj->nyxi", rows, page)


def _ink(
    grid: Float[Tensor, "n h w 2"], lines: Float[Tensor, "n strokes 3 2"], pen: Float[Tensor, " n"]
) -> Float[Tensor, "n h w"]:
    """1 within ``pen`` of a stroke, falling to 0 over one pixel: the distance to the segments of sampled curves."""
    t = torch.linspace(0, 1, POINTS, device=grid.device)
    basis = torch.stack([(1 - t) ** 2, 2 * t * (1 - t), t**2], dim=1)
    curve = torch.einsum("tk,nskc->nstc", basis, lines)
    start, along = curve[:, :, :-1].flatten(1, 2), curve.diff(dim=2).flatten(1, 2)
    length = along.square().sum(-1).clamp_min(1e-9)
    # |p - a - u (b - a)|² with u clamped to the segment, from dot products: no (pixels, segments, 2) tensor is needed
    flat = grid.flatten(1, 2)
    away = torch.baddbmm((start * along).sum(-1)[:, None], flat, along.mT, beta=-1)
    u = (away / length[:, None]).clamp(0, 1)
    square = flat.square().sum(-1, keepdim=True) - 2 * flat @ start.mT + start.square().sum(-1)[:, None]
    square = square - 2 * u * away + u.square() * length[:, None]
    distance = square.clamp_min(0).sqrt().amin(-1).view(grid.shape[:3])
    soft = 2 / grid.shape[1]
    return (0.5 + (pen[:, None, None] - distance) / soft).clamp(0, 1)


def _waves(
    grid: Float[Tensor, "n h w 2"], kind: Float[Tensor, "n 3"], phase: Float[Tensor, " n"]
) -> Float[Tensor, "n h w"]:
    """A plane wave, the product of two that cross at a right angle, or rings around a point beside the centre."""
    frequency, angle, which = (column[:, None, None] for column in kind.T)
    x, y = grid.unbind(-1)
    phase = phase[:, None, None]
    along, across = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
    wave = (math.pi * frequency * along + phase).cos()
    plaid = wave * (math.pi * frequency * across + phase).cos()
    centre = 0.5 * angle.cos(), 0.5 * angle.sin()
    rings = (math.pi * frequency * torch.hypot(x - centre[0], y - centre[1]) + phase).cos()
    return 0.5 + 0.5 * torch.where(which == 0, wave, torch.where(which == 1, plaid, rings))
