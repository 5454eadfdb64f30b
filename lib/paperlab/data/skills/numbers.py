"""Sums, differences, comparisons and later years: digits are single tokens, and the truth is arithmetic.

Answers of sums and differences stand least significant digit first, since a decoder writes from left to right and the
carry runs the other way.
"""

import random

from paperlab.checks import require_one_of
from paperlab.data import lexicon
from paperlab.data.skills.example import Draft, Example, Range, collect, span_of


def _operand(rng: random.Random, digits: int) -> int:
    return rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)


def _operation(skill: str, n: int, seed: int, part: str, digits: Range, minus: bool, separator: str) -> list[Example]:
    digits = span_of(1, 6, digits=digits)
    sign = "-" if minus else "+"

    def result(a: int, b: int) -> str:
        return str(a - b if minus else a + b)[::-1] + "."

    def draw(rng: random.Random) -> Example:
        size = rng.randint(*digits)
        a, b = _operand(rng, size), _operand(rng, size)
        if minus and a < b:
            a, b = b, a
        width = max(len(str(a)), len(str(b)))
        carries, carry = [], 0
        for i in range(width):
            x, y = a // 10**i % 10, b // 10**i % 10
            carry = int(x - y - carry < 0) if minus else (x + y + carry) // 10
            carries.append(carry)
        # The counterpart changes one digit of the first number; a difference stays at or above zero.
        other = a
        while other == a or len(str(other)) != len(str(a)) or (minus and other < b):
            place = 10 ** rng.randrange(len(str(a)))
            other = a + (rng.randrange(10) - a // place % 10) * place
            if minus and a == b == 10 ** len(str(a)) - 1:
                break
        draft = Draft(skill).put(str(a), "first").put(sign, "operator").put(str(b), "second").put(separator)
        truth = {"first": a, "second": b, "result": a - b if minus else a + b, "carries": carries, "digits": size}
        if other != a:
            truth["counterpart"] = (f"{other}{sign}{b}{separator}", result(other, b))
        return draft.ask(result(a, b)).done(**truth)

    def pair(example: Example) -> str:
        a, b = sorted((example.truth["first"], example.truth["second"]))
        return f"{a} {b}"

    return collect(draw, n, seed=seed, part=part, key=pair)


def addition(n: int, *, seed: int, part: str = "train", digits: Range = (1, 3), separator: str = "=") -> list[Example]:
    """``47+85=`` → ``231.``: the sum of two numbers of equal length, its digits reversed, and a full stop.

    Held out are pairs of numbers, in either order: no question of the one part occurs turned round in the other.

    Args:
        n: how many examples.
        seed: of all that is drawn.
        part: "train", "held_out" or "all", by the pair of numbers.
        digits: least and most digits of both numbers, each length as likely as another.
        separator: between question and answer.

    Truth: ``first``, ``second``, ``result``, ``carries`` (out of each digit, least significant first), ``digits``,
    ``counterpart`` (one digit of the first number changed). Spans: ``first``, ``operator``, ``second``, ``answer``.

    Raises:
        ValueError: ``digits`` not within 1 to 6, or nothing in that part.
    """
    return _operation("addition", n, seed, part, digits, False, separator)


def subtraction(
    n: int, *, seed: int, part: str = "train", digits: Range = (1, 3), separator: str = "="
) -> list[Example]:
    """``85-47=`` → ``83.``: a difference that is never negative, its digits reversed, and a full stop.

    Arguments, held-out pairs, truth (``carries`` are borrows), spans and errors are those of `addition`; another
    ``separator`` makes a notation that a model has not seen. Of two equal numbers of nines there is no ``counterpart``.
    """
    return _operation("subtraction", n, seed, part, digits, True, separator)


def comparison(n: int, *, seed: int, part: str = "train", digits: Range = (1, 3)) -> list[Example]:
    """``Which is larger, 372 or 58?`` → `` 372.``; or smaller.

    Args:
        n: how many examples.
        seed: of all that is drawn.
        part: "train", "held_out" or "all", by the pair of numbers.
        digits: least and most digits, drawn for each number.

    Truth: ``first``, ``second`` (never equal), ``asked`` ("larger" or "smaller"), ``result``, ``counterpart`` (the
    other word). Spans: ``asked``, ``first``, ``second``, ``answer``.

    Raises:
        ValueError: ``digits`` not within 1 to 6, or nothing in that part.
    """
    digits = span_of(1, 6, digits=digits)

    def draw(rng: random.Random) -> Example:
        a = b = _operand(rng, rng.randint(*digits))
        while a == b:
            b = _operand(rng, rng.randint(*digits))
        asked = rng.choice(("larger", "smaller"))
        best, worst = (max(a, b), min(a, b)) if asked == "larger" else (min(a, b), max(a, b))
        draft = Draft("comparison").put("Which is").put(" " + asked, "asked").put(",").put(f" {a}", "first").put(" or")
        draft.put(f" {b}", "second").put("?")
        other = "smaller" if asked == "larger" else "larger"
        counterpart = (f"Which is {other}, {a} or {b}?", f" {worst}.")
        return draft.ask(f" {best}.").done(first=a, second=b, asked=asked, result=best, counterpart=counterpart)

    def pair(example: Example) -> str:
        return " ".join(map(str, sorted((example.truth["first"], example.truth["second"]))))

    return collect(draw, n, seed=seed, part=part, key=pair)


def greater_than(
    n: int, *, seed: int, part: str = "train", century: Range = (11, 19), order: str = "later"
) -> list[Example]:
    """``The war lasted from the year 1732 to the year 17`` → ``58``: any later year of the century is right.

    The answer is drawn evenly from the right ones, so that a model that has learned the task spreads its probability
    over them: the measure is the probability of the right years less that of the wrong ones. Years are two digits,
    two tokens: P(year) = P(tens) P(units | tens).

    Hanna, Liu and Variengien (2023), https://arxiv.org/abs/2305.00586.

    Args:
        n: how many examples.
        seed: of all that is drawn.
        part: "train", "held_out" or "all", by noun, century and year.
        century: least and most first two digits.
        order: "later" or "earlier": the second turns the task round (years 03 to 98 either way).

    Truth: ``noun``, ``century``, ``year`` (two digits as a number), ``right`` (all right answers, as texts),
    ``counterpart`` (the first year is 01, or 98 when earlier ones are asked; its answer is a year that was wrong before
    and is right now). Spans: ``noun``, ``century``, ``year``, ``answer``.

    Raises:
        ValueError: ``century`` not within 10 to 99, or an unknown ``order``.
    """
    century = span_of(10, 99, century=century)
    require_one_of(("later", "earlier"), order=order)

    def draw(rng: random.Random) -> Example:
        noun, first, year = rng.choice(lexicon.PERIODS), rng.randint(*century), rng.randint(2, 97)
        right = [f"{y:02d}" for y in (range(year + 1, 100) if order == "later" else range(year))]
        draft = Draft("greater_than").put("The").put(" " + noun, "noun").put(" lasted from the year")
        draft.put(f" {first}", "century").put(f"{year:02d}", "year").put(f" to the year {first}")
        edge = 1 if order == "later" else 98
        other = f"The {noun} lasted from the year {first}{edge:02d} to the year {first}"
        newly = [f"{y:02d}" for y in (range(edge + 1, year + 1) if order == "later" else range(year, edge))]
        draft.ask(rng.choice(right))
        return draft.done(noun=noun, century=first, year=year, right=right, counterpart=(other, rng.choice(newly)))

    def content(example: Example) -> str:
        return "{noun} {century} {year}".format(**example.truth)

    return collect(draw, n, seed=seed, part=part, key=content)
