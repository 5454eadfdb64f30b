r"""What stands where in a scene, drawn for a whole batch at once, and how its objects lie to each other.

The picture is the unit square, x to the right and y *downwards*; a shape lies within the disc of its radius. Discs
overlap by less than a fifth of the smaller radius (`CLOSE`), so that one object hides at most 12% of another; no two
objects of a scene agree in both shape and colour, so that "the red circle" is one object.

*Bias.* With probability ``bias`` an object has its shape's `FAVOURITE` colour, and with the same probability the second
of a pair of objects (the 2nd, the 4th …) is the `PARTNER` shape of the one before it; otherwise both are even. So the
first object has its favourite colour with probability $b + (1-b)/8$, and the second is the first one's partner with
probability $b + (1-b)/6$, up to the objects that are left out because they are there already. ``bias=0`` removes it.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from paperlab.checks import require_at_least, require_between, require_finite, require_nonempty, require_one_of
from paperlab.devices import generator

SHAPES = ("circle", "square", "triangle", "cross", "ring", "bar")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
SIZES = ("small", "big")
PARTNER = {
    "circle": "square",
    "square": "circle",
    "triangle": "cross",
    "cross": "triangle",
    "ring": "bar",
    "bar": "ring",
}
FAVOURITE = {
    "circle": "red",
    "square": "blue",
    "triangle": "yellow",
    "cross": "green",
    "ring": "purple",
    "bar": "orange",
}
RADII = (0.12, 0.18)  # of the small and the big ones, each ± 6%
DIRECTIONS = ("left", "right", "above", "below")
MARGIN = 0.1  # of the picture's side: by how much one direction must exceed the other before it is called by its name
CLOSE = 0.19
MOST = 5  # objects in a scene
TRIES, ROUNDS = 8, 300


class Object(NamedTuple):
    """One object in words and numbers: its centre (x, y) and radius, and where in the picture it stands, if clear."""

    shape: str
    colour: str
    size: str
    centre: tuple[float, float]
    radius: float
    place: str | None


@dataclass(frozen=True)
class Scenes:
    """``n`` scenes of up to ``most`` objects, from the back to the front; −1 in the first three where there is none.

    ``tint`` is added to the palette's colour, ``ground`` is the grey of the background, ``turn`` is in radians and
    ``velocity`` in picture sides a frame. Indexing with a number, a slice or a tensor gives fewer scenes.
    """

    shape: Int[Tensor, "n most"]
    colour: Int[Tensor, "n most"]
    size: Int[Tensor, "n most"]
    centre: Float[Tensor, "n most 2"]
    radius: Float[Tensor, "n most"]
    turn: Float[Tensor, "n most"]
    velocity: Float[Tensor, "n most 2"]
    tint: Float[Tensor, "n most 3"]
    ground: Float[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.ground)

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> "Scenes":
        rows = torch.arange(len(self), device=self.ground.device)[index].reshape(-1)
        return Scenes(*(getattr(self, f.name)[rows] for f in fields(self)))

    def to(self, device: torch.device | str) -> "Scenes":
        """The same scenes on a device."""
        return Scenes(*(getattr(self, f.name).to(device) for f in fields(self)))

    @property
    def present(self) -> Bool[Tensor, "n most"]:
        """Where there is an object; they come first in every row."""
        return self.shape >= 0

    def objects(self) -> list[list[Object]]:
        """The objects of each scene in words, from the back to the front."""
        columns = (self.shape, self.colour, self.size, self.centre, self.radius, places(self))
        found = []
        for row in zip(*(column.tolist() for column in columns), strict=True):
            named = []
            for shape, colour, size, centre, radius, place in zip(*row, strict=True):
                if shape >= 0:
                    where = DIRECTIONS[place] if place >= 0 else None
                    named.append(Object(SHAPES[shape], COLOURS[colour], SIZES[size], tuple(centre), radius, where))
            found.append(named)
        return found


def draw_scenes(
    n: int,
    *,
    seed: int,
    objects: tuple[int, int] = (1, 3),
    bias: float = 0.0,
    shapes: Sequence[str] = SHAPES,
    colours: Sequence[str] = COLOURS,
    sizes: Sequence[str] = SIZES,
    without: Collection[tuple[str, str]] = (),
    scale: float = 1.0,
    turn: float = 0.0,
    speed: float = 0.0,
) -> Scenes:
    """``n`` scenes, reproducible from ``seed``; every number of objects is equally frequent.

    Args:
        n: how many scenes.
        seed: of all that is drawn.
        objects: least and most objects in a scene.
        bias: how often colour and company follow the shape (see the module), 0 to 1.
        shapes: the shapes to draw from, of `SHAPES`.
        colours: the colours to draw from, of `COLOURS`.
        sizes: the sizes to draw from, of `SIZES`.
        without: pairs (colour, shape) that never occur.
        scale: all radii are multiplied by it.
        turn: objects are turned by up to so many radians to either side.
        speed: mean speed in picture sides a frame, in a random direction, between half and three halves of it.

    Raises:
        ValueError: ``n`` below 1, ``objects`` not in order within 1 to 5, ``bias`` outside 0 to 1, a name that does not
            exist, fewer allowed kinds than objects, ``scale`` outside 0.3 to 2, ``turn`` or ``speed`` negative or not
            finite, or objects that do not fit the picture.
    """
    require_at_least(1, n=n)
    require_between(1, MOST, objects=objects)
    require_between(0, 1, bias=bias)
    require_between(0.3, 2, scale=scale)
    require_finite(turn=turn, speed=speed)
    require_at_least(0, turn=turn, speed=speed)
    if objects[0] > objects[1]:
        raise ValueError(f"objects must be given as (least, most), got {objects}")
    for name, given, known in (("shapes", shapes, SHAPES), ("colours", colours, COLOURS), ("sizes", sizes, SIZES)):
        require_nonempty(**{name: given})
        for word in given:
            require_one_of(known, **{name: word})
    for colour, shape in without:
        require_one_of(COLOURS, without=colour)
        require_one_of(SHAPES, without=shape)
    g, most = generator(seed), objects[1]
    allowed = torch.zeros(len(SHAPES), len(COLOURS), dtype=torch.bool)
    for shape in shapes:
        for colour in colours:
            allowed[SHAPES.index(shape), COLOURS.index(colour)] = (colour, shape) not in without
    if int(allowed.sum()) < most:
        raise ValueError(f"objects must be at most {int(allowed.sum())} where only so many kinds are allowed")
    absent = torch.arange(most) >= torch.randint(objects[0], most + 1, (n, 1), generator=g)
    shape, colour = _kinds(n, most, allowed, bias, g)
    size = torch.tensor([SIZES.index(s) for s in sizes])[torch.randint(len(sizes), (n, most), generator=g)]
    radius = torch.tensor(RADII)[size] * scale * (0.94 + 0.12 * torch.rand(n, most, generator=g))
    radius = radius.masked_fill(absent, 0.0)
    angle = 2 * torch.pi * torch.rand(n, most, generator=g)
    fast = speed * (0.5 + torch.rand(n, most, generator=g))
    velocity = fast[..., None] * torch.stack([angle.cos(), angle.sin()], -1)
    return Scenes(
        shape=shape.masked_fill(absent, -1),
        colour=colour.masked_fill(absent, -1),
        size=size.masked_fill(absent, -1),
        centre=_centres(radius, absent, g),
        radius=radius,
        turn=(turn * (2 * torch.rand(n, most, generator=g) - 1)).masked_fill(absent, 0.0),
        velocity=velocity.masked_fill(absent[..., None], 0.0),
        tint=0.06 * (2 * torch.rand(n, most, 3, generator=g) - 1),
        ground=0.05 + 0.25 * torch.rand(n, generator=g),
    )


def _kinds(
    n: int, most: int, allowed: Bool[Tensor, "shapes colours"], bias: float, g: torch.Generator
) -> tuple[Int[Tensor, "n most"], Int[Tensor, "n most"]]:
    """Shape and colour of object after object; what a scene has already is left out, and the rest made to sum to 1."""
    even = allowed.any(1) / allowed.any(1).sum()
    partner = torch.zeros(len(SHAPES), len(SHAPES))
    favourite = torch.zeros(allowed.shape)
    for i, shape in enumerate(SHAPES):
        partner[i, SHAPES.index(PARTNER[shape])] = 1
        favourite[i, COLOURS.index(FAVOURITE[shape])] = 1
    lost = ~allowed.any(1)[partner.argmax(1)]
    partner = torch.where(lost[:, None], even, partner)  # without its partner a shape keeps even company
    shades = allowed / allowed.sum(1, keepdim=True).clamp_min(1)
    favourite = torch.where((favourite * allowed).sum(1, keepdim=True) > 0, favourite, shades)
    shades = (1 - bias) * shades + bias * favourite
    free = allowed.flatten().repeat(n, 1)
    kinds: list[Tensor] = []
    for k in range(most):
        share = even.expand(n, -1)
        if k % 2:
            share = (1 - bias) * share + bias * partner[kinds[-1] // len(COLOURS)]
        weight = (share[:, :, None] * shades).flatten(1) * free
        weight = torch.where(weight.sum(1, keepdim=True) > 0, weight, free.float())
        kinds.append(torch.multinomial(weight, 1, generator=g)[:, 0])
        free.scatter_(1, kinds[-1][:, None], False)
    kind = torch.stack(kinds, 1)
    return kind // len(COLOURS), kind % len(COLOURS)


def _centres(
    radius: Float[Tensor, "n most"], absent: Bool[Tensor, "n most"], g: torch.Generator
) -> Float[Tensor, "n most 2"]:
    """Places evenly within the picture, the first of `TRIES` that keeps away; a scene that fails is begun again."""
    n, most = radius.shape
    centre, todo = torch.zeros(n, most, 2), torch.arange(n)
    for _ in range(ROUNDS):
        r, there = radius[todo], torch.zeros(len(todo), most, 2)
        fits = (r <= 0.5).all(1)
        for k in range(most):
            tried = r[:, k, None, None] + torch.rand(len(todo), TRIES, 2, generator=g) * (1 - 2 * r[:, k, None, None])
            away = (tried[:, :, None] - there[:, None, :k]).norm(dim=-1)
            least = r[:, k, None] + r[:, :k] - CLOSE * torch.minimum(r[:, k, None], r[:, :k])
            good = (away >= least[:, None]).all(-1) | absent[todo, k, None]
            there[:, k] = tried[torch.arange(len(todo)), good.int().argmax(1)]
            fits &= good.any(1)
        centre[todo[fits]] = there[fits]
        todo = todo[~fits]
        if not len(todo):
            return centre.masked_fill(absent[..., None], 0.0)
    raise ValueError(f"objects must fit the picture, but {len(todo)} of {n} scenes have no room: fewer or smaller ones")


def directions(offset: Float[Tensor, "*batch 2"]) -> Int[Tensor, "*batch"]:
    """Index in `DIRECTIONS` of an offset (x, y), y downwards; −1 where neither axis exceeds the other by `MARGIN`."""
    x, y = offset.unbind(-1)
    way = torch.where(x.abs() > y.abs(), (x > 0).long(), 2 + (y > 0).long())
    return way.masked_fill((x.abs() - y.abs()).abs() < MARGIN, -1)


def places(scenes: Scenes) -> Int[Tensor, "n most"]:
    """Where each object stands from the middle of the picture, as in `directions`; −1 where there is none."""
    return directions(scenes.centre - 0.5).masked_fill(~scenes.present, -1)


def relations(scenes: Scenes) -> Int[Tensor, "n most most"]:
    """Entry (i, a, b): where object a stands, seen from object b, as in `directions`; −1 also where one is missing."""
    there = scenes.present[:, :, None] & scenes.present[:, None]
    return directions(scenes.centre[:, :, None] - scenes.centre[:, None]).masked_fill(~there, -1)


def move(scenes: Scenes, frames: int) -> Scenes:
    """Every scene at times 0, 1, …: frame t of scene i is row ``i * frames + t``.

    Objects keep their speed and are reflected where their disc meets the picture's edge. They pass in front of each
    other, so that more may be hidden than at the start.

    Raises:
        ValueError: ``frames`` below 1.
    """
    require_at_least(1, frames=frames)
    many = scenes[torch.arange(len(scenes), device=scenes.ground.device).repeat_interleave(frames)]
    t = torch.arange(frames, device=scenes.ground.device).repeat(len(scenes))[:, None, None]
    radius = many.radius[..., None]
    room = 1 - 2 * radius
    path = (many.centre - radius + t * many.velocity) % (2 * room)  # unfolded: there and back again
    back = path > room
    centre = torch.where(back, 2 * room - path, path) + radius
    centre = torch.where(t > 0, centre, many.centre).masked_fill(~many.present[..., None], 0.0)
    velocity = torch.where(back, -many.velocity, many.velocity)
    changed = {"centre": centre, "velocity": velocity}
    return Scenes(*(changed.get(f.name, getattr(many, f.name)) for f in fields(many)))
