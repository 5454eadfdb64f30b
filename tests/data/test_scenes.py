"""Scenes against plane geometry, Matplotlib's polygons, and a reader who knows only the objects' coordinates."""

import math
import re
from collections import Counter

import numpy as np
import pytest
import torch
from matplotlib.path import Path

from paperlab.data import scenes as lib
from paperlab.data.scenes import (
    COLOURS,
    FAVOURITE,
    KINDS,
    MARGIN,
    PARTNER,
    SHAPES,
    Scenes,
    boxes,
    captions,
    draw_scenes,
    front,
    masks,
    move,
    questions,
    referring,
    render,
)

NUMBERS = ["zero", "one", "two", "three", "four", "five"]
MANY = draw_scenes(1500, seed=5, objects=(1, 4))
THINGS = MANY.objects()


def one(shape, *, centre=(0.5, 0.5), radius=0.3, turn=0.0, velocity=(0.0, 0.0)):
    """A scene of one white object on black."""
    number = lambda value: torch.tensor([[value]])  # noqa: E731
    return Scenes(
        shape=number(SHAPES.index(shape)),
        colour=number(COLOURS.index("white")),
        size=number(1),
        centre=torch.tensor([[centre]]),
        radius=number(radius),
        turn=number(turn),
        velocity=torch.tensor([[velocity]]),
        tint=torch.zeros(1, 1, 3),
        ground=torch.zeros(1),
    )


def polygon(shape):
    """The corners of a shape in its disc of radius 1, going round; y downwards."""
    if shape == "triangle":
        return [(math.cos(a), math.sin(a)) for a in np.deg2rad([-90, 30, 150])]
    if shape == "square":
        return [(math.cos(a), math.sin(a)) for a in np.deg2rad([45, 135, 225, 315])]
    a = math.asin(0.35) if shape == "bar" else math.asin(0.3)
    if shape == "bar":
        return [(math.cos(b), math.sin(b)) for b in (a, math.pi - a, math.pi + a, -a)]
    quarter = [(math.cos(a), -0.3), (math.cos(a), 0.3), (0.3, 0.3)]
    found, corner = [], np.array(quarter)
    for _ in range(4):
        found.extend(corner.tolist())
        corner = corner @ np.array([[0, 1], [-1, 0]])  # a quarter turn
    return found


def shoelace(corners):
    x, y = np.array(corners).T
    return abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2


# Pixels


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("turn", [0.0, 0.4])
def test_areas_are_those_of_plane_geometry(shape, turn):
    area = {"circle": math.pi, "ring": math.pi * (1 - 0.45**2)}.get(shape) or shoelace(polygon(shape))
    scene = one(shape, turn=turn, centre=(0.47, 0.53))
    assert masks(scene, 256).float().mean().item() == pytest.approx(area * 0.3**2, rel=0.01)
    for size, slack in ((16, 0.06), (32, 0.03), (128, 0.01)):  # white on black: the mean is the covered share
        assert render(scene, size).mean().item() == pytest.approx(area * 0.3**2, rel=slack)


@pytest.mark.parametrize("shape", ["square", "triangle", "cross", "bar"])
@pytest.mark.parametrize("turn", [0.0, 0.7])
def test_masks_are_the_polygons_of_matplotlib(shape, turn):
    rotation = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])  # of rows
    path = Path(np.array(polygon(shape)) @ rotation * 0.3 + (0.4, 0.55))
    axis = (np.arange(64) + 0.5) / 64
    points = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    expected = path.contains_points(points).reshape(64, 64)
    found = masks(one(shape, centre=(0.4, 0.55), turn=turn), 64)[0, 0].numpy()
    assert (found != expected).sum() <= 1


@pytest.mark.parametrize("turn", [0.0, 0.5])
def test_boxes_touch_the_masks_on_all_sides(turn):
    scenes = draw_scenes(40, seed=1, objects=(1, 3), turn=turn)
    found = boxes(scenes)
    whole = masks(scenes, 512, hidden=True)
    for i, j in scenes.present.nonzero().tolist():
        y, x = whole[i, j].nonzero(as_tuple=True)
        seen = torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1]) / 512
        assert (found[i, j] - seen).abs().max() < 0.008  # a tip narrower than a pixel may be missed
    assert (found[~scenes.present] == 0).all()


def test_pixels_inside_a_mask_have_the_objects_colour_and_others_the_grounds():
    scenes = MANY[:200]
    image, seen = render(scenes, 48), front(scenes, 48)
    same = torch.nn.functional.pad(seen[:, None].float(), (1, 1, 1, 1), value=-1, mode="constant").unfold(2, 3, 1)
    same = same.unfold(3, 3, 1)[:, 0].flatten(3)
    inner = (same == seen[..., None]).all(-1)  # the neighbours belong to the same thing
    colour = (lib.PALETTE[scenes.colour.clamp_min(0)] + scenes.tint).clamp(0, 1)
    for i in range(200):
        for j in range(len(THINGS[i])):
            pixels = image[i][:, inner[i] & (seen[i] == j)]
            if pixels.numel():
                assert (pixels - colour[i, j, :, None]).abs().amax(0).float().median() < 1e-5
        ground = image[i][:, inner[i] & (seen[i] == -1)]
        assert ((ground - scenes.ground[i]).abs() < 1e-5).float().mean() > 0.99  # but for tips narrower than a pixel


def test_masks_divide_the_picture_and_hide_little():
    seen, whole = masks(MANY, 32), masks(MANY, 32, hidden=True)
    assert (seen.sum(1) <= 1).all()
    assert torch.equal(seen.any(1), whole.any(1))
    assert not (seen & ~whole).any()
    for i in range(len(MANY)):  # the last one is in front
        assert torch.equal(seen[i, len(THINGS[i]) - 1], whole[i, len(THINGS[i]) - 1])
    crowded = draw_scenes(300, seed=2, objects=(5, 5), sizes=["big"], scale=0.95)
    seen, whole = masks(crowded, 128), masks(crowded, 128, hidden=True)
    hidden = 1 - seen.sum((2, 3)) / whole.sum((2, 3))
    pairs = (whole[:, :, None] & whole[:, None]).sum((3, 4)) / whole.sum((2, 3))[..., None]
    pairs.diagonal(dim1=1, dim2=2).zero_()
    assert 0.02 < pairs.max() <= 0.125
    assert hidden.max() <= 4 * 0.12


def test_a_palette_can_be_replaced():
    grey = render(one("circle"), 16, palette=torch.full((8, 3), 0.5))
    assert grey[0, :, 8, 8].tolist() == [0.5] * 3


@pytest.mark.gpu
def test_cuda_draws_what_the_cpu_draws():
    device = torch.accelerator.current_accelerator()
    scenes = MANY[:64].to(device)
    torch.testing.assert_close(render(scenes).cpu(), render(MANY[:64]), atol=1e-4, rtol=0)
    torch.testing.assert_close(boxes(move(scenes, 3)).cpu(), boxes(move(MANY[:64], 3)))


# What stands where


def test_scenes_repeat_from_their_seed_and_keep_their_promises():
    again = draw_scenes(1500, seed=5, objects=(1, 4))
    assert torch.equal(render(MANY[:50], 16), render(again[:50], 16))
    assert not torch.equal(MANY.centre, draw_scenes(1500, seed=6, objects=(1, 4)).centre)
    counts = Counter(len(things) for things in THINGS)
    assert set(counts) == {1, 2, 3, 4}
    assert max(abs(count / 1500 - 0.25) for count in counts.values()) < 0.05
    for things in THINGS:
        assert len({(t.shape, t.colour) for t in things}) == len(things)
        for t in things:
            assert all(t.radius <= c <= 1 - t.radius for c in t.centre)
            assert (t.size == "big") == (t.radius > 0.15)


@pytest.mark.parametrize("bias", [0.0, 0.6, 1.0])
def test_bias_is_the_documented_one(bias):
    things = draw_scenes(4000, seed=3, objects=(2, 2), bias=bias).objects()
    slack = 4 * 0.5 / math.sqrt(4000)
    favourite = np.mean([FAVOURITE[a.shape] == a.colour for a, _ in things])
    assert favourite == pytest.approx(bias + (1 - bias) / 8, abs=slack)
    together = np.mean([PARTNER[a.shape] == b.shape for a, b in things])
    repeats = (1 - bias) / 6 * (bias + (1 - bias) / 8)  # what is left out, at most
    assert together == pytest.approx(bias + (1 - bias) / 6, abs=slack + repeats)
    shapes = Counter(a.shape for a, _ in things)
    assert max(abs(count / 4000 - 1 / 6) for count in shapes.values()) < 0.03  # the first shape is always even


def test_partners_are_mutual_and_favourites_differ():
    assert all(PARTNER[PARTNER[shape]] == shape != PARTNER[shape] for shape in SHAPES)
    assert len(set(FAVOURITE.values())) == len(SHAPES)


def test_restricted_kinds():
    scenes = draw_scenes(
        300, seed=0, objects=(1, 2), bias=0.9, shapes=["circle", "ring"], colours=["red", "blue"],
        without=[("red", "circle")], sizes=["small"],
    )  # fmt: skip
    kinds = {(t.colour, t.shape, t.size) for things in scenes.objects() for t in things}
    assert kinds == {("blue", "circle", "small"), ("red", "ring", "small"), ("blue", "ring", "small")}
    assert scenes[3].objects() == [scenes.objects()[3]]
    assert len(scenes[10:20]) == 10


def test_motion_is_what_small_steps_and_a_wall_make():
    scenes, frames = draw_scenes(40, seed=4, objects=(1, 2), speed=0.15), 12
    film = move(scenes, frames)
    assert len(film) == 40 * frames
    assert torch.equal(film.centre[::frames], scenes.centre)
    x, v, r = scenes.centre.double().clone(), scenes.velocity.double().clone(), scenes.radius.double()[..., None]
    speed = v.norm(dim=-1)[scenes.present]
    assert speed.min() >= 0.075 - 1e-6
    assert speed.max() <= 0.225 + 1e-6
    for t in range(frames):
        now = film[torch.arange(40) * frames + t]
        there = scenes.present
        assert (now.centre[there].double() - x[there]).abs().max() < 5e-3  # a bounce is late by up to a step
        assert torch.equal(now.colour, scenes.colour)
        assert (now.velocity[there] - v[there]).abs().max(-1).values.gt(1e-6).float().mean() < 0.05  # but at a bounce
        for _ in range(400):
            x = x + v / 400
            v = torch.where((x < r) & (v < 0) | (x > 1 - r) & (v > 0), -v, v)


# What is said: a reader that parses the text and looks at the coordinates


def side(a, b):
    """Where point a lies from point b, if that is clear."""
    dx, dy = a[0] - b[0], a[1] - b[1]
    clear = abs(abs(dx) - abs(dy)) >= MARGIN - 1e-6
    if not clear:
        return None
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "above" if dy < 0 else "below"


def match(things, phrase):
    """Indices of what a noun phrase without its article describes."""
    words = phrase.split()
    found = []
    for i, t in enumerate(things):
        noun = words[-1]
        right = noun in ("shape", "shapes", t.shape, t.shape + "s", t.shape + "es")
        if right and all(w in (t.colour, t.size) for w in words[:-1]):
            found.append(i)
    return found


def test_relations_and_places_are_clear():
    found, places = lib.relations(MANY).tolist(), lib.places(MANY)
    names = {-1: None, 0: "left", 1: "right", 2: "above", 3: "below"}
    for i, things in enumerate(THINGS):
        for a, s in enumerate(things):
            assert s.place == names[int(places[i, a])] == side(s.centre, (0.5, 0.5))
            for b, t in enumerate(things):
                assert names[found[i][a][b]] == side(s.centre, t.centre)
    assert (places[~MANY.present] == -1).all()


def test_captions_name_everything_and_are_true():
    found = captions(MANY, seed=0)
    assert {e.truth["template"] for e in found} == set(lib.TEMPLATES)
    where = {"on the left": "left", "on the right": "right", "at the top": "above", "at the bottom": "below"}
    for things, e in zip(THINGS, found, strict=True):
        assert e.prompt == "Picture:"
        text = e.answer.removeprefix(" ").removesuffix(".").removeprefix("there is ")
        pieces = re.split(r", with | left of | right of | above | below | and |, ", text)
        seen = []
        for piece in pieces:
            article, phrase, place = re.fullmatch(r"(an?) (.+?)((?: on| at) the \w+)?", piece).groups()
            assert article == ("an" if phrase[0] in "aeiou" else "a")
            (i,) = match(things, phrase)
            seen.append(i)
            if place:
                assert side(things[i].centre, (0.5, 0.5)) == where[place.strip()]
            assert (phrase.split()[0] in ("small", "big")) == (e.truth["template"] == "sizes")
        assert sorted(seen) == list(range(len(things)))
        assert seen == e.truth["objects"]
        said = re.search(r"(left|right)(?= of)|above|below", text)
        assert bool(said) == (e.truth["relation"] is not None) == (e.truth["template"] == "relation")
        if said:
            assert side(things[seen[0]].centre, things[seen[1]].centre) == said.group()
        for i, t in enumerate(things):
            for name in ("shape", "colour"):
                start, end = e.truth["spans"][f"{name} {i}"]
                assert e.text[start:end] == getattr(t, name)


def answer_of(things, later, text):
    """The answer by looking at all objects."""
    if m := re.fullmatch(r"Is there an? (.+)\?", text):
        return "yes" if match(things, m[1]) else "no"
    if m := re.fullmatch(r"What colour is the (.+)\?", text):
        (i,) = match(things, m[1])
        return things[i].colour
    if m := re.fullmatch(r"Which shape is (\w+)\?", text):
        (i,) = match(things, m[1] + " shape")
        return things[i].shape
    if m := re.fullmatch(r"Is the (.+) big or small\?", text):
        (i,) = match(things, m[1])
        return things[i].size
    if m := re.fullmatch(r"Where is the (.+)\?", text):
        (i,) = match(things, m[1])
        return {"left": "left", "right": "right", "above": "top", "below": "bottom"}[side(things[i].centre, (0.5, 0.5))]
    if m := re.fullmatch(r"Is the (.+) (left of|right of|above|below) the (.+)\?", text):
        (i,), (j,) = match(things, m[1]), match(things, m[3])
        way = side(things[i].centre, things[j].centre)
        assert {way, m[2].split()[0]} <= {"left", "right"} or {way, m[2]} <= {"above", "below"}
        return "yes" if way == m[2].split()[0] else "no"
    if m := re.fullmatch(r"How many (.+) are there\?", text):
        return NUMBERS[len(match(things, m[1]))]
    m = re.fullmatch(r"Where did the (.+) go\?", text)
    (i,) = match(things, m[1])
    return {"left": "left", "right": "right", "above": "up", "below": "down"}[side(later[i].centre, things[i].centre)]


def test_answers_are_true_and_balanced():
    scenes = draw_scenes(3000, seed=7, objects=(1, 4), speed=0.04)
    last = move(scenes, 8)[7::8]
    found = questions(scenes, seed=0, later=last)
    for things, later, e in zip(scenes.objects(), last.objects(), found, strict=True):
        assert e.answer == " " + answer_of(things, later, e.prompt)
        if e.skill == "exists":
            colour, shape = e.truth["asked"]
            there = {t.shape for t in things}
            usual = shape in there and FAVOURITE[shape] == colour if colour else PARTNER[shape] in there
            assert e.truth["usual"] == usual
    given = {kind: Counter(e.answer for e in found if e.skill == kind) for kind in (*KINDS, "went")}
    for kind, answers in given.items():
        least = {"exists": 2, "relation": 2, "size": 2, "colour": 8, "shape": 6, "where": 4, "went": 4, "count": 5}[
            kind
        ]
        assert len(answers) == least
        assert min(answers.values()) > 0.85 * max(answers.values()) - 2
    assert questions(scenes[:100], seed=0, later=last[:100]) == found[:100]
    assert questions(scenes[:100], seed=1, later=last[:100]) != found[:100]


def test_bias_shows_in_what_is_true_of_usual_questions():
    def yes(bias):
        scenes = draw_scenes(3000, seed=1, objects=(2, 3), bias=bias)
        found = [e for e in questions(scenes, seed=0, kinds=["exists"]) if e.truth["usual"]]
        return np.mean([e.answer == " yes" for e in found])

    assert yes(0.9) > yes(0.0) + 0.2


def test_what_is_pointed_at_is_what_the_phrase_means():
    found = referring(MANY, seed=0)
    kinds = Counter()
    for things, e in zip(THINGS, found, strict=True):
        start, end = e.truth["spans"]["phrase"]
        phrase = e.text[start:end].removeprefix("the ")
        assert e.text == f"Find the {phrase}."
        if m := re.fullmatch(r"(.+?) (left of|right of|above|below) the (.+)", phrase):
            (other,) = match(things, m[3])
            same = [i for i in match(things, m[1]) if i != other]
            ways = {i: side(things[i].centre, things[other].centre) for i in same}
            assert None not in ways.values()
            meant = [i for i in same if ways[i] == m[2].split()[0]]
        else:
            meant = match(things, phrase)
        assert e.truth["objects"] == meant
        kinds[min(len(meant), 2)] += 1
        assert e.answer == ""
    assert kinds[0] / 1500 == pytest.approx(0.2, abs=0.05)
    assert kinds[2] > 100
    assert all(len(e.truth["objects"]) == 1 for e in referring(MANY, seed=0, absent=0, several=0))


def test_the_language_is_closed():
    last = move(draw_scenes(1500, seed=5, objects=(1, 4), speed=0.05), 8)[7::8]
    examples = captions(MANY, seed=1) + questions(MANY, seed=1, later=last) + referring(MANY, seed=1)
    used = {word for e in examples for word in re.findall(r"\w+", e.text)}
    assert used <= set(lib.words())
    assert set(lib.words()) - used <= {"five"}


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: draw_scenes(0, seed=0), "n must"),
        (lambda: draw_scenes(1, seed=-1), "seed"),
        (lambda: draw_scenes(1, seed=0, objects=(2, 1)), "objects"),
        (lambda: draw_scenes(1, seed=0, objects=(0, 1)), "objects"),
        (lambda: draw_scenes(1, seed=0, bias=1.5), "bias"),
        (lambda: draw_scenes(1, seed=0, bias=float("nan")), "bias"),
        (lambda: draw_scenes(1, seed=0, shapes=["moon"]), "shapes"),
        (lambda: draw_scenes(1, seed=0, colours=[]), "colours"),
        (lambda: draw_scenes(1, seed=0, sizes=["huge"]), "sizes"),
        (lambda: draw_scenes(1, seed=0, without=[("circle", "red")]), "without"),
        (lambda: draw_scenes(1, seed=0, objects=(1, 2), shapes=["ring"], colours=["red"]), "objects"),
        (lambda: draw_scenes(4, seed=0, objects=(5, 5), scale=2), "objects must fit"),
        (lambda: draw_scenes(1, seed=0, scale=9), "scale"),
        (lambda: draw_scenes(1, seed=0, turn=float("inf")), "turn"),
        (lambda: draw_scenes(1, seed=0, speed=-1), "speed"),
        (lambda: move(MANY[:1], 0), "frames"),
        (lambda: render(MANY[:1], 4), "size"),
        (lambda: render(MANY[:1], palette=torch.zeros(2, 3)), "palette"),
        (lambda: masks(MANY[:1], 4), "size"),
        (lambda: front(MANY[:1], 4), "size"),
        (lambda: captions(MANY[:1], seed=-1), "seed"),
        (lambda: captions(MANY[:1], seed=0, templates=["poem"]), "templates"),
        (lambda: questions(MANY[:1], seed=0, kinds=["went"]), "kinds"),
        (lambda: questions(one("ring"), seed=0, kinds=["relation"]), "kinds"),
        (lambda: questions(MANY[:2], seed=0, later=MANY[:1]), "later"),
        (lambda: referring(MANY[:1], seed=0, absent=0.7, several=0.7), "absent"),
    ],
)
def test_bad_input_names_the_argument(call, name):
    with pytest.raises(ValueError, match=name):
        call()
