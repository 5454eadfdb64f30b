"""ldr-losses: against scipy on the simplex, torch's own losses, closed forms of the optimum, a plain training loop."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq, minimize
from sklearn.metrics import roc_auc_score, top_k_accuracy_score
from torch.nn import functional as F

from paperlab.devices import generator
from paperlab.output_layers import ldr_losses as ldr
from paperlab.output_layers.ldr_losses import Arm

F64 = torch.float64


def batch(n=6, classes=5, seed=0, dtype=F64):
    g = generator(seed)
    return 2 * torch.randn(n, classes, generator=g, dtype=dtype), torch.randint(classes, (n,), generator=g)


def distributions(n, classes, seed=1):
    return torch.rand(n, classes, generator=generator(seed), dtype=F64).pow(2).add(0.01).softmax(-1) ** 3


def normalised(q):
    return q / q.sum(-1, keepdim=True)


@pytest.mark.parametrize("lam", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("c", [0.0, 1.0])
def test_the_inner_maximum_against_scipy_on_the_simplex(lam, c):
    f, y = batch(4)
    found, weights = ldr.ldr_kl(f, y, lam, c), ldr.worst_case(f, y, lam, c)
    for i in range(4):
        delta = np.array([0.0 if k == y[i] else (f[i, k] - f[i, y[i]]).item() + c for k in range(5)])

        def value(p, delta=delta):
            return -(p @ delta - lam * (p * np.log(np.maximum(p, 1e-300) * 5)).sum())

        best = minimize(value, np.full(5, 0.2), bounds=[(1e-12, 1)] * 5, method="SLSQP",
                        options={"ftol": 1e-14, "maxiter": 500},
                        constraints={"type": "eq", "fun": lambda p: p.sum() - 1})  # fmt: skip
        assert found[i].item() == pytest.approx(-best.fun, abs=1e-6)
        np.testing.assert_allclose(weights[i], best.x, atol=2e-3)
        assert value(weights[i].numpy()) <= best.fun + 1e-9


def test_the_three_limits():
    f, y = batch(50)
    torch.testing.assert_close(ldr.ldr_kl(f, y, 1.0), F.cross_entropy(f, y, reduction="none") - math.log(5))
    rows = torch.arange(50)
    delta = f - f[rows, y][:, None] + 0.7
    delta[rows, y] = 0
    torch.testing.assert_close(ldr.ldr_kl(f, y, 1e-5, 0.7), delta.amax(-1), atol=2e-5, rtol=0)
    torch.testing.assert_close(ldr.ldr_kl(f, y, 1e7, 0.7), delta.mean(-1), atol=1e-5, rtol=0)
    single = ldr.ldr_kl(f.float(), y, 1e5, 0.7)  # a log of a sum of exponentials would lose all digits here
    torch.testing.assert_close(single.double(), delta.mean(-1), atol=2e-3, rtol=0)


@pytest.mark.parametrize("c", [0.0, 0.5])
def test_at_the_far_end_the_loss_is_symmetric(c):
    f, _ = batch(20, 7)
    total = sum(ldr.ldr_kl(f, torch.full((20,), y), 1e8, c) for y in range(7))
    torch.testing.assert_close(total, torch.full_like(total, 6 * c), atol=1e-5, rtol=0)
    near = sum(ldr.ldr_kl(f, torch.full((20,), y), 1.0, c) for y in range(7))
    assert near.std() > 0.1


def test_scaling_and_order_in_lambda():
    f, y = batch(30)
    torch.testing.assert_close(ldr.ldr_kl(f, y, 3.0, 1.5), 3 * ldr.ldr_kl(f / 3, y, 1.0, 0.5))
    values = torch.stack([ldr.ldr_kl(f, y, lam, 1.0) for lam in (0.1, 1.0, 10.0, 100.0)])
    assert (values.diff(dim=0) < 0).all()  # a dearer deviation from uniform makes the worst case milder
    own = torch.rand(30, generator=generator(3), dtype=F64) + 0.1
    one = torch.stack([ldr.ldr_kl(f[i], y[i], own[i].item(), 1.0) for i in range(30)])
    torch.testing.assert_close(ldr.ldr_kl(f, y, own, 1.0), one)


def test_the_gradient_is_the_worst_case():
    f, y = batch(8)
    f.requires_grad_()
    (slope,) = torch.autograd.grad(ldr.ldr_kl(f, y, 0.7, 1.0).sum(), f)
    p = ldr.worst_case(f.detach(), y, 0.7, 1.0)
    torch.testing.assert_close(slope, p - F.one_hot(y, 5))
    torch.testing.assert_close(ldr.worst_case(f.detach(), y, 1.0), f.detach().softmax(-1))


def test_extreme_scores_stay_finite():
    f, y = torch.tensor([[1000.0, 0.0, -1000.0], [0.0, 1000.0, 0.0]], requires_grad=True), torch.tensor([0, 0])
    for lam in (0.01, 1.0, 100.0):
        loss = ldr.ldr_kl(f, y, lam, 1.0)
        (slope,) = torch.autograd.grad(loss.sum(), f)
        assert loss.isfinite().all()
        assert slope.isfinite().all()


@pytest.mark.parametrize("c", [0.0, 1.0])
def test_the_alternation_ends_at_the_best_lambda(c):
    f, y = batch(12, seed=5)
    lam0, alpha = 1.5, 2.0
    lam = torch.full((12,), lam0, dtype=F64)
    for _ in range(200):
        lam = ldr.adapt(lam, f, y, lam0=lam0, alpha=alpha, c=c)
    grid = np.linspace(1e-3, lam0, 40_001)
    for i in range(12):
        delta = np.array([0.0 if k == y[i] else (f[i, k] - f[i, y[i]]).item() + c for k in range(5)])
        inner = grid * (np.logaddexp.reduce(delta / grid[:, None], axis=1) - math.log(5))  # max over p
        whole = inner - alpha * math.log(5) / lam0 / 2 * (grid - lam0) ** 2
        assert lam[i].item() == pytest.approx(grid[whole.argmax()], abs=1e-3)


def test_without_a_margin_the_label_has_no_part_in_lambda_and_with_it_contradiction_lowers_it():
    f = torch.tensor([[4.0, 0.0, 0.0, 0.0]], dtype=F64).expand(4, -1)
    y = torch.arange(4)
    plain = ldr.adapt(1.0, f, y, lam0=1.0, alpha=2.0)
    assert plain.std() == 0
    wide = ldr.adapt(1.0, f, y, lam0=1.0, alpha=2.0, c=1.0)
    assert wide[0] > plain[0] > wide[1:].amax()
    even = ldr.adapt(1.0, torch.zeros(1, 4), y[:1], lam0=3.0, alpha=2.0)
    assert even.item() == pytest.approx(3.0)  # no opinion: lambda stays at lambda_0
    sure = ldr.adapt(1.0, 1000 * f[:1], y[:1], lam0=3.0, alpha=2.0)
    assert sure.item() == pytest.approx(1.5)  # certainty: lambda_0 (1 - 1/alpha)
    assert ldr.adapt(1.0, 1000 * f[:1], y[:1], lam0=3.0, alpha=0.5).item() == pytest.approx(3e-4)


def test_bounded_scores():
    f, _ = batch(9)
    b = ldr.bounded(f)
    torch.testing.assert_close(b.abs().mean(-1), torch.ones(9, dtype=F64))
    torch.testing.assert_close(b, ldr.bounded(17 * f))
    assert ldr.bounded(torch.zeros(2, 5)).abs().max() == 0
    assert (b.argsort() == f.argsort()).all()


def test_symmetric_losses_and_what_they_reach():
    f, y = batch(10)
    torch.testing.assert_close(ldr.absolute_error(f, y), (f.softmax(-1) - F.one_hot(y, 5)).abs().sum(-1))
    for loss, total in ((ldr.absolute_error, 8.0), (ldr.round_loss, 0.0)):
        every = torch.stack([loss(f, torch.full((10,), k)) for k in range(5)])
        torch.testing.assert_close(every.sum(0), torch.full((10,), total, dtype=F64))
    values = torch.stack([ldr.round_loss(50 * f, torch.full((10,), k)) for k in range(5)])
    assert (values.norm(dim=0) < 1).all()
    assert (values.norm(dim=0) > 0.9999).all()
    direction = F.normalize(f - f.mean(-1, keepdim=True), dim=-1).T
    torch.testing.assert_close(values, -direction, atol=1e-3, rtol=0)


def keeps_top_k(f, q, k):
    """Yang and Koyejo's definition: f is top-k preserving with respect to q."""
    f_k, f_next = sorted(f, reverse=True)[k - 1], sorted([*f, -math.inf], reverse=True)[k]
    q_k, q_next = sorted(q, reverse=True)[k - 1], sorted([*q, -math.inf], reverse=True)[k]
    return all((b <= q_next or a > f_next) and (b >= q_k or a < f_k) for a, b in zip(f, q, strict=True))


def test_the_round_loss_charges_a_fixed_amount_for_every_wrong_top_k():
    g, failures = generator(5), 0
    for q in [*normalised(distributions(6, 4)), torch.tensor([0.3, 0.3, 0.2, 0.2], dtype=F64)]:
        f = (
            torch.randn(300, 4, generator=g, dtype=F64)
            * torch.tensor([0.3, 3.0, 300.0], dtype=F64).repeat(100)[:, None]
        )
        f[::4, 0] = f[::4, 1]  # ties count as wrong
        f[1::4] = 100 * (q - 0.25)[None] + 0.3 * f[1::4]  # near the best direction
        excess = ldr.expected_loss(ldr.round_loss, f, q) + (q - 0.25).norm()
        differences = (q[:, None] - q).abs()
        least = differences[differences > 0].min()
        gap = (q - 0.25).norm() - ((q - 0.25).square().sum() - least.square() / 2).sqrt()
        for k in (1, 2, 3, 4):
            wrong = torch.tensor([not keeps_top_k(row, q.tolist(), k) for row in f.tolist()])
            failures += wrong.sum().item()
            assert (excess[wrong] >= gap - 1e-12).all()
    assert failures > 1000


def test_a_symmetric_loss_between_0_and_its_bound_does_not_tell_the_second_from_the_third():
    f = torch.tensor([[60.0, 2.0, 1.0], [60.0, 1.0, 2.0]], dtype=F64)
    for q in ([0.5, 0.3, 0.2], [0.5, 0.2, 0.3]):
        risk = ldr.expected_loss(ldr.absolute_error, f, torch.tensor(q, dtype=F64))
        torch.testing.assert_close(risk, torch.full_like(risk, 2 * (1 - 0.5)), atol=1e-12, rtol=0)
    every = torch.stack([ldr.round_loss(1e6 * f, torch.full((2,), k)) for k in range(3)]) + math.sqrt(2 / 3)
    assert (every >= 0).all()
    assert every.max() > every.sum(0).max() / 2  # the bound that the absolute error keeps


def test_free_optimum_without_margin_is_lambda_log_q():
    q = normalised(distributions(8, 5))
    for lam in (0.2, 1.0, 20.0):
        f = ldr.newton(
            lambda z, lam=lam: ldr.expected_loss(lambda a, y: ldr.ldr_kl(a, y, lam), z, q), torch.zeros_like(q)
        )
        torch.testing.assert_close(f, lam * (q.log() - q.log().mean(-1, keepdim=True)), atol=1e-8, rtol=0)


@pytest.mark.parametrize(("lam", "c"), [(1.0, 0.5), (0.5, 1.0), (5.0, 1.0)])
def test_free_optimum_with_margin_solves_its_quadratic(lam, c):
    """With s the softmax of f / lam and a = exp(c / lam), stationarity reads s_y (a - (a - 1) s_y) = t q_y."""
    q = normalised(distributions(3, 4, seed=7) + 0.1)
    f = ldr.newton(lambda z: ldr.expected_loss(lambda u, y: ldr.ldr_kl(u, y, lam, c), z, q), torch.zeros_like(q))
    a = math.exp(c / lam)

    def shares(t, row):
        return (a - np.sqrt(a * a - 4 * (a - 1) * t * row)) / (2 * (a - 1))

    for row, found in zip(q.numpy(), f, strict=True):
        most = a * a / (4 * (a - 1)) / row.max()
        t = brentq(lambda t, row=row: shares(t, row).sum() - 1, 1e-9, most * (1 - 1e-12))
        np.testing.assert_allclose((found / lam).softmax(-1), shares(t, row), atol=1e-7)


def test_newton_against_scipy_on_another_loss():
    q = normalised(distributions(2, 3, seed=9))

    def risk(z, rows):
        loss = ldr.expected_loss(lambda f, y: ldr.margins(f, y, 1.0).clamp(min=0).square().sum(-1), z, rows)
        return loss + 0.05 * z.square().sum(-1)

    found = ldr.newton(lambda z: risk(z, q), torch.zeros_like(q))
    for k in range(2):
        best = minimize(lambda z, k=k: risk(torch.tensor(z)[None], q[k]).item(), np.zeros(3), tol=1e-10)
        assert risk(found[k][None], q[k]).item() <= best.fun + 1e-9


def test_expected_loss_is_the_sum_over_labels():
    f, _ = batch(3, 4)
    q = normalised(distributions(3, 4))
    by_hand = sum(q[:, k] * F.cross_entropy(f, torch.full((3,), k), reduction="none") for k in range(4))
    torch.testing.assert_close(ldr.expected_loss(lambda a, y: ldr.LOSSES["CE"](a, y, 0), f, q), by_hand)


def test_rivals_are_their_definitions():
    f, y = batch(40)
    p, ce = f.softmax(-1)[torch.arange(40), y], F.cross_entropy(f, y, reduction="none")
    reverse = -(f.softmax(-1) * torch.where(F.one_hot(y, 5) == 1, 0.0, -4.0)).sum(-1)
    crammer = torch.stack(
        [max(torch.tensor(0.0), *(z[k] - z[t] + 0.5 for k in range(5) if k != t)) for z, t in zip(f, y, strict=True)]
    )
    expected = {
        ("CE", 0.0): ce,
        ("MAE", 0.0): 2 - 2 * p,
        ("GCE", 0.7): (1 - p**0.7) / 0.7,
        ("SCE", 0.1): 0.1 * ce + reverse,
        ("CS", 0.5): crammer,
        ("WW", 0.5): 5 * F.multi_margin_loss(f, y, margin=0.5, reduction="none"),
        ("LDR-KL, free", 1e-5): ldr.margins(f, y, 1.0).amax(-1),
        ("LDR-KL", 1e7): ldr.margins(5 * f / f.abs().sum(-1, keepdim=True), y, 1.0).mean(-1),
    }
    for (name, setting), value in expected.items():
        own = ldr.LOSSES[name](f, y, torch.full((40,), setting, dtype=F64))
        torch.testing.assert_close(own, value.double(), atol=3e-5, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


def test_noise_has_its_rate_and_kind():
    y = torch.randint(10, (20_000,), generator=generator(2))
    hit = ldr.flip(y, "uniform", 0.6, 10, generator(3))
    assert (hit != y).double().mean().item() == pytest.approx(0.54, abs=0.012)  # one draw in ten hits its own label
    pair = ldr.flip(y, "pair", 0.3, 10, generator(3))
    moved = pair != y
    assert moved.double().mean().item() == pytest.approx(0.3, abs=0.012)
    assert (pair[moved] == (y[moved] + 1) % 10).all()
    assert torch.equal(ldr.flip(y, "pair", 0.0, 10, generator(3)), y)


def small(seeds=2, n=40):
    g = generator(11)
    x = torch.randn(seeds, n, 6, generator=g)
    return (
        x,
        torch.randint(3, (2, seeds, n), generator=g),
        {"classes": 3, "hidden": 8, "steps": 25, "batch": 10, "seed": 4},
    )


def test_a_stack_trains_each_network_as_a_plain_loop_would():
    x, y, how = small()
    arms = [
        Arm("CE", 0.0, 0.03),
        Arm("WW", 1.0, 0.01),
        Arm("CE", 0.0, 0.01),
        Arm("LDR-KL", 2.0, 0.01),
        Arm("LDR-KL", 2.0, 0.03, 2.0),
    ]
    trained = ldr.train(arms, x, y, **how)
    scores = trained.scores(x)
    assert scores.shape == (5, 2, 2, 40, 3)
    start = ldr.Perceptrons(1, 1, 2, (6, 8, 3), generator(4))
    drawn = torch.randint(40, (25, 2, 10), generator=generator(4))
    for noise, seed in ((0, 0), (1, 1)):
        net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        with torch.no_grad():
            for layer, own in ((net[0], start.into), (net[2], start.out)):
                layer.weight.copy_(own.weight[seed].T)
                layer.bias.copy_(own.bias[seed, 0])
        opt = torch.optim.Adam(net.parameters(), lr=0.03)
        for step in range(25):
            for group in opt.param_groups:
                group["lr"] = 0.03 * (1 + math.cos(math.pi * step / 25)) / 2
            i = drawn[step, seed]
            opt.zero_grad()
            F.cross_entropy(net(x[seed, i]), y[noise, seed, i]).backward()
            opt.step()
        torch.testing.assert_close(scores[0, noise, seed], net(x[seed]), atol=2e-4, rtol=1e-3)


def test_the_memory_of_lambda():
    x, y, how = small(n=200)
    arm = Arm("LDR-KL", 2.0, 0.01, alpha=2.0)
    trained = ldr.train([Arm("CE", 0.0, 0.01), arm], x, y, **how)
    lam, drawn = trained.lam[arm], torch.randint(200, (25, 2, 10), generator=generator(4))
    assert lam.shape == y.shape
    assert ((lam >= 1.0) & (lam <= 2.0)).all()
    for seed in range(2):
        fresh = torch.ones(200, dtype=torch.bool)
        fresh[drawn[:, seed].unique()] = False
        assert (lam[:, seed, fresh] == 2.0).all()
        assert (lam[:, seed, ~fresh] < 2.0).all()


def test_top_k_and_area_against_sklearn():
    f, y = batch(80, 5)
    for k in (1, 2, 3):
        assert ldr.top_k(f, y, k).item() == pytest.approx(100 * top_k_accuracy_score(y, f, k=k, labels=range(5)))
    assert ldr.top_k(torch.zeros(4, 5), torch.arange(4), 2).item() == 0  # a network without opinions knows nothing
    values, positive = f[:, 0].mul(2).round().view(4, 20), (y > 1).view(4, 20)  # with ties
    expected = [roc_auc_score(b, v) for v, b in zip(values, positive, strict=True)]
    np.testing.assert_allclose(ldr.area(values, positive), expected)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: ldr.ldr_kl(torch.zeros(2, 3), torch.tensor([0, 3]), 1.0), "labels"),
        (lambda: ldr.ldr_kl(torch.zeros(2, 3), torch.tensor([0, 1]), 0.0), "lam"),
        (lambda: ldr.margins(torch.zeros(2, 1), torch.tensor([0, 0])), "classes"),
        (lambda: ldr.margins(torch.zeros(2, 3), torch.tensor([0, 1]), -1.0), "c must"),
        (lambda: ldr.worst_case(torch.zeros(2, 3), torch.tensor([0, 1]), math.nan), "lam"),
        (lambda: ldr.adapt(1.0, torch.zeros(1, 3), torch.tensor([0]), lam0=1.0, alpha=0.0), "alpha"),
        (lambda: ldr.adapt(1.0, torch.zeros(1, 3), torch.tensor([0]), lam0=-1.0, alpha=1.0), "lam0"),
        (lambda: ldr.expected_loss(ldr.absolute_error, torch.zeros(2, 3), torch.ones(3)), "sum of q"),
        (lambda: ldr.newton(lambda f: f.sum(-1), torch.full((1, 2), math.nan)), "start"),
        (lambda: ldr.flip(torch.tensor([0]), "salt", 0.1, 2, generator(0)), "kind"),
        (lambda: ldr.flip(torch.tensor([0]), "pair", 1.1, 2, generator(0)), "rate"),
        (lambda: ldr.train([], *small()[:2], **small()[2]), "arms"),
        (lambda: ldr.train([Arm("XX", 0.0, 0.1)], *small()[:2], **small()[2]), "loss"),
        (lambda: ldr.top_k(torch.zeros(2, 3), torch.tensor([0, 1]), 4), "k must"),
        (lambda: ldr.area(torch.zeros(3), torch.zeros(3, dtype=torch.bool)), "positive"),
    ],
)
def test_bad_input_is_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()
