"""Comp-sum losses against PyTorch, autograd, brute-force search, enumeration, and the limits in tau."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch.nn import functional as F

from paperlab.output_layers import comp_sum_losses as cs

TAUS = (0.0, 0.5, 1.0, 1.3, 1.5, 1.8, 2.0)
F64 = torch.float64


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(n: int = 7, count: int = 40):
    scores = 3 * torch.randn(count, n, generator=draws(), dtype=F64)
    return scores, torch.randint(n, (count,), generator=draws(1))


def worlds(count: int, inputs: int, classes: int, seed: int = 2):
    q = torch.rand(count, inputs, classes, generator=draws(seed), dtype=F64) ** 3 + 1e-3
    return q / q.sum(-1, keepdim=True)


def test_the_four_named_losses():
    z, y = batch()
    p = z.softmax(-1).gather(-1, y[:, None])[:, 0]
    u = sum((z[:, k] - z.gather(-1, y[:, None])[:, 0]).exp() * (y != k) for k in range(7))
    torch.testing.assert_close(cs.comp_sum(z, y, 0.0), u)
    torch.testing.assert_close(cs.comp_sum(z, y, 1.0), F.cross_entropy(z, y, reduction="none"))
    torch.testing.assert_close(cs.comp_sum(z, y, 1.7), (1 - p**0.7) / 0.7)
    torch.testing.assert_close(cs.comp_sum(z, y, 2.0), 1 - p)
    torch.testing.assert_close(cs.comp_sum(z, y, 2.0), (F.one_hot(y, 7) - z.softmax(-1)).abs().sum(-1) / 2)


@pytest.mark.parametrize("tau", TAUS)
def test_the_gradient_in_the_scores(tau):
    z, y = batch()
    z.requires_grad_()
    (slope,) = torch.autograd.grad(cs.comp_sum(z, y, tau).sum(), z)
    p = z.detach().softmax(-1)
    weight = p.gather(-1, y[:, None]) ** (tau - 1)
    torch.testing.assert_close(slope, weight * (p - F.one_hot(y, 7)))


@pytest.mark.parametrize("step", [1e-3, 1e-6, 1e-9, 1e-12])
def test_continuity_at_one(step):
    z, y = batch()
    q, beta = worlds(3, 4, 5), torch.linspace(0, 1, 21, dtype=F64)
    for sign in (-1, 1):
        tau = 1 + sign * step
        torch.testing.assert_close(cs.comp_sum(z, y, tau), cs.comp_sum(z, y, 1.0), rtol=60 * step + 1e-12, atol=0)
        torch.testing.assert_close(cs.least_conditional(q, tau), -(q * q.log()).sum(-1), rtol=9 * step + 1e-11, atol=0)
        torch.testing.assert_close(
            cs.transform(beta, tau, 3), cs.transform(beta, 1.0, 3), rtol=0, atol=3 * step + 1e-11
        )


def test_extreme_margins_stay_finite_and_accurate():
    z, y = torch.tensor([[1000.0, 0.0], [-1000.0, 0.0], [0.0, -30.0]]), torch.tensor([0, 0, 0])
    z.requires_grad_()
    for tau in (1.0, 1.5, 2.0):
        loss = cs.comp_sum(z, y, tau)
        (slope,) = torch.autograd.grad(loss.sum(), z)
        assert loss.isfinite().all()
        assert slope.isfinite().all()
    assert cs.comp_sum(z, y, 1.0)[1] == 1000
    assert cs.surprise(z, y)[2].item() == pytest.approx(math.exp(-30), rel=1e-5)  # 1 + u rounds to 1 in float32
    assert cs.comp_sum(z, y, 0.0)[2].item() == pytest.approx(math.exp(-30), rel=1e-5)


def test_a_tau_for_every_run_and_rho_as_a_unit():
    z, y = batch()
    both = cs.comp_sum(torch.stack([z, z]), torch.stack([y, y]), torch.tensor([[0.5], [2.0]]).double())
    torch.testing.assert_close(both, torch.stack([cs.comp_sum(z, y, 0.5), cs.comp_sum(z, y, 2.0)]))
    torch.testing.assert_close(cs.comp_sum(z, y, 0.5, rho=4.0), cs.comp_sum(z / 4, y, 0.5))


@pytest.mark.parametrize("tau", [0.0, 0.6, 1.0, 1.4, 1.9])
def test_least_conditional_against_scipy(tau):
    q = worlds(1, 1, 4)[0, 0].numpy()

    def risk(z):
        p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
        return q @ (-np.log(p) if tau == 1 else (p ** (tau - 1) - 1) / (1 - tau))

    best = min(minimize(risk, start, method="BFGS", options={"gtol": 1e-9}).fun
               for start in np.vstack([np.zeros(4), np.log(q), 3 * np.eye(4)]))  # fmt: skip
    assert cs.least_conditional(torch.tensor(q), tau).item() == pytest.approx(best, abs=1e-7)


@pytest.mark.parametrize("tau", [2.0, 2.5, 4.0])
def test_from_two_on_the_vertex_is_best(tau):
    q = worlds(1, 1, 3)[0, 0]
    grid = torch.tensor([(i, j, 100 - i - j) for i in range(101) for j in range(101 - i)], dtype=F64) / 100
    searched = (q * (1 - grid ** (tau - 1)) / (tau - 1)).sum(-1).min()
    assert cs.least_conditional(q, tau).item() == pytest.approx(searched.item(), abs=1e-12)


@pytest.mark.parametrize("tau", TAUS)
def test_transform_is_the_least_regret_of_a_wrong_choice(tau):
    """Two classes, by search over all probabilities that favour the wrong one."""
    p = torch.linspace(1e-9, 0.5, 20_001, dtype=F64)  # of the better label
    for beta in (0.05, 0.3, 0.8, 1.0):
        q = torch.tensor([(1 + beta) / 2, (1 - beta) / 2], dtype=F64)
        phi = (lambda x: -x.log()) if tau == 1 else (lambda x: (x ** (tau - 1) - 1) / (1 - tau))
        every = torch.linspace(1e-9, 1 - 1e-9, 200_001, dtype=F64)
        least = (q[0] * phi(every) + q[1] * phi(1 - every)).min()
        wrong = (q[0] * phi(p) + q[1] * phi(1 - p)).min()
        assert cs.transform(torch.tensor(beta, dtype=F64), tau, 2).item() == pytest.approx(
            (wrong - least).item(), abs=2e-6
        )


def test_transform_is_only_a_lower_bound_beyond_two():
    for tau, beta in ((3.0, 0.2), (2.5, 0.6)):
        p, q = torch.linspace(0, 0.5, 10_001, dtype=F64), (1 + beta) / 2
        wrong = (q * (1 - p ** (tau - 1)) + (1 - q) * (1 - (1 - p) ** (tau - 1))).min() / (tau - 1)
        assert wrong - (1 - q) / (tau - 1) > 1.5 * cs.transform(torch.tensor(beta, dtype=F64), tau, 2)


@pytest.mark.parametrize("n", [3, 6])
def test_the_number_of_classes_enters_beyond_one_and_a_crowd_attains_it_at_two(n):
    beta = torch.tensor([0.3, 0.9], dtype=F64) / (n - 1)
    for tau, factor in ((0.5, 1.0), (1.0, 1.0), (1.5, (2 / n) ** 0.5), (3.0, (2 / n) ** 2)):
        torch.testing.assert_close(cs.transform(beta, tau, n), factor * cs.transform(beta, tau, 2))
    crowd = (1 + beta)[:, None, None].expand(2, 1, n) / n - torch.eye(n).double()[-1] * beta[:, None, None]
    zero_one, surrogate = cs.regrets(torch.zeros(2, 1, n, dtype=F64), crowd, 2.0)  # the tie goes to the worst label
    torch.testing.assert_close(zero_one, beta)
    torch.testing.assert_close(surrogate, cs.transform(beta, 2.0, n))


def test_gamma_inverts_and_meets_the_square_root():
    beta, t = torch.linspace(0, 1, 33, dtype=F64), torch.linspace(0, 0.69, 50, dtype=F64)
    for tau in (*TAUS, 3.0):
        torch.testing.assert_close(cs.gamma(cs.transform(beta, tau, 4), tau, 4), beta, atol=1e-7, rtol=0)
        assert cs.gamma(torch.tensor(9.0, dtype=F64), tau, 4) == 1
    assert (cs.gamma(t, 1.0, 2) <= (2 * t).sqrt() + 1e-12).all()


@pytest.mark.parametrize("classes", [2, 3, 8])
def test_the_bound_holds_for_random_and_for_hostile_scores(classes):
    q = worlds(60, 6, classes)
    best = q.log()
    top = q.topk(2).indices
    hostile = best.scatter(-1, top[..., 1:], best.gather(-1, top[..., :1]) + 1e-9)  # the runner-up, by a hair
    scores = torch.stack([torch.randn(60, 6, classes, generator=draws(3), dtype=F64), hostile, -best, 0 * best])
    for tau in (0.0, 1.0, 1.5, 2.0, 2.5):
        zero_one, surrogate = cs.regrets(scores, q.expand_as(scores), tau)
        assert (zero_one >= -1e-12).all()
        assert (zero_one <= cs.gamma(surrogate.clamp(min=0), tau, classes) + 1e-6).all()


def test_regrets_vanish_at_the_best_scores_and_ties_go_last():
    q = worlds(4, 6, 3)
    for tau in (0.0, 1.0, 1.5):
        zero_one, surrogate = cs.regrets(q.log() / (2 - tau), q, tau)
        assert zero_one.abs().max() == 0
        assert surrogate.abs().max() < 1e-12
    flat = torch.tensor([[0.2, 0.5, 0.3]], dtype=F64)
    assert cs.regrets(torch.zeros(1, 3, dtype=F64), flat, 1.0)[0].item() == pytest.approx(0.2)


def test_best_labelling_against_a_search_over_lines():
    q = worlds(6, 4, 3, seed=5)
    x = torch.stack([torch.linspace(-1, 1, 4), torch.ones(4)], -1).double()
    chosen = (x @ torch.randn(40_000, 2, 3, generator=draws(6), dtype=F64)).argmax(-1)
    for world in q:
        hits = torch.stack([world[i][chosen[:, i]] for i in range(4)]).mean(0)
        assert cs.best_labelling(world.numpy()) == pytest.approx(1 - hits.max().item(), abs=1e-12)
    alternating = np.eye(2)[[0, 1, 0, 1]]
    assert cs.best_labelling(alternating) == pytest.approx(0.25)


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 1.5])
def test_fit_linear_against_scipy(tau):
    q = worlds(2, 5, 3, seed=7)
    x = torch.stack([torch.linspace(-1, 1, 5), torch.ones(5)], -1).double()
    more = 8 if tau > 1 else 0  # up to 1 the risk is convex
    starts = torch.cat([torch.zeros(1, 2, 2, 3), torch.randn(more, 2, 2, 3, generator=draws(8))]).double()
    w, risk = cs.fit_linear(q, x, tau, starts)

    def objective(flat, world):
        p = (x @ torch.tensor(flat).view(2, 3)).softmax(-1).numpy()
        return (world * (-np.log(p) if tau == 1 else (p ** (tau - 1) - 1) / (1 - tau))).sum() / 5

    for k in range(2):
        found = min(minimize(objective, s.flatten(), (q[k].numpy(),), method="BFGS").fun for s in starts[:, k].numpy())
        assert risk[k].item() == pytest.approx(found, abs=2e-5)
        assert objective(w[k].flatten().numpy(), q[k].numpy()) == pytest.approx(risk[k].item(), abs=1e-12)


def test_absolute_error_never_beats_the_best_labelling():
    """With a bias, soft choices are mixtures of hard ones (Gumbel noise), so 1 - p_y has the same infimum."""
    q = worlds(10, 6, 4, seed=9)
    x = torch.stack([torch.linspace(-1, 1, 6), torch.ones(6)], -1).double()
    _, risk = cs.fit_linear(q, x, 2.0, 5 * torch.randn(20, 10, 2, 4, generator=draws(10), dtype=F64), steps=80)
    exact = torch.tensor([cs.best_labelling(world.numpy()) for world in q])
    assert (risk >= exact - 1e-9).all()
    assert (risk - exact).abs().min() < 1e-4


def test_smooth_term_and_divergence_against_their_definitions():
    h, y = batch(4, 5)
    m = h + torch.randn(5, 4, generator=draws(11), dtype=F64)
    for i in range(5):
        others = [k for k in range(4) if k != y[i]]
        stacked = [torch.stack([z[i, y[i]] - z[i, k] for k in others]) for z in (h, m)]
        assert cs.smooth_term(h, m, y)[i].item() == pytest.approx((stacked[1] - stacked[0]).norm().item())
    kl = F.kl_div(m.log_softmax(-1), h.softmax(-1), reduction="none").sum(-1)
    torch.testing.assert_close(cs.divergence(h, m, y), kl)
    torch.testing.assert_close(cs.smooth_term(h, h + 5, y), torch.zeros(5, dtype=F64))  # a shift moves no margin


def test_attack_finds_the_corner_of_a_linear_objective():
    x = torch.full((2, 3), 0.5)
    x[1] = 0.95
    slope = torch.tensor([1.0, -2.0, 0.5])
    moved = cs.attack(x, lambda z: (z * slope).sum(), radius=0.1, steps=4, generator=draws())
    torch.testing.assert_close(moved, torch.tensor([[0.6, 0.4, 0.6], [1.0, 0.85, 1.0]]))
    same = cs.attack(x, lambda z: (z * slope).sum(), radius=0.0, steps=1, generator=draws())
    assert torch.equal(same, x)


def test_with_weight_0_every_defence_is_cross_entropy_and_with_1_it_costs_more():
    net = torch.nn.Linear(6, 4).double()
    x, y = torch.rand(6, 9, 6, generator=draws(12), dtype=F64), torch.randint(4, (6, 9), generator=draws(13))
    plan = [(d, slice(2 * k, 2 * k + 2)) for k, d in enumerate(cs.DEFENCES.values())]
    weight = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 1.0], dtype=F64)[:, None]
    args = {"radius": 0.1, "steps": 3}
    together = cs.adversarial_loss(net, x, y, plan, weight, generator=draws(), **args)
    none = cs.adversarial_loss(net, x, y, plan, 0 * weight, generator=draws(), **args)
    every = F.cross_entropy(net(x).flatten(0, 1), y.flatten(), reduction="none").view(6, 9).mean(1)
    assert none.item() == pytest.approx(every.sum().item())
    assert together.item() > none.item()
    clean, safe = cs.accuracy_under_attack(net, x, y, generator=draws(), **args)
    still = cs.accuracy_under_attack(net, x, y, radius=0.0, steps=1, generator=draws())
    torch.testing.assert_close(clean, still[1])
    assert (safe <= clean).all()


def test_every_defence_is_its_formula():
    h, y = batch(4, 6)
    m, rows = h + torch.randn(6, 4, generator=draws(14), dtype=F64), torch.arange(6)
    w = torch.tensor(0.3, dtype=F64)
    clean, hit = (F.cross_entropy(z, y, reduction="none") for z in (h, m))
    kl = F.kl_div(m.log_softmax(-1), h.softmax(-1), reduction="none").sum(-1)
    norm = ((m[rows, y][:, None] - m) - (h[rows, y][:, None] - h)).norm(dim=-1)
    expected = {
        "smooth comp-sum": (norm, clean + 0.3 * norm),
        "TRADES": (kl, clean + 0.3 * kl),
        "PGD training": (hit, 0.7 * clean + 0.3 * hit),
    }
    assert expected.keys() == cs.DEFENCES.keys()
    for name, (inner, outer) in expected.items():
        torch.testing.assert_close(cs.DEFENCES[name].inner(h, m, y), inner)
        torch.testing.assert_close(cs.DEFENCES[name].outer(h, m, y, w), outer)


def test_accuracy_under_attack_is_exact_for_a_linear_network():
    net, slope = torch.nn.Linear(3, 2).double(), torch.tensor([1.0, -2.0, 0.5], dtype=F64)
    with torch.no_grad():
        net.weight.copy_(torch.stack([slope, 0 * slope]))
        net.bias.copy_(torch.tensor([0.25, 0.0]))
    x = 0.2 + 0.6 * torch.rand(2, 200, 3, generator=draws(15), dtype=F64)
    margin = x @ slope + 0.25
    y = (margin < 0).long()
    clean, safe = cs.accuracy_under_attack(net, x, y, radius=0.1, steps=4, generator=draws())
    assert (clean == 1).all()
    torch.testing.assert_close(safe.double(), (margin.abs() > 0.1 * slope.abs().sum()).double().mean(1))


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: cs.comp_sum(torch.zeros(2, 3), torch.tensor([0, 3]), 1.0), "labels"),
        (lambda: cs.comp_sum(torch.zeros(2, 3), torch.tensor([0, 1]), -0.5), "tau"),
        (lambda: cs.surprise(torch.zeros(2, 1), torch.tensor([0, 0])), "classes"),
        (lambda: cs.surprise(torch.zeros(2, 3), torch.tensor([0, 1]), rho=0.0), "rho"),
        (lambda: cs.least_conditional(torch.full((3,), 0.5), 1.0), "sum of q"),
        (lambda: cs.least_conditional(torch.tensor([1.5, -0.5]), 1.0), "q"),
        (lambda: cs.transform(torch.tensor([1.1]), 1.0, 2), "beta"),
        (lambda: cs.transform(torch.tensor([0.1]), 1.0, 1), "classes"),
        (lambda: cs.gamma(torch.tensor([-0.1]), 1.0, 2), "regret"),
        (lambda: cs.regrets(torch.full((2, 2), math.nan), torch.full((2, 2), 0.5), 1.0), "scores"),
        (lambda: cs.best_labelling(-np.ones((2, 2))), "q"),
        (
            lambda: cs.fit_linear(torch.ones(1, 2, 2) / 2, torch.ones(2, 1), 1.0, torch.zeros(1, 1, 1, 2), steps=0),
            "steps",
        ),
        (lambda: cs.attack(torch.full((2,), 2.0), torch.sum, radius=0.1, steps=1, generator=draws()), "x"),
        (lambda: cs.attack(torch.ones(2), torch.sum, radius=-0.1, steps=1, generator=draws()), "radius"),
    ],
)
def test_bad_input_is_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()
