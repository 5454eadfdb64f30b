"""A made-up world of 376 people, towns and guilds: what is stated often, once held back, and never said.

Whatever a model knows of it, it has from training: no name means anything elsewhere. So it is known exactly which
facts were stated, which two-step questions were asked, which were not though both steps were stated, and which people
do not exist.
"""

import random
from dataclasses import dataclass
from functools import cache

from paperlab.checks import require_one_of
from paperlab.data import lexicon
from paperlab.data.skills.example import Draft, Example, collect

PEOPLE = 320
RELATIONS = {
    "person": ("town", "job", "guild", "friend", "pet", "drink"),
    "town": ("country", "river"),
    "guild": ("home", "goods"),
}
KIND = {"town": "town", "guild": "guild", "friend": "person", "home": "town"}  # of a relation's value, if an entity
COMPOSITIONS = (
    ("town", "country"),
    ("town", "river"),
    ("guild", "goods"),
    ("guild", "home"),
    ("friend", "job"),
    ("friend", "pet"),
    ("friend", "town"),
)
NEVER_ASKED = ("friend", "town")  # a composition of which not one question is in the training part
# A second wording for each relation of a person, {0} the person.
WORDINGS = {
    "town": "{0} lives in",
    "job": "{0} works as a",
    "guild": "{0} works for",
    "friend": "{0} is a friend of",
    "pet": "{0} has a",
    "drink": "{0} likes to drink",
}
PARTS = ("train", "held_out", "unknown")
FORMS = ("plain", "other", "card", "mixed")


@dataclass(frozen=True)
class FactBase:
    """The whole truth. Keys of ``value`` are (entity, relation); people are "First Last"."""

    people: tuple[str, ...]
    towns: tuple[str, ...]
    guilds: tuple[str, ...]
    strangers: tuple[str, ...]  # first and last names occur in the world, these pairs of them do not
    value: dict[tuple[str, str], str]
    options: dict[str, tuple[str, ...]]  # all values of a relation
    unstated: frozenset[tuple[str, str]]  # true facts that no training example states or needs
    stated: tuple[tuple[str, str], ...]
    asked: tuple[tuple[str, tuple[str, str]], ...]  # two-step questions of the training part
    unasked: tuple[tuple[str, tuple[str, str]], ...]  # both steps stated, the question never asked

    def answer(self, entity: str, path: tuple[str, ...]) -> str:
        """Where the relations of ``path`` lead from ``entity``, the first applied first."""
        for relation in path:
            entity = self.value[entity, relation]
        return entity


@cache
def world(seed: int = 0) -> FactBase:
    """The fact base, the same for the same seed.

    One in twenty of the people's facts is never stated. Of the two-step questions that need no unstated fact, one in
    ten is never asked, and those of one composition (`NEVER_ASKED`) are not asked at all.
    """
    rng = random.Random(f"world {seed}")
    names = [f"{first} {last}" for first in lexicon.NAMES for last in lexicon.SURNAMES]
    rng.shuffle(names)
    people, strangers = tuple(sorted(names[:PEOPLE])), tuple(sorted(names[PEOPLE:]))
    towns, guilds = tuple(lexicon.TOWNS), tuple(lexicon.GUILDS)
    options = {
        "town": towns,
        "job": tuple(lexicon.JOBS),
        "guild": guilds,
        "friend": people,
        "pet": tuple(lexicon.ANIMALS),
        "drink": tuple(lexicon.DRINKS),
        "country": tuple(lexicon.COUNTRIES),
        "river": tuple(lexicon.RIVERS),
        "home": towns,
        "goods": tuple(lexicon.GOODS),
    }
    value = {}
    for kind, entities in (("person", people), ("town", towns), ("guild", guilds)):
        for relation in RELATIONS[kind]:
            for entity in entities:
                value[entity, relation] = rng.choice([o for o in options[relation] if o != entity])
    personal = [fact for fact in value if fact[0] in set(people)]
    unstated = frozenset(rng.sample(personal, len(personal) // 20))
    asked, unasked = [], []
    for path in COMPOSITIONS:
        for person in people:
            if (person, path[0]) in unstated or (value[person, path[0]], path[1]) in unstated:
                continue
            (unasked if path == NEVER_ASKED or rng.random() < 0.1 else asked).append((person, path))
    stated = tuple(fact for fact in value if fact not in unstated)
    return FactBase(people, towns, guilds, strangers, value, options, unstated, stated, tuple(asked), tuple(unasked))


def _question(draft: Draft, entity: str, path: tuple[str, ...], form: str) -> Draft:
    """``The river of the town of Orla Venn is``, or the relation's second wording."""
    if form == "other" and len(path) == 1 and path[0] in WORDINGS:
        return draft.put(" ").put(entity, "subject").put(WORDINGS[path[0]].removeprefix("{0}"))
    draft.put(" The")
    for i, relation in reversed(list(enumerate(path))):
        draft.put(" " + relation, f"relation {i}").put(" of" if i == 0 else " of the")
    return draft.put(" " + entity, "subject").put(" is")


def question(entity: str, path: tuple[str, ...], form: str = "plain") -> str:
    """The prompt of `facts` as a text, for any entity, stated or not.

    Raises:
        ValueError: ``form`` is not "plain" or "other".
    """
    require_one_of(("plain", "other"), form=form)
    return _question(Draft("facts").put("Fact:"), entity, path, form).done().text


def facts(
    n: int,
    *,
    seed: int,
    part: str = "train",
    hops: int | None = None,
    form: str = "mixed",
    composition: tuple[str, str] | None = None,
    base: int = 0,
) -> list[Example]:
    """``Fact: The town of Orla Reed is`` → `` Kelso``; ``Fact: The river of the town of Orla Reed is`` → `` Cree``.

    Args:
        n: how many examples, drawn with replacement.
        seed: of the draws.
        part: "train"; "held_out" (one hop: facts never stated, so that chance is all there is; two hops: questions
            never asked, both of whose steps are stated); "unknown": people who do not exist, and no answer.
        hops: 1 or 2; random by default.
        form: of one hop: "plain" (as above), "other" (``Orla Reed lives in``), "card" (up to six facts of one entity,
            ``Fact: Orla Reed; town Kelso; pet goat; …``, each learned, the shortest way to say much; training only),
            or "mixed", which in training is one of them at random and elsewhere "plain".
        composition: only two-step questions of this kind, such as ("town", "river"); `COMPOSITIONS` lists all.
        base: the seed of the world.

    Truth: ``entity``, ``path`` (relations, the first applied first), ``values`` along the path, ``form``, ``part``,
    ``new_composition`` (two hops, of the kind that is never asked), ``counterpart`` (the same question about another
    person; plain and stated only). Spans: ``subject``, ``relation i`` for step i, ``answer``; on cards ``relation i``
    and ``value i``.

    Raises:
        ValueError: an unknown part, form or composition, ``hops`` not 1 or 2, or no such question in that part.
    """
    require_one_of(PARTS, part=part)
    require_one_of((None, 1, 2), hops=hops)
    require_one_of(FORMS, form=form)
    require_one_of((None, *COMPOSITIONS), composition=composition)
    if form == "card" and part != "train":
        raise ValueError("form must not be 'card' outside the training part")
    w = world(base)
    one = {"train": w.stated, "held_out": tuple(sorted(w.unstated))}.get(part, ())
    two = {"train": w.asked, "held_out": w.unasked}.get(part, ())
    if composition:
        hops, two = 2, tuple(q for q in two if q[1] == composition)
        if not two and part != "unknown":
            raise ValueError(f"composition {composition} has no question in the part {part!r}")
    usual = {path: [p for p, other in two if other == path] for path in {q[1] for q in two}}
    told: dict[str, list[str]] = {}
    for entity, relation in w.stated:
        told.setdefault(entity, []).append(relation)

    def card(rng: random.Random, entity: str) -> Example:
        relations = rng.sample(told[entity], len(told[entity]))
        draft = Draft("facts").put("Fact: ").put(entity, "subject")
        for i, relation in enumerate(relations):
            value = w.value[entity, relation]
            draft.put(";").put(" " + relation, f"relation {i}").ask(" " + value, f"value {i}")
        draft.spans["answer"] = draft.spans[f"value {i}"]
        return draft.done(entity=entity, path=(relation,), values=[value], form="card", part=part)

    def draw(rng: random.Random) -> Example:
        steps = hops or rng.choice((1, 2))
        chosen = "plain"
        if steps == 1:
            chosen = form if form != "mixed" else rng.choice(FORMS[:3]) if part == "train" else "plain"
        if part == "unknown":
            entity = rng.choice(w.strangers)
            paths = [composition] if composition else COMPOSITIONS if steps == 2 else [(r,) for r in WORDINGS]
            path = rng.choice(paths)
            draft = _question(Draft("facts").put("Fact:"), entity, path, chosen)
            return draft.done(entity=entity, path=path, values=[], form=chosen, part=part, new_composition=False)
        entity, path = rng.choice(two if steps == 2 else one)
        path = path if steps == 2 else (path,)
        if chosen == "card":
            return card(rng, entity)
        if path[0] not in WORDINGS:
            chosen = "plain"
        draft = _question(Draft("facts").put("Fact:"), entity, path, chosen)
        values = [w.answer(entity, path[: i + 1]) for i in range(steps)]
        truth = {"entity": entity, "path": path, "values": values, "form": chosen, "part": part}
        truth["new_composition"] = path == NEVER_ASKED
        if part == "train" and chosen == "plain":
            kin = usual[path] if steps == 2 else [e for e, r in w.stated if r == path[0]] if len(path) == 1 else []
            others = [e for e in rng.choices(kin, k=20) if w.answer(e, path) != values[-1]]
            if others:
                truth["counterpart"] = (question(others[0], path), " " + w.answer(others[0], path))
        return draft.ask(" " + values[-1]).done(**truth)

    return collect(draw, n, seed=seed, part="all")


def statements(n: int, *, seed: int, part: str = "train", base: int = 0) -> list[Example]:
    """``True or false? The town of Orla Reed is Kelso.`` → `` true`` or `` false``, as likely.

    Only stated facts are used; a false statement has another value of the same relation.

    Args:
        n: how many examples.
        seed: of all that is drawn.
        part: "train", "held_out" or "all", by the statement: the facts are all stated elsewhere.
        base: the seed of the world.

    Truth: ``entity``, ``relation``, ``value`` (as claimed), ``true_value``, ``label``, ``counterpart`` (the true
    value for a false one and the other way round). Spans: ``subject``, ``relation``, ``value``, ``answer``.

    Raises:
        ValueError: nothing of that part, or a wrong argument.
    """
    w = world(base)

    def draw(rng: random.Random) -> Example:
        entity, relation = rng.choice(w.stated)
        right = w.value[entity, relation]
        wrong = rng.choice([o for o in w.options[relation] if o not in (right, entity)])
        label = rng.random() < 0.5
        claimed, other = (right, wrong) if label else (wrong, right)
        draft = Draft("statements").put("True or false? The").put(" " + relation, "relation").put(" of")
        draft.put(" " + entity, "subject").put(" is").put(" " + claimed, "value").put(".")
        return draft.ask(" true" if label else " false").done(
            entity=entity,
            relation=relation,
            value=claimed,
            true_value=right,
            label=label,
            counterpart=(f"True or false? The {relation} of {entity} is {other}.", " false" if label else " true"),
        )

    return collect(draw, n, seed=seed, part=part)
