"""Hopular against torch's own attention and modules, nearest neighbours, invariances and tables written out by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, r2_score
from sklearn.neighbors import KNeighborsClassifier
from torch import nn
from torch.nn import functional as F

from paperlab.data.tables import as_table, load_table
from paperlab.memory.hopular import (
    Association,
    Embedding,
    Hopular,
    StackedNorm,
    annealed,
    cell_loss,
    choose,
    encode,
    error,
    folds,
    predict,
    standard,
    standardised,
    train,
)
from paperlab.nn import StackedLinear

SIZES = (1, 3, 1, 2)  # a number, a word of three, a number; the target is a word of two


def rows(copies: int, n: int, seed: int) -> torch.Tensor:
    """Random cells of features of `SIZES`."""
    g = torch.Generator().manual_seed(seed)
    cells = torch.zeros(copies, n, 4, 3)
    for j, size in enumerate(SIZES):
        if size == 1:
            cells[:, :, j, 0] = torch.randn(copies, n, generator=g)
        else:
            cells[:, :, j, :size] = F.one_hot(torch.randint(size, (copies, n), generator=g), size).float()
    return cells


def network(copies: int = 2, seed: int = 0, **options) -> Hopular:
    torch.manual_seed(seed)
    return Hopular(copies, SIZES, **options).eval()


def association(copies: int = 1, size: int = 6, **options) -> Association:
    torch.manual_seed(1)
    return Association(copies, size, **({"heads": 2, "hidden": 3} | options)).eval()


def test_association_is_torchs_attention_with_the_mask():
    layer, state, stored = association(2, scaling=1.7), torch.randn(2, 1, 5, 6), torch.randn(2, 1, 7, 6)
    nn.init.normal_(layer.norm.weight)
    nn.init.normal_(layer.norm.bias)
    own = torch.zeros(2, 5, 7, dtype=torch.bool)
    own[:, torch.arange(5), torch.arange(5)] = True
    new, _ = layer(state, standard(stored), own)
    for c in range(2):
        x, y = (F.layer_norm(z[c, 0], (6,), layer.norm.weight[c], layer.norm.bias[c]) for z in (state, stored))
        q, k, v = (
            (z @ W.weight[c] + W.bias[c]).view(-1, 2, 3).transpose(0, 1)
            for z, W in ((x, layer.W_Q), (y, layer.W_K), (y, layer.W_V))
        )
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=~own[c], scale=1.7 / math.sqrt(3))
        out = found.transpose(0, 1).reshape(5, 6) @ layer.W_O.weight[c] + layer.W_O.bias[c]
        torch.testing.assert_close(new[c, 0], x + out)  # the residual is the normalised state


def identical(size: int, scaling: float) -> Association:
    """One head, all projections the identity."""
    layer = association(1, size, heads=1, hidden=size, scaling=scaling)
    for W in (layer.W_Q, layer.W_K, layer.W_V, layer.W_O):
        nn.init.zeros_(W.bias)
        W.weight.data[0] = torch.eye(size)
    return layer


def test_sharp_retrieval_with_identity_projections_is_the_nearest_neighbour():
    g = torch.Generator().manual_seed(3)
    known, asked = torch.randn(40, 5, generator=g), torch.randn(30, 5, generator=g)
    labels = torch.randint(3, (40,), generator=g)
    state, stored = F.layer_norm(asked, (5,)), F.layer_norm(known, (5,))  # of one length: nearest = largest product
    found = identical(5, 1e6)(asked[None, None], stored[None, None])[1][0, 0, 0].argmax(-1)
    by_sklearn = KNeighborsClassifier(1).fit(stored, labels).predict(state)
    np.testing.assert_array_equal(labels[found].numpy(), by_sklearn)


def test_flat_retrieval_is_the_mean_of_the_memory():
    stored, state = torch.randn(1, 1, 9, 5), torch.randn(1, 1, 4, 5)
    new, weights = identical(5, 1e-9)(state, stored)
    expected = F.layer_norm(state, (5,)) + stored.mean(2, keepdim=True)
    torch.testing.assert_close(new, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 9))


def test_memory_is_a_set():
    net, cells, known = network(), rows(2, 6, 1), rows(2, 11, 2)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(
        predict(net, cells, known)[0], predict(net, cells, known[:, order])[0], atol=1e-5, rtol=1e-5
    )


def test_the_own_row_has_weight_zero_and_its_label_no_influence():
    net, known = network(), rows(2, 8, 5)
    own = torch.arange(8).expand(2, -1)
    read, _, weights = predict(net, known, known, own)
    assert all((p.diagonal(dim1=-2, dim2=-1) == 0).all() for p in weights)
    torch.testing.assert_close(weights[0].sum(-1), torch.ones(2, 2, 8))
    changed = known.clone()
    changed[:, 0, -1] = changed[:, 0, -1].flip(-1) + torch.tensor([5.0, -2.0, 0.0])
    torch.testing.assert_close(predict(net, known, changed, own)[0][:, :, 0], read[:, :, 0])  # blind to its own label
    assert (predict(net, known, changed)[0][1:, :, 0] - read[1:, :, 0]).abs().min() > 1e-6  # without the mask: not


def test_the_targets_of_queries_are_never_seen():
    net, cells, known = network(), rows(2, 6, 6), rows(2, 9, 7)
    wrong = cells.clone()
    wrong[..., -1, :] = 17.0
    torch.testing.assert_close(predict(net, cells, known)[0], predict(net, wrong, known)[0])


def test_without_its_output_projection_the_memory_is_silent():
    net, cells = network(), rows(2, 6, 8)
    before = predict(net, cells, rows(2, 9, 9))[0]
    for layer in net.H_s:
        nn.init.zeros_(layer.W_O.weight)
    one, other = (predict(net, cells, rows(2, 9, seed))[0] for seed in (9, 10))
    torch.testing.assert_close(one, other)
    assert (one[1:] - before[1:]).abs().max() > 1e-4


def test_blocks_see_the_original_features_and_can_lose_either_association():
    cells, known, hidden = rows(1, 5, 11), rows(1, 9, 12), torch.zeros(1, 5, 4, dtype=torch.bool)
    changed = cells.clone()
    changed[:, :, 0, 0] += 1  # how far do the other features hear of that?
    moves = {}
    for samples in (True, False):
        for features in (True, False):
            net = network(1, samples=samples, features=features)
            one, other = (net.states(x, hidden, known)[0][-1] for x in (cells, changed))
            moves[samples, features] = (one - other)[:, :, 1:].abs().max().item()
    assert moves[False, False] == 0
    assert min(moves[True, True], moves[True, False], moves[False, True]) > 1e-3
    full, seen = network(1), []
    # Every block stores the input: its features, not those of the state, are what H_f retrieves.
    handle = full.H_f[1].register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    start = predict(full, cells, known)[1][0]
    handle.remove()
    torch.testing.assert_close(seen[0][1], F.layer_norm(start, (8,)))


def test_embedding_of_a_feature_by_hand():
    torch.manual_seed(2)
    copies, c, j = 2, 1, 1
    embed = Embedding(copies, SIZES, 4, 0.0).eval()
    nn.init.normal_(embed.norm.weight)
    nn.init.normal_(embed.norm.bias)
    got = embed(rows(copies, 3, 13), torch.tensor([[[False, True, False, True]] * 3] * copies))
    own = j * copies + c
    x = torch.tensor([0.0, 0.0, 0.0, 1.0])  # hidden: nothing but the flag
    x = x @ embed.read.weight[own] + embed.read.bias[own, 0] + embed.kind[c, 1] + embed.place[c, j]
    x = F.layer_norm(F.gelu(x), (4,), embed.norm.weight[own], embed.norm.bias[own])
    torch.testing.assert_close(got[c, :, j], (x @ embed.write.weight[own] + embed.write.bias[own, 0]).expand(3, -1))


def test_copies_do_not_touch_each_other():
    net, cells, known = network(3), rows(3, 5, 14), rows(3, 7, 15)
    together = predict(net, cells, known)[0]
    loss = together[-1][1].sum()
    other = known.clone()
    other[[0, 2]] += 1
    torch.testing.assert_close(predict(net, cells, other)[0][-1][1].sum(), loss)


def test_cell_loss_against_torch():
    predicted, true = torch.randn(2, 5, 4, 3), rows(2, 5, 16)
    got = cell_loss(predicted, true, SIZES)
    torch.testing.assert_close(got[..., 0], F.mse_loss(predicted[..., 0, 0], true[..., 0, 0], reduction="none"))
    expected = F.cross_entropy(
        predicted[..., 3, :2].flatten(0, 1), true[..., 3, :2].argmax(-1).flatten(), reduction="none"
    )
    torch.testing.assert_close(got[..., 3].flatten(), expected)


def test_cell_loss_has_a_finite_gradient_where_cells_are_padded():
    predicted = torch.randn(1, 4, 4, 3, requires_grad=True)
    cell_loss(predicted, rows(1, 4, 17), SIZES).sum().backward()
    assert predicted.grad.isfinite().all()
    assert (predicted.grad[..., 3, 2] == 0).all()


def test_tables_become_cells():
    table = as_table({"a": [1.0, 2.0, 4.0], "b": ["x", "z", "x"]}, ["no", "yes", "yes"])
    cells, sizes = encode(table)
    assert sizes == (1, 2, 2)
    assert cells.tolist() == [[[1, 0], [1, 0], [1, 0]], [[2, 0], [0, 1], [0, 1]], [[4, 0], [1, 0], [0, 1]]]
    numbers = replace(table, labels=np.array([0.5, 1.5, 2.5]))
    assert encode(numbers)[1] == (1, 2, 1)
    with pytest.raises(ValueError, match="column b"):
        encode(as_table({"b": [1.0, "unknown"]}, ["no", "yes"]))


def test_standardised_by_the_known_rows_only():
    cells, sizes = encode(load_table("iris"))
    known = torch.arange(0, 150, 3)[None]
    x = standardised(cells[None], sizes, known)
    np.testing.assert_allclose(x[0, ::3, :4, 0].mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(x[0, ::3, :4, 0].std(0, correction=0), 1, atol=1e-5)
    assert x[0, :, :4, 0].mean(0).abs().max() > 1e-3  # the other rows had no say
    torch.testing.assert_close(x[0, :, 4], cells[:, 4])


def test_weight_of_the_feature_loss():
    assert [round(annealed(t, 5), 6) for t in range(5)] == [1.0, round((1 + math.sqrt(0.5)) / 2, 6), 0.5,
                                                             round((1 - math.sqrt(0.5)) / 2, 6), 0.0]  # fmt: skip


def test_error_against_sklearn():
    true, predicted = rows(3, 20, 20), torch.randn(3, 20, 4, 3)
    pairs = zip(true[..., 1, :].argmax(-1), predicted[..., 1, :].argmax(-1), strict=True)
    wrong = [1 - accuracy_score(t, p) for t, p in pairs]
    np.testing.assert_allclose(error(predicted[..., 1, :], true[..., 1, :], 3), wrong, atol=1e-6)
    unexplained = [1 - r2_score(t, p) for t, p in zip(true[..., 0, 0], predicted[..., 0, 0], strict=True)]
    np.testing.assert_allclose(error(predicted[..., 0, :], true[..., 0, :], 1), unexplained, rtol=1e-5)


def test_folds_are_disjoint_and_no_choice_is_scored_on_its_own_test_rows():
    known, check, test = folds(53, 25, 0)
    assert sorted(test.flatten().tolist()) == sorted(check.flatten().tolist())
    assert test.flatten().unique().numel() == test.numel() == 50
    for i in range(5):
        assert torch.cat([known[i], check[i], test[i]]).unique().numel() == 25 + 10 + 10
        assert [j for j in range(5) if set(check[j].tolist()) & set(test[i].tolist())] == [(i - 1) % 5]


def test_choice_ignores_the_split_that_scored_on_the_test_rows():
    scores = torch.ones(2, 5)
    scores[1, 3] = -10.0  # the second setting shines in split 3 alone: every split but 4 may know
    assert choose(scores).tolist() == [1, 1, 1, 1, 0]
    assert choose(torch.tensor([[3.0, 1.0, 2.0], [1.0, 1.0, 1.5]])).tolist() == [1, 1, 1]


def test_stacked_norm_is_layer_norm():
    torch.manual_seed(3)
    norm, x = StackedNorm(2, 6), torch.randn(2, 5, 6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    expected = F.layer_norm(x[1], (6,), norm.weight[1], norm.bias[1])
    torch.testing.assert_close(norm(x)[1], expected)
    layers = StackedLinear(2, 6, 3), StackedLinear(2, 6, 4)
    by_hand = torch.cat([expected @ layer.weight[1] + layer.bias[1] for layer in layers], dim=-1)
    torch.testing.assert_close(
        norm.then(standard(x), *layers)[1], by_hand
    )  # folded into the weights, the same function


def test_training_learns_a_rule():
    # The label is the sign of the first number; a held-out half is answered from the other.
    cells = rows(1, 160, 18)
    cells[..., -1, 0] = (cells[..., 0, 0] > 0).float()
    cells[..., -1, 1] = 1 - cells[..., -1, 0]
    net = network(1, dropout=0.0, lookup_dropout=0.0)
    history = train(net, cells[:, :80], steps=60, lr=0.01, batch=40)
    assert history[-1] < history[30]
    right = predict(net, cells[:, 80:], cells[:, :80])[0][-1].argmax(-1) == cells[:, 80:, -1].argmax(-1)
    assert right.float().mean() > 0.85


def test_what_a_network_is_shown_in_training():
    net, cells, seen = network(1), rows(1, 600, 21), []
    net.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    train(net, cells, steps=1, lr=0.001, batch=500)
    train(net, cells, steps=1, lr=0.001, batch=500, leak=True)
    shown, hidden, memory, own = seen[0]
    assert hidden[..., -1].all()  # the target, always
    assert hidden[..., :-1].float().mean() == pytest.approx(0.025, abs=0.02)
    torch.testing.assert_close(memory, cells)  # every training row, with its label
    differs = (shown != cells[:, own[0]])[..., 0]
    assert differs[..., [0, 2]].float().mean() == pytest.approx(0.175, abs=0.06)
    others = torch.isin(shown[..., 0, 0], cells[..., 0, 0])
    assert others.all()  # a replaced number is that of another row
    assert seen[1][3] is None  # the leak


def test_one_run_among_many_is_the_run_alone():
    # Side by side with another rate, and with one that has no feature loss, a copy takes the steps that it would have
    # taken alone: the same rows, hidden cells and dropout.
    cells = rows(1, 30, 19)
    alone, targets, many = network(1), network(1), network(3)
    for name, parameter in many.named_parameters():
        # Features before copies: repeat each feature's entry for all copies.
        source = dict(alone.named_parameters())[name].data
        per_feature = name.startswith(("embed.read", "embed.write", "embed.norm"))
        parameter.data = source.repeat_interleave(3, 0) if per_feature else source.repeat(3, *[1] * (source.ndim - 1))
    runs = (alone, 0.004, True), (targets, 0.004, False), (many, [0.004, 0.01, 0.004], [True, True, False])
    for net, lr, anneal in runs:
        torch.manual_seed(0)
        copies = 3 if net is many else 1
        train(net, cells.repeat(copies, 1, 1, 1), lr=lr, anneal=anneal, steps=4, batch=20)
    one, faster, without = many.summary.weight
    torch.testing.assert_close(one, alone.summary.weight[0], atol=2e-5, rtol=1e-3)
    torch.testing.assert_close(without, targets.summary.weight[0], atol=2e-5, rtol=1e-3)
    assert min((one - faster).abs().max(), (one - without).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: Hopular(1, (1,)), "sizes"),
        (lambda: Hopular(0, SIZES), "copies"),
        (lambda: Hopular(1, SIZES, dropout=1.5), "dropout"),
        (lambda: Association(1, 4, heads=0, hidden=2), "heads"),
        (lambda: Association(1, 4, heads=1, hidden=2, scaling=0.0), "scaling"),
        (lambda: annealed(5, 5), "step"),
        (lambda: folds(50, 31, 0), "known"),
        (lambda: choose(torch.ones(2, 1)), "splits"),
        (lambda: train(network(1), rows(1, 9, 1), steps=2, lr=0.01, hide=1.2), "hide"),
        (lambda: train(network(1), rows(1, 9, 1), steps=2, lr=0.01, batch=0), "batch"),
        (lambda: standardised(rows(1, 9, 1), SIZES, torch.zeros(1, 0, dtype=torch.int64)), "known"),
    ],
)
def test_bad_arguments_are_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()
