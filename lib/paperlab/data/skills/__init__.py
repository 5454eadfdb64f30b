"""Skills with an exact answer: what the pocket models learn beside English and Python, and how pages examine them.

Every skill is a function ``name(n, *, seed, part="train", …) -> list[Example]``; the same call gives the same examples.
``part`` keeps what is held out apart from what is trained on, by content and not by seed.
"""

from collections.abc import Callable

from paperlab.data.skills.example import Example
from paperlab.data.skills.fact_base import facts, statements, world
from paperlab.data.skills.few_shot import in_context
from paperlab.data.skills.languages import translation
from paperlab.data.skills.logic import boolean, coin_flip
from paperlab.data.skills.numbers import addition, comparison, greater_than, subtraction
from paperlab.data.skills.programs import code, docstring
from paperlab.data.skills.retrieval import induction_copy, key_value_retrieval, needle, random_repeats
from paperlab.data.skills.sentences import indirect_object, sentiment, topic

SKILLS: dict[str, Callable[..., list[Example]]] = {
    skill.__name__: skill
    for skill in (
        key_value_retrieval,
        needle,
        induction_copy,
        addition,
        subtraction,
        comparison,
        greater_than,
        indirect_object,
        docstring,
        code,
        facts,
        statements,
        sentiment,
        topic,
        boolean,
        coin_flip,
        translation,
        in_context,
    )
}

__all__ = ["SKILLS", "Example", "random_repeats", "world", *SKILLS]
