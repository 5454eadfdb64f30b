"""CNN-SVM against torch's own layers and losses, scikit-learn's SVM, finite differences, closed forms and limits."""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import hinge_loss
from sklearn.svm import LinearSVC
from torch import nn
from torch.nn import functional as F

from paperlab.output_layers import cnn_svm as cs

F64 = torch.float64


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(n: int = 5, count: int = 30):
    return 2 * torch.randn(count, n, generator=draws(), dtype=F64), torch.randint(n, (count,), generator=draws(1))


def test_heads_against_torch_and_scikit_learn():
    z, y = batch()
    torch.testing.assert_close(cs.softmax(z, y), F.cross_entropy(z, y, reduction="none"))
    assert cs.crammer_singer(z, y).mean().item() == pytest.approx(hinge_loss(y, z, labels=range(5)))
    one_vs_rest = [hinge_loss(2 * (y == k).long() - 1, z[:, k], labels=[-1, 1]) for k in range(5)]
    assert cs.l1_svm(z, y).mean().item() == pytest.approx(sum(one_vs_rest))


def test_heads_by_hand():
    """Scores (0.5, -2, 0.2), the true class is 0: terms 0.5, 0, 1.2."""
    z, y = torch.tensor([[0.5, -2.0, 0.2]], dtype=F64), torch.tensor([0])
    assert cs.l1_svm(z, y).item() == pytest.approx(0.5 + 1.2)
    assert cs.l2_svm(z, y).item() == pytest.approx(0.25 + 1.44)
    assert cs.crammer_singer(z, y).item() == pytest.approx(1 - 0.3)
    assert cs.softmax(z, y).item() == pytest.approx(math.log(1 + math.exp(-2.5) + math.exp(-0.3)))
    torch.testing.assert_close(cs.margins(z, y), torch.tensor([[0.5, 2.0, -0.2]], dtype=F64))


@pytest.mark.parametrize("head", cs.HEADS)
@pytest.mark.parametrize("means", [False, True])
def test_the_gradient_by_finite_differences(head, means):
    z, y = batch(4, 6)
    w = torch.randn(3, 4, generator=draws(2), dtype=F64, requires_grad=True)
    z.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: cs.objective(head, a, y, b, 0.7, means=means), (z, w))


def test_the_slope_of_the_squared_hinge_is_its_formula_and_continuous():
    z, y = batch()
    z.requires_grad_()
    (slope,) = torch.autograd.grad(cs.objective("L2-SVM", z, y, torch.zeros(2, 5, dtype=F64), 3.0), z)
    t = torch.full_like(z, -1).scatter(-1, y[:, None], 1.0)
    torch.testing.assert_close(slope, torch.where(t * z < 1, -2 * 3.0 * t * (1 - t * z), 0.0))
    torch.testing.assert_close(cs.push("L2-SVM", z, y), slope.norm(dim=-1) / 3)
    edge = torch.tensor([[1 - 1e-7, -1 + 1e-7], [1 + 1e-7, -1 - 1e-7]], dtype=F64)
    assert cs.push("L2-SVM", edge, torch.zeros(2, dtype=torch.int64)).max() < 1e-6
    assert cs.push("L1-SVM", edge, torch.zeros(2, dtype=torch.int64))[0] > 1


def test_beyond_the_margin_only_the_weights_cost():
    y = torch.tensor([0, 1, 2])
    z = 1.5 * (2 * torch.eye(3, dtype=F64) - 1)
    w = torch.randn(4, 3, generator=draws(3), dtype=F64)
    for head in ("L2-SVM", "L1-SVM", "Crammer-Singer"):
        assert cs.objective(head, z, y, w, 1e6).item() == pytest.approx(w.square().sum().item() / 2, abs=0)
        assert (cs.push(head, z, y) == 0).all()
    assert (cs.push("softmax", 10 * z, y) > 0).all()


def test_the_two_conventions_are_one_objective():
    z, y = batch(5, 30)
    w = torch.randn(7, 5, generator=draws(4), dtype=F64)
    for head in cs.HEADS:
        formula = cs.objective(head, z, y, w, 0.3)
        means = cs.objective(head, z, y, w, cs.c_of_means(0.3, examples=30, features=7), means=True)
        assert means.item() == pytest.approx(formula.item() * 2 / (7 * 5), rel=1e-12)
    released = (w**2).mean() + 0.3 * F.relu(1 - torch.where(F.one_hot(y, 5).bool(), 1, -1) * z).pow(2).mean()
    assert cs.objective("L2-SVM", z, y, w, 0.3, means=True).item() == pytest.approx(released.item())


def test_every_copy_has_its_own_objective():
    z = torch.randn(3, 8, 4, generator=draws(5), dtype=F64)
    y, w = torch.randint(4, (3, 8), generator=draws(6)), torch.randn(3, 2, 4, generator=draws(7), dtype=F64)
    c = torch.tensor([0.1, 1.0, 10.0], dtype=F64)
    together = cs.objective("L2-SVM", z, y, w, c)
    alone = [cs.objective("L2-SVM", z[k], y[k], w[k], float(c[k])) for k in range(3)]
    torch.testing.assert_close(together, torch.stack(alone))


def test_refitted_heads_are_scikit_learns_svm():
    """LinearSVC also penalises the bias: a constant feature, and no bias of our own. One call, three values of C."""
    x = torch.randn(80, 6, generator=draws(8), dtype=F64)
    y = (x[:, :3] + 0.7 * torch.randn(80, 3, generator=draws(9), dtype=F64)).argmax(-1)
    x = torch.cat([x, torch.ones(80, 1, dtype=F64)], -1)
    some = torch.tensor([0.01, 0.3, 10.0], dtype=F64)
    head = cs.refit("L2-SVM", x.expand(3, -1, -1), y.expand(3, -1), some, classes=3, bias=False, steps=100)
    for k, c in enumerate(some.tolist()):
        svm = LinearSVC(C=c, loss="squared_hinge", dual=False, fit_intercept=False, tol=1e-10, max_iter=100_000)
        theirs = torch.tensor(svm.fit(x.numpy(), y.numpy()).coef_.T)
        torch.testing.assert_close(head.weight[k], theirs, atol=1e-4, rtol=1e-3)
        ours = cs.objective("L2-SVM", head(x.expand(3, -1, -1))[k], y, head.weight[k], c).item()
        assert ours == pytest.approx(cs.objective("L2-SVM", x @ theirs, y, theirs, c).item(), rel=1e-7)


def test_a_refitted_softmax_is_scikit_learns_logistic_regression():
    x = torch.randn(90, 4, generator=draws(31), dtype=F64)
    y = (x[:, :3] + torch.randn(90, 3, generator=draws(32), dtype=F64)).argmax(-1)
    head = cs.refit("softmax", x[None], y[None], 0.8, classes=3, steps=200)
    theirs = LogisticRegression(C=0.8, tol=1e-10, max_iter=1000).fit(x.numpy(), y.numpy())
    torch.testing.assert_close(head.weight[0].T, torch.tensor(theirs.coef_), atol=1e-5, rtol=1e-4)


def test_scikit_learns_crammer_singer_and_hinge_agree_with_our_objective():
    """Their solution has no higher value of our objective than ours, and ours none higher than theirs."""
    x = torch.cat([torch.randn(60, 4, generator=draws(10), dtype=F64), torch.ones(60, 1, dtype=F64)], -1)
    y = x[:, :3].argmax(-1)
    for head, args in (("Crammer-Singer", {"multi_class": "crammer_singer"}), ("L1-SVM", {"loss": "hinge"})):
        svm = LinearSVC(C=0.5, fit_intercept=False, tol=1e-10, max_iter=200_000, random_state=0, **args)
        theirs = torch.tensor(svm.fit(x.numpy(), y.numpy()).coef_.T)
        least = cs.objective(head, x @ theirs, y, theirs, 0.5).item()
        for k in range(40):
            near = theirs + 0.02 * torch.randn(5, 3, generator=draws(20 + k), dtype=F64)
            assert cs.objective(head, x @ near, y, near, 0.5).item() >= least - 1e-6


def test_signs_against_the_rule_case_by_case():
    z = torch.tensor([[-1.0, 0.2, 3.0], [-1.0, -0.1, -5.0], [-2.0, -1.0, 0.5], [-1.0, 0.0, -1.0], [2.0, 9.0, 9.0]])
    assert cs.by_signs(z).tolist() == [1, 0, 2, 1, 0]
    assert z.argmax(-1).tolist()[:3] == [2, 1, 2]
    many = torch.randn(500, 10, generator=draws(11))
    assert cs.by_signs(many).tolist() == np.argmax(np.sign(many.numpy()), -1).tolist()
    one = (many > 0).sum(-1) == 1
    assert (cs.by_signs(many)[one] == many[one].argmax(-1)).all()


def torch_network(twins: cs.Twins, copy: int) -> nn.Sequential:
    """The same network from torch's own modules, with the weights of one copy."""
    conv1, conv2 = (nn.Conv2d(c.weight.shape[2], c.weight.shape[1], c.weight.shape[-1], padding="same", dtype=F64)
                    for c in (twins.conv1, twins.conv2))  # fmt: skip
    dense, head = (nn.Linear(*layer.weight.shape[1:], dtype=F64) for layer in (twins.dense, twins.head))
    with torch.no_grad():
        for mine, theirs in ((conv1, twins.conv1), (conv2, twins.conv2)):
            mine.weight.copy_(theirs.weight[copy])
            mine.bias.copy_(theirs.bias[copy])
        for mine, theirs in ((dense, twins.dense), (head, twins.head)):
            mine.weight.copy_(theirs.weight[copy].T)
            mine.bias.copy_(theirs.bias[copy, 0])
    pool = nn.MaxPool2d(2)
    return nn.Sequential(conv1, nn.ReLU(), pool, conv2, nn.ReLU(), pool, nn.Flatten(), dense, nn.ReLU(), head)


@pytest.mark.parametrize("sizes", [{}, {"side": 12, "channels": (3, 5), "kernel": 5, "features": 7, "classes": 4}])
def test_the_stacked_network_and_its_gradients_are_torchs_own(sizes):
    twins = cs.Twins(6, 2, generator=draws(), **sizes).double()
    with torch.no_grad():  # as after training: every copy differs
        for w in twins.parameters():
            w.add_(0.1 * torch.randn(w.shape, generator=draws(12), dtype=F64))
    images = torch.rand(2, 9, sizes.get("side", 8), sizes.get("side", 8), generator=draws(13), dtype=F64)
    labels = torch.randint(4, (6, 9), generator=draws(14))
    scores = twins(images)
    cs.l2_svm(scores, labels).sum().backward()
    for setting in range(3):
        for seed in range(2):
            copy = setting * 2 + seed
            alone = torch_network(twins, copy)
            expected = alone(images[seed][:, None])
            torch.testing.assert_close(scores[copy], expected)
            cs.l2_svm(expected, labels[copy]).sum().backward()
            torch.testing.assert_close(twins.conv1.weight.grad[copy], alone[0].weight.grad)
            torch.testing.assert_close(twins.conv2.bias.grad[copy], alone[3].bias.grad)
            torch.testing.assert_close(twins.dense.weight.grad[copy], alone[7].weight.grad.T)


def test_twins_start_alike_and_seeds_do_not():
    twins = cs.Twins(6, 2, generator=draws())
    images = torch.rand(2, 5, 8, 8, generator=draws(15))
    mask = torch.rand(2, 5, 128, generator=draws(16))
    first = twins(images, mask).unflatten(0, (3, 2))
    torch.testing.assert_close(first, first[:1].expand(3, -1, -1, -1))
    same = twins(images[:1].expand(2, -1, -1, -1))
    assert not torch.allclose(same[0], same[1])


def test_some_copies_alone_score_as_in_the_stack():
    twins = cs.Twins(6, 2, generator=draws())
    with torch.no_grad():  # as after training: every copy differs
        for w in twins.parameters():
            w.add_(0.1 * torch.randn(w.shape, generator=draws(12)))
    images = torch.rand(2, 5, 8, 8, generator=draws(15))
    together = twins(images)
    torch.testing.assert_close(twins.only(torch.tensor([4, 1]))(images), together[[4, 1]])
    assert len(twins.head.weight) == 6  # the stack itself stays whole


def test_training_in_a_stack_is_training_alone():
    """Four networks in a stack, and each again from torch's modules, Adam and losses, on the same draws."""
    images, labels = torch.rand(2, 40, 8, 8, generator=draws(30), dtype=F64), torch.arange(80).view(2, 40) % 10
    c, rate, steps = np.array([[2.0, 0.5], [3.0, 0.7]]), 3e-3, 6
    heads = ["softmax", "L2-SVM"]
    stacked = cs.train(images, labels, heads, c, rate=rate, seeds=2, steps=steps, seed=5, batch=8)
    start = cs.Twins(4, 2, generator=draws(5)).double()
    for head in (0, 1):
        for seed in (0, 1):
            alone, g = torch_network(start, head * 2 + seed), draws(5)
            opt = torch.optim.Adam(alone.parameters(), lr=rate)
            slow = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
            for _ in range(steps):
                i = torch.randint(40, (2, 8), generator=g)[seed]
                kept = (torch.rand(2, 8, 128, generator=g)[seed] >= 0.5) * 2.0
                z, y = alone[-1](alone[:-1](images[seed][i][:, None]) * kept), labels[seed][i]
                t = 2 * F.one_hot(y, 10) - 1
                loss = F.cross_entropy(z, y) / 10 if head == 0 else F.relu(1 - t * z).pow(2).mean()
                opt.zero_grad()
                (alone[-1].weight.square().mean() + c[head, seed] * loss).backward()
                opt.step()
                slow.step()
            mine = stacked(images)[head * 2 + seed]
            torch.testing.assert_close(mine, alone(images[seed][:, None]), atol=1e-6, rtol=1e-5)


def test_a_larger_trunk_pays_less_for_the_same_scores():
    """Only the head is penalised, and ReLU is homogeneous: scale the features up and W down, nothing else changes."""
    twins = cs.Twins(1, 1, generator=draws()).double()
    images, labels = torch.rand(1, 20, 8, 8, generator=draws(18), dtype=F64), torch.arange(20)[None] % 10
    before = twins(images)
    cost = cs.objective("L2-SVM", before, labels, twins.head.weight, 1.0)
    data = cs.l2_svm(before, labels).sum()
    with torch.no_grad():
        for w in twins.dense.parameters():
            w.mul_(100.0)
        twins.head.weight.div_(100.0)
    after = twins(images)
    torch.testing.assert_close(after, before)
    cheaper = cs.objective("L2-SVM", after, labels, twins.head.weight, 1.0)
    assert (cheaper - data).item() == pytest.approx((cost - data).item() / 1e4)


def test_spoiled_images():
    plain = torch.full((400, 8, 8), 0.5, dtype=F64)
    quiet = cs.spoil(plain, draws(19), noise=0.0, block=3)
    assert (quiet == 0).sum((-1, -2)).tolist() == [9] * 400
    assert ((quiet == 0).any(0)).all()  # every place is hidden somewhere
    loud = cs.spoil(plain, draws(20), noise=0.1, block=0)
    assert (loud - plain).std().item() == pytest.approx(0.1, rel=0.1)
    assert 0 <= cs.spoil(plain, draws(21), noise=9.0).min() <= cs.spoil(plain, draws(21), noise=9.0).max() <= 1


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: cs.margins(torch.full((2, 3), math.nan), torch.tensor([0, 1])), "scores"),
        (lambda: cs.l2_svm(torch.zeros(2, 3), torch.tensor([0, 3])), "labels"),
        (lambda: cs.objective("hinge", torch.zeros(2, 3), torch.tensor([0, 1]), torch.zeros(4, 3), 1.0), "head"),
        (lambda: cs.objective("softmax", torch.zeros(2, 3), torch.tensor([0, 1]), torch.zeros(4, 3), 0.0), "c must"),
        (lambda: cs.c_of_means(1.0, examples=0, features=3), "examples"),
        (lambda: cs.push("none", torch.zeros(2, 3), torch.tensor([0, 1])), "head"),
        (lambda: cs.StackedConv(1, 1, 1, 4, draws()), "kernel"),
        (lambda: cs.Twins(1, 1, generator=draws(), side=10), "side"),
        (lambda: cs.Twins(0, 1, generator=draws()), "copies"),
        (lambda: cs.Twins(3, 2, generator=draws()), "seeds"),
        (lambda: cs.crammer_singer(torch.zeros(2, 3), torch.tensor([0, 3])), "labels"),
        (lambda: cs.softmax(torch.zeros(2, 1), torch.tensor([0, 0])), "classes"),
        (lambda: cs.refit("L2-SVM", torch.full((1, 2, 2), math.inf), torch.zeros(1, 2, dtype=int), 1.0), "features"),
        (lambda: cs.spoil(torch.zeros(1, 4, 4), draws(), block=5), "block"),
        (lambda: cs.spoil(torch.zeros(1, 4, 4), draws(), noise=-1.0), "noise"),
    ],
)
def test_bad_input_is_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()
