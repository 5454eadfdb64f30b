"""The mixture's rows: what is learned in them, and where answers end."""

import pytest
import torch

from paperlab.zoo.language import ANSWER, CONTEXT, ENDING, ROWS, Mixture, sentences, tokenizer


@pytest.fixture(scope="module")
def rows():
    mixture = Mixture()
    found = [mixture.rows(step) for step in range(40, 46)]
    return torch.cat([tokens for tokens, _ in found]), torch.cat([weights for _, weights in found])


def test_every_row_is_full_and_depends_on_the_step_alone(rows):
    tokens, weights = rows
    assert tokens.shape == weights.shape == (6 * ROWS, CONTEXT + 1)
    assert (tokens != tokenizer().pad).all()
    again = Mixture()
    again.rows(7)  # whatever was asked before
    assert torch.equal(again.rows(43)[0], tokens[3 * ROWS : 4 * ROWS])


def test_the_token_after_an_answer_is_learned_whatever_it_is(rows):
    tokens, weights = rows
    after = (weights[:, :-1] == ANSWER) & (weights[:, 1:] != ANSWER)
    assert after.sum() > 100
    assert (weights[:, 1:][after] == ENDING).all()
    ends = tokens[:, 1:][after]
    assert (ends == tokenizer().bos).any()  # the example is over
    assert (ends != tokenizer().bos).any()  # a value's full stop, a card's semicolon


def test_of_a_skill_only_answers_and_their_ends_are_learned(rows):
    tokens, weights = rows
    bos = tokens == tokenizer().bos
    skilled = (weights == ANSWER).any(1)
    assert 0.3 < skilled.float().mean() < 0.7
    before = torch.cat([torch.zeros(len(weights), 1), weights[:, :-1]], dim=1)
    learned_ends = (weights == ENDING)[skilled]
    assert (before[skilled][learned_ends] == ANSWER).all()
    assert (weights[skilled & bos[:, 0], 0] == 0).all()


def test_an_answer_that_was_learned_can_be_read_off_the_row(rows):
    tokens, weights = rows
    made = tokenizer()
    for row, marks in zip(tokens, weights == ANSWER, strict=True):
        text = made.decode(row.tolist())
        if "Logic:" in text and marks.any():
            told = made.decode(row[marks].tolist())
            assert " true" in told or " false" in told


def test_sentences_are_begun_ended_and_padded():
    made = tokenizer()
    found = sentences(["a red circle.", "", " a bar"], ended=True)
    assert found[:, 0].tolist() == [made.bos] * 3
    assert found[1].tolist() == [made.bos, made.sep] + [made.pad] * (found.shape[1] - 2)
    assert made.decode(found[0].tolist()) == " a red circle."
    assert made.decode(found[2].tolist()) == " a bar"
    assert (sentences(["a bar"]) != made.sep).all()
    with pytest.raises(ValueError, match="texts"):
        sentences([])
