"""Questions about scenes, with answers that a model cannot guess: each is given as often as any other."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import product

from paperlab.checks import require_nonempty, require_nonnegative, require_one_of
from paperlab.data import lexicon
from paperlab.data.scenes.layout import COLOURS, DIRECTIONS, FAVOURITE, PARTNER, SHAPES, Object, Scenes, directions
from paperlab.data.scenes.wording import OPPOSITE, RELATIONS, Pairs, called, pairs_of, plural, with_article
from paperlab.data.skills.example import Draft, Example

KINDS = ("exists", "colour", "shape", "size", "where", "relation", "count")  # and "went", where there is a later frame
WHERE = {"left": "left", "right": "right", "above": "top", "below": "bottom"}
WENT = {"left": "left", "right": "right", "above": "up", "below": "down"}
Options = dict[str, list[tuple[str, dict]]]  # answer to questions, each with its truth


def questions(
    scenes: Scenes,
    *,
    seed: int,
    kinds: Sequence[str] | None = None,
    later: Scenes | None = None,
    shapes: Sequence[str] = SHAPES,
    colours: Sequence[str] = COLOURS,
) -> list[Example]:
    """One question about each scene: ``Is there a red circle?`` → `` yes``.

    The kind is drawn evenly among those that a scene allows, then the answer: of those that it allows, the one that
    was given least often to that kind so far. So yes and no are equally frequent, and colours, shapes and places as
    nearly as the scenes let them. (High numbers are rare: few scenes have them.)

    - ``exists``: ``Is there a circle?``, ``Is there a red circle?`` What is absent is drawn evenly from all that is, or
      in one half of the cases from pairs whose colour or shape is there.
    - ``colour``: ``What colour is the circle?`` · ``shape``: ``Which shape is red?``, both of what there is one of
    - ``size``: ``Is the red circle big or small?``
    - ``where``: ``Where is the red circle?`` → left, right, top or bottom
    - ``relation``: ``Is the red circle left of the blue square?``; where it is not, it is right of it
    - ``count``: ``How many shapes are there?``, ``How many circles …``, ``How many red shapes …`` → zero to five
    - ``went``: ``Where did the red circle go?`` → left, right, up or down, from ``scenes`` to ``later``

    Args:
        scenes: what is asked about; for ``went``, the first frame.
        seed: of all that is drawn.
        kinds: of `KINDS`, or "went"; all that can be asked by default.
        later: the same objects in the last frame (`paperlab.data.scenes.move`).
        shapes: what may be asked for though it is not there.
        colours: likewise.

    Truth: ``kind``; ``objects`` asked about; ``exists`` has ``asked`` (colour or None, shape) and ``usual``: whether
    the bias of `paperlab.data.scenes.layout` would put what is asked for beside what is there (for a shape: its partner
    is there; for a pair: the shape is there, and the colour is its favourite); ``relation`` has ``relation`` as asked;
    ``count`` has ``asked`` (colour or None, shape or None).

    Raises:
        ValueError: ``seed`` negative, a kind that does not exist or needs ``later``, scenes that allow none of the
            kinds, or ``later`` of another number of scenes.
    """
    require_nonnegative(seed=seed)
    known = KINDS if later is None else (*KINDS, "went")
    kinds = known if kinds is None else kinds
    require_nonempty(kinds=kinds)
    for kind in kinds:
        require_one_of(known, kinds=kind)
    if later is not None and len(later) != len(scenes):
        raise ValueError(f"later must have as many scenes as scenes, {len(scenes)}, got {len(later)}")
    went = directions(later.centre - scenes.centre).tolist() if later is not None else [None] * len(scenes)
    rng, given = random.Random(seed), {kind: Counter() for kind in kinds}
    ask: dict[str, Callable[..., Options]] = {
        "exists": lambda things, i: _exists(things, list(shapes), list(colours), rng),
        "colour": lambda things, i: _attribute(things, "shape", "colour", "What colour is the {}?"),
        "shape": lambda things, i: _attribute(things, "colour", "shape", "Which shape is {}?"),
        "size": lambda things, i: _each(things, "Is the {} big or small?", [thing.size for thing in things]),
        "where": lambda things, i: _each(things, "Where is the {}?", [WHERE.get(thing.place) for thing in things]),
        "relation": lambda things, i: _related(things, pairs[i]),
        "count": lambda things, i: _count(things, list(shapes), list(colours)),
        "went": lambda things, i: _each(
            things, "Where did the {} go?", [WENT[DIRECTIONS[d]] if d >= 0 else None for d in went[i][: len(things)]]
        ),
    }
    pairs = pairs_of(scenes)
    found = []
    for i, things in enumerate(scenes.objects()):
        for kind in rng.sample(kinds, len(kinds)):
            options = ask[kind](things, i)
            if options:
                break
        else:
            raise ValueError(f"kinds must hold one that each scene allows, but scene {i} allows none of {kinds}")
        answer = min(options, key=lambda a: (given[kind][a], rng.random()))
        given[kind][answer] += 1
        prompt, truth = rng.choice(options[answer])
        found.append(Draft(kind).put(prompt).ask(" " + answer).done(kind=kind, **truth))
    return found


def _exists(things: list[Object], shapes: list[str], colours: list[str], rng: random.Random) -> Options:
    there = {thing.shape for thing in things}
    options: Options = {"yes": [], "no": []}
    if rng.random() < 0.5:
        for shape in dict.fromkeys(shapes + sorted(there)):
            truth = {
                "asked": (None, shape),
                "objects": [i for i, thing in enumerate(things) if thing.shape == shape],
                "usual": PARTNER[shape] in there,
            }
            options["yes" if shape in there else "no"].append((f"Is there {with_article(shape)}?", truth))
    else:
        pairs = {(thing.colour, thing.shape): i for i, thing in enumerate(things)}
        absent = [pair for pair in product(colours, shapes) if pair not in pairs]
        if rng.random() < 0.5:
            seen = {thing.colour for thing in things}
            absent = [(c, s) for c, s in absent if c in seen or s in there] or absent
        for colour, shape in [*pairs, *absent]:
            objects = [pairs[colour, shape]] if (colour, shape) in pairs else []
            usual = shape in there and FAVOURITE[shape] == colour
            truth = {"asked": (colour, shape), "objects": objects, "usual": usual}
            options["yes" if objects else "no"].append((f"Is there {with_article(colour)} {shape}?", truth))
    return {answer: some for answer, some in options.items() if some}


def _attribute(things: list[Object], known: str, wanted: str, text: str) -> Options:
    """Ask for one attribute of what is the only one with the other."""
    often = Counter(getattr(thing, known) for thing in things)
    options: Options = {}
    for i, thing in enumerate(things):
        if often[getattr(thing, known)] == 1:
            options.setdefault(getattr(thing, wanted), []).append(
                (text.format(getattr(thing, known)), {"objects": [i]})
            )
    return options


def _each(things: list[Object], text: str, answers: Sequence[str | None]) -> Options:
    options: Options = {}
    for i, (thing, answer) in enumerate(zip(things, answers, strict=True)):
        if answer:
            options.setdefault(answer, []).append((text.format(called(thing)), {"objects": [i]}))
    return options


def _related(things: list[Object], pairs: Pairs) -> Options:
    options: Options = {"yes": [], "no": []}
    for (a, b), way in pairs.items():
        for answer, said in (("yes", way), ("no", OPPOSITE[way])):
            text = f"Is the {called(things[a])} {RELATIONS[said]} the {called(things[b])}?"
            options[answer].append((text, {"objects": [a, b], "relation": said}))
    return options if pairs else {}


def _count(things: list[Object], shapes: list[str], colours: list[str]) -> Options:
    options: Options = {}
    asked = [(None, None), *((None, s) for s in shapes), *((c, None) for c in colours)]
    for colour, shape in asked:
        objects = [i for i, t in enumerate(things) if colour in (None, t.colour) and shape in (None, t.shape)]
        what = plural(shape) if shape else f"{colour} shapes" if colour else "shapes"
        truth = {"asked": (colour, shape), "objects": objects}
        options.setdefault(lexicon.NUMBERS[len(objects)], []).append((f"How many {what} are there?", truth))
    return options
