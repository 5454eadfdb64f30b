"""A rule shown by examples: what to do with the last word, only the words before it tell."""

import random

from paperlab.checks import require_one_of
from paperlab.data import lexicon
from paperlab.data.skills.example import Draft, Example, Range, collect, span_of

OPPOSITE = {word: other for pair in lexicon.ANTONYMS for word, other in (pair, pair[::-1])}
CATEGORY = {word: name for name, words in lexicon.CATEGORIES.items() for word in words}
LETTER = {word: word[0] for word in [*OPPOSITE, *CATEGORY]}
LABELS = ("foo", "bar", "yes", "no", "left", "right")
TASKS = ("antonym", "category", "first_letter", "labels", "opposite_labels", "first_item", "last_item", "operation")

# A drawn context: the inputs, the right answers, and the answers of the rival rule that fits the same inputs.
Context = tuple[list[str], list[str], list[str] | None]


def _lookup(rng: random.Random, count: int, task: str) -> Context:
    table = {"antonym": OPPOSITE, "category": CATEGORY, "first_letter": LETTER}[task]
    inputs = rng.sample(list(table), count)
    return inputs, [table[word] for word in inputs], None


def _labels(rng: random.Random, count: int) -> Context:
    """Two categories, and two words that stand for them in this context only."""
    categories, names = rng.sample(list(lexicon.CATEGORIES), 2), rng.sample(LABELS, 2)
    sides = [rng.randrange(2) for _ in range(count)]
    words = [rng.sample(lexicon.CATEGORIES[category], 12) for category in categories]
    inputs = [words[side].pop() if words[side] else rng.choice(lexicon.CATEGORIES[categories[side]]) for side in sides]
    return inputs, [names[side] for side in sides], [names[1 - side] for side in sides]


def _opposite_labels(rng: random.Random, count: int) -> Context:
    """Good and bad words called by their names or, as often, by each other's."""
    names = ["positive", "negative"]
    rng.shuffle(names)
    sides = [rng.randrange(2) for _ in range(count)]
    inputs = [rng.choice((lexicon.POSITIVE, lexicon.NEGATIVE)[side]) for side in sides]
    return inputs, [names[side] for side in sides], [names[1 - side] for side in sides]


def _item(rng: random.Random, count: int, first: bool) -> Context:
    lists = [rng.sample(list(CATEGORY), rng.randint(2, 4)) for _ in range(count)]
    ends = [words[0] for words in lists], [words[-1] for words in lists]
    return [" ".join(words) for words in lists], ends[not first], ends[first]


def _operation(rng: random.Random, count: int) -> Context:
    """One-digit sums or differences behind a sign that does not say which; both fit into one digit."""
    pairs = []
    while len(pairs) < count:
        a, b = rng.randrange(1, 9), rng.randrange(1, 5)
        if a >= b and a + b <= 9:
            pairs.append((a, b))
    results = [str(a + b) for a, b in pairs], [str(a - b) for a, b in pairs]
    plus = rng.random() < 0.5
    return [f"{a}?{b}" for a, b in pairs], results[not plus], results[plus]


def in_context(
    n: int, *, seed: int, part: str = "train", task: str | None = None, shots: Range = (0, 8)
) -> list[Example]:
    """``Task. hot: cold. big: small. wet:`` → `` dry``: k demonstrations, then a question.

    The answers of the demonstrations are learned as well, so that an example trains every number of shots up to its
    own. "antonym", "category" and "first_letter" share their words, so that a word alone does not tell what to do with
    it; "labels" gives two categories names for this context only; "opposite_labels" calls good and bad words by the
    right or the wrong name; "first_item" and "last_item" pick from 2 to 4 words; "operation" is a hidden plus or minus
    (``7?2: 5``).

    Args:
        n: how many examples.
        seed: of all that is drawn.
        part: "train", "held_out" or "all", by the text (words and rules are the same; contexts are not).
        task: one of `TASKS`; random by default.
        shots: least and most demonstrations.

    Truth: ``task``, ``shots``, ``inputs`` and ``outputs`` (the last is the question), ``zero_shot`` (the prompt
    without demonstrations), ``shuffled`` (the prompt with the demonstrations' outputs permuted: same words, no rule);
    ``counterpart`` (the same inputs under the rival rule: swapped labels, the other end, the other operation), where
    the task has one and there is a demonstration. Spans: ``input i``, ``output i``; ``query`` and ``answer``.

    Raises:
        ValueError: an unknown task, or ``shots`` not within 0 to 16.
    """
    require_one_of((*TASKS, None), task=task)
    shots = span_of(0, 16, shots=shots)

    def write(draft: Draft, inputs: list[str], outputs: list[str]) -> Draft:
        draft.put("Task.")
        for i, (x, y) in enumerate(zip(inputs, outputs, strict=False)):
            draft.put(" " + x, f"input {i}").put(":").ask(_spaced(y), f"output {i}").put(".")
        return draft.put(" " + inputs[-1], "query").put(":")

    def draw(rng: random.Random) -> Example:
        chosen, k = task or rng.choice(TASKS), rng.randint(*shots)
        if chosen in ("antonym", "category", "first_letter"):
            inputs, outputs, rival = _lookup(rng, k + 1, chosen)
        elif chosen == "labels":
            inputs, outputs, rival = _labels(rng, k + 1)
        elif chosen == "opposite_labels":
            inputs, outputs, rival = _opposite_labels(rng, k + 1)
        elif chosen == "operation":
            inputs, outputs, rival = _operation(rng, k + 1)
        else:
            inputs, outputs, rival = _item(rng, k + 1, chosen == "first_item")
        draft = write(Draft("in_context"), inputs, outputs[:-1]).ask(_spaced(outputs[-1]))
        permuted = rng.sample(outputs[:-1], k)
        truth = {"task": chosen, "shots": k, "inputs": inputs, "outputs": outputs}
        truth["zero_shot"] = write(Draft("in_context"), inputs[-1:], []).done().text
        truth["shuffled"] = write(Draft("in_context"), inputs, permuted).done().text
        if rival and k:
            other = write(Draft("in_context"), inputs, rival[:-1]).done().text
            truth["counterpart"] = (other, _spaced(rival[-1]))
        return draft.done(**truth)

    return collect(draw, n, seed=seed, part=part)


def _spaced(output: str) -> str:
    """A word with its space; a digit without one, so that it is the answer's first token."""
    return output if output.isdigit() else " " + output
