"""Kneser–Ney against the definition written with dictionaries, and against what every distribution must satisfy."""

from collections import Counter
from functools import cache

import numpy as np
import pytest

from paperlab.ngrams import KneserNey

TEXT = ["abcdefgr".index(c) for c in "abracadabraabracadacabbagecadabrafacadeacabadabra"]
VOCAB = 8


def by_definition(order):
    """p(w | h) as the formula says it, from sets of strings."""
    counts = {order: Counter(tuple(TEXT[i : i + order]) for i in range(len(TEXT) - order + 1))}
    for size in range(order - 1, 0, -1):
        counts[size] = Counter(gram[1:] for gram in counts[size + 1])

    @cache
    def p(w, h):
        k = len(h) + 1
        shorter = p(w, h[1:]) if h else 1 / VOCAB
        after = {gram[-1]: n for gram, n in counts[k].items() if gram[:-1] == h}
        if not after:
            return shorter
        ones, twos = (sum(n == m for n in counts[k].values()) for m in (1, 2))
        discount = ones / (ones + 2 * twos) if ones and twos else 0.5
        total = sum(after.values())
        return ((after[w] - discount if w in after else 0) + discount * len(after) * shorter) / total

    return p


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_it_is_the_formula(order):
    model, p = KneserNey(np.array(TEXT), vocab=VOCAB, order=order), by_definition(order)
    asked = np.random.default_rng(0).integers(0, VOCAB, 200)
    asked[:40] = TEXT[:40]
    expected = [np.log(p(int(asked[i]), tuple(map(int, asked[i - order + 1 : i])))) for i in range(order - 1, 200)]
    assert np.allclose(model.log_probabilities(asked), expected)


def test_probabilities_of_all_tokens_add_up_to_one():
    model = KneserNey(np.array(TEXT), vocab=VOCAB, order=4)
    for context in ([0, 1, 7], [7, 7, 7], TEXT[:3]):
        total = sum(np.exp(model.log_probabilities(np.array([*context, w])))[0] for w in range(VOCAB))
        assert total == pytest.approx(1)


def test_a_token_that_follows_many_is_likelier_in_a_new_context_than_a_frequent_one_that_follows_one():
    # "Francisco" (1) is as frequent as anything, but only after "San" (0); 2 has followed three different tokens.
    text = np.array([0, 1] * 6 + [3, 2, 4, 2, 5, 2])
    after = np.exp([KneserNey(text, vocab=8, order=2).log_probabilities(np.array([7, w]))[0] for w in (1, 2)])
    assert after[1] > after[0]


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: KneserNey(np.array([0, 1]), vocab=2, order=3), "length of tokens"),
        (lambda: KneserNey(np.array([0, 9]), vocab=2, order=1), "tokens must be between"),
        (lambda: KneserNey(np.array([0, 1]), vocab=2, order=0), "order"),
        (lambda: KneserNey(np.zeros(9, int), vocab=2**13, order=5), "order must keep"),
        (lambda: KneserNey(np.array(TEXT), vocab=VOCAB).log_probabilities(np.array([1])), "length of tokens"),
    ],
)
def test_bad_input_names_the_argument(call, name):
    with pytest.raises(ValueError, match=name):
        call()
