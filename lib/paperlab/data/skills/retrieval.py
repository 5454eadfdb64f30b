"""Find it again: values by their key, a needle in prose, the rest of a word list. Answers that stand in the context.

What is drawn has no meaning outside its context, so that nothing but looking back can answer. The text around it is
either sentences of the lexicon (one token a word) or sentences of the corpus.
"""

import random
import re
from collections.abc import Sequence
from functools import cache

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from paperlab.checks import require_at_least, require_between, require_one_of
from paperlab.data import corpus, lexicon
from paperlab.data.skills.example import Draft, Example, Range, collect, span_of
from paperlab.devices import generator

FILLERS = ("sentences", "corpus", "none")
VALUES = ("digits", "words", "mixed")
WORDS = [*lexicon.ANIMALS, *lexicon.COLOURS, *lexicon.FOODS, *lexicon.TOOLS, *lexicon.MUSIC, *lexicon.WEATHER]
SHOWN = 2.6  # characters of corpus text a token


def filler_sentence(rng: random.Random) -> tuple[str, int]:
    """A sentence of the lexicon that says nothing about keys and values, and its number of tokens."""
    some = lexicon.FILLER
    a, b = rng.sample(some["noun"], 2)
    adjective, verb = rng.choice(some["adjective"]), rng.choice(some["verb"])
    if rng.random() < 0.5:
        return f" The {adjective} {a} {verb} the {b}.", 7
    return f" The {a} {verb} the {adjective} {b} {rng.choice(some['time'])}.", 8


@cache
def _corpus_sentences(held_out: bool) -> tuple[tuple[str, int], ...]:
    """Short plain sentences of the English corpus, each with its number of tokens, estimated."""
    documents = corpus.split(corpus.english())[1 if held_out else 0]
    found = []
    for _, text in documents:
        for sentence in re.split(r"(?<=[.!?])\s+", " ".join(text.split())):
            if 20 <= len(sentence) <= 90 and re.fullmatch(r"[A-Z][A-Za-z ,'-]+[.]", sentence):
                found.append((" " + sentence, round(len(sentence) / SHOWN)))
    return tuple(dict.fromkeys(found))


def _haystack(rng: random.Random, tokens: int, filler: str, part: str) -> list[str]:
    """Sentences of about so many tokens in all."""
    found, used = [], 0
    while filler != "none" and used < tokens - 3:
        sentence, length = (
            filler_sentence(rng) if filler == "sentences" else rng.choice(_corpus_sentences(part == "held_out"))
        )
        found.append(sentence)
        used += length
    return found


def _value(rng: random.Random, length: int, kind: str) -> str:
    """So many digits without a space (``"7304"``) or so many words, a space before each (``" red fox"``)."""
    if kind == "mixed":
        kind = rng.choice(VALUES[:2])
    if kind == "digits":
        return "".join(rng.choice("0123456789") for _ in range(length))
    return "".join(" " + word for word in rng.sample(WORDS, length))


def _mingle(rng: random.Random, items: list, hay: list[str], depth: float | None) -> list:
    """The items at random places among the sentences; with a ``depth``, the first item at that share of the list."""
    first, rest = items[0], [*items[1:], *hay]
    rng.shuffle(rest)
    place = rng.randrange(len(rest) + 1) if depth is None else round(depth * len(rest))
    return [*rest[:place], first, *rest[place:]]


def key_value_retrieval(
    n: int,
    *,
    seed: int,
    part: str = "train",
    pairs: Range = (2, 10),
    queries: int = 4,
    value_tokens: Range = (1, 4),
    values: str = "mixed",
    context: Range = (20, 200),
    depth: float | None = None,
    filler: str = "sentences",
) -> list[Example]:
    """``Codes. Orla:7304. The old man saw the door. Finn:1192. Ask. Orla:`` → ``7304``, and so on.

    Several questions follow each list, of different keys as far as they go. Only the answers are learned.

    Args:
        n: how many examples.
        seed: of all that is drawn.
        part: "train", "held_out" or "all", by the text.
        pairs: least and most number of pairs.
        queries: most questions, one for each pair at most.
        value_tokens: least and most tokens of a value, the same number throughout one list.
        values: "digits" (``7304``), "words" (`` red fox``) or "mixed", a kind for each list.
        context: least and most tokens before the first question, about; fewer filler sentences where the pairs need
            the room.
        depth: where the pair that is asked last stands in the list, from 0 (first) to 1 (last); random by default.
        filler: "sentences" of the lexicon, "corpus" (sentences of the English corpus) or "none".

    Truth: ``pairs`` (a dictionary), ``keys`` asked, ``values`` right, ``depth`` of the pair asked last as a share of
    the characters before it, ``counterpart`` (another key asked last). Spans: ``key i``, ``value i`` in the list for
    the i-th question, ``query i`` and ``answer i``; ``source`` and ``answer`` for the last.

    Raises:
        ValueError: an argument out of range or unknown.
    """
    pairs = span_of(1, len(lexicon.NAMES), pairs=pairs)
    require_at_least(1, queries=queries)
    value_tokens = span_of(1, 8, value_tokens=value_tokens)
    context = span_of(4, 100_000, context=context)
    require_between(0, 1, depth=0.0 if depth is None else depth)
    require_one_of(VALUES, values=values)
    require_one_of(FILLERS, filler=filler)

    def draw(rng: random.Random) -> Example:
        length = rng.randint(*value_tokens)
        kind = rng.choice(VALUES[:2]) if values == "mixed" else values
        room = rng.randint(*context)
        most = max(pairs[0], min(pairs[1], room // (length + 3)))
        count = rng.randint(pairs[0], most)
        keys = rng.sample(lexicon.NAMES, count)
        table: dict[str, str] = {}
        while len(table) < count:  # no value twice, as far as there are values
            value = _value(rng, length, kind)
            if value not in table.values() or (kind == "digits" and count > 10**length // 2):
                table[keys[len(table)]] = value
        asked = rng.sample(keys, min(queries, count))
        items = [(asked[-1], table[asked[-1]])] + [(k, v) for k, v in table.items() if k != asked[-1]]
        hay = _haystack(rng, room - count * (length + 3), filler, part)
        draft = Draft("key_value_retrieval").put("Codes.")
        where = {}
        for item in _mingle(rng, items, hay, depth):
            if isinstance(item, str):
                draft.put(item)
                continue
            key, value = item
            draft.put(" " + key, "_").put(":")
            spans = [draft.spans.pop("_")]
            draft.put(value, "_").put(".")
            where[key] = (*spans, draft.spans.pop("_"))
        listed = draft.length
        draft.put(" Ask.")
        for i, key in enumerate(asked):
            draft.spans[f"key {i}"], draft.spans[f"value {i}"] = where[key]
            draft.put(" " + key, f"query {i}").put(":")
            before = "".join(piece for piece, _ in draft.pieces)
            draft.ask(table[key], f"answer {i}").put(".")
        draft.spans["answer"], draft.spans["source"] = draft.spans[f"answer {i}"], where[key][1]
        truth = {"pairs": table, "keys": asked, "values": [table[k] for k in asked]}
        truth["depth"] = where[key][0][0] / listed
        others = [k for k in keys if table[k] != table[key]]
        if others:
            other = rng.choice(others)
            truth["counterpart"] = (before.removesuffix(f"{key}:") + f"{other}:", table[other])
        return draft.done(**truth)

    return collect(draw, n, seed=seed, part=part)


def needle(
    n: int,
    *,
    seed: int,
    part: str = "train",
    needles: Range = (1, 4),
    value_tokens: Range = (1, 4),
    context: Range = (20, 200),
    depth: float | None = None,
    filler: str = "sentences",
) -> list[Example]:
    """``… The code of Orla is 7304. … Ask. The code of Orla is`` → `` 7304``: sentences hidden in prose.

    Every needle is asked once, in random order. A value is digits or words, drawn for each needle; in front of digits
    the answer's first token is the blank.

    Args:
        n: how many examples.
        seed: of all that is drawn.
        part: "train", "held_out" or "all", by the text.
        needles: least and most needles.
        value_tokens: least and most tokens of a value (the blank before digits not counted).
        context: least and most tokens before the question, about.
        depth: where the needle that is asked last stands among the sentences, 0 to 1; random by default.
        filler: "sentences" of the lexicon, "corpus" (sentences of the English corpus) or "none".

    Truth: ``codes`` (name to value), ``keys`` asked, ``values`` right, ``depth``; ``counterpart`` (another name asked
    last, with more than one needle). Spans: ``key i``, ``value i`` in the prose, ``query i``, ``answer i``; ``source``
    and ``answer`` for the last.

    Raises:
        ValueError: an argument out of range or unknown.
    """
    needles = span_of(1, 12, needles=needles)
    value_tokens = span_of(1, 8, value_tokens=value_tokens)
    context = span_of(4, 100_000, context=context)
    require_between(0, 1, depth=0.0 if depth is None else depth)
    require_one_of(FILLERS, filler=filler)

    def draw(rng: random.Random) -> Example:
        room = rng.randint(*context)
        count = rng.randint(needles[0], max(needles[0], min(needles[1], room // 12)))
        length = rng.randint(*value_tokens)
        codes: dict[str, str] = {}
        names = rng.sample(lexicon.NAMES, count)
        while len(codes) < count:  # no value twice
            value = " " + _value(rng, length, "mixed").lstrip()
            if value not in codes.values():
                codes[names[len(codes)]] = value
        asked = rng.sample(list(codes), count)
        hay = _haystack(rng, room - count * (length + 7), filler, part)
        draft = Draft("needle").put("Text.")
        where = {}
        for item in _mingle(rng, [(k,) for k in reversed(asked)], hay, depth):
            if isinstance(item, str):
                draft.put(item)
                continue
            (name,) = item
            draft.put(" The code of").put(" " + name, "_").put(" is")
            key = draft.spans.pop("_")
            draft.put(codes[name], "_").put(".")
            where[name] = (key, draft.spans.pop("_"))
        listed = draft.length
        draft.put(" Ask.")
        for i, name in enumerate(asked):
            draft.spans[f"key {i}"], draft.spans[f"value {i}"] = where[name]
            draft.put(" The code of").put(" " + name, f"query {i}").put(" is")
            before = "".join(piece for piece, _ in draft.pieces)
            draft.ask(codes[name], f"answer {i}").put(".")
        draft.spans["answer"], draft.spans["source"] = draft.spans[f"answer {i}"], where[name][1]
        truth = {"codes": codes, "keys": asked, "values": [codes[k] for k in asked]}
        truth["depth"] = where[name][0][0] / listed
        if count > 1:
            truth["counterpart"] = (before.removesuffix(f"{name} is") + f"{asked[0]} is", codes[asked[0]])
        return draft.done(**truth)

    return collect(draw, n, seed=seed, part=part)


def induction_copy(
    n: int, *, seed: int, part: str = "train", length: Range = (3, 20), gap: Range = (0, 20)
) -> list[Example]:
    """``Copy. pear axe wind harp … axe`` → `` wind harp``: words stand once, and a stretch of them comes back.

    Random words, some gap of other words, and the stretch again: its first word is given, the others are learned. No
    word of the list stands twice otherwise, so that one match in the context tells what follows.

    Args:
        n: how many examples.
        seed: of all that is drawn.
        part: "train", "held_out" or "all", by the text.
        length: least and most words of the stretch that is repeated (2 at least).
        gap: least and most words before the stretch, and between the stretch and its return.

    Truth: ``words`` of the stretch. Spans: ``source`` (the words to copy, at their first place), ``trigger`` (the
    repeated first word), ``answer``.

    Raises:
        ValueError: lengths out of range, or more words needed than there are.
    """
    length, gap = span_of(2, len(WORDS), length=length), span_of(0, len(WORDS), gap=gap)
    if length[1] + 2 * gap[1] > len(WORDS):
        raise ValueError(f"length and gap must need {len(WORDS)} words at most, got {length[1]} + 2 × {gap[1]}")

    def draw(rng: random.Random) -> Example:
        before, size, after = rng.randint(*gap), rng.randint(*length), rng.randint(*gap)
        words = [" " + word for word in rng.sample(WORDS, before + size + after)]
        again = words[before : before + size]
        draft = Draft("induction_copy").put("Copy." + "".join(words[: before + 1]))
        draft.put("".join(again[1:]), "source").put("".join(words[before + size :]))
        draft.put(again[0], "trigger").ask("".join(again[1:]))
        return draft.done(words=[word.strip() for word in again])

    return collect(draw, n, seed=seed, part=part)


def random_repeats(
    n: int,
    length: int,
    vocab: int | Sequence[int],
    *,
    seed: int,
    first: int = 4,
    segment: tuple[int, int] | None = None,
    gap: int = 8,
) -> tuple[Int[Tensor, "n length"], Bool[Tensor, "n length"]]:
    """Random tokens in which one segment comes back again and again: the food that induction heads grow on.

    In each row: a random start of any length up to a quarter of the row, then a segment of random length, returning
    with 0 to ``gap`` random tokens before each return until the row is full. Short segments are as likely as long ones
    on a logarithmic scale. Because length and gaps vary, position alone predicts nothing.

    Args:
        n: rows.
        length: tokens in a row.
        vocab: ids run from ``first`` to vocab − 1; or the ids to draw from.
        seed: of all that is drawn.
        first: the least id drawn when ``vocab`` is a number: the special tokens stay out.
        segment: least and most length of the segment; by default 3 to half of the row.
        gap: most random tokens between a return and the next.

    Returns:
        The tokens, and True where the token is the second or a later one of a return, predictable from the last time
        that the token before it occurred (but for chance repetitions within a segment).

    Raises:
        ValueError: an argument out of range.
    """
    require_at_least(1, n=n)
    require_at_least(8, length=length)
    require_at_least(0, gap=gap, first=first)
    low, high = segment or (3, length // 2)
    require_between(2, length - 2, segment=(low, high))
    ids = torch.arange(first, vocab) if isinstance(vocab, int) else torch.as_tensor(vocab)
    if len(ids) < 2:
        raise ValueError(f"vocab must leave at least 2 tokens to draw from, got {len(ids)}")
    g = generator(seed)
    tokens = ids[torch.randint(len(ids), (n, length), generator=g)]
    start = torch.randint(0, length // 4 + 1, (n, 1), generator=g)
    size = torch.exp(torch.empty(n, 1).uniform_(generator=g) * torch.log(torch.tensor((high + 1) / low))) * low
    size = torch.minimum(size.long(), length - start - 1).clamp(max=high)
    place = torch.arange(length).expand(n, -1)
    predictable = torch.zeros(n, length, dtype=torch.bool)
    source, cursor = place.clone(), start + size
    while (cursor < length).any():
        cursor = cursor + torch.randint(0, gap + 1, (n, 1), generator=g)
        inside = (place >= cursor) & (place < cursor + size)
        source = torch.where(inside, place - cursor + start, source)
        predictable |= inside & (place > cursor)
        cursor = cursor + size
    return tokens.gather(1, source), predictable
