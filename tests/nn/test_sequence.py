"""Small models with an exchangeable mixer, against torch's attention and one copy alone."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from paperlab.nn.sequence import (
    Blocks,
    MultiHead,
    PatchClassifier,
    attention,
    decoder,
    embed,
    fused_attention,
    l1_rows,
)

softmax = partial(fused_attention, causal=True)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def heads(*shape):
    return torch.randn(3, *shape, generator=generator())


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("batch", [(), (5,), (2, 5)])
def test_attention_is_torchs(causal, batch):
    q, k, v = heads(*batch, 4, 7, 8)
    wanted = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    torch.testing.assert_close(attention(q, k, v, causal=causal), wanted)
    torch.testing.assert_close(fused_attention(q, k, v, causal=causal), wanted)


def test_a_scale_is_used():
    q, k, v = heads(4, 7, 8)
    wanted = F.scaled_dot_product_attention(q, k, v, scale=0.1)
    torch.testing.assert_close(attention(q, k, v, causal=False, scale=0.1), wanted)


def test_rows_sum_to_one_over_what_is_seen():
    allowed = torch.ones(4, 4, dtype=torch.bool).tril()
    weights = l1_rows(torch.rand(2, 4, 4, generator=generator()), allowed)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4))
    assert weights[:, ~allowed].eq(0).all()
    exponential = torch.rand(2, 4, 4, generator=generator())
    torch.testing.assert_close(l1_rows(exponential.exp()), exponential.softmax(-1))
    assert l1_rows(torch.zeros(1, 4)).eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("score", [-1000.0, -105.0, -95.0, -80.0, -60.0, 0.0])
def test_rows_of_next_to_nothing_have_a_finite_gradient(dtype, score):
    scores = torch.full((1, 4), score, dtype=dtype, requires_grad=True)
    rows = l1_rows(F.softplus(scores))
    rows[0, 0].backward()
    assert scores.grad.isfinite().all()
    assert rows.eq(0).all() or torch.equal(rows, torch.full_like(rows, 0.25))
    assert rows.eq(0.25).all() or score < -60


def test_multi_head_is_torchs_with_the_same_weights():
    layer = MultiHead(2, 12, 3, softmax, generator=generator())
    x = torch.randn(2, 4, 7, 12, generator=generator(1))
    mask = ~torch.ones(7, 7, dtype=torch.bool).tril()
    for c in range(2):
        peer = nn.MultiheadAttention(12, 3, batch_first=True)
        with torch.no_grad():
            peer.in_proj_weight.copy_(torch.cat([W.weight[c].T for W in (layer.W_q, layer.W_k, layer.W_v)]))
            peer.in_proj_bias.copy_(torch.cat([W.bias[c, 0] for W in (layer.W_q, layer.W_k, layer.W_v)]))
            peer.out_proj.weight.copy_(layer.W_o.weight[c].T)
            peer.out_proj.bias.copy_(layer.W_o.bias[c, 0])
        torch.testing.assert_close(layer(x)[c], peer(x[c], x[c], x[c], attn_mask=mask)[0])


def test_rotary_heads_see_distances_only():
    layer = MultiHead(1, 8, 2, softmax, rotary=4, generator=generator())
    x = torch.randn(1, 1, 1, 8, generator=generator(1)).expand(1, 1, 100, 8)  # also beyond the first table's length
    torch.testing.assert_close(layer(x)[0, 0, 5], layer(x)[0, 0, 99])  # the same values everywhere: the same mean
    q, k = torch.randn(2, 1, 1, 1, 1, 4, generator=generator(2)).expand(2, 1, 1, 1, 9, 4)
    turns = layer.rotary.turns(9, 0, None)
    scores = (layer.rotary(q, turns) @ layer.rotary(k, turns).mT)[0, 0, 0]
    torch.testing.assert_close(scores[8, 5], scores[3, 0])
    assert not torch.isclose(scores[8, 5], scores[8, 4])


def model(copies=3, attend=softmax):
    return decoder(copies, 11, [attend] * 2, width=8, heads=2, hidden=16, rotary=2, generator=generator())


def test_the_attention_does_not_change_the_first_weights():
    other = model(attend=partial(attention, normaliser=l1_rows, causal=True))
    assert all(torch.equal(a, b) for a, b in zip(model().parameters(), other.parameters(), strict=True))


def test_copies_do_not_see_each_other():
    whole, alone = model(), model(1)
    with torch.no_grad():
        for mine, theirs in zip(alone.parameters(), whole.parameters(), strict=True):
            mine.copy_(theirs[1:2])
    tokens = torch.randint(11, (3, 4, 6), generator=generator(1))
    torch.testing.assert_close(whole(tokens)[1:2], alone(tokens[1:2]))
    torch.testing.assert_close(whole.losses(tokens)[1:2], alone.losses(tokens[1:2]))
    whole.losses(tokens)[1].backward()
    assert all(p.grad[[0, 2]].eq(0).all() and p.grad[1].ne(0).any() for p in whole.parameters())


def test_logits_depend_on_the_past_only():
    lm, tokens = model(), torch.randint(11, (1, 2, 6), generator=generator(1))
    changed = tokens.clone()
    changed[..., 3] = (changed[..., 3] + 1) % 11
    torch.testing.assert_close(lm(changed)[..., :3, :], lm(tokens)[..., :3, :])
    assert not torch.allclose(lm(changed)[..., 5, :], lm(tokens)[..., 5, :])


def test_losses_are_cross_entropy_of_the_next_token():
    lm, tokens = model(), torch.randint(11, (3, 4, 6), generator=generator(1))
    logits = lm(tokens[..., :-1])
    wanted = [F.cross_entropy(logits[c].flatten(0, 1), tokens[c, :, 1:].flatten()) for c in range(3)]
    torch.testing.assert_close(lm.losses(tokens), torch.stack(wanted))
    each = lm.losses(tokens, "none")
    assert each.shape == (3, 4, 5)
    torch.testing.assert_close(each.mean((1, 2)), lm.losses(tokens))


def test_embed_reads_each_copys_own_table():
    table, tokens = torch.randn(3, 11, 8, generator=generator()), torch.randint(11, (3, 4, 6), generator=generator(1))
    torch.testing.assert_close(embed(tokens, table), torch.stack([table[c][tokens[c]] for c in range(3)]))
    torch.testing.assert_close(embed(tokens[:1], table)[2], table[2][tokens[0]])


def test_patches_without_places_may_come_in_any_order():
    g = generator()
    blocks = Blocks(2, 8, 16, [MultiHead(2, 8, 2, partial(fused_attention, causal=False), generator=g)], generator=g)
    vision = PatchClassifier(2, 5, 4, 10, 8, blocks, generator=g)
    x, order = torch.randn(2, 3, 5, 4, generator=g), torch.randperm(5, generator=g)
    assert vision(x).shape == (2, 3, 10)
    assert not torch.allclose(vision(x), vision(x[:, :, order]))
    nn.init.zeros_(vision.places)
    torch.testing.assert_close(vision(x), vision(x[:, :, order]))
    torch.testing.assert_close(vision(x[:1])[0], vision(x)[0])


@pytest.mark.parametrize(
    ("arguments", "name"),
    [((1, 8, 3, softmax, 0), "width"), ((1, 8, 2, softmax, 3), "rotary"), ((1, 8, 2, softmax, 6), "rotary")],
)
def test_bad_sizes_are_named(arguments, name):
    *rest, rotary = arguments
    with pytest.raises(ValueError, match=name):
        MultiHead(*rest, rotary=rotary)


def test_bad_calls_are_named():
    with pytest.raises(ValueError, match="reduction"):
        model().losses(torch.zeros(1, 1, 5, dtype=torch.long), "sum")
    with pytest.raises(ValueError, match="tokens"):
        model().losses(torch.zeros(1, 1, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="mixers"):
        Blocks(1, 8, 16, [])
