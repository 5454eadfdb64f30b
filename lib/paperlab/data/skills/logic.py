"""Truth values: nested formulas with their parse tree, and coins that are flipped or not."""

import random

from paperlab.data import lexicon
from paperlab.data.skills.example import Draft, Example, Range, collect, span_of

Tree = bool | tuple  # a leaf, ("not", tree), ("and", tree, tree) or ("or", tree, tree)


def value(tree: Tree) -> bool:
    """What a formula comes to."""
    if isinstance(tree, bool):
        return tree
    operator, *parts = tree
    if operator == "not":
        return not value(parts[0])
    return (all if operator == "and" else any)(value(part) for part in parts)


def _word(truth: bool) -> str:
    return " true" if truth else " false"


def boolean(n: int, *, seed: int, part: str = "train", depth: Range = (1, 3)) -> list[Example]:
    """``Logic: ( true and ( not false ) ) is`` → `` true``: a formula, every operation in brackets.

    Half of the answers are true at every depth. A formula is drawn from the top: at each level above the last one
    "not", "and" or "or", one branch as deep as can be, the other of any depth up to that.

    Args:
        n: how many examples.
        seed: of all that is drawn.
        part: "train", "held_out" or "all", by the formula. (Depth 1 has 10 formulas in all.)
        depth: least and most nested operations.

    Truth: ``tree`` (a leaf is a bool, else ("not", a), ("and", a, b), ("or", a, b)), ``depth``, ``label``, ``leaves``,
    ``nodes`` (for each operation, innermost first: its span with brackets, and its value), ``counterpart`` (one leaf
    flipped so that the value flips, where one leaf can do it). Spans: ``formula``, ``leaf i``, ``answer``.

    Raises:
        ValueError: ``depth`` not within 1 to 6, or nothing in that part.
    """
    depth = span_of(1, 6, depth=depth)

    def grow(rng: random.Random, level: int) -> Tree:
        if level == 0:
            return rng.random() < 0.5
        operator = rng.choice(("not", "and", "or"))
        if operator == "not":
            return ("not", grow(rng, level - 1))
        parts = [grow(rng, level - 1), grow(rng, rng.randrange(level))]
        rng.shuffle(parts)
        return (operator, *parts)

    def write(draft: Draft, tree: Tree, nodes: list, leaves: list) -> None:
        if isinstance(tree, bool):
            draft.put(_word(tree), f"leaf {len(leaves)}")
            leaves.append(tree)
            return
        start = draft.length + 1
        draft.put(" (")
        operator, *parts = tree
        if operator == "not":
            draft.put(" not")
            write(draft, parts[0], nodes, leaves)
        else:
            write(draft, parts[0], nodes, leaves)
            draft.put(" " + operator)
            write(draft, parts[1], nodes, leaves)
        draft.put(" )")
        nodes.append(((start, draft.length), value(tree)))

    def flipped(tree: Tree, leaf: int) -> tuple[Tree, int]:
        """The tree with its leaf of that number flipped, and how many leaves it has."""
        if isinstance(tree, bool):
            return (not tree if leaf == 0 else tree), 1
        parts, count = [tree[0]], 0
        for branch in tree[1:]:
            new, size = flipped(branch, leaf - count)
            parts.append(new)
            count += size
        return tuple(parts), count

    def draw(rng: random.Random) -> Example:
        level, wanted = rng.randint(*depth), rng.random() < 0.5
        tree = grow(rng, level)
        while value(tree) != wanted:
            tree = grow(rng, level)
        draft = Draft("boolean").put("Logic:")
        nodes, leaves, start = [], [], draft.length + 1
        write(draft, tree, nodes, leaves)
        draft.spans["formula"] = (start, draft.length)
        draft.put(" is").ask(_word(wanted))
        truth = {"tree": tree, "depth": level, "label": wanted, "leaves": leaves, "nodes": nodes}
        for leaf in rng.sample(range(len(leaves)), len(leaves)):
            other, _ = flipped(tree, leaf)
            if value(other) != wanted:
                again = Draft("boolean").put("Logic:")
                write(again, other, [], [])
                truth["counterpart"] = (again.put(" is").done().text, _word(not wanted))
                break
        return draft.done(**truth)

    return collect(draw, n, seed=seed, part=part)


def coin_flip(n: int, *, seed: int, part: str = "train", flips: Range = (1, 4)) -> list[Example]:
    """``The coin is heads. Orla flips it. Tom does not. Now it is`` → `` tails``: parity, told as a story.

    Args:
        n: how many examples.
        seed: of all that is drawn.
        part: "train", "held_out" or "all", by the text.
        flips: least and most people who come by; each flips with probability 1/2.

    Truth: ``start``, ``flipped`` (a list of bools), ``people``, ``states`` after each, ``label``, ``counterpart``
    (the coin starts on the other side). Spans: ``start``, ``person i``, ``answer``.

    Raises:
        ValueError: ``flips`` not within 1 to 20.
    """
    flips = span_of(1, 20, flips=flips)
    sides = ("heads", "tails")

    def draw(rng: random.Random) -> Example:
        start = rng.randrange(2)
        people = rng.sample(lexicon.NAMES, rng.randint(*flips))
        flipped = [rng.random() < 0.5 for _ in people]
        draft = Draft("coin_flip").put("The coin is").put(" " + sides[start], "start").put(".")
        state, states = start, []
        for i, (person, flip) in enumerate(zip(people, flipped, strict=True)):
            draft.put(" " + person, f"person {i}").put(" flips it." if flip else " does not.")
            state ^= flip
            states.append(sides[state])
        draft.put(" Now it is")
        text = "".join(piece for piece, _ in draft.pieces)
        other = text.replace(f"is {sides[start]}.", f"is {sides[1 - start]}.", 1)
        return draft.ask(" " + sides[state]).done(
            start=sides[start],
            flipped=flipped,
            people=people,
            states=states,
            label=sides[state],
            counterpart=(other, " " + sides[1 - state]),
        )

    return collect(draw, n, seed=seed, part=part)
