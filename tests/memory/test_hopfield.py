"""Modern Hopfield networks against attention, finite differences, brute force and the paper's own numbers."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from paperlab.data.bags import draw_bags
from paperlab.data.sphere import unit_vectors
from paperlab.devices import generator
from paperlab.memory.hopfield import (
    GatedAttentionPooling,
    Hopfield,
    HopfieldLayer,
    HopfieldPooling,
    ProjectedMaxPooling,
    binary_recall,
    capacity,
    energy,
    error_bound,
    fixed_points,
    guaranteed_base,
    patterns_for_mass,
    retrieve,
    separation,
    update,
)


def patterns(n: int = 12, d: int = 5, seed: int = 0, scale: float = 1.5) -> torch.Tensor:
    return scale * torch.randn(n, d, generator=generator(seed), dtype=torch.float64)


@pytest.mark.parametrize("beta", [0.05, 1.0, 7.0])
def test_gradient_of_the_energy_is_state_minus_update(beta):
    # Central differences know nothing of softmax.
    X, xi, step = patterns(), patterns(6, seed=1), 1e-5
    shifted = xi[:, None] + step * torch.eye(5, dtype=torch.float64)
    lowered = xi[:, None] - step * torch.eye(5, dtype=torch.float64)
    gradient = (energy(X, shifted, beta) - energy(X, lowered, beta)) / (2 * step)
    torch.testing.assert_close(gradient, xi - update(X, xi, beta), atol=1e-7, rtol=1e-6)


def test_energy_against_the_formula_by_hand():
    X = torch.tensor([[3.0, 4.0], [0.0, 1.0]], dtype=torch.float64)
    xi, beta = torch.tensor([1.0, 2.0], dtype=torch.float64), 0.5
    by_hand = -2 * math.log(math.exp(0.5 * 11) + math.exp(0.5 * 2)) + 2.5 + 2 * math.log(2) + 12.5
    assert energy(X, xi, beta).item() == pytest.approx(by_hand, abs=1e-12)


@pytest.mark.parametrize("beta", [0.01, 0.5, 3.0, 50.0])
def test_energy_never_rises_and_stays_within_its_bounds(beta):
    X = patterns(20, 8)
    xi = torch.softmax(patterns(50, 20, seed=2), -1) @ X  # states inside the convex hull of the patterns
    M2 = X.square().sum(-1).max()
    for _ in range(30):
        new = update(X, xi, beta)
        assert (energy(X, new, beta) - energy(X, xi, beta)).max() < 1e-10
        assert energy(X, new, beta).min() >= -1e-10
        assert energy(X, new, beta).max() <= 2 * M2
        xi = new


def test_update_is_scaled_dot_product_attention():
    X, xi = patterns(30, 16), patterns(7, 16, seed=3)
    expected = F.scaled_dot_product_attention(xi[None], X[None], X[None])[0]
    torch.testing.assert_close(update(X, xi, 1 / math.sqrt(16)), expected, atol=1e-12, rtol=0)


def test_limits_of_beta_and_of_one_pattern():
    X, xi = patterns(), patterns(9, seed=4)
    torch.testing.assert_close(update(X, xi, 1e-9), X.mean(0).expand(9, -1), atol=1e-6, rtol=0)
    by_argmax = X[torch.tensor(np.argmax(xi.numpy() @ X.numpy().T, axis=1))]
    torch.testing.assert_close(update(X, xi, 1e6), by_argmax)
    torch.testing.assert_close(update(X[:1], xi, 0.3), X[:1].expand(9, -1))  # N = 1: exact in one step


def test_permuting_or_rotating_changes_nothing():
    X, xi = patterns(), patterns(4, seed=5)
    order = torch.randperm(len(X), generator=generator(6))
    torch.testing.assert_close(update(X[order], xi, 2.0), update(X, xi, 2.0))
    Q = torch.linalg.qr(patterns(5, 5, seed=7)).Q
    torch.testing.assert_close(update(X @ Q, xi @ Q, 2.0), update(X, xi, 2.0) @ Q)


def test_retrieve_ends_where_the_gradient_vanishes():
    X = patterns(15, 6)
    end = retrieve(X, patterns(20, 6, seed=8), 0.7)
    torch.testing.assert_close(end, update(X, end, 0.7), atol=1e-7, rtol=0)


def test_separation_by_loops():
    X = patterns(7, 4).numpy()
    loops = [X[i] @ X[i] - max(X[i] @ X[j] for j in range(7) if j != i) for i in range(7)]
    np.testing.assert_allclose(separation(torch.tensor(X)).numpy(), loops)


@pytest.mark.parametrize("beta", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("noise", [0.0, 0.05, 0.3])
def test_error_bound_is_never_violated(beta, noise):
    X = math.sqrt(11) * unit_vectors(25, 12, generator=generator(1))
    M, star = math.sqrt(11), retrieve(X, X, beta)
    for trial in range(20):
        xi = X + noise * M * unit_vectors(25, 12, generator=generator(trial)) if noise else X
        r = torch.maximum((xi - X).norm(dim=-1), (star - X).norm(dim=-1))
        assert ((update(X, xi, beta) - X).norm(dim=-1) <= error_bound(X, r, beta) * (1 + 1e-12)).all()


def test_error_bound_of_two_patterns_by_hand():
    X = torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=torch.float64)  # separations 4 and 1, M = 2
    bound = error_bound(X, torch.tensor([0.0, 0.1], dtype=torch.float64), 0.5)
    np.testing.assert_allclose(bound, [4 * math.exp(-2), 4 * math.exp(-0.5 * 0.6)])


def test_fixed_points_count_the_three_regimes():
    pairs = torch.tensor([[1.0, 0.1], [1.0, -0.1], [-1.0, 0.1], [-1.0, -0.1]], dtype=torch.float64)
    assert len(fixed_points(pairs, 0.1)[0]) == 1  # the global mean, which is the origin
    torch.testing.assert_close(fixed_points(pairs, 0.1)[0], torch.zeros(1, 2, dtype=torch.float64), atol=1e-4, rtol=0)
    ends, member = fixed_points(pairs, 20.0)  # metastable: the mean of each pair
    assert member.tolist() == [0, 0, 1, 1]
    torch.testing.assert_close(ends, torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64), atol=1e-4, rtol=0)
    ends, member = fixed_points(pairs, 2000.0)  # every pattern by itself
    assert member.tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(ends, pairs, atol=1e-4, rtol=0)


def test_patterns_for_mass():
    weights = torch.tensor([[0.5, 0.2, 0.2, 0.1], [1.0, 0.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]])
    assert patterns_for_mass(weights).tolist() == [3, 1, 4]
    assert patterns_for_mass(torch.full((1, 1000), 1e-3)).tolist() == [900]
    assert patterns_for_mass(weights, 0.4).tolist() == [1, 1, 2]


@pytest.mark.parametrize("degree", [2, 3, 4])
def test_binary_recall_against_the_sum_written_out(degree):
    rng = np.random.default_rng(0)
    X, xi = rng.choice([-1.0, 1.0], (5, 9)), rng.choice([-1.0, 1.0], (4, 9))
    expected = np.empty_like(xi)
    for b in range(4):
        for i in range(9):
            others = [j for j in range(9) if j != i]
            field = sum(X[m, i] * (X[m, others] @ xi[b, others]) ** (degree - 1) for m in range(5))
            expected[b, i] = 1.0 if field >= 0 else -1.0
    one_step = binary_recall(torch.tensor(X), torch.tensor(xi), degree, limit=1)
    np.testing.assert_array_equal(one_step.numpy(), expected)


def test_classical_network_recalls_below_its_capacity_and_not_above():
    pool = torch.randn(200, 200, generator=generator(0)).sign()
    few, many = pool[:10], pool[:100]  # 0.05 d and 0.5 d
    assert ((binary_recall(few, few, 2) * few).mean() > 0.999).item()
    assert ((binary_recall(many, many, 2) * many).mean() < 0.9).item()


def test_capacity_finds_a_known_threshold():
    pool = 2.0 * unit_vectors(1000, 6, generator=generator(0))

    def fails_above_137(X: torch.Tensor, xi: torch.Tensor) -> torch.Tensor:
        nearest = X[torch.cdist(xi, X).argmin(1)]
        return nearest if len(X) <= 137 else nearest + 1.0

    assert 134 <= capacity(pool[:, :], fails_above_137, generator(1), share=0.5) <= 137
    assert capacity(pool[:100], fails_above_137, generator(1), share=0.5) == 100  # censored: at least all of them
    assert capacity(pool, lambda X, xi: xi + 9.0, generator(1)) == 0
    assert capacity(pool[:1], lambda X, xi: update(X, xi, 1.0), generator(1)) == 1


def test_guaranteed_base_gives_the_papers_two_examples():
    assert guaranteed_base(20, 3.0, 1.0, 1e-3) == pytest.approx(3.1546, abs=1e-4)
    assert guaranteed_base(75, 1.0, 1.0, 1e-3) == pytest.approx(1.3718, abs=1e-4)
    assert guaranteed_base(12, 1.0, 1.0, 1e-3) == 0.0  # the condition of the theorem fails


@pytest.mark.parametrize("heads", [1, 4])
def test_module_is_pytorchs_attention(heads):
    torch.manual_seed(0)
    module, R, Y = (
        Hopfield(10, 12, 8, 5, heads=heads).double(),
        torch.randn(3, 4, 10).double(),
        torch.randn(3, 7, 12).double(),
    )
    q, k = module.W_Q(F.layer_norm(R, (10,))), module.W_K(F.layer_norm(Y, (12,)))
    q, k = (t.unflatten(-1, (heads, 8)).transpose(1, 2) for t in (q, k))
    expected = module.W_V(F.scaled_dot_product_attention(q, k, k).transpose(1, 2).flatten(2))
    torch.testing.assert_close(module(R, Y), expected, atol=1e-12, rtol=0)


def test_more_updates_retrieve_from_the_projected_patterns():
    torch.manual_seed(1)
    module = Hopfield(6, 6, 4, 4, beta=2.0, updates=200).double()
    module.W_V.weight.data = torch.eye(4, dtype=torch.float64)
    R, Y = torch.randn(1, 5, 6).double(), torch.randn(1, 9, 6).double()
    K = module.W_K(F.layer_norm(Y, (6,)))[0]
    expected = retrieve(K, module.W_Q(F.layer_norm(R, (6,)))[0], 2.0)
    torch.testing.assert_close(module(R, Y)[0], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("pool", [HopfieldPooling(6, 4, 3), GatedAttentionPooling(6, 4), ProjectedMaxPooling(6, 4, 3)])
def test_pooling_ignores_the_order_and_trains_every_parameter(pool):
    Y = torch.randn(5, 8, 6)
    torch.testing.assert_close(pool(Y), pool(Y[:, torch.randperm(8)]))
    pool(Y).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in pool.parameters())


def test_pooling_at_beta_zero_is_the_mean_of_the_projected_set():
    pool, Y = HopfieldPooling(6, 4, 3, beta=1e-9), torch.randn(5, 8, 6)
    mean = pool.hopfield.W_V(pool.hopfield.W_K(F.layer_norm(Y, (6,))).mean(1))
    torch.testing.assert_close(pool(Y), mean, atol=1e-5, rtol=1e-5)


def test_gated_attention_by_hand():
    # One feature and two instances: V = 0.5, U = -1, w = 2, with biases 0.1 and 0.3.
    pool = GatedAttentionPooling(1, 1).double()
    for parameter, value in ((pool.V.weight, 0.5), (pool.U.weight, -1.0), (pool.w.weight, 2.0)):
        parameter.data.fill_(value)
    pool.V.bias.data.fill_(0.1)
    pool.U.bias.data.fill_(0.3)
    scores = [2 * math.tanh(0.5 * h + 0.1) / (1 + math.exp(h - 0.3)) for h in (1.0, 3.0)]
    share = 1 / (1 + math.exp(scores[1] - scores[0]))
    pooled = pool(torch.tensor([[[1.0], [3.0]]], dtype=torch.float64))
    assert pooled.item() == pytest.approx(share * 1.0 + (1 - share) * 3.0, abs=1e-12)
    assert 0.5 < share < 0.8  # neither the mean nor a maximum


def test_projected_max_by_hand():
    pool = ProjectedMaxPooling(2, 2, 1).double()
    pool.W_K.weight.data = torch.tensor([[1.0, 0.0], [0.0, 3.0]], dtype=torch.float64)
    pool.W_V.weight.data = torch.tensor([[10.0, 1.0]], dtype=torch.float64)
    h = torch.tensor([[[5.0, 1.0], [-2.0, 4.0]]], dtype=torch.float64)  # normalised: (1, -1) and (-1, 1)
    assert pool(h).item() == pytest.approx(10 * 1 + 3 * 1, abs=1e-4)


def test_retrieve_stops_each_state_by_itself():
    X, xi = patterns(), patterns(9, seed=8)
    together = retrieve(X, xi.reshape(3, 3, 5), 1.3)
    alone = torch.stack([retrieve(X, state, 1.3) for state in xi]).reshape(3, 3, 5)
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(update(X, together, 1.3), together, atol=1e-7, rtol=0)


def test_layer_retrieves_from_its_memory():
    layer = HopfieldLayer(6, 20, 4, 3)
    x = torch.randn(11, 6)
    torch.testing.assert_close(layer(x), layer.hopfield(x[:, None], layer.memory.expand(11, -1, -1))[:, 0])


def test_bags_hold_what_they_say():
    labels = torch.arange(300) % 10
    members, positive = draw_bags(labels, target=9, bags=101, size=12, seed=3, hits=2)
    assert ((labels[members] == 9).sum(1) == 2 * positive).all()
    assert positive.sum() == 50
    places = (labels[members] == 9).double().mean(0)
    assert (places > 0).all()  # no fixed place
    again, _ = draw_bags(labels, target=9, bags=101, size=12, seed=3, hits=2)
    assert torch.equal(again, members)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("beta", lambda: update(patterns(), patterns(), 0.0)),
        ("beta", lambda: energy(patterns(), patterns(), float("nan"))),
        ("xi", lambda: energy(patterns(), patterns() * float("inf"), 1.0)),
        ("X", lambda: update(patterns() * float("nan"), patterns(), 1.0)),
        ("X", lambda: update(torch.zeros(0, 5), torch.zeros(2, 5), 1.0)),
        ("X", lambda: separation(patterns(1))),
        ("mass", lambda: patterns_for_mass(torch.ones(1, 3) / 3, 1.5)),
        ("degree", lambda: binary_recall(patterns(), patterns(), 1)),
        ("X", lambda: binary_recall(patterns(), patterns(), 2)),
        ("pool", lambda: capacity(torch.zeros(0, 5), lambda X, xi: xi, generator(0))),
        ("K", lambda: guaranteed_base(20, 0.0, 1.0, 1e-3)),
        ("heads", lambda: Hopfield(4, 4, 4, 4, heads=0)),
        ("beta", lambda: HopfieldPooling(4, 4, 4, beta=-1.0)),
        ("hits", lambda: draw_bags(torch.arange(10), target=9, bags=2, size=3, seed=0, hits=4)),
        ("labels", lambda: draw_bags(torch.zeros(10, dtype=torch.int64), target=9, bags=2, size=3, seed=0)),
    ],
)
def test_bad_input_is_named(name, call):
    with pytest.raises(ValueError, match=name):
        call()


@pytest.mark.gpu
def test_cuda_agrees_with_the_cpu():
    torch.manual_seed(0)
    gpu = torch.device("cuda")
    X, xi = patterns(50, 16), patterns(8, 16, seed=1)
    torch.testing.assert_close(update(X.to(gpu), xi.to(gpu), 0.5).cpu(), update(X, xi, 0.5), atol=1e-10, rtol=0)
    torch.testing.assert_close(energy(X.to(gpu), xi.to(gpu), 0.5).cpu(), energy(X, xi, 0.5), atol=1e-10, rtol=0)
    Y, v = torch.randn(3, 7, 6), torch.randn(3, 6)
    for module, x in (
        (HopfieldPooling(6, 4, 3), Y),
        (GatedAttentionPooling(6, 4), Y),
        (ProjectedMaxPooling(6, 4, 3), Y),
        (HopfieldLayer(6, 20, 4, 3), v),
    ):
        here = module(x)
        torch.testing.assert_close(module.to(gpu)(x.to(gpu)).cpu(), here, atol=1e-4, rtol=1e-4)
