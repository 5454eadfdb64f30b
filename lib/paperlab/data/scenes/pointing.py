"""Descriptions to point by: of one object of a scene, of several, or of none."""

import random
from collections import Counter

from paperlab.checks import require_between, require_nonnegative
from paperlab.data.scenes.layout import COLOURS, SHAPES, Object, Scenes
from paperlab.data.scenes.wording import OPPOSITE, RELATIONS, Pairs, called, pairs_of, plural
from paperlab.data.skills.example import Draft, Example

Phrases = list[list[tuple[str, list[int]]]]  # by kind, so that a kind with many phrases is not drawn more often


def referring(scenes: Scenes, *, seed: int, absent: float = 0.2, several: float = 0.2) -> list[Example]:
    """One description for each scene of what is to be found in it: ``Find the red circle.``

    One thing is described by its shape or its colour where that is enough, by both, or by its shape and a relation
    (``Find the circle left of the blue square.``, said where any other circle is on the opposite side); several by
    shape, colour or size (``Find the circles.``, ``Find the red shapes.``); what is absent by a pair or a relation that
    does not hold. A scene without several of a kind describes one.

    Args:
        scenes: where to find it.
        seed: of all that is drawn.
        absent: share of descriptions of what is not there.
        several: share that describe at least two objects, where there are such.

    Truth: ``objects`` meant (none where absent), so that the mask is the union of theirs. Spans: ``phrase``. There is
    no answer in words.

    Raises:
        ValueError: ``seed`` negative, or shares outside 0 to 1 or above 1 together.
    """
    require_nonnegative(seed=seed)
    require_between(0, 1, absent=absent, several=several)
    if absent + several > 1:
        raise ValueError(f"absent and several must be at most 1 together, got {absent + several}")
    rng, found = random.Random(seed), []
    pairs = pairs_of(scenes)
    for i, things in enumerate(scenes.objects()):
        u = rng.random()
        if u < absent:
            options = _nowhere(things, pairs[i])
        else:
            options = (_groups(things) if u < absent + several else []) or _singles(things, pairs[i])
        phrase, objects = rng.choice(rng.choice(options))
        found.append(Draft("referring").put("Find").put(f" the {phrase}", "phrase").put(".").done(objects=objects))
    return found


def _singles(things: list[Object], pairs: Pairs) -> Phrases:
    shapes, colours = Counter(t.shape for t in things), Counter(t.colour for t in things)
    both = [(called(t), [i]) for i, t in enumerate(things)]
    by_shape = [(t.shape, [i]) for i, t in enumerate(things) if shapes[t.shape] == 1]
    by_colour = [(f"{t.colour} shape", [i]) for i, t in enumerate(things) if colours[t.colour] == 1]
    by_relation = []
    for (a, b), way in pairs.items():
        others = [c for c, t in enumerate(things) if t.shape == things[a].shape and c not in (a, b)]
        if all(pairs.get((c, b)) == OPPOSITE[way] for c in others):
            by_relation.append((f"{things[a].shape} {RELATIONS[way]} the {called(things[b])}", [a]))
    return [kind for kind in (both, by_shape, by_colour, by_relation) if kind]


def _groups(things: list[Object]) -> Phrases:
    groups: dict[str, list[int]] = {}
    for i, t in enumerate(things):
        for phrase in (plural(t.shape), f"{t.colour} shapes", f"{t.size} shapes"):
            groups.setdefault(phrase, []).append(i)
    return [found] if (found := [(p, objects) for p, objects in groups.items() if len(objects) > 1]) else []


def _nowhere(things: list[Object], pairs: Pairs) -> Phrases:
    there = {called(t) for t in things}
    mixed = [f"{t.colour} {s}" for t in things for s in SHAPES] + [f"{c} {t.shape}" for t in things for c in COLOURS]
    by_pair = [(phrase, []) for phrase in mixed if phrase not in there]
    by_relation = []
    for (a, b), way in pairs.items():
        same = [c for c, t in enumerate(things) if t.shape == things[a].shape and c != b]
        if all(pairs.get((c, b)) == way for c in same):
            by_relation.append((f"{things[a].shape} {RELATIONS[OPPOSITE[way]]} the {called(things[b])}", []))
    return [kind for kind in (by_pair, by_relation) if kind]
