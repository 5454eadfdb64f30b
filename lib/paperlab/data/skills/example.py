"""What a skill's example is, how one is written down, and which ones are held out.

An example is a text in pieces, some of which are to be learned. The pieces meet where the tokenizer cuts anyway, so
that prompt and answer can be encoded apart. Beside the text stands its ground truth: who is who, and where.
"""

import random
from collections.abc import Callable
from typing import Any, NamedTuple

from paperlab.checks import require_at_least, require_nonnegative, require_one_of
from paperlab.data.held_out import is_held_out

PARTS = ("train", "held_out", "all")
Span = tuple[int, int]
Range = int | tuple[int, int]  # a number, or the least and the most of what is drawn


class Example(NamedTuple):
    """A text in pieces; ``True`` marks what is to be learned.

    ``truth`` holds what a page may want to test against. In every skill: ``spans``, characters (first, one after the
    last) of the things named in the skill's docstring, without the space before them. In skills that have one:
    ``counterpart``, a prompt of as many tokens that differs in what matters, and its answer.
    """

    skill: str
    segments: tuple[tuple[str, bool], ...]
    truth: dict[str, Any]

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(piece for piece, _ in self.segments)

    @property
    def _last(self) -> int | None:
        return next((i for i in reversed(range(len(self.segments))) if self.segments[i][1]), None)

    @property
    def prompt(self) -> str:
        """Everything before the last answer; the whole text where there is none."""
        return "".join(piece for piece, _ in self.segments[: self._last])

    @property
    def answer(self) -> str:
        """The last answer as it continues the prompt, usually with a space in front; empty where there is none."""
        return "" if self._last is None else self.segments[self._last][0]

    @property
    def answers(self) -> list[Span]:
        """Where the answers stand in the text, with the spaces before them."""
        places, at = [], 0
        for piece, learned in self.segments:
            if learned:
                places.append((at, at + len(piece)))
            at += len(piece)
        return places


class Draft:
    """An example being written: pieces are appended, and named ones remember where they stand."""

    def __init__(self, skill: str):
        self.skill = skill
        self.pieces: list[tuple[str, bool]] = []
        self.spans: dict[str, Span] = {}
        self.length = 0

    def _append(self, text: str, learned: bool, name: str | None) -> "Draft":
        if name:
            blanks = len(text) - len(text.lstrip(" ")) if text.strip(" ") else 0
            self.spans[name] = (self.length + blanks, self.length + len(text))
        self.length += len(text)
        if not learned and self.pieces and not self.pieces[-1][1]:
            self.pieces[-1] = (self.pieces[-1][0] + text, False)
        elif text:
            self.pieces.append((text, learned))
        return self

    def put(self, text: str, name: str | None = None) -> "Draft":
        """Append text that is given."""
        return self._append(text, False, name)

    def ask(self, text: str, name: str | None = "answer") -> "Draft":
        """Append text that is to be learned."""
        return self._append(text, True, name)

    def done(self, **truth: Any) -> Example:
        """The finished example."""
        return Example(self.skill, tuple(self.pieces), {"spans": self.spans, **truth})


def span_of(low: int, high: int, /, **named: Range) -> tuple[int, int]:
    """The one named range as (least, most); a number stands for both.

    Raises:
        ValueError: it is not within ``low`` to ``high``, or the least exceeds the most.
    """
    ((name, value),) = named.items()
    least, most = (value, value) if isinstance(value, int) else value
    if not low <= least <= most <= high:
        raise ValueError(f"{name} must be a number or a range within {low} to {high}, got {value!r}")
    return least, most


def collect(
    draw: Callable[[random.Random], Example],
    n: int,
    *,
    seed: int,
    part: str,
    key: Callable[[Example], str] = lambda example: example.text,
) -> list[Example]:
    """``n`` examples of a part: training, held out, or all.

    An example belongs to a part by its content, never by its seed: no text (or ``key``) of the one part occurs in the
    other, however many are drawn.

    Raises:
        ValueError: ``n`` is below 1, ``seed`` negative, ``part`` unknown, or no example of that part turns up.
    """
    require_at_least(1, n=n)
    require_nonnegative(seed=seed)
    require_one_of(PARTS, part=part)
    rng = random.Random(seed)
    found: list[Example] = []
    for _ in range(1000 + 100 * n):
        example = draw(rng)
        if part == "all" or is_held_out(key(example)) == (part == "held_out"):
            found.append(example)
            if len(found) == n:
                return found
    raise ValueError(f"part {part!r} has too few examples with these settings: {len(found)} of n = {n} found")
