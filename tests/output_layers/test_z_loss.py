"""The Z-loss against autograd, torch's softplus, dense gradient descent, and its invariances."""

import math

import pytest
import torch
from torch.nn import functional as F

from paperlab.output_layers import z_loss as zl

F64 = torch.float64


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def labelled(batch: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return draw(batch, classes, seed=seed), torch.randint(
        classes, (batch,), generator=torch.Generator().manual_seed(seed + 1)
    )


def naive(o: torch.Tensor, c: torch.Tensor, a: float, b: float) -> torch.Tensor:
    z = (o - o.mean(1, keepdim=True)) / o.std(1, keepdim=True, correction=0)
    return F.softplus(b - z[torch.arange(len(c)), c], beta=a)


LOSSES = {
    "z": lambda m: zl.z_loss(m, 0.7, 3.0),
    "no scale": lambda m: zl.z_loss(m, 0.7, 3.0, scale=False),
    "no shift": lambda m: zl.z_loss(m, 0.7, 3.0, shift=False),
    "squared": lambda m: zl.squared_error(m, 2.0),
    "spherical": lambda m: zl.spherical_softmax(m, 0.1),
    "taylor": lambda m: zl.taylor_softmax(m, 1.5),
}


@pytest.mark.parametrize(("a", "b"), [(0.1, 2.0), (1.0, 6.0), (3.0, 0.0)])
def test_z_loss_is_softplus_of_the_standardised_score(a, b):
    o, c = labelled(7, 20)
    torch.testing.assert_close(zl.z_loss(zl.moments(o, c), a, b), naive(o, c, a, b))


def test_z_loss_forgets_shift_and_positive_scale_and_a_sign_it_does_not_forget():
    o, c = labelled(7, 20)
    here = zl.z_loss(zl.moments(o, c), 1.0, 2.0)
    moved = zl.z_loss(zl.moments(3.7 * o - 5, c), 1.0, 2.0)
    torch.testing.assert_close(here, moved, atol=1e-6, rtol=0)
    assert (zl.z_loss(zl.moments(-o, c), 1.0, 2.0) - here).abs().max() > 0.1


def test_z_score_of_a_one_hot_row_is_the_bound_and_a_flat_row_has_none():
    for classes in (2, 5, 100):
        o, c = torch.zeros(1, classes, dtype=F64), torch.tensor([1])
        assert zl.z_score(zl.moments(o, c)).item() == 0
        o[0, 1] = 4.0
        assert zl.z_score(zl.moments(o, c)).item() == pytest.approx(math.sqrt(classes - 1))
    o, c = labelled(50, 10)
    assert zl.z_score(zl.moments(o, c)).max() < 3


def test_the_ablations_take_out_what_they_say():
    o, c = labelled(5, 12)
    own = o[torch.arange(5), c]
    torch.testing.assert_close(zl.z_score(zl.moments(o, c), scale=False), own - o.mean(1))
    torch.testing.assert_close(zl.z_score(zl.moments(o, c), shift=False), own / o.square().mean(1).sqrt())


def test_the_rivals_are_their_definitions_on_all_scores():
    o, c = labelled(6, 9, seed=3)
    m, one_hot, i = zl.moments(o, c), F.one_hot(c, 9), torch.arange(6)
    torch.testing.assert_close(zl.squared_error(m, 2.0), 0.5 * F.mse_loss(o, 2.0 * one_hot, reduction="none").sum(1))
    square = o.square() + 0.1
    torch.testing.assert_close(zl.spherical_softmax(m, 0.1), -(square / square.sum(1, keepdim=True))[i, c].log())
    taylor = 1 + o / 2 + (o / 2).square() / 2
    torch.testing.assert_close(zl.taylor_softmax(m, 2.0), -(taylor / taylor.sum(1, keepdim=True))[i, c].log())
    order = zl.RANKING["Taylor softmax"](o, 2.0).argsort(1)
    assert torch.equal(order, taylor.argsort(1))
    assert torch.equal(zl.RANKING["spherical softmax"](o, 0.1).argsort(1), square.argsort(1))


def test_taylor_softmax_tends_to_softmax_for_small_scores():
    o, c = labelled(6, 9)
    found = zl.taylor_softmax(zl.moments(1e-3 * o, c))
    torch.testing.assert_close(found, F.cross_entropy(1e-3 * o, c, reduction="none"), atol=1e-8, rtol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_slopes_give_the_gradient_of_every_score(name):
    o, c = labelled(5, 11)
    o.requires_grad_()
    m = zl.moments(o, c)
    (true,) = torch.autograd.grad(LOSSES[name](m).sum(), o)
    alpha, beta, gamma = zl.slopes(LOSSES[name], m)
    torch.testing.assert_close(alpha[:, None] * o + beta[:, None] + gamma[:, None] * F.one_hot(c, 11), true)


def test_z_slopes_are_the_gradient_of_torchs_own_softplus():
    o, c = labelled(5, 11)
    o = (o + 2).requires_grad_()
    (true,) = torch.autograd.grad(naive(o, c, 0.7, 3.0).sum(), o)
    alpha, beta, gamma = zl.z_slopes(zl.moments(o, c), 0.7, 3.0)
    torch.testing.assert_close(alpha[:, None] * o + beta[:, None] + gamma[:, None] * F.one_hot(c, 11), true)
    torch.testing.assert_close(true.sum(1), torch.zeros(5, dtype=F64))  # shift invariance
    torch.testing.assert_close((true * o).sum(1), torch.zeros(5, dtype=F64))  # scale invariance (Euler)


def test_implicit_moments_and_their_gradients_are_those_of_the_scores():
    h, w = draw(2, 4, 3), draw(2, 15, 3, seed=1)
    c = torch.randint(15, (2, 4), generator=torch.Generator().manual_seed(2))
    h.requires_grad_(), w.requires_grad_()
    found, true = zl.implicit_moments(h, w, c), zl.moments(h @ w.mT, c)
    for x, y in zip(found[:3], true[:3], strict=True):
        torch.testing.assert_close(x, y)
    one, other = (torch.autograd.grad(zl.z_loss(m, 1.0, 2.0).sum(), (h, w)) for m in (found, true))
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("size", [1.0, 1000.0])  # scores so far apart that a probability underflows
def test_cross_entropy_is_torchs_with_label_smoothing(size):
    h, w = size * draw(2, 7, 4), draw(2, 9, 4, seed=1)
    c, smoothing = torch.tensor([[0, 3, 3, 8, 5, 1, 0], [2, 2, 2, 2, 7, 6, 8]]), torch.tensor([0.0, 0.3], dtype=F64)
    h.requires_grad_()
    w.requires_grad_()
    mine = zl.cross_entropy(h, w, c, smoothing)
    true = torch.stack(
        [F.cross_entropy(h[j] @ w[j].T, c[j], label_smoothing=smoothing[j].item()) for j in range(len(h))]
    )
    torch.testing.assert_close(mine, true)
    upstream = torch.tensor([2.0, -3.0], dtype=F64)
    one, other = (torch.autograd.grad((upstream * loss).sum(), (h, w)) for loss in (mine, true))
    torch.testing.assert_close(one, other)


def dense(w, h, c, loss, lr):
    """A step of torch's own gradient descent on the full matrix."""
    w, h = w.clone().requires_grad_(), h.clone().requires_grad_()
    dw, dh = torch.autograd.grad(loss(zl.moments(h @ w.T, c)).sum(), (w, h))
    return (w - lr * dw).detach(), dh


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("batch", [1, 4, 12])
def test_factored_steps_equal_dense_gradient_descent(name, batch):
    w = draw(30, 5)
    layer = zl.FactoredOutput(w)
    for step in range(25):
        h = draw(batch, 5, seed=100 + step)
        c = torch.randint(6, (batch,), generator=torch.Generator().manual_seed(step))  # few classes: labels repeat
        w, dh = dense(w, h, c, LOSSES[name], 0.01)
        back = layer.step(h, c, lambda m: zl.slopes(LOSSES[name], m), 0.01)
        torch.testing.assert_close(back, dh, atol=1e-9, rtol=1e-8)
        if step == 12:
            layer.refactor()
            assert torch.equal(layer.mix, torch.eye(5, dtype=F64))
    torch.testing.assert_close(layer.weight(), w, atol=1e-9, rtol=1e-8)
    torch.testing.assert_close(layer.gram, w.T @ w, atol=1e-9, rtol=1e-8)
    torch.testing.assert_close(layer.total, w.sum(0), atol=1e-9, rtol=1e-8)
    torch.testing.assert_close(layer.unmix, torch.linalg.inv(layer.mix), atol=1e-8, rtol=1e-8)


def test_a_step_moves_no_row_of_v_but_the_labels_own():
    w = draw(40, 6)
    layer = zl.FactoredOutput(w)
    layer.step(draw(3, 6, seed=5), torch.tensor([7, 9, 7]), lambda m: zl.z_slopes(m, 1.0, 3.0), 0.1)
    moved = (layer.rows != w).any(1).nonzero()[:, 0].tolist()
    assert moved == [7, 9]
    assert (layer.weight() != w).all()  # and yet every row of W has moved


def test_softmax_step_is_torchs_cross_entropy_and_sgd():
    w, h, c = draw(20, 4), draw(6, 4, seed=1), torch.tensor([0, 3, 3, 19, 7, 0])
    mine, w = w.clone(), w.requires_grad_()
    h.requires_grad_()
    F.cross_entropy(h @ w.T, c, reduction="sum").backward()
    back = zl.softmax_step(mine, h.detach(), c, 0.1)
    torch.testing.assert_close(back, h.grad)
    torch.testing.assert_close(mine, (w - 0.1 * w.grad).detach())


@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize("labels", [[5], [0, 3, 3, 19, 7, 0]])
def test_two_level_step_is_autograd_on_the_product_of_two_softmaxes(labels, gather):
    head, words, c = draw(4, 3), draw(4, 5, 3, seed=1), torch.tensor(labels)
    h = draw(len(labels), 3, seed=2)
    u, v, x = (t.clone().requires_grad_() for t in (head, words, h))
    log_p = (x @ u.T).log_softmax(1)[:, :, None] + torch.einsum("bd,gsd->bgs", x, v).log_softmax(2)
    assert log_p.exp().sum((1, 2)).detach().allclose(torch.ones(len(labels), dtype=F64))
    (-log_p.flatten(1)[torch.arange(len(c)), c].sum()).backward()
    back = zl.two_level_step(head, words, h, c, 0.1, gather)
    torch.testing.assert_close(back, x.grad)
    torch.testing.assert_close(head, (u - 0.1 * u.grad).detach())
    torch.testing.assert_close(words, (v - 0.1 * v.grad).detach())


def test_ranks_against_sorting_and_ties_count_against_the_label():
    o, c = labelled(30, 8)
    place = o.argsort(1, descending=True).argsort(1)[torch.arange(30), c] + 1
    assert torch.equal(zl.ranks(o, c), place)
    assert zl.ranks(torch.zeros(1, 9), torch.tensor([0])).item() == 9


def test_scores_that_are_not_numbers_never_help_the_label():
    o = torch.arange(9.0)[None]  # the last class is first
    for broken in range(9):
        bad = o.clone()
        bad[0, broken] = math.nan
        assert zl.ranks(bad, torch.tensor([8])).item() == (9 if broken == 8 else 2)


def stepped(hidden: torch.Tensor, labels: torch.Tensor, lr: float = 0.1) -> torch.Tensor:
    layer = zl.FactoredOutput(torch.eye(5, 3))
    return layer.step(hidden, labels, lambda m: zl.z_slopes(m, 1.0, 2.0), lr)


def crossed(label: int = 0, smoothing: float = 0.0) -> torch.Tensor:
    return zl.cross_entropy(
        torch.zeros(1, 1, 2), torch.zeros(1, 3, 2), torch.tensor([[label]]), torch.tensor([smoothing])
    )


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: zl.moments(torch.zeros(2, 3), torch.tensor([0, 3])), "labels"),
        (lambda: zl.moments(torch.zeros(2, 1), torch.tensor([0, 0])), "classes"),
        (lambda: zl.z_loss(zl.moments(torch.rand(1, 3), torch.tensor([0])), 0.0, 1.0), "a must"),
        (lambda: zl.z_loss(zl.moments(torch.rand(1, 3), torch.tensor([0])), 1.0, math.inf), "b must"),
        (lambda: zl.spherical_softmax(zl.moments(torch.rand(1, 3), torch.tensor([0])), 0.0), "eps"),
        (lambda: zl.taylor_softmax(zl.moments(torch.rand(1, 3), torch.tensor([0])), -1.0), "temperature"),
        (lambda: zl.implicit_moments(torch.zeros(1, 1, 2), torch.zeros(1, 3, 2), torch.tensor([[3]])), "labels"),
        (lambda: crossed(label=3), "labels"),
        (lambda: crossed(smoothing=1.5), "smoothing"),
        (lambda: zl.ranks(torch.zeros(1, 3), torch.tensor([-1])), "labels"),
        (lambda: zl.squared_error(zl.moments(torch.rand(1, 3), torch.tensor([0])), 0.0), "height"),
        (lambda: stepped(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)), "labels"),
        (lambda: stepped(torch.zeros(1, 3), torch.tensor([-1])), "labels"),
        (lambda: stepped(torch.zeros(1, 3), torch.tensor([0]), lr=0.0), "lr"),
        (lambda: zl.FactoredOutput(torch.zeros(1, 2)), "classes"),
        (lambda: zl.FactoredOutput(torch.full((3, 2), math.nan)), "weight"),
    ],
)
def test_bad_input_is_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()
