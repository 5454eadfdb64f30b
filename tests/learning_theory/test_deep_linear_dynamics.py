"""Deep linear networks against an ODE solver, automatic differentiation, conservation laws and limits."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from paperlab.data.hierarchy import tree_svd
from paperlab.learning_theory import deep_linear_dynamics as dl


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def solve(velocity, start, t):
    return solve_ivp(velocity, (0, t[-1]), start, t_eval=t, rtol=1e-10, atol=1e-13).y


T = np.linspace(0, 6, 40)


def random_task(copies: int = 2):
    """Three layers of odd widths, correlated inputs, arbitrary targets."""
    g = draws(1)
    weights = [dl.gaussian(copies, o, i, g) for i, o in ((5, 7), (7, 6), (6, 4))]
    x, y = torch.randn(50, 5, generator=g, dtype=torch.float64), torch.randn(50, 4, generator=g, dtype=torch.float64)
    return weights, x, y


def test_mode_strength_solves_its_equation_and_meets_its_limits():
    s, u0 = 1.7, 1e-3
    expected = solve(lambda t, u: 2 * u * (s - u) / 0.5, [u0], T)[0]
    np.testing.assert_allclose(dl.mode_strength(T, s, u0, tau=0.5), expected, rtol=1e-6)
    assert dl.mode_strength(np.zeros(1), s, u0)[0] == pytest.approx(u0)
    assert dl.mode_strength(np.full(1, 1e3), s, u0)[0] == pytest.approx(s)


def test_learning_time_inverts_the_curve():
    half = dl.learning_time(1e-4, 1.0, 2.0)
    assert half == pytest.approx(math.log(2 / 1e-4 - 1) / 4)  # the half-time law
    assert dl.mode_strength(np.array([half]), 2.0, 1e-4)[0] == pytest.approx(1.0)


@pytest.mark.parametrize(("a0", "b0"), [(0.5, 0.01), (0.01, 0.5), (0.101, 0.1)])
def test_unbalanced_strength_solves_the_two_equations(a0, b0):
    a, b = solve(lambda t, z: [z[1] * (2 - z[0] * z[1]), z[0] * (2 - z[0] * z[1])], [a0, b0], T)
    np.testing.assert_allclose(dl.unbalanced_strength(T, 2.0, a0, b0), a * b, atol=1e-8)
    np.testing.assert_allclose(a**2 - b**2, a0**2 - b0**2, atol=1e-8)


@pytest.mark.parametrize(("a0", "b0"), [(1.0, 0.05), (0.02, 0.7)])
def test_equation_25_needs_a_2_on_s(a0, b0):
    """theta of equation 23 grows as 2s - c0 sinh(theta), and not as the printed s - c0 sinh(theta)."""
    a, b = solve(lambda t, z: [z[1] * (2 - z[0] * z[1]), z[0] * (2 - z[0] * z[1])], [a0, b0], T)
    c0 = abs(a0**2 - b0**2)
    theta = 2 * np.arctanh(np.minimum(a, b) / np.maximum(a, b))
    np.testing.assert_allclose(a * b, c0 / 2 * np.sinh(theta), rtol=1e-6)
    expected = solve(lambda t, q: 2 * 2 - c0 * np.sinh(q), theta[:1], T)[0]
    np.testing.assert_allclose(theta, expected, rtol=1e-6)
    printed = solve(lambda t, q: 2 - c0 * np.sinh(q), theta[:1], T)[0]
    assert np.abs(printed - theta).max() > 0.1


def test_unbalanced_tends_to_balanced():
    near = dl.unbalanced_strength(T, 1.5, 0.1 + 1e-6, 0.1 - 1e-6)
    np.testing.assert_allclose(near, dl.mode_strength(T, 1.5, 0.01), atol=1e-6)


@pytest.mark.parametrize("layers", [1, 2, 3, 6])
def test_deep_strength_solves_equation_15(layers):
    expected = solve(lambda t, u: layers * u ** (2 - 2 / layers) * (1.5 - u), [0.02], T)[0]
    np.testing.assert_allclose(dl.deep_strength(T, 1.5, 0.02, layers), expected, atol=1e-6)


def test_deep_strength_has_the_known_cases():
    np.testing.assert_allclose(dl.deep_strength(T, 2.0, 1e-3, 2), dl.mode_strength(T, 2.0, 1e-3), rtol=1e-6)
    shallow = 2 - (2 - 1e-3) * np.exp(-2 * T / 2)  # one layer has no plateau: an exponential approach
    np.testing.assert_allclose(dl.deep_strength(T, 2.0, 1e-3, 1)[:5], shallow[:5], rtol=1e-6)


def test_orthogonal_products_have_singular_values_one():
    product = torch.eye(9, dtype=torch.float64)
    for _ in range(30):
        product = dl.orthogonal(3, 9, 9, draws(2)) @ product
    torch.testing.assert_close(torch.linalg.svdvals(product), torch.ones(3, 9).double(), atol=1e-10, rtol=0)
    wide = dl.orthogonal(2, 4, 9, draws())
    torch.testing.assert_close(wide @ wide.mT, torch.eye(4).double().expand(2, 4, 4), atol=1e-12, rtol=0)


def test_gaussian_preserves_the_mean_squared_norm():
    w, x = dl.gaussian(400, 30, 50, draws()), torch.ones(50, dtype=torch.float64)
    assert ((w @ x).square().sum(1) / 30).mean() == pytest.approx(1.0, rel=0.05)


def test_directions_are_minus_the_gradient():
    weights, x, y = random_task()
    leaves = [w.clone().requires_grad_() for w in weights]
    h = x.T
    for w in leaves:
        h = w @ h
    loss = 0.5 * (y.T - h).square().sum() / len(x)
    directions, total = dl.descent_directions(weights, y.T @ x / len(x), x.T @ x / len(x))
    for d, gradient in zip(directions, torch.autograd.grad(loss, leaves), strict=True):
        torch.testing.assert_close(d, -gradient)
    torch.testing.assert_close(total @ x.T, h.detach())


def test_small_steps_follow_the_gradient_flow_and_conserve():
    """Against solve_ivp; W2' W2 - W1 W1' and its likes between all neighbouring layers stay what they were."""
    weights, x, y = random_task(copies=1)
    s31, s11 = y.T @ x / len(x), x.T @ x / len(x)
    shapes = [w.shape for w in weights]

    def velocity(t, flat):
        parts = torch.tensor(flat).split([s.numel() for s in shapes])
        directions, _ = dl.descent_directions([p.view(s) for p, s in zip(parts, shapes, strict=True)], s31, s11)
        return torch.cat([d.flatten() for d in directions]).numpy()

    end = solve(velocity, torch.cat([w.flatten() for w in weights]).numpy(), np.array([0.0, 2.0]))[:, -1]
    after, _ = dl.descend(weights, s31, s11, rate=2e-4, steps=10_000)
    np.testing.assert_allclose(torch.cat([w.flatten() for w in after]).numpy(), end, atol=2e-3)
    for k in range(len(weights) - 1):
        drift = [w[k + 1].mT @ w[k + 1] - w[k] @ w[k].mT for w in (weights, after)]
        torch.testing.assert_close(drift[1], drift[0], atol=2e-3, rtol=0)


@pytest.mark.parametrize("layers", [2, 4])
def test_decoupled_modes_stay_decoupled_and_follow_the_formula(layers):
    u, s, v = tree_svd(2)
    strengths = torch.full((1, layers, 4), 0.05 ** (1 / layers), dtype=torch.float64)
    weights = dl.decoupled(u, v, strengths, 6, draws())
    seen = dl.descend(weights, u * s @ v.T, torch.eye(4).double(), rate=1e-3, steps=4000, every=100,
                      watch=lambda w: u.T @ w @ v)[1][:, 0]  # fmt: skip
    diagonal = seen.diagonal(dim1=1, dim2=2)
    assert (seen - torch.diag_embed(diagonal)).abs().max() < 1e-12
    t = np.arange(40) * 0.1
    for k in range(4):
        np.testing.assert_allclose(diagonal[:, k], dl.deep_strength(t, float(s[k]), 0.05, layers), rtol=0.02)


def test_steps_to_learn_on_one_layer_is_geometric():
    # W <- W + r (S - W): the error falls as (1 - r)^2 a step.
    zero, s31 = [torch.zeros(3, 2, 2, dtype=torch.float64)], torch.eye(2).double()
    rates = torch.tensor([0.5, 0.1, 2.5], dtype=torch.float64)
    taken = dl.steps_to_learn(zero, s31, s31, rates=rates, criterion=0.01, limit=100)
    assert taken.tolist() == [4, 22, math.inf]  # the least n with (1 - r)^(2n) <= 0.01; a rate above 2 blows up


def test_rivals_are_called_off_and_the_best_stays():
    zero, s31 = [torch.zeros(6, 2, 2, dtype=torch.float64)], torch.eye(2).double()
    rates = torch.tensor([0.5, 0.1, 2.5, 0.02, 0.1, 1e-4], dtype=torch.float64)
    taken = dl.steps_to_learn(zero, s31, s31, rates=rates, criterion=0.01, limit=150, rivals=3)
    assert taken.tolist() == [4, math.inf, math.inf, math.inf, 22, math.inf]
    with pytest.raises(ValueError, match="rivals"):
        dl.steps_to_learn(zero, s31, s31, rates=rates, criterion=0.01, limit=1, rivals=4)


def test_one_rate_a_copy_is_each_copy_alone():
    weights, x, y = random_task()
    s31, s11, rates = y.T @ x / len(x), x.T @ x / len(x), torch.tensor([0.05, 0.1], dtype=torch.float64)
    together, _ = dl.descend(weights, s31, s11, rate=rates, steps=20)
    for k, rate in enumerate(rates.tolist()):
        alone, _ = dl.descend([w[k : k + 1] for w in weights], s31, s11, rate=rate, steps=20)
        for one, both in zip(alone, together, strict=True):
            torch.testing.assert_close(one[0], both[k])
    with pytest.raises(ValueError, match="rate"):
        dl.descend(weights, s31, s11, rate=rates[:1], steps=1)


def test_steps_to_learn_knows_the_best_map_of_correlated_inputs():
    _, x, y = random_task()
    s31, s11 = y.T @ x / len(x), x.T @ x / len(x)
    best = torch.tensor(np.linalg.lstsq(x.numpy(), y.numpy(), rcond=None)[0].T)
    taken = dl.steps_to_learn([best[None]], s31, s11, rates=torch.ones(1).double(), criterion=1e-9, limit=0)
    assert taken.tolist() == [0]


def test_pretraining_reaches_principal_components_first_and_orthogonality_last():
    lam = torch.tensor([1.0, 0.5, 0.01], dtype=torch.float64)
    q = dl.orthogonal(1, 3, 3, draws(4))[0]
    c = q * lam @ q.T
    short, long = (dl.pretrain(c, [3], 2, draws(5), steps=n)[0] for n in (40, 4000))
    gain = (short @ q).norm(dim=1)  # one number a principal component
    assert (gain[:, 0] > 0.9).all()
    assert (gain[:, 2] < 0.5).all()
    torch.testing.assert_close(torch.linalg.svdvals(long), torch.ones(2, 3).double(), atol=0.02, rtol=0)


def test_jacobian_against_autograd_and_the_linear_limit():
    n, g = 6, draws(7)
    weights = [dl.gaussian(1, n, n, g) for _ in range(3)]
    x = torch.randn(1, n, generator=g, dtype=torch.float64)

    def network(v):
        for w in weights:
            v = 1.3 * w[0] @ torch.tanh(v)
        return v

    *_, last = dl.jacobians(weights, x, 1.3)
    torch.testing.assert_close(last[0], torch.autograd.functional.jacobian(network, x[0]))
    *_, linear = dl.jacobians([dl.orthogonal(1, n, n, g) for _ in range(9)], 1e-9 * x, 0.9)
    torch.testing.assert_close(torch.linalg.svdvals(linear), torch.full((1, n), 0.9**9).double())


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: dl.mode_strength(T, -1.0, 0.1), "s"),
        (lambda: dl.learning_time(0.1, 2.0, 1.0), "s - u"),
        (lambda: dl.unbalanced_strength(T, 1.0, 0.1, 0.1), "a0 and b0"),
        (lambda: dl.deep_strength(T, 1.0, 0.1, 0), "layers"),
        (lambda: dl.deep_strength(T, 1.0, 2.0, 3), "s - u0"),
        (lambda: dl.decoupled(*[torch.eye(4)] * 2, torch.ones(1, 2, 4), 3, draws()), "width"),
        (lambda: dl.descend([], torch.eye(2), torch.eye(2), rate=0.1, steps=1), "weights"),
        (lambda: dl.descend([torch.eye(2)[None]], torch.eye(2), torch.eye(2), rate=math.nan, steps=1), "rate"),
        (lambda: dl.descend([torch.eye(2)[None]], torch.eye(2) / 0, torch.eye(2), rate=1.0, steps=1), "sigma31"),
        (lambda: dl.steps_to_learn([torch.eye(2)[None]], torch.eye(2), torch.eye(2), rates=torch.ones(2),
                                   criterion=0.1, limit=1), "rates"),
        (lambda: dl.pretrain(torch.eye(2), [], 1, draws(), steps=1), "widths"),
        (lambda: next(dl.jacobians([torch.eye(2)[None]], torch.ones(1, 2), 0.0)), "gain"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()


@pytest.mark.gpu
def test_cuda_agrees_with_cpu():
    weights, x, y = random_task()
    s31, s11, rates = y.T @ x / len(x), x.T @ x / len(x), torch.tensor([0.05, 0.1], dtype=torch.float64)
    cuda = torch.device("cuda")
    cpu = dl.steps_to_learn(weights, s31, s11, rates=rates, criterion=0.3, limit=400)
    gpu = dl.steps_to_learn([w.to(cuda) for w in weights], s31.to(cuda), s11.to(cuda), rates=rates.to(cuda),
                            criterion=0.3, limit=400)  # fmt: skip
    torch.testing.assert_close(gpu.cpu(), cpu, atol=1, rtol=0)
    after = [dl.descend([w.to(d) for w in weights], s31.to(d), s11.to(d), rate=0.1, steps=50)[0][0].cpu()
             for d in ("cpu", cuda)]  # fmt: skip
    torch.testing.assert_close(*after)
