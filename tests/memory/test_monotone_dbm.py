"""monotone-dbm: against something independent (a closed form, a limit, an invariance, a library)."""

import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import softmax, wrightomega

from paperlab.devices import generator
from paperlab.memory.monotone_dbm import (
    Equilibrium,
    Layout,
    Machine,
    RestrictedMachine,
    completion_loss,
    exact_marginals,
    free_weights,
    monotone_weights,
    prox,
    prox_jacobian,
    settle,
    steepness,
    unsettled,
)

MIXED = Layout(((3, 2), (2, 4)))  # three binary variables and two with four states: 14 units
OWNER = [0, 1, 2, 0, 1, 2, 3, 4, 3, 4, 3, 4, 3, 4]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def all_free(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, dtype=torch.bool)


def uniform(layout: Layout, *batch: int) -> torch.Tensor:
    return layout.softmax(torch.zeros(*batch, layout.units, dtype=torch.float64))


def test_layout_softmax_sums_to_one_over_the_states_of_each_variable():
    q = MIXED.softmax(normal(5, 14)).numpy()
    for variable in range(5):
        np.testing.assert_allclose(q[:, [u for u in range(14) if OWNER[u] == variable]].sum(1), 1)
    assert MIXED.same().tolist() == [[a == b for b in OWNER] for a in OWNER]
    torch.testing.assert_close(MIXED.join(MIXED.split(torch.arange(14.0))), torch.arange(14.0))


def test_folding_keeps_lengths_and_turns_weights_into_the_same_weights():
    P = MIXED.fold(torch.eye(14).double()).T.numpy()  # 3 differences and 2 × 4 states
    np.testing.assert_allclose(P @ P.T, np.eye(11), atol=1e-15)
    np.testing.assert_allclose(MIXED.unfold(torch.eye(11).double()), P)
    A = MIXED.unfold(normal(2, 9, 11))  # the columns of a pair are opposite
    folded = monotone_weights(MIXED.fold(A), MIXED.folded, 0.3).numpy()
    np.testing.assert_allclose(folded, P @ monotone_weights(A, MIXED, 0.3).numpy() @ P.T, atol=1e-12)


@pytest.mark.parametrize("m", [-0.9, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("scale", [0.1, 10.0])
def test_weights_are_monotone_symmetric_and_hollow(m, scale):
    phi = monotone_weights(scale * normal(2, 6, 14), MIXED, m).numpy()
    assert np.linalg.eigvalsh(np.eye(14) - phi).min() >= m - 1e-12
    np.testing.assert_allclose(phi, phi.transpose(0, 2, 1), atol=1e-14)
    for a, b in itertools.product(range(14), repeat=2):
        assert OWNER[a] != OWNER[b] or not phi[:, a, b].any()
    assert np.abs(phi).max() > 0.01 or m == 1 or scale < 1


def test_small_factors_are_not_scaled_and_large_ones_reach_the_bound():
    A = 0.01 * normal(6, 14)
    apart = torch.tensor([[a != b for b in OWNER] for a in OWNER])
    torch.testing.assert_close(monotone_weights(A, MIXED, 0.1), -(A.T @ A) * apart)
    two = Layout(((2, 2),))
    a = torch.tensor([[-3.0, 3.0, 3.0, -3.0]], dtype=torch.float64)  # variable 0 has (-3, 3), variable 1 has (3, -3)
    phi = monotone_weights(a, two, 0.1)
    assert torch.linalg.eigvalsh(phi).max().item() == pytest.approx(0.9)
    assert phi[2, 3].item() == pytest.approx(0.45)  # state 1 of one with state 1 of the other: an agreement
    assert phi[0, 3].item() == pytest.approx(-0.45)


@pytest.mark.parametrize("states", [2, 3, 10])
def test_prox_at_alpha_one_is_softmax(states):
    y = 3 * normal(7, states, 4)
    torch.testing.assert_close(prox(y, 1.0)[0].numpy(), softmax(y.numpy(), axis=1))


@pytest.mark.parametrize("states", [2, 3, 10])
@pytest.mark.parametrize("alpha", [0.05, 0.25, 0.8])
def test_prox_against_the_wright_omega_function(states, alpha):
    y = 2 * normal(6, states, 1)
    z, _ = prox(y, alpha)
    y, z = y[..., 0].numpy(), z[..., 0].numpy()
    beta = (1 - alpha) / alpha
    for row, found in zip(y, z, strict=True):
        low, high = -row.max() - 50, 1 - row.min() + 50  # bisection for nu
        for _ in range(200):
            nu = (low + high) / 2
            exact = wrightomega((row + nu - alpha) / alpha + np.log(beta)).real / beta
            low, high = (nu, high) if exact.sum() < 1 else (low, nu)
        np.testing.assert_allclose(found, exact, atol=1e-9)


def test_prox_minimises_its_objective():
    y, alpha = np.array([0.9, 0.2, -0.4]), 0.3

    def objective(free):
        z = softmax(np.append(free, 0))
        return ((z - y) ** 2).sum() / 2 + alpha * (z @ np.log(z) - (z**2).sum() / 2)

    best = softmax(np.append(minimize(objective, np.zeros(2), tol=1e-12).x, 0))
    z, _ = prox(torch.tensor(y)[None, :, None], alpha)
    np.testing.assert_allclose(z[0, :, 0], best, atol=1e-5)


@pytest.mark.parametrize("states", [2, 5])
def test_a_small_alpha_projects_and_a_warm_start_changes_nothing(states):
    y = normal(20, states, 3)
    z, warm = prox(y, 1e-3, newton=100, precision=1e-13)
    for i, j in itertools.product(range(20), range(3)):  # projection onto the simplex, by sorting
        v = np.sort(y[i, :, j].numpy())[::-1]
        theta = max(((v[: k + 1].sum() - 1) / (k + 1) for k in range(states)), default=0)
        np.testing.assert_allclose(z[i, :, j], np.maximum(y[i, :, j].numpy() - theta, 0), atol=0.01)
    other = y + 0.3 * normal(20, states, 3, seed=1)
    torch.testing.assert_close(
        prox(other, 1e-3, warm, newton=100, precision=1e-13)[0], prox(other, 1e-3, newton=100, precision=1e-13)[0]
    )


@pytest.mark.parametrize("states", [2, 4])
def test_prox_jacobian_against_differences(states):
    y, v, h = normal(5, states, 2), normal(5, states, 2, seed=1), 1e-5
    numerical = (prox(y + h * v, 0.3)[0] - prox(y - h * v, 0.3)[0]) / (2 * h)
    torch.testing.assert_close(prox_jacobian(prox(y, 0.3)[0], v, 0.3), numerical, atol=1e-8, rtol=1e-6)


def test_without_weights_the_answer_is_the_softmax_of_the_biases():
    b = normal(1, 14)
    q = settle(torch.zeros(14, 14).double(), b, MIXED, uniform(MIXED, 3), all_free(3, 14), alpha=0.25, steps=200)
    torch.testing.assert_close(q, MIXED.softmax(b).expand(3, -1))


@pytest.mark.parametrize("m", [0.1, -0.9])
def test_inference_finds_the_lowest_free_energy_from_every_start(m):
    phi, b = monotone_weights(5 * normal(3, 14), MIXED, m), normal(1, 14, seed=1)
    start = MIXED.softmax(5 * normal(20, 14, seed=2))
    step = (1 / steepness(phi)).item()
    q = settle(phi, b, MIXED, start, all_free(20, 14), alpha=step, steps=400, tolerance=1e-8)
    assert (q - q[0]).abs().max() < 1e-6
    assert unsettled(phi, b, MIXED, q, all_free(20, 14)).max() < 1e-6

    def energy(logits):
        p = MIXED.softmax(torch.tensor(logits)).numpy()
        return p @ np.log(p) - p @ phi.numpy() @ p / 2 - b[0].numpy() @ p

    found = minimize(energy, np.zeros(14), tol=1e-12)
    np.testing.assert_allclose(MIXED.softmax(torch.tensor(found.x)), q[0], atol=1e-4)


def test_observed_variables_stay_and_act():
    phi, b = monotone_weights(5 * normal(3, 14), MIXED, 0.1), torch.zeros(1, 14).double()
    values, free = uniform(MIXED, 2), all_free(2, 14)
    for row, state in enumerate((0, 1)):
        values[row, [0, 3]] = torch.tensor([1.0 - state, float(state)]).double()
        free[row, [0, 3]] = False
    q = settle(phi, b, MIXED, values, free, alpha=0.05, steps=100)
    torch.testing.assert_close(q[:, [0, 3]], values[:, [0, 3]])
    assert (q[0, 6:] - q[1, 6:]).abs().max() > 0.01


def test_undamped_disagreement_flips_for_ever_and_the_prox_does_not():
    layout = Layout(((4, 2),))
    phi = monotone_weights(torch.cat([-torch.ones(1, 4), torch.ones(1, 4)], 1).double(), layout, 0.1)
    b, free = torch.zeros(1, 8).double(), all_free(1, 8)
    on = torch.cat([0.2 * torch.ones(1, 4), 0.8 * torch.ones(1, 4)], 1).double()
    flips = [settle(phi, b, layout, on, free, damping="average", alpha=1.0, steps=s)[0, 4].item() for s in (100, 101)]
    assert abs(flips[0] - flips[1]) > 0.5
    proved = (0.2 / steepness(phi) ** 2).item()
    torch.testing.assert_close(settle(phi, b, layout, on, free, alpha=proved, steps=1200), uniform(layout, 1))


def test_gradient_of_the_fixed_point_by_differences_and_by_unrolling():
    layout = Layout(((2, 2), (1, 3)))
    A, b = normal(2, 4, 7).requires_grad_(), normal(2, 1, 7, seed=1).requires_grad_()
    values, free = uniform(layout, 2, 3), all_free(2, 3, 7)
    values[:, 0, [0, 2]], free[:, 0, [0, 2]] = torch.tensor([1.0, 0.0]).double(), False

    def solved(A, b, alpha=0.25):
        options = {"alpha": alpha, "steps": 120}
        return Equilibrium.apply(monotone_weights(A, layout, 0.1), b, values, free, layout, options)

    assert torch.autograd.gradcheck(solved, (A, b), atol=1e-6, fast_mode=True)
    q, phi = values, monotone_weights(A, layout, 0.1)
    for _ in range(150):
        q = torch.where(free, q + 0.2 * (layout.softmax(q @ phi + b) - q), values)
    weight = normal(2, 3, 7, seed=2)
    for alpha in (0.25, 0.1):
        implicit = torch.autograd.grad((weight * solved(A, b, alpha)).sum(), (A, b))
        unrolled = torch.autograd.grad((weight * q).sum(), (A, b), retain_graph=True)
        torch.testing.assert_close(implicit, unrolled, atol=1e-8, rtol=1e-6)


def test_exact_marginals_by_a_plain_loop():
    layout = Layout(((2, 2), (1, 3)))
    phi, b = free_weights(normal(7, 7), layout), normal(7, seed=1)
    owner, total, mass = [[0, 2], [1, 3], [4, 5, 6]], 0.0, np.zeros(7)
    for state in itertools.product(range(2), range(2), range(3)):
        x = np.zeros(7)
        x[[owner[v][s] for v, s in enumerate(state)]] = 1
        p = np.exp(x @ phi.numpy() @ x / 2 + b.numpy() @ x)
        total, mass = total + p, mass + p * x
    np.testing.assert_allclose(exact_marginals(phi, b, layout), mass / total)


def test_machine_starts_at_the_mean_image_and_sees_only_what_is_seen():
    ink = torch.tensor([[0.1, 0.5, 0.9]])
    machine = Machine(ink, 4, 5, 0.1, generator=generator(0))
    with torch.no_grad():
        machine.weight.copy_(torch.eye(19))
    images = torch.tensor([[[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]])
    odds, label = machine(images, torch.zeros(1, 2, 3, dtype=torch.bool))
    torch.testing.assert_close(torch.sigmoid(odds), ink.expand(1, 2, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(label.softmax(-1), torch.full((1, 2, 5), 0.2))
    other = Machine(ink, 4, 5, 0.1, generator=generator(1))
    phi, b = other.model()  # activity counts from the centre: there the field is b alone
    torch.testing.assert_close(other.centre @ phi + b, other.b)
    seen = torch.tensor([False, True, True]).expand(1, 2, 3)
    torch.testing.assert_close(*other(images, seen)[1][0])  # they differ in the pixel that is not seen


def test_machine_takes_the_step_that_its_weights_allow_and_reads_the_likeliest_class():
    machine = Machine(torch.full((2, 6), 0.4), 3, 4, [0.1, -0.9], alpha=1.0, generator=generator(0)).double()
    with torch.no_grad():
        machine.weight.copy_(normal(2, 22, 22))
        machine.b[..., 18 + 2] += 3.0  # the third class
        for _ in range(60):
            step = machine.step_size(machine.model()[0])
        torch.testing.assert_close(step, 1 / steepness(machine.model()[0]), rtol=1e-4, atol=0)
        images = torch.zeros(2, 1, 6).double()
        assert (machine(images, images > 1)[1].argmax(-1) == 2).all()


def test_loss_by_hand_and_its_gradient_reaches_every_parameter():
    odds, label = torch.tensor([[[0.0, 2.0]]]), torch.zeros(1, 1, 4)
    images, seen = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[False, True]]])
    by_hand = 0.1 * 0.25 * np.log(2) + 0.9 * np.log(4)
    assert completion_loss(odds, label, images, torch.tensor([[3]]), seen).item() == pytest.approx(by_hand)
    machine = Machine(torch.full((2, 6), 0.4), 3, 4, [0.1, 0.5], generator=generator(0))
    x = (torch.rand(2, 8, 6, generator=generator(1)) < 0.5).float()
    completion_loss(*machine(x, x > 1), x, torch.arange(8).remainder(4).expand(2, 8), x > 1).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in machine.parameters())


def test_free_energy_sums_the_hidden_units_out():
    rbm = RestrictedMachine(torch.tensor([[0.3, 0.6]]), 3, 2, generator=generator(0))
    with torch.no_grad():
        rbm.c.add_(torch.tensor([1.0, -2.0, 0.5]))
    W, a, c = (p.detach()[0].numpy() for p in (rbm.W, rbm.a, rbm.c))
    v = np.array([1.0, 0.0, 0.0, 1.0])
    by_hand = sum(np.exp(v @ a[0] + v @ W @ h + h @ c[0]) for h in map(np.array, itertools.product((0, 1), repeat=3)))
    assert -rbm.free_energy(torch.tensor(v).float().view(1, 1, 4)).item() == pytest.approx(np.log(by_hand), rel=1e-5)


def test_restricted_machine_fills_in_as_mean_field_on_the_same_graph_does():
    rbm = RestrictedMachine(torch.tensor([[0.3, 0.6, 0.5]]), 2, 4, generator=generator(0)).double()
    with torch.no_grad():
        rbm.W.mul_(12)
        rbm.c.add_(torch.tensor([0.7, -0.4]))
    W, a, c = (p.detach()[0] for p in (rbm.W, rbm.a, rbm.c))
    layout = Layout(((5, 2), (1, 4)))  # 3 pixels and 2 hidden units, off and then on; the label
    visible, hidden = torch.tensor([5, 6, 7, 10, 11, 12, 13]), torch.tensor([8, 9])
    phi, b = torch.zeros(14, 14).double(), torch.zeros(1, 14).double()
    phi[visible[:, None], hidden], phi[hidden[:, None], visible], b[0, visible], b[0, hidden] = W, W.T, a[0], c[0]
    image, seen = torch.tensor([[[1.0, 0.0, 0.0]]]).double(), torch.tensor([[[True, False, False]]])
    values, free = uniform(layout, 1), all_free(1, 14)
    values[0, [0, 5]], free[0, [0, 5]] = torch.tensor([0.0, 1.0]).double(), False
    q = settle(phi, b, layout, values, free, damping="average", alpha=0.5, steps=300)
    field = (q @ phi + b)[0]
    odds, label = rbm(image, seen, steps=200)
    torch.testing.assert_close(odds[0, 0].detach(), field[visible[:3]])
    torch.testing.assert_close(label[0, 0].detach(), field[visible[3:]])
    assert (odds[0, 0] - a[0, :3]).abs().max() > 0.1


def test_gibbs_sampling_visits_states_as_often_as_they_are_likely():
    rbm = RestrictedMachine(torch.tensor([[0.3]]), 2, 2, generator=generator(0))
    with torch.no_grad():
        rbm.W.mul_(30)
    states = torch.tensor([[0.0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1]])
    expected = torch.softmax(-rbm.free_energy(states[None]), -1)[0]
    v, g = states[0].repeat(1, 20000, 1), generator(1)
    for _ in range(20):
        v = rbm.gibbs(v, g)
    seen = (v[0] @ torch.tensor([2.0, 0, 1])).long().bincount(minlength=4) / 20000
    torch.testing.assert_close(seen, expected.detach(), atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: Layout(((3, 1),)), "states"),
        (lambda: monotone_weights(torch.ones(2, 14), MIXED, 1.5), "m"),
        (lambda: prox(torch.zeros(1, 2, 1), 0.0), "alpha"),
        (lambda: settle(torch.full((14, 14), torch.nan).double(), torch.zeros(1, 14).double(), MIXED,
                        uniform(MIXED, 1), all_free(1, 14), alpha=0.5, steps=1), "phi"),
        (lambda: settle(torch.zeros(14, 14).double(), torch.zeros(1, 14).double(), MIXED, uniform(MIXED, 1),
                        all_free(1, 14), alpha=0.5, steps=1, damping="none"), "damping"),
        (lambda: exact_marginals(torch.zeros(40, 40), torch.zeros(40), Layout(((20, 2),))), "states"),
        (lambda: Machine(torch.full((1, 3), 2.0), 2, 3, 0.1), "ink"),
        (lambda: RestrictedMachine(torch.full((1, 3), 0.5), 0, 3), "hidden"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()
