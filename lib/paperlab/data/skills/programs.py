"""Little Python programs: which parameter comes next, which bracket closes, how far the next line is indented."""

import random

from paperlab.checks import require_one_of
from paperlab.data import lexicon
from paperlab.data.skills.example import Draft, Example, Range, Span, collect, span_of

STYLES = (":param", "@param", "Args")
DESCRIBED = ("the name of the {}", "a {} to read", "the {} or None", "one {} of many", "the old {}", "a new {}")
NOUNS = [*lexicon.FILLER["noun"], *lexicon.OBJECTS]


def docstring(
    n: int,
    *,
    seed: int,
    part: str = "train",
    parameters: Range = (2, 6),
    style: str | None = None,
) -> list[Example]:
    '''A method and its documentation: ``:param`` → the next parameter, in the order of the signature.

    ::

        def load(self, size, mode, path, label):
            """Load the book.

            :param size: the old key
            :param mode: a box to read
            :param

    Every parameter's name is learned where the documentation reaches it.

    Heimersheim and Janiak (2023), "A circuit for Python docstrings in a 4-layer attention-only transformer".

    Args:
        n: how many examples.
        seed: of all that is drawn.
        part: "train", "held_out" or "all", by the text.
        parameters: least and most parameters after ``self``; the documentation stops at a random one, the second at
            the earliest.
        style: ":param", "@param" or "Args" (an indented list under ``Args:``); random by default.

    Truth: ``function``, ``parameters`` in order, ``style``, ``right`` (the parameter asked last), ``counterpart`` (the
    same documentation under a signature of other names in which the right one does not occur; its answer is the name
    in the right one's place). Spans: ``signature i`` and ``documented i`` for the i-th parameter; ``answer``.

    Raises:
        ValueError: ``parameters`` not within 2 to 12, or an unknown ``style``.
    '''
    parameters = span_of(2, 12, parameters=parameters)
    require_one_of((*STYLES, None), style=style)

    def draw(rng: random.Random) -> Example:
        count = rng.randint(*parameters)
        drawn = rng.sample(lexicon.PARAMETERS, 2 * count)
        names, others = drawn[:count], drawn[count:]
        shown = rng.randint(2, count)
        chosen = style or rng.choice(STYLES)
        function, noun = rng.choice(lexicon.FUNCTIONS), rng.choice(NOUNS)
        described = [rng.choice(DESCRIBED).format(rng.choice(NOUNS)) for _ in range(shown - 1)]
        mark = "\n       " if chosen == "Args" else f"\n    {chosen}"
        middle = f'    """{function.capitalize()} the {noun}.\n' + ("\n    Args:" if chosen == "Args" else "")
        draft = Draft("docstring").put(f"def {function}(self")
        for i, name in enumerate(names):
            draft.put(",").put(" " + name, f"signature {i}")
        draft.put("):\n" + middle)
        for i in range(shown):
            draft.put(mark).ask(" " + names[i], f"documented {i}")
            if i < shown - 1:
                draft.put(": " + described[i])
        draft.spans["answer"] = draft.spans[f"documented {shown - 1}"]
        body = "".join(f"{mark} {name}: {words}" for name, words in zip(names[: shown - 1], described, strict=True))
        counterpart = (f"def {function}(self, {', '.join(others)}):\n" + middle + body + mark, " " + others[shown - 1])
        return draft.done(
            function=function, parameters=names, style=chosen, right=names[shown - 1], counterpart=counterpart
        )

    return collect(draw, n, seed=seed, part=part)


BRACKETS = {"(": ")", "[": "]", "{": "}"}


def code(n: int, *, seed: int, part: str = "train", kind: str | None = None, depth: Range = (1, 4)) -> list[Example]:
    """Close the brackets, or indent the next line.

    "brackets": ``size = ( [ key , { path`` → `` }``, then `` ]`` and `` )``: a list, tuple or set in valid Python,
    spaced so that every bracket is a token of its own. Each closing bracket is learned.

    "indentation": nested ``if``/``for``/``while``/``with`` heads. After each the next line's indentation is learned,
    one token, without the last space, which belongs to the word behind it.

    Args:
        n: how many examples.
        seed: of all that is drawn.
        part: "train", "held_out" or "all", by the text.
        kind: "brackets" or "indentation"; random by default.
        depth: least and most pairs of brackets (they may stand side by side), or nested heads.

    Truth: ``kind``, ``depth``; for brackets ``partners``: for each answer its span, the span of the bracket that it
    closes, and how many are open before it. Spans: ``answer``, and for brackets ``source``, the bracket that the last
    answer closes.

    Raises:
        ValueError: ``depth`` not within 1 to 8, or an unknown ``kind``.
    """
    depth = span_of(1, 8, depth=depth)
    require_one_of(("brackets", "indentation", None), kind=kind)

    def brackets(rng: random.Random, draft: Draft, levels: int) -> Example:
        stack: list[tuple[str, Span]] = []
        partners: list[tuple[Span, Span, int]] = []
        target, *names = rng.sample(lexicon.PARAMETERS, 2 * levels + 1)
        draft.put(f"{target} =")
        pending, fresh = levels, True  # fresh: nothing stands in the innermost open bracket yet
        while pending or stack:
            # The outermost bracket closes last, so that the whole is one expression.
            if pending and (len(stack) < 2 or rng.random() < 0.6):
                bracket = rng.choice("([{")
                draft.put("" if fresh else " ,").put(" " + bracket, "_")
                stack.append((bracket, draft.spans.pop("_")))
                pending -= 1
                fresh = rng.random() < 0.4
                if not fresh:
                    draft.put(" " + names.pop())
            else:
                count = len(stack)
                bracket, source = stack.pop()
                draft.ask(" " + BRACKETS[bracket])
                partners.append((draft.spans["answer"], source, count))
                draft.spans["source"] = source
                fresh = False
                if stack and rng.random() < 0.4:
                    draft.put(" ,").put(" " + names.pop())
        return draft.done(kind="brackets", depth=levels, partners=partners)

    def indentation(rng: random.Random, draft: Draft, levels: int) -> Example:
        names = rng.sample(lexicon.PARAMETERS, 2 * levels + 2)
        for level in range(levels):
            a, b = names[2 * level : 2 * level + 2]
            head = rng.choice((f"for {a} in {b}:", f"if {a}.{b}:", f"while {a} < {b}:", f"with {a}({b}):"))
            if level:
                draft.ask(" " * (4 * level - 1)).put(" ")
            draft.put(head + "\n")
        last = rng.choice((f"{names[-1]} = {names[-2]}", f"return {names[-1]}", "pass"))
        draft.ask(" " * (4 * levels - 1)).put(" " + last)
        return draft.done(kind="indentation", depth=levels)

    def draw(rng: random.Random) -> Example:
        chosen, levels = kind or rng.choice(("brackets", "indentation")), rng.randint(*depth)
        return (brackets if chosen == "brackets" else indentation)(rng, Draft("code"), levels)

    return collect(draw, n, seed=seed, part=part)
