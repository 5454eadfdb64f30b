"""topk-softmax-moe: against closed forms, SciPy, autograd, expectation maximisation and the definitions."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, optimize, stats

from paperlab.output_layers import topk_softmax_moe as tm

TRUTH = tm.make_experts([[0.8, -3.0], [0.4, -1.5], [0, 0]], [[2.5, 2.0], [-0.5, 0.5], [2.5, -2.0]], [0.5, 0.6, 0.4])


def sample(copies=2, n=300, selected=2, seed=0, truth=TRUTH):
    return tm.draw(truth, copies, n, selected, torch.Generator().manual_seed(seed))


def random_experts(copies=3, k=4, d=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    gate, mean = (torch.randn(copies, k, d + 1, generator=g, dtype=torch.float64) for _ in range(2))
    return tm.Experts(gate, mean, 0.3 * torch.randn(copies, k, generator=g, dtype=torch.float64))


def density_by_hand(e, c, x, y, chosen):
    """The definition, one observation at a time, for given selected experts."""
    gate, mean, sd = e.gate[c].numpy(), e.mean[c].numpy(), e.log_sd[c].exp().numpy()
    z = np.concatenate([[1.0], np.atleast_1d(x)])
    weight = np.exp([gate[i] @ z for i in chosen])
    return weight @ [stats.norm.pdf(y, mean[i] @ z, sd[i]) for i in chosen] / weight.sum()


def test_selecting_all_is_the_ordinary_softmax_gate():
    e, z = random_experts(), tm.columns(torch.rand(3, 50, 2, dtype=torch.float64))
    torch.testing.assert_close(tm.gate_weights(e.gate, z, 4), torch.softmax(e.gate @ z, 1))


@pytest.mark.parametrize("features", [1, 2])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("selected", [1, 2, 3])
def test_density_is_its_definition(selected, with_bias, features):
    e = random_experts(d=features)
    g = torch.Generator().manual_seed(2)
    x, y = torch.randn(3, 20, features, generator=g).double(), torch.randn(3, 20, generator=g).double()
    found = tm.log_density(e, x, y, selected, with_bias).exp()
    for c in range(3):
        for m in range(20):
            point = x[c, m].numpy()
            key = e.gate[c, :, 1:].numpy() @ point + (e.gate[c, :, 0].numpy() if with_bias else 0)
            chosen = sorted(range(4), key=lambda i, key=key: -key[i])[:selected]
            assert float(found[c, m]) == pytest.approx(density_by_hand(e, c, point, float(y[c, m]), chosen))


def test_density_integrates_to_one():
    x = 0.3
    total, _ = integrate.quad(
        lambda y: float(tm.log_density(TRUTH, torch.tensor([[[x]]]).double(), torch.tensor([[y]]).double(), 2).exp()),
        -6,
        8,
    )
    assert total == pytest.approx(1, abs=1e-6)


def test_ties_select_exactly_k():
    gate = torch.zeros(1, 5, 2, dtype=torch.float64)
    z = tm.columns(torch.rand(1, 9, 1, dtype=torch.float64))
    for selected in (1, 3, 5):
        assert ((tm.gate_weights(gate, z, selected) > 0).sum(1) == selected).all()


@pytest.mark.parametrize("selected", [1, 2, 4])
def test_scores_are_the_gradient(selected):
    e = random_experts(copies=2, k=4, d=2, seed=3)
    g = torch.Generator().manual_seed(1)
    x, y = torch.rand(2, 7, 2, generator=g).double() * 2 - 1, torch.randn(2, 7, generator=g).double()
    flat = e.flat().requires_grad_()
    total = tm.log_density(tm.Experts.of(flat), x, y, selected)
    value, s, *_ = tm.scores(e, tm.columns(x), y, selected)
    torch.testing.assert_close(value, total.detach())
    for m in range(7):
        (expected,) = torch.autograd.grad(total[:, m].sum(), flat, retain_graph=True)
        torch.testing.assert_close(s[..., m], expected)


@pytest.mark.parametrize("features", [1, 2])
@pytest.mark.parametrize("selected", [2, 4])
def test_curvature_is_minus_the_hessian(selected, features):
    e = random_experts(copies=2, k=4, d=features, seed=4)
    g = torch.Generator().manual_seed(2)
    x, y = torch.rand(2, 9, features, generator=g).double() * 2 - 1, torch.randn(2, 9, generator=g).double()
    value, slope, outer, curve = tm.curvature(e, tm.columns(x), y, selected)
    for c in range(2):

        def total(flat, c=c):
            return tm.log_density(tm.Experts.of(flat.view(1, 4, -1)), x[c : c + 1], y[c : c + 1], selected).sum()

        flat = e.flat()[c].flatten()
        torch.testing.assert_close(value[c], total(flat))
        torch.testing.assert_close(slope[c], torch.autograd.functional.jacobian(total, flat))
        torch.testing.assert_close(curve[c], -torch.autograd.functional.hessian(total, flat))
    s = tm.scores(e, tm.columns(x), y, selected)[1].flatten(1, 2)
    torch.testing.assert_close(outer, s @ s.mT)


def test_one_expert_is_least_squares():
    truth = tm.make_experts([[0.0, 0]], [[0.5, -1.0]], [0.7])
    x, y = sample(n=200, selected=1, truth=truth)
    found = tm.fit([tm.make_experts([[0.0, 0]], [[0, 0]], [1.0])], x, y, selected=1, steps=80)
    for c in range(2):
        design = np.column_stack([np.ones(200), x[c, :, 0]])
        beta, rss, *_ = np.linalg.lstsq(design, y[c].numpy(), rcond=None)
        np.testing.assert_allclose(found.experts.mean[c, 0].numpy(), beta, atol=1e-6)
        assert float(found.experts.log_sd[c, 0].exp()) == pytest.approx(math.sqrt(rss[0] / 200), rel=1e-5)


def test_fit_is_the_maximum_that_scipy_finds():
    x, y = sample(copies=1, n=400)
    ours = tm.fit([TRUTH], x, y, selected=2, steps=60)
    free = [k for k in range(15) if k not in (10, 11)]

    def loss(v):
        flat = TRUTH.flat().flatten().clone()
        flat[free] = torch.tensor(v)
        return -float(tm.log_density(tm.Experts.of(flat.view(1, 3, 5)), x, y, 2).mean())

    theirs = optimize.minimize(loss, TRUTH.flat().flatten()[free].numpy(), method="BFGS", options={"gtol": 1e-6})
    assert float(ours.log_likelihood) == pytest.approx(-theirs.fun, abs=1e-8)
    np.testing.assert_allclose(ours.experts.flat().flatten()[free].numpy(), theirs.x, atol=2e-3)
    assert float(ours.gradient) < 1e-7


def test_fit_is_a_fixed_point_of_expectation_maximisation():
    x, y = sample(copies=1, n=400, seed=2)
    found = tm.fit([TRUTH], x, y, selected=2, steps=60).experts
    xs, ys = x[0, :, 0].numpy(), y[0].numpy()
    chosen = [(1, 2) if v > 0 else (0, 1) for v in xs]
    gate, mean, sd = found.gate[0].numpy(), found.mean[0].numpy(), found.log_sd[0].exp().numpy()
    r, pi = np.zeros((400, 3)), np.zeros((400, 3))
    for m, (v, w, c) in enumerate(zip(xs, ys, chosen, strict=True)):
        weight = np.array([np.exp(gate[i] @ [1, v]) for i in c])
        pi[m, list(c)] = weight / weight.sum()
        joint = pi[m, list(c)] * [stats.norm.pdf(w, mean[i] @ [1, v], sd[i]) for i in c]
        r[m, list(c)] = joint / joint.sum()
    design = np.column_stack([np.ones(400), xs])
    for i in range(3):
        beta = np.linalg.solve(design.T @ (r[:, i, None] * design), design.T @ (r[:, i] * ys))
        np.testing.assert_allclose(mean[i], beta, atol=1e-5)
        assert sd[i] ** 2 == pytest.approx(r[:, i] @ (ys - design @ beta) ** 2 / r[:, i].sum(), rel=1e-5)
    np.testing.assert_allclose(((r - pi).T @ design)[:2], 0, atol=1e-4)


@pytest.mark.parametrize("selected", [2, 3])
def test_likelihood_never_falls(selected):
    x, y = sample()
    start = tm.twins(TRUTH, 1, [0, 0.3, 0.2, 0, 0])
    climb = torch.stack([tm.fit([start], x, y, selected=selected, steps=s).log_likelihood for s in range(1, 25, 3)])
    assert (climb.diff(dim=0) >= 0).all()
    torch.testing.assert_close(
        tm.log_density(tm.fit([start], x, y, selected=selected, steps=22).experts, x, y, selected).mean(1), climb[-1]
    )


def test_the_better_start_wins_copy_by_copy():
    x, y = sample(n=200)
    bad = tm.make_experts([[0.0, -1], [0, 1], [0, 0]], [[0, 0], [0.1, 0], [0.2, 0]], [1.0, 1.0, 1.0])
    both = tm.fit([bad, TRUTH], x, y, selected=2, steps=40)
    alone = tm.fit([TRUTH], x, y, selected=2, steps=40)
    assert (both.log_likelihood >= alone.log_likelihood - 1e-9).all()


def test_fit_stays_in_its_box():
    x, y = sample(copies=1, n=40)
    e = tm.fit([tm.twins(TRUTH, 1, [1, 0.1, 0.3, 0, 0])], x, y, selected=3, steps=40).experts
    assert float(e.log_sd.exp().min()) >= tm.BOX["sd"][0] - 1e-12
    assert float(e.gate[..., 0].abs().max()) <= tm.BOX["gate_bias"][1]
    assert (e.gate[:, -1] == 0).all()


def test_maxima_on_an_edge_are_maxima_of_their_region():
    """Where two slopes tie no gradient need vanish; but no small step that keeps the regions may raise the value."""
    x, y = sample(copies=12, n=300, seed=5)
    found = tm.fit([tm.twins(TRUTH, 1, [0, 0.3, 0, 0, 0])], x, y, selected=3, steps=150)
    slopes = found.experts.gate[..., 1].sort(1).values
    tied = slopes.diff(dim=1).amin(1) < tm.TIE
    assert tied.any()
    assert (found.gradient < 1e-5).double().mean() > 0.7
    flat, g = found.experts.flat(), torch.Generator().manual_seed(0)
    order = found.experts.gate[..., 1].argsort(1)
    checked = 0
    for _ in range(60):
        moved = flat + 1e-3 * torch.randn(flat.shape, generator=g, dtype=flat.dtype)
        moved[..., 0].clamp_(*tm.BOX["gate_bias"])
        moved[..., 1].clamp_(*tm.BOX["gate_slope"])
        moved[..., -1].clamp_(min=math.log(tm.BOX["sd"][0]))
        kept = (moved[..., 1].argsort(1) == order).all(1) & (found.gradient < 1e-5)
        rise = tm.log_density(tm.Experts.of(moved), x, y, 3).mean(1) - found.log_likelihood
        assert (rise[kept] < 1e-8).all()
        checked += int((kept & tied).sum())
    assert checked > 20


def test_fits_never_leave_their_order():
    x, y = sample(copies=4, n=300, seed=1)
    wrong = TRUTH.take([1, 0, 2])  # slopes in the order 2, 1, 3 from left to right of the list: regions of the truth
    wrong = tm.Experts(wrong.gate * torch.tensor([1.0, -1.0]).double(), *wrong[1:])  # and now turned round
    found = tm.fit([wrong], x, y, selected=2, steps=60).experts
    before, after = wrong.gate[0, :, 1].argsort(), found.gate[..., 1].argsort(1)
    assert (after == before).all()


def test_samples_follow_the_density():
    x, y = sample(copies=1, n=4000, seed=5)
    xs, ys = x[0, :, 0].numpy(), y[0].numpy()
    assert stats.kstest(xs, stats.uniform(-1, 2).cdf).pvalue > 0.01
    gate, mean, sd = TRUTH.gate[0].numpy(), TRUTH.mean[0].numpy(), TRUTH.log_sd[0].exp().numpy()
    level = np.zeros(4000)
    for m, (v, w) in enumerate(zip(xs, ys, strict=True)):
        c = [1, 2] if v > 0 else [0, 1]
        weight = np.exp(gate[c] @ [1, v])
        level[m] = weight @ stats.norm.cdf(w, mean[c] @ [1, v], sd[c]) / weight.sum()
    assert stats.kstest(level, "uniform").pvalue > 0.01


def test_hellinger_of_two_normals_is_the_closed_form():
    a, b = tm.make_experts([[0.0, 0]], [[0.3, 0]], [0.5]), tm.make_experts([[0.0, 0]], [[-0.4, 0]], [0.8])
    s = 0.5**2 + 0.8**2
    expected = 1 - math.sqrt(2 * 0.5 * 0.8 / s) * math.exp(-(0.7**2) / (4 * s))
    assert float(tm.hellinger(a, b, tm.grid(b), 1, 1)) == pytest.approx(math.sqrt(expected), abs=1e-7)
    slope = tm.make_experts([[0.0, 0]], [[0.3, 1.0]], [0.5])
    own = tm.make_experts([[0.0, 0]], [[0.3, 0]], [0.5])
    mean, _ = integrate.quad(lambda v: (1 - math.exp(-(v**2) / (8 * 0.25))) / 2, -1, 1)
    assert float(tm.hellinger(slope, own, tm.grid(own), 1, 1)) == pytest.approx(math.sqrt(mean), abs=1e-7)


def test_hellinger_knows_neither_order_nor_translation_nor_twins():
    at = tm.grid(TRUTH)
    shuffled = tm.Experts(TRUTH.gate + torch.tensor([0.7, -0.4]).double(), *TRUTH[1:]).take([2, 0, 1])
    same = tm.twins(TRUTH, 1, [0] * 5)
    assert float(tm.hellinger(shuffled, TRUTH, at, 2, 2)) < 1e-12
    assert float(tm.hellinger(same, TRUTH, at, 3, 2)) < 1e-12
    assert float(tm.hellinger(same, TRUTH, at, 4, 2)) > 0.1  # one selected too many


@pytest.mark.parametrize("epsilon", [0.01, 0.5])
def test_two_selected_suffice_for_the_middle_twins(epsilon):
    """Gate slopes -1.5 - eps, -eps, eps, 1.5 + eps: below the number that the paper asks for, and exactly the truth."""
    e = TRUTH.take([0, 1, 1, 2])
    shift = torch.tensor([-1.0, -1, 1, 1], dtype=torch.float64) * epsilon
    gate = e.gate.clone()
    gate[0, :, 1] += shift
    assert float(tm.hellinger(tm.Experts(gate, *e[1:]), TRUTH, tm.grid(TRUTH), 2, 2)) < 1e-12


def test_grid_of_several_features_integrates():
    truth = tm.make_experts([[0.2, 1, 0], [0, 0, 0]], [[1, 0.5, 0], [-1, 0, 0.5]], [0.5, 0.5])
    at = tm.grid(truth, x=2 * torch.rand(64, 2, generator=torch.Generator().manual_seed(0)).double() - 1)
    assert float(tm.log_density(truth, at.x, at.y, 1).exp()[0] @ at.weight) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("share", [0.5, 0.3])
@pytest.mark.parametrize(("column", "order"), [(1, 2), (2, 4), (3, 2), (4, 2)])
def test_how_well_twins_hide(column, order, share):
    """One twin displaced: intercepts hide to fourth order, slopes, variances and the gate's slopes to second."""
    steps = [0.08, 0.04]
    offsets = [[d * (c == column) for c in range(5)] for d in steps]
    flat = torch.cat([tm.twins(TRUTH, 1, o).flat() for o in offsets])
    flat[:, 1:3, 0] += torch.tensor([2 * share, 2 - 2 * share], dtype=torch.float64).log()
    start = tm.Experts.of(flat)
    held = torch.zeros(4, 5, dtype=torch.bool)
    held[3, :2] = held[1, 0] = held[1, column] = True
    at = tm.grid(TRUTH, nodes=8)
    found = tm.nearest(start, TRUTH, at, selected=3, truth_selected=2, held=held, steps=40)
    h = tm.hellinger(found.experts, TRUTH, at, 3, 2)
    torch.testing.assert_close(found.experts.flat()[:, held], start.flat()[:, held])
    torch.testing.assert_close((-found.log_likelihood).sqrt(), h)
    assert float((h[0] / h[1]).log2()) == pytest.approx(order, abs=0.25)


def test_voronoi_loss_by_hand():
    flat = TRUTH.flat().clone()
    flat[0, 0] += torch.tensor([0.1, 0.2, -0.05, 0.1, 0.0]).double()  # β₀, β₁, b, a of the first expert
    e = tm.Experts.of(flat)
    w = math.exp(0.9)
    expected = w * (0.2 + 0.05 + 0.1) + abs(w - math.exp(0.8))
    assert float(tm.voronoi_loss(e, TRUTH, 2, exact=True)) == pytest.approx(expected)
    shuffled = tm.Experts(*(part[:, [2, 0, 1]] for part in e))  # labels do not matter, and cells of one are of power 1
    assert float(tm.voronoi_loss(shuffled, TRUTH, 2)) == pytest.approx(expected)


def test_shared_cells_carry_their_powers():
    w = math.exp(0.4)
    losses = [tm.voronoi_loss(tm.twins(TRUTH, 1, [0, 0, d, 0, 0]), TRUTH, 2).item() for d in (0.1, 0.2)]
    np.testing.assert_allclose(losses, [w * 0.1**4, w * 0.2**4])
    losses = [tm.voronoi_loss(tm.twins(TRUTH, 1, [0, 0, 0, d, 0]), TRUTH, 2).item() for d in (0.1, 0.2)]
    np.testing.assert_allclose(losses, [w * 0.1**2, w * 0.2**2])
    three = tm.twins(tm.twins(TRUTH, 1, [0] * 5), 1, [0, 0, 0.1, 0, 0])
    assert tm.voronoi(three, TRUTH).tolist() == [[0, 1, 1, 1, 2]]
    assert float(tm.voronoi_loss(three, TRUTH, 2)) == pytest.approx(w / 2 * 0.1**6)


def test_errors_of_twins_and_singles():
    e = tm.twins(TRUTH, 1, [0, 0.1, 0.2, 0.3, 0])
    shared, alone = tm.errors(e, TRUTH)
    np.testing.assert_allclose(shared[0, :3], [0.1, 0.2, 0.3])
    np.testing.assert_allclose(alone.numpy(), 0, atol=1e-12)
    uneven = e.gate.clone()
    uneven[0, 1, 0] += math.log(3)
    mean = e.mean.clone()
    mean[0, 1, 0] = TRUTH.mean[0, 1, 0]
    shared, _ = tm.errors(tm.Experts(uneven, mean, e.log_sd), TRUTH)
    assert float(shared[0, 1]) == pytest.approx((0.25 * 0.2**4) ** 0.25)
    assert tm.errors(TRUTH, TRUTH)[0].isnan().all()


X, Y = torch.zeros(1, 4, 1, dtype=torch.float64), torch.zeros(1, 4, dtype=torch.float64)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: tm.make_experts([[0, 0]], [[0, 0]], [0.0]), "sd"),
        (lambda: tm.make_experts([[0, float("nan")]], [[0, 0]], [1.0]), "gate"),
        (lambda: tm.make_experts([[0, 0]], [[0, 0, 0]], [1.0]), "mean"),
        (lambda: tm.log_density(TRUTH, X, Y, 4), "selected"),
        (lambda: tm.log_density(TRUTH, X, Y, 0), "selected"),
        (lambda: tm.draw(TRUTH, 1, 0, 2, torch.Generator()), "n"),
        (lambda: tm.draw(TRUTH, 0, 5, 2, torch.Generator()), "copies"),
        (lambda: tm.fit([], X, Y, selected=2), "starts"),
        (lambda: tm.fit([TRUTH], X, Y / 0, selected=2), "y"),
        (lambda: tm.fit([TRUTH], X, Y, selected=7), "selected"),
        (lambda: tm.grid(TRUTH, panels=0), "panels"),
        (lambda: tm.voronoi_loss(TRUTH, TRUTH, 4), "selected"),
        (lambda: tm.twins(TRUTH, 2, [0] * 5), "i"),
        (lambda: tm.twins(TRUTH, 1, [0] * 4), "offset"),
    ],
)
def test_bad_input_is_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()


@pytest.mark.gpu
def test_cuda_agrees_with_cpu():
    x, y = sample()
    start = tm.twins(TRUTH, 1, [0, 0.3, 0.2, 0, 0])
    cpu = tm.fit([start], x, y, selected=3, steps=10)
    moved = tm.Experts(*(part.cuda() for part in start))
    cuda = tm.fit([moved], x.cuda(), y.cuda(), selected=3, steps=10)
    torch.testing.assert_close(cuda.log_likelihood.cpu(), cpu.log_likelihood, atol=1e-6, rtol=0)
