"""The words for scenes: a small closed language, in which everything said is true and unambiguous.

A thing is called "the circle" only where there is one, and "left of" is said only where one direction clearly exceeds
the other. Texts are examples as in `paperlab.data.skills`; "object i" in a truth is the i-th object of the scene,
counted from the back.
"""

from paperlab.data import lexicon
from paperlab.data.scenes.layout import COLOURS, DIRECTIONS, Object, Scenes
from paperlab.data.scenes.layout import relations as relations_of

RELATIONS = {"left": "left of", "right": "right of", "above": "above", "below": "below"}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
Pairs = dict[tuple[int, int], str]  # (object, seen from object) to a direction


def words() -> list[str]:
    """Every word of the captions, questions and descriptions, in alphabetical order."""
    text = (
        "a an and are at bar bars big bottom circle circles colour cross crosses did down Find go How Is is left "
        "many no of on or Picture right ring rings shape shapes small square squares the there top triangle "
        "triangles up What Where Which with yes above below"
    )
    return sorted({*text.split(), *COLOURS, *lexicon.NUMBERS[:6]}, key=str.lower)


def plural(shape: str) -> str:
    """``circle`` → ``circles``, ``cross`` → ``crosses``."""
    return shape + ("es" if shape.endswith("s") else "s")


def called(thing: Object) -> str:
    """``red circle``: the name that no other object of the scene has."""
    return f"{thing.colour} {thing.shape}"


def pairs_of(scenes: Scenes) -> list[Pairs]:
    """For each scene, the ordered pairs whose direction is clear."""
    found = []
    for rows in relations_of(scenes).tolist():
        found.append({(a, b): DIRECTIONS[d] for a, row in enumerate(rows) for b, d in enumerate(row) if d >= 0})
    return found


def with_article(word: str) -> str:
    """``bar`` → ``a bar``, ``orange`` → ``an orange``."""
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"
