"""Two made-up languages with the same things to say: other words, other order, other endings.

Alto says subject, verb, object, the adjective behind its noun, and marks plurals with ``-im``. Brio says subject,
object, verb, the adjective before its noun, marks the object with ``-ta`` (behind the plural's ``-so``), and its verb
agrees with a plural subject (``-so``). English glosses are kept as truth; no example shows them.
"""

import random
from typing import NamedTuple

from paperlab.checks import require_one_of
from paperlab.data import lexicon
from paperlab.data.skills.example import Draft, Example, collect

LANGUAGES = ("Alto", "Brio")
# Meaning to word, by language.
DICTIONARY = {
    language: {m: w for kind, meanings in lexicon.MEANINGS.items() for m, w in zip(meanings, words[kind], strict=True)}
    for language, words in (("Alto", lexicon.ALTO), ("Brio", lexicon.BRIO))
}


class Phrase(NamedTuple):
    """A noun, perhaps many of it, perhaps with an adjective."""

    noun: str
    plural: bool
    adjective: str | None

    def gloss(self) -> str:
        """In English words: ``big dog(s)``."""
        return (self.adjective + " " if self.adjective else "") + self.noun + "(s)" * self.plural


class Meaning(NamedTuple):
    """Who does what to whom."""

    subject: Phrase
    verb: str
    object: Phrase

    def gloss(self) -> str:
        """In English words, for reading: ``big dog(s) sees tree``."""
        return f"{self.subject.gloss()} {self.verb} {self.object.gloss()}"


def _phrase(p: Phrase, role: str, language: str) -> list[tuple[str, str]]:
    words = DICTIONARY[language]
    if language == "Alto":
        noun = words[p.noun] + ("-im" if p.plural else "")
    else:
        noun = words[p.noun] + ("-so" if p.plural else "") + ("-ta" if role == "object" else "")
    both = [(noun, role)]
    if p.adjective:
        adjective = (words[p.adjective], role + " adjective")
        both = [*both, adjective] if language == "Alto" else [adjective, *both]
    return both


def render(meaning: Meaning, language: str) -> list[tuple[str, str]]:
    """The sentence's words in order, each with its role: "subject", "subject adjective", "verb", "object", …

    Raises:
        ValueError: ``language`` is not "Alto" or "Brio".
    """
    require_one_of(LANGUAGES, language=language)
    verb = DICTIONARY[language][meaning.verb]
    subject, things = _phrase(meaning.subject, "subject", language), _phrase(meaning.object, "object", language)
    if language == "Alto":
        return [*subject, (verb, "verb"), *things]
    return [*subject, *things, (verb + ("-so" if meaning.subject.plural else ""), "verb")]


def translation(
    n: int, *, seed: int, part: str = "train", source: str | None = None, adjectives: float = 0.4, plurals: float = 0.3
) -> list[Example]:
    """``Alto: bal-im fos bek dor. Brio:`` → `` ugo ako-so bira-ta neta-so.``

    Args:
        n: how many examples.
        seed: of all that is drawn.
        part: "train", "held_out" or "all", by the meaning: a held-out sentence is held out in both directions, its
            words and endings are not.
        source: the language translated from, "Alto" or "Brio"; random by default.
        adjectives: the probability that a noun has one.
        plurals: the probability that a noun is plural.

    Truth: ``source``, ``target``, ``meaning``, ``gloss``, ``dictionary`` (from source words to target words, without
    endings), ``words`` (the target's, in order), ``roles`` (of each target word). Spans: ``source ROLE`` and
    ``target ROLE`` for each word, so that the alignment is by equal roles; ``answer``.

    Raises:
        ValueError: an unknown language or part.
    """
    require_one_of((*LANGUAGES, None), source=source)
    nouns, verbs, qualities = (lexicon.MEANINGS[k] for k in ("noun", "verb", "adjective"))
    pairs = {a: {DICTIONARY[a][m]: DICTIONARY[b][m] for m in DICTIONARY[a]} for a, b in (LANGUAGES, LANGUAGES[::-1])}

    def phrase(rng: random.Random, noun: str) -> Phrase:
        return Phrase(noun, rng.random() < plurals, rng.choice(qualities) if rng.random() < adjectives else None)

    def draw(rng: random.Random) -> Example:
        first, second = rng.sample(nouns, 2)
        meaning = Meaning(phrase(rng, first), rng.choice(verbs), phrase(rng, second))
        start = source or rng.choice(LANGUAGES)
        target = LANGUAGES[start == "Alto"]
        draft = Draft("translation").put(start + ":")
        for word, role in render(meaning, start):
            draft.put(" " + word, f"source {role}")
        draft.put(f". {target}:")
        at, words = draft.length, render(meaning, target)
        draft.ask("".join(" " + word for word, _ in words) + ".")
        for word, role in words:
            draft.spans[f"target {role}"] = (at + 1, at + 1 + len(word))
            at += 1 + len(word)
        return draft.done(
            source=start,
            target=target,
            meaning=meaning,
            gloss=meaning.gloss(),
            dictionary=pairs[start],
            words=[word for word, _ in words],
            roles=[role for _, role in words],
        )

    return collect(draw, n, seed=seed, part=part, key=lambda example: example.truth["gloss"])
