"""Captions: a sentence that names all objects of a scene, in one of five forms."""

import random
from collections.abc import Sequence

from paperlab.checks import require_nonempty, require_nonnegative, require_one_of
from paperlab.data.scenes.layout import Object, Scenes
from paperlab.data.scenes.wording import RELATIONS, Pairs, pairs_of, with_article
from paperlab.data.skills.example import Draft, Example

TEMPLATES = ("list", "sizes", "places", "relation", "there")
PLACES = {"left": "on the left", "right": "on the right", "above": "at the top", "below": "at the bottom"}
PICTURE = "Picture:"  # the prompt


def captions(scenes: Scenes, *, seed: int, templates: Sequence[str] = TEMPLATES) -> list[Example]:
    """One caption of each scene that names all of its objects, in random order: ``Picture:`` → `` a red bar.``

    The templates, of which one is drawn evenly (where it says nothing about a scene, "list" takes its place):

    - ``list``: `` a red circle, a blue square and a green ring.``
    - ``sizes``: `` a big red circle and a small blue square.``
    - ``places``: `` a red circle on the left and a blue square.``, for objects that clearly stand somewhere
    - ``relation``: `` a red circle left of a blue square, with a green ring.``
    - ``there``: `` there is a red circle and a blue square.``

    Truth: ``template``, ``objects`` in the order of mention, ``relation`` (object, direction, object) or None,
    ``places`` (object to direction, those that are said). Spans: ``colour i``, ``shape i`` and ``size i`` of object i.

    Raises:
        ValueError: ``seed`` negative, or a template that does not exist.
    """
    require_nonnegative(seed=seed)
    require_nonempty(templates=templates)
    for template in templates:
        require_one_of(TEMPLATES, templates=template)
    rng = random.Random(seed)
    pairs = pairs_of(scenes)
    return [_caption(things, pairs[i], rng.choice(templates), rng) for i, things in enumerate(scenes.objects())]


def _caption(things: list[Object], pairs: Pairs, template: str, rng: random.Random) -> Example:
    order = rng.sample(range(len(things)), len(things))
    relation, said = None, {}
    if template == "relation" and pairs:
        a, b = rng.choice(list(pairs))
        relation = (a, pairs[a, b], b)
        order = [a, b] + [i for i in order if i not in (a, b)]
    if template == "places":
        said = {i: thing.place for i, thing in enumerate(things) if thing.place}
    if (template == "relation" and not relation) or (template == "places" and not said):
        template = "list"
    draft = Draft("caption").put(PICTURE)
    start = draft.length
    if template == "there":
        draft.put(" there is")
    for place, i in enumerate(order):
        if relation and place == 1:
            draft.put(" " + RELATIONS[relation[1]])
        elif relation and place == 2:
            draft.put(", with")
        elif place:
            draft.put(" and" if place == len(order) - 1 else ",")
        _describe(draft, i, things[i], sized=template == "sizes")
        if i in said:
            draft.put(" " + PLACES[said[i]])
    draft.put(".")
    text = draft.pieces[0][0]
    truth = {"template": template, "objects": order, "relation": relation, "places": said}
    return Example("caption", ((text[:start], False), (text[start:], True)), {"spans": draft.spans, **truth})


def _describe(draft: Draft, i: int, thing: Object, *, sized: bool) -> None:
    first = thing.size if sized else thing.colour
    draft.put(" " + with_article(first).split()[0])
    if sized:
        draft.put(" " + thing.size, f"size {i}")
    draft.put(" " + thing.colour, f"colour {i}").put(" " + thing.shape, f"shape {i}")
