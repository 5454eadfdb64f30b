"""The masked-language task: what is hidden and what is not, and scores that a model of known knowledge must get."""

import numpy as np
import pytest
import torch
from torch import nn

from paperlab.data import skills
from paperlab.zoo import masked
from paperlab.zoo.language import CONTEXT, VOCAB, tokenizer
from paperlab.zoo.recipes import RECIPES


def test_what_is_hidden_is_what_was_chosen():
    rng = np.random.default_rng(0)
    tokens = torch.from_numpy(rng.integers(4, VOCAB, (200, 100)))
    chosen = torch.from_numpy(rng.random(tokens.shape) < 0.3)
    shown = masked.hide(tokens, chosen, 2, rng)
    assert torch.equal(shown[~chosen], tokens[~chosen])
    # Of the 6,000 chosen, 80% are masked and 10% kept; the bounds are five standard errors.
    assert (shown[chosen] == 2).float().mean().item() == pytest.approx(0.8, abs=0.026)
    assert (shown[chosen] == tokens[chosen]).float().mean().item() == pytest.approx(0.1, abs=0.02)


class Oracle(nn.Module):
    """Knows one text by heart: its logits are those of the tokens that stand there."""

    def __init__(self, known):
        super().__init__()
        self.known, self.tokenizer = known, tokenizer()

    def forward(self, tokens, padding=None):
        self.seen = tokens
        return nn.functional.one_hot(self.known[: len(tokens), : tokens.shape[1]], VOCAB).float()


def test_answers_are_hidden_whole_and_scored_whole():
    examples = skills.key_value_retrieval(3, seed=0, context=(10, 60), value_tokens=(4, 4))
    ids, _ = masked.encode(examples, tokenizer())
    order = np.argsort([len(i) for i in ids])
    known, _ = masked.padded([ids[r] for r in order], 0)
    oracle = Oracle(known)
    assert masked.filled_in(oracle, examples).all()
    assert ((oracle.seen == tokenizer().mask).sum(1) == 4).all()
    assert torch.equal(oracle.seen[oracle.seen != 2], known[oracle.seen != 2])
    oracle.known = known.clone()
    oracle.known[oracle.seen == 2] = torch.tensor([5, 6, 7, 8] * 3)  # all answers wrong
    assert not masked.filled_in(oracle, examples).any()


def test_padding_marks_the_ends_of_short_rows():
    rows, padding = masked.padded([np.array([5, 6, 7]), np.array([8])], 0)
    assert rows.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert padding.tolist() == [[False] * 3, [False, True, True]]


def test_the_loss_of_an_untrained_encoder_is_that_of_a_guess():
    task = masked.MaskedTask(torch.device("cpu"))
    torch.manual_seed(0)
    with torch.no_grad():
        loss = task.loss(RECIPES["pocket-bert"].build(), 0)
    assert loss.item() == pytest.approx(np.log(VOCAB), abs=0.2)
    assert task.seen_per_step == 16 * CONTEXT
