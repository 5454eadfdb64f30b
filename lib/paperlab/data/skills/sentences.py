"""Sentences with a hidden variable: who receives, how it was liked, what it is about."""

import random

from paperlab.checks import require_between, require_one_of
from paperlab.data import lexicon
from paperlab.data.skills.example import Draft, Example, Range, collect, span_of

# {A} and {B} are the two people of the first half, {S} is the one who acts.
TEMPLATES = (
    ("When {A} and {B} went to the {place},", "{S} gave a {object} to"),
    ("Then {A} and {B} met at the {place}.", "{S} gave the {object} to"),
    ("After {A} and {B} left the {place},", "{S} sent a {object} to"),
    ("While {A} and {B} sat in the {place},", "{S} handed the {object} to"),
    ("Today {A} and {B} were at the {place}, and", "{S} showed a {object} to"),
    ("Once {A} met {B} in the {place}, and", "{S} sold the {object} to"),
)
ORDERS = ("ABBA", "BABA", "mixed")


def indirect_object(n: int, *, seed: int, part: str = "train", order: str = "mixed") -> list[Example]:
    """``When Mary and John went to the store, John gave a drink to`` → `` Mary``: the one who is not repeated.

    Wang, Variengien, Conmy, Shlegeris and Steinhardt (2023), https://arxiv.org/abs/2211.00593.

    Args:
        n: how many examples.
        seed: of all that is drawn.
        part: "train", "held_out" or "all", by the text.
        order: "ABBA" (the receiver stands first), "BABA", or "mixed".

    Truth: ``receiver`` and ``giver`` (the repeated name), ``order``, ``template``; ``counterpart``: the roles swapped
    (the receiver acts and the giver receives); ``corrupted``: the prompt with three other names, none repeated, so
    that nobody is the answer. All have the same number of tokens. Spans: ``receiver``, ``giver`` and ``giver again``,
    ``answer``.

    Raises:
        ValueError: an unknown ``order`` or part.
    """
    require_one_of(ORDERS, order=order)

    def draw(rng: random.Random) -> Example:
        receiver, giver, *strangers = rng.sample(lexicon.NAMES, 5)
        chosen = rng.choice(ORDERS[:2]) if order == "mixed" else order
        index = rng.randrange(len(TEMPLATES))
        thing = {"place": rng.choice(lexicon.PLACES), "object": rng.choice(lexicon.OBJECTS)}
        first, second = TEMPLATES[index]
        frame = f"{first} {second}"

        a, b = (receiver, giver) if chosen == "ABBA" else (giver, receiver)
        draft = Draft("indirect_object")
        head, middle, tail = first.split(" {A}")[0], first.split("{A}")[1].split(" {B}")[0], first.split("{B}")[1]
        names = ("receiver", "giver") if chosen == "ABBA" else ("giver", "receiver")
        draft.put(head).put(" " + a, names[0]).put(middle).put(" " + b, names[1]).put(tail.format(**thing))
        draft.put(" " + giver, "giver again").put(second.removeprefix("{S}").format(**thing))
        return draft.ask(" " + receiver).done(
            receiver=receiver,
            giver=giver,
            order=chosen,
            template=index,
            counterpart=(frame.format(A=a, B=b, S=receiver, **thing), " " + giver),
            corrupted=frame.format(A=strangers[0], B=strangers[1], S=strangers[2], **thing),
        )

    return collect(draw, n, seed=seed, part=part)


def _write_review(draft: Draft, parts: list[dict], words: list[str]) -> Draft:
    draft.put("Review:")
    for i, (clause, word) in enumerate(zip(parts, words, strict=True)):
        if i:
            draft.put(" and" if clause["score"] * parts[i - 1]["score"] > 0 else " but")
        draft.put(" the").put(" " + clause["noun"], f"noun {i}").put(" was")
        if clause["negated"]:
            draft.put(" not", f"not {i}")
        if clause["intensifier"]:
            draft.put(" " + clause["intensifier"])
        draft.put(" " + word, f"word {i}")
    return draft.put(". It is")


def sentiment(
    n: int,
    *,
    seed: int,
    part: str = "train",
    clauses: Range = (1, 2),
    negation: float = 0.25,
    intensifiers: float = 0.4,
) -> list[Example]:
    """``Review: the film was very good but the food was not warm. It is`` → `` positive``: the larger sum wins.

    A clause is worth 1 for a good word and −1 for a bad one, times its intensifier's strength
    (`lexicon.INTENSIFIERS`), turned round by "not". No review is balanced.

    Args:
        n: how many examples.
        seed: of all that is drawn.
        part: "train", "held_out" or "all", by the text.
        clauses: least and most clauses.
        negation: the probability of "not" in a clause.
        intensifiers: the probability of an intensifier.

    Truth: ``score``, ``label``, ``clauses`` (for each: ``noun``, ``word``, ``negated``, ``intensifier``, ``score``),
    ``counterpart`` (every adjective exchanged for one of the other side). Spans: ``noun i``, ``word i``, ``not i``
    where there is one, ``answer``.

    Raises:
        ValueError: probabilities not within 0 to 1, or ``clauses`` not within 1 to 6.
    """
    clauses = span_of(1, 6, clauses=clauses)
    require_between(0, 1, negation=negation, intensifiers=intensifiers)
    strengths = list(lexicon.INTENSIFIERS)

    def attempt(rng: random.Random) -> Example | None:
        count = rng.randint(*clauses)
        parts = []
        for noun in rng.sample(lexicon.REVIEWED, count):
            good = rng.random() < 0.5
            word = rng.choice(lexicon.POSITIVE if good else lexicon.NEGATIVE)
            negated = rng.random() < negation
            strength = rng.choice(strengths) if rng.random() < intensifiers else None
            score = (1 if good != negated else -1) * lexicon.INTENSIFIERS.get(strength, 1.0)
            parts.append({"noun": noun, "word": word, "negated": negated, "intensifier": strength, "score": score})
        total = sum(clause["score"] for clause in parts)
        if total == 0:
            return None
        exchanged = [rng.choice(lexicon.NEGATIVE if c["word"] in lexicon.POSITIVE else lexicon.POSITIVE) for c in parts]

        labels = ("positive", "negative") if total > 0 else ("negative", "positive")
        draft = _write_review(Draft("sentiment"), parts, [c["word"] for c in parts]).ask(" " + labels[0])
        other = _write_review(Draft("sentiment"), parts, exchanged).done().text
        return draft.done(score=total, label=labels[0], clauses=parts, counterpart=(other, " " + labels[1]))

    def draw(rng: random.Random) -> Example:
        while (example := attempt(rng)) is None:
            pass
        return example

    return collect(draw, n, seed=seed, part=part)


ABOUT = (
    "the {0} was near the {1}",
    "a {0} and a {1} are here",
    "the {0} is like the {1}",
    "there was a {0} by the {1}",
    "she saw the {0} and the {1}",
)


def _write_about(draft: Draft, templates: list[str], words: list[str]) -> Draft:
    draft.put("Text:")
    for i, template in enumerate(templates):
        before, rest = template.split(" {0}")
        between, after = rest.split(" {1}")
        draft.put(" " + before).put(" " + words[2 * i], f"word {2 * i}").put(between)
        draft.put(" " + words[2 * i + 1], f"word {2 * i + 1}").put(after + ".")
    return draft.put(" Topic:")


def topic(n: int, *, seed: int, part: str = "train", sentences: Range = (1, 3), noise: float = 0.15) -> list[Example]:
    """``Text: the drum was near the flute. Topic:`` → `` music``: the topic of most nouns.

    Args:
        n: how many examples.
        seed: of all that is drawn.
        part: "train", "held_out" or "all", by the text.
        sentences: least and most sentences, of two nouns each.
        noise: the probability that a noun comes from another topic; the right one keeps more nouns than any other.

    Truth: ``topic``, ``words`` (each with its topic), ``counterpart`` (the right topic's nouns exchanged for those of
    another). Spans: ``word i``, ``answer``.

    Raises:
        ValueError: ``sentences`` not within 1 to 6, or ``noise`` not within 0 to 0.5.
    """
    sentences = span_of(1, 6, sentences=sentences)
    require_between(0, 0.5, noise=noise)
    topics = list(lexicon.TOPICS)

    def attempt(rng: random.Random) -> Example | None:
        label, other = rng.sample(topics, 2)
        count = rng.randint(*sentences)
        nouns, exchanged = [], []
        for word, instead in zip(
            rng.sample(lexicon.TOPICS[label], 2 * count), rng.sample(lexicon.TOPICS[other], 2 * count), strict=True
        ):
            if rng.random() < noise:
                stray = rng.choice([t for t in topics if t not in (label, other)])
                nouns.append((rng.choice(lexicon.TOPICS[stray]), stray))
                exchanged.append(nouns[-1][0])
            else:
                nouns.append((word, label))
                exchanged.append(instead)
        votes = [t for _, t in nouns]
        if any(votes.count(t) >= votes.count(label) for t in set(votes) - {label}) or label not in votes:
            return None
        templates = rng.sample(ABOUT, min(count, len(ABOUT)))
        templates += rng.choices(ABOUT, k=count - len(templates))

        draft = _write_about(Draft("topic"), templates, [w for w, _ in nouns]).ask(" " + label)
        counterpart = (_write_about(Draft("topic"), templates, exchanged).done().text, " " + other)
        return draft.done(topic=label, words=nouns, counterpart=counterpart)

    def draw(rng: random.Random) -> Example:
        while (example := attempt(rng)) is None:
            pass
        return example

    return collect(draw, n, seed=seed, part=part)
