"""The examiner, asked about models whose answers are known."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from paperlab.data import skills
from paperlab.nn.transformer import Transformer, TransformerConfig
from paperlab.zoo.examine import at_rest, bits_per_byte, ended, exact, last_run
from paperlab.zoo.language import VOCAB, encode, tokenizer


class Stub(Transformer):
    """A decoder in name only, so that it may be examined."""

    def __init__(self):
        super().__init__(TransformerConfig(vocab=4, layers=1, width=2, heads=1, context=1, hidden=1))
        self.tokenizer = tokenizer()


class Parrot(Stub):
    """Says by heart how the given rows go on; after everything else it says token 5."""

    def __init__(self, rows):
        super().__init__()
        self.next = {tuple(row[: k + 1]): row[k + 1] for row in map(list, rows) for k in range(len(row) - 1)}

    def states(self, tokens):
        said = [[self.next.get(tuple(row[: k + 1]), 5) for k in range(len(row))] for row in tokens.tolist()]
        return F.one_hot(torch.tensor(said), VOCAB).float()

    def unembed(self, states):
        return states


@pytest.fixture(scope="module")
def examples():
    return [
        e for name in ("addition", "facts", "key_value_retrieval", "docstring") for e in skills.SKILLS[name](6, seed=3)
    ]


def test_who_knows_a_text_by_heart_gives_its_answer_and_nobody_else_does(examples):
    ids, _ = encode(examples, tokenizer())
    known = np.arange(len(examples)) % 3 == 0
    parrot = Parrot([row for row, k in zip(ids, known, strict=True) if k])
    assert (exact(parrot, examples, batch=5) == known).all()


def test_one_wrong_token_of_an_answer_is_a_wrong_answer(examples):
    ids, marks = encode(examples, tokenizer())
    for k, (row, mark) in enumerate(zip(ids, marks, strict=True)):
        answer = last_run(mark > 0)
        for place in (answer.start, answer.stop - 1):
            parrot = Parrot([row])
            parrot.next[tuple(row[:place].tolist())] = 6
            assert not exact(parrot, [examples[k]])[0]
        parrot.next[tuple(row[:place].tolist())] = int(row[place])
        parrot.next[tuple(row[: answer.start - 1].tolist())] = 6  # before the answer anything may be said
        assert exact(parrot, [examples[k]])[0]


def test_the_last_run_is_the_last_answer():
    assert last_run(np.array([0, 1, 1, 0, 1, 1, 1, 0]) > 0) == slice(4, 7)
    assert last_run(np.array([1, 1]) > 0) == slice(0, 2)


def test_only_who_begins_a_new_text_has_ended_the_last(examples):
    bos = tokenizer().bos
    ids, marks = encode(examples, tokenizer())
    whole = [row for row, mark in zip(ids, marks, strict=True) if mark[-1] > 0]
    assert 0 < len(whole) < len(ids)  # a list of codes ends with a full stop that is given
    assert ended(Parrot([[*row, bos] for row in whole]), examples) == [True] * len(whole)
    assert ended(Parrot([[*row, bos] for row in whole[1:]]), examples) == [False] + [True] * (len(whole) - 1)


def test_a_model_without_a_clue_pays_the_logarithm_of_the_vocabulary():
    class Clueless(Stub):
        def forward(self, tokens):
            return torch.zeros(*tokens.shape, VOCAB)

    text = "The value of an attribute may be anything at all. " * 40
    expected = len(tokenizer().encode(text)) * math.log2(VOCAB) / len(text)
    assert bits_per_byte(Clueless(), text) == pytest.approx(expected, rel=1e-5)


def test_of_two_opposite_units_one_is_at_rest():
    sizes = {"layers": 2, "width": 8, "heads": 2, "context": 256, "hidden": 6}
    model = Transformer(TransformerConfig(vocab=VOCAB, activation="relu", **sizes))
    model.tokenizer = tokenizer()
    for block in model.blocks:
        block.mlp.W_in.weight.data[3:] = -block.mlp.W_in.weight.data[:3]
    assert at_rest(model, ["One of a pair is always 0.", "Not both."]) == [0.5, 0.5]
    model.blocks[1].mlp.W_in.weight.data.zero_()
    assert at_rest(model, ["And here all of a layer."]) == [0.75]
