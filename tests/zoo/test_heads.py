"""Scores of heads: closed forms for a model that attends to everything alike, and heads made by hand that score 1."""

import pytest
import torch

from paperlab.data import skills
from paperlab.data.held_out import HELD_OUT
from paperlab.nn.transformer import Transformer, TransformerConfig
from paperlab.zoo import heads
from paperlab.zoo.language import CONTEXT, VOCAB, tokenizer


@pytest.fixture
def even():
    """Two layers of three heads that attend to all tokens so far alike."""
    sizes = {"layers": 2, "width": 12, "heads": 3, "context": CONTEXT, "hidden": 4}
    model = Transformer(TransformerConfig(vocab=VOCAB, **sizes), generator=torch.Generator().manual_seed(0))
    for block in model.blocks:
        torch.nn.init.zeros_(block.attn.W_q.weight)
    model.tokenizer = tokenizer()
    return model.eval()


def test_even_attention_scores_one_over_the_number_of_tokens_seen(even):
    length = (CONTEXT - 1) // 2
    second = sum(1 / (q + 1) for q in range(length + 1, 2 * length + 1)) / length
    torch.testing.assert_close(heads.induction_scores(even, rows=2), torch.full((2, 3), second))
    settled = sum(1 / (q + 1) for q in range(8, CONTEXT)) / (CONTEXT - 8)
    torch.testing.assert_close(heads.first_token_scores(even, rows=2), torch.full((2, 3), settled))


class ByHand(Transformer):
    """A model whose second layer's last head attends where it is told: to ``key`` from ``query``, else to itself."""

    def __init__(self, where):
        super().__init__(TransformerConfig(vocab=VOCAB, layers=2, width=12, heads=3, context=CONTEXT, hidden=4))
        self.where, self.tokenizer = where, tokenizer()

    def run_with_cache(self, tokens, names):
        n = tokens.shape[1]
        seen = {name: torch.eye(n).expand(len(tokens), 3, n, n).clone() for name in names}
        for row, ids in enumerate(tokens.tolist()):
            for query, key in self.where(ids).items():
                seen["blocks.1.attn.pattern"][row, 2, query] = torch.eye(n)[key]
        return None, seen


def alone(value=1.0):
    return torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, value]])


def test_an_induction_head_made_by_hand_scores_one():
    def after_the_last_time(ids):
        found, last = {}, {}
        for q, token in enumerate(ids):
            if token in last:
                found[q] = last[token] + 1
            last[token] = q
        return found

    # Random tokens repeat by chance within a copy: there the head looks at the later one.
    found = heads.induction_scores(ByHand(after_the_last_time), rows=4)
    assert found[1, 2] > 0.9
    torch.testing.assert_close(found * (1 - alone()), torch.zeros(2, 3))


def test_a_retrieval_head_made_by_hand_scores_one():
    examples = skills.key_value_retrieval(5, seed=HELD_OUT, part="held_out", context=(60, 200))

    def copied(ids):
        text = next(e for e in examples if tokenizer().encode(e.text) == ids[1:])
        source, answer = (tokenizer().positions(text.text, text.truth["spans"][s]) for s in ("source", "answer"))
        assert [ids[k + 1] for k in source] == [ids[k + 1] for k in answer]  # what is looked at is what is written
        return {a: s + 1 for s, a in zip(source, answer, strict=True)}

    torch.testing.assert_close(heads.retrieval_scores(ByHand(copied), n=5), alone())


def test_the_stream_of_a_model_without_blocks_is_its_embedding(even):
    for name, weight in even.named_parameters():
        if "W_o" in name:  # W_o and W_out: nothing is added
            torch.nn.init.zeros_(weight)
    found = heads.stream_sizes(even, rows=2)
    first = even.embedding.weight[tokenizer().bos].abs().max().item()
    assert found["largest at the first token"] == pytest.approx([first, first], abs=1e-4)
    assert found["largest elsewhere"][0] == found["largest elsewhere"][1]


def test_a_portrait_fits_a_card(even):
    told = heads.portrait(even)
    assert [len(row) for row in told["heads"]["retrieval"]] == [3, 3]
    assert len(told["samples"]) == len(heads.PROMPTS)
    assert all(isinstance(text, str) for _, text in told["samples"])
