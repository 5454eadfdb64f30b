"""PRESTO against statsmodels, scikit-learn, a likelihood written a second time, closed forms and limits."""

import inspect
import itertools
import warnings

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from statsmodels.miscmodels.ordinal_model import OrderedModel

from paperlab.output_layers import presto as ps


def sample(draws: int = 2, n: int = 200, p: int = 3, classes: int = 3, seed: int = 0):
    """Ordered classes of unequal size, features of unequal scale, slopes that differ between the boundaries."""
    g = np.random.default_rng(seed)
    x = g.normal(size=(draws, n, p)) * [1, 3, 0.5, 1, 1][:p] + 1
    latent = x @ np.array([0.8, -0.2, 0.5, 0, 0.1])[:p] + g.logistic(size=(draws, n)) * (1 + 0.4 * (x[..., 0] > 1))
    cuts = np.quantile(latent, [0.5, 0.85, 0.95][: classes - 1])
    return torch.tensor(x), torch.tensor((latent[..., None] > cuts).sum(-1))


def standard(x):
    return (x - x.mean(0)) / x.std(0)


def naive_loss(flat, x, y, classes):
    """Minus the mean log-likelihood in (alpha_k, beta_k), straight from the definition, with a wall where it ends."""
    w = np.asarray(flat).reshape(classes - 1, -1)
    cumulative = np.column_stack([np.zeros(len(x)), expit(w[:, 0] + x @ w[:, 1:].T), np.ones(len(x))])
    own = np.diff(cumulative, axis=1)[np.arange(len(x)), y]
    return -np.log(np.maximum(own, 1e-9)).mean()


def by_scipy(x, y, classes, strength, first=1.0):
    """The L1 problem with every difference split into two halves that may not be negative."""
    p = x.shape[1]

    def boundaries(v):
        alpha, up, down = v[: classes - 1], v[classes - 1 :][: (classes - 1) * p], v[classes - 1 :][(classes - 1) * p :]
        psi = (up - down).reshape(classes - 1, p)
        return alpha, psi, (up + down).reshape(classes - 1, p)

    def objective(v):
        alpha, psi, size = boundaries(v)
        price = first * size[0].sum() + size[1:].sum()
        return naive_loss(np.column_stack([alpha, psi.cumsum(0)]).ravel(), x, y, classes) + strength * price

    share = np.bincount(y, minlength=classes).cumsum()[:-1] / len(y)
    start = np.concatenate([np.log(share / (1 - share)), np.zeros(2 * (classes - 1) * p)])
    bounds = [(None, None)] * (classes - 1) + [(0, None)] * (2 * (classes - 1) * p)
    options = {"maxiter": 5000, "maxfun": 10**6, "ftol": 1e-14, "gtol": 1e-9}
    v = minimize(objective, start, method="L-BFGS-B", bounds=bounds, options=options).x
    alpha, psi, _ = boundaries(v)
    return alpha, psi.cumsum(0)


def test_proportional_odds_is_statsmodels():
    x, y = sample()
    fit = ps.fit_path(x, y, classes=3, method="proportional", norm="none", folds=0, tolerance=1e-10).fits
    for d in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            other = OrderedModel(y[d].numpy(), x[d].numpy(), distr="logit").fit(method="bfgs", disp=0, gtol=1e-9)
        np.testing.assert_allclose(fit.beta[d, 0, 0], -other.params[:3], atol=1e-5)  # their latent variable: x beta + e
        torch.testing.assert_close(fit.beta[d, 0, 0], fit.beta[d, 0, 1])
        theirs = other.model.predict(other.params, exog=x[d].numpy())
        np.testing.assert_allclose(fit.probabilities(x[:, None])[d, 0], theirs, atol=1e-5)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_two_classes_are_sklearns_logistic_regression(norm):
    x, y = sample(draws=1)
    rare = (y[0] == 2).numpy()
    path = ps.fit_path(x, y, classes=3, method="logistic", norm=norm, folds=0, strengths=4, tolerance=1e-10)
    z = standard(x[0].numpy())
    for k, strength in enumerate(path.strengths[0].tolist()):
        c = 1 / (strength * len(z))
        kind = {"l1_ratio": 1.0, "solver": "saga", "random_state": 0} if norm == "l1" else {"l1_ratio": 0.0}
        other = LogisticRegression(C=c, tol=1e-10, max_iter=100_000, **kind).fit(z, ~rare)
        theirs = other.predict_proba(z)[:, 0]
        np.testing.assert_allclose(path.fits.rare(x[:, None])[0, k], theirs, atol=2e-5)


@pytest.mark.parametrize(("classes", "first"), [(3, 1.0), (4, 1.0), (3, 0.0)])
def test_presto_is_the_minimum_that_scipy_finds(classes, first):
    x, y = sample(draws=1, n=120, classes=classes)
    path = ps.fit_path(x, y, classes=classes, first=first, folds=0, strengths=3, span=(0.5, 0.02), tolerance=1e-9)
    z = standard(x[0].numpy())
    mean, spread = x[0].numpy().mean(0), x[0].numpy().std(0)
    for k, strength in enumerate(path.strengths[0].tolist()):
        alpha, beta = by_scipy(z, y[0].numpy(), classes, strength, first)
        np.testing.assert_allclose(path.fits.beta[0, k] * torch.tensor(spread), beta, atol=2e-3)
        ours = (path.fits.alpha[0, k] + path.fits.beta[0, k] @ torch.tensor(mean)).numpy()
        np.testing.assert_allclose(ours, alpha, atol=2e-3)


@pytest.mark.parametrize("differences", [1.0, 0.3])
def test_the_optimum_obeys_the_conditions_of_a_lasso(differences):
    # autograd of the plain definition: at the optimum the gradient of a zero difference is small, else exactly lambda
    x, y = sample(draws=1, n=400)
    path = ps.fit_path(x, y, classes=3, differences=differences, folds=0, strengths=5, tolerance=1e-7)
    z = torch.tensor(standard(x[0].numpy()))
    spread = torch.tensor(x[0].numpy().std(0))
    zeros = 0
    for k, strength in enumerate(path.strengths[0].tolist()):
        fit = ps.Boundaries(path.fits.alpha[0, k], path.fits.beta[0, k])
        beta = fit.beta * spread
        psi = beta.diff(dim=0, prepend=torch.zeros_like(beta[:1])).requires_grad_()
        alpha = fit.alpha + fit.beta @ torch.tensor(x[0].numpy().mean(0))
        below = torch.sigmoid(z @ psi.cumsum(0).T + alpha)
        edges = torch.cat([torch.zeros(400, 1).double(), below, torch.ones(400, 1).double()], 1)
        (-edges.diff(dim=1).gather(1, y[0][:, None]).log().mean()).backward()
        there = psi.detach().abs() > 1e-12
        price = strength * torch.tensor([[1.0], [differences]]).double().expand_as(psi)
        torch.testing.assert_close(psi.grad[there], -(price * psi.detach().sign())[there], atol=1e-6, rtol=0)
        assert (psi.grad[~there].abs() <= price[~there] + 1e-6).all()
        zeros += int((~there).sum())
    assert 0 < zeros < 5 * 6
    assert path.residual.max() < 1e-7


@pytest.mark.parametrize(("classes", "first"), [(3, 1.0), (4, 1.0), (3, 0.0)])
def test_fusion_by_squares_is_the_minimum_that_scipy_finds(classes, first):
    # strengths at which no boundary comes near another: at weaker ones the wall would decide, and scipy knows none
    x, y = sample(draws=1, n=200, classes=classes)
    path = ps.fit_path(
        x, y, classes=classes, norm="l2", first=first, folds=0, strengths=3, span=(10, 0.3), tolerance=1e-9
    )
    z, price = standard(x[0].numpy()), np.array([first] + [1.0] * (classes - 2))
    for k, strength in enumerate(path.strengths[0].tolist()):

        def objective(flat, strength=strength):
            slopes = flat.reshape(classes - 1, -1)[:, 1:]
            psi = np.diff(slopes, axis=0, prepend=0)
            return naive_loss(flat, z, y[0].numpy(), classes) + strength / 2 * (price * (psi**2).sum(1)).sum()

        start = np.zeros((classes - 1, 4))
        start[:, 0] = np.log((share := np.bincount(y[0]).cumsum()[:-1] / 200) / (1 - share))
        best = minimize(objective, start.ravel(), method="BFGS", options={"gtol": 1e-7}).x.reshape(classes - 1, -1)
        np.testing.assert_allclose(path.fits.beta[0, k] * torch.tensor(x[0].numpy().std(0)), best[:, 1:], atol=1e-3)


def test_the_ends_of_the_path():
    x, y = sample()
    start = ps.fit_path(x, y, classes=3, folds=0, strengths=1).fits
    assert start.beta.abs().max() == 0  # all slopes penalised: nothing is left but the shares
    share = torch.stack([(y == k).double().mean(1) for k in range(3)], 1)
    torch.testing.assert_close(start.probabilities(x[:, None])[:, 0, 0], share, atol=1e-4, rtol=0)
    fused = ps.fit_path(x, y, classes=3, first=0, folds=0, strengths=1, tolerance=1e-9).fits
    odds = ps.fit_path(x, y, classes=3, method="proportional", norm="none", folds=0, tolerance=1e-9).fits
    torch.testing.assert_close(fused.beta, odds.beta, atol=1e-6, rtol=0)  # only differences penalised: they fuse
    free = ps.fit_path(x, y, classes=3, folds=0, strengths=3, span=(1, 1e-7), tolerance=1e-9).fits
    full = ps.fit_path(x, y, classes=3, method="non-proportional", folds=0, tolerance=1e-9).fits
    torch.testing.assert_close(free.beta[:, -1:], full.beta, atol=1e-4, rtol=0)


def test_units_do_not_matter_and_the_order_may_be_turned_around():
    x, y = sample()
    moved = x * torch.tensor([10.0, 0.01, 3]) - torch.tensor([5.0, 0, 100])
    a, b = (ps.fit_path(v, y, classes=3, folds=0, strengths=4, tolerance=1e-9).fits for v in (x, moved))
    pa, pb = a.probabilities(x[:, None].expand(-1, 4, -1, -1)), b.probabilities(moved[:, None].expand(-1, 4, -1, -1))
    torch.testing.assert_close(pa, pb, atol=1e-6, rtol=0)
    for method in ("proportional", "non-proportional"):
        there = ps.fit_path(x, y, classes=3, method=method, norm="none", folds=0, tolerance=1e-10).fits
        back = ps.fit_path(x, 2 - y, classes=3, method=method, norm="none", folds=0, tolerance=1e-10).fits
        torch.testing.assert_close(there.beta, -back.beta.flip(2), atol=1e-6, rtol=0)


def test_a_weight_of_two_is_the_row_twice():
    x, y = sample(draws=1, n=90)
    twice = torch.ones(1, 90, dtype=torch.float64)
    twice[:, ::3] = 2
    rows = torch.arange(90).repeat_interleave(twice[0].long())
    a = ps.fit_path(x, y, classes=3, weights=twice, folds=0, strengths=3, tolerance=1e-9).fits
    b = ps.fit_path(x[:, rows], y[:, rows], classes=3, folds=0, strengths=3, tolerance=1e-9).fits
    torch.testing.assert_close(a.beta, b.beta, atol=1e-6, rtol=0)


def test_boundaries_do_not_cross_where_the_data_would_have_them_cross():
    # Far to the right the middle class vanishes: without the wall the two lines meet inside the data.
    g = torch.Generator().manual_seed(3)
    x = torch.linspace(-1, 1, 60, dtype=torch.float64)[None, :, None]
    y = torch.where(x[..., 0] > 0.2, 2 * torch.randint(2, (1, 60), generator=g), torch.randint(3, (1, 60), generator=g))
    for method in ("presto", "non-proportional"):
        fits = ps.fit_path(x, y, classes=3, method=method, folds=0, strengths=4, steps=60).fits
        assert (fits.probabilities(x[:, None].expand(-1, fits.beta.shape[1], -1, -1)) > 0).all()
    alone = [LogisticRegression(C=1e6).fit(x[0].numpy(), y[0].numpy() > k) for k in (0, 1)]
    lines = [model.decision_function(x[0].numpy()) for model in alone]
    assert (lines[0] < lines[1]).any()  # fitted one by one, they do cross


def test_cross_validation_by_hand():
    x, y = sample(draws=1, n=300)
    path = ps.fit_path(x, y, classes=3, method="logistic", norm="none", folds=3, tolerance=1e-9)
    rare, turn, seen = (y[0] == 2).numpy(), np.zeros(300, int), [0, 0]
    for i, hit in enumerate(rare):
        turn[i], seen[int(hit)] = seen[int(hit)] % 3, seen[int(hit)] + 1
    brier = loss = 0.0
    for fold in range(3):
        out = turn == fold
        model = LogisticRegression(C=1e12, tol=1e-9, max_iter=10_000).fit(x[0][~out], rare[~out])
        hat = model.predict_proba(x[0][out])[:, 1]
        brier += ((hat - rare[out]) ** 2).sum() / 300
        loss -= np.log(np.where(rare[out], hat, 1 - hat)).sum() / 300
    assert float(path.scores["brier"]) == pytest.approx(2 * brier, abs=1e-5)  # over both classes
    assert float(path.scores["rare"]) == pytest.approx(brier, abs=1e-5)
    assert float(path.scores["log loss"]) == pytest.approx(loss, abs=1e-4)


def test_the_chosen_fit_has_the_least_score_and_of_equals_the_strongest_penalty():
    alpha = torch.arange(6.0).view(1, 3, 2)
    path = ps.Path(torch.tensor([[3.0, 2, 1]]), ps.Boundaries(alpha, torch.zeros(1, 3, 2, 1)), torch.zeros(1, 3),
                   {"brier": torch.tensor([[0.5, 0.2, 0.2]]), "rare": torch.tensor([[0.1, 0.2, 0.0]])})  # fmt: skip
    torch.testing.assert_close(path.chosen().alpha, alpha[:, 1])
    torch.testing.assert_close(path.chosen("rare").alpha, alpha[:, 2])


def test_slope_variances_are_the_inverse_information():
    shares = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
    odds, logistic = ps.slope_variances(shares)
    for k, share in enumerate(shares):
        cuts = torch.logit(share.cumsum(0)[:-1])

        def expected(v, cuts=cuts, share=share):  # minus the expected log-likelihood, x = -1 or 1 with equal chances
            total = 0.0
            for x in (-1.0, 1.0):
                edges = torch.cat([torch.zeros(1), torch.sigmoid(v[:-1] + x * v[-1]), torch.ones(1)])
                total = total - (share * edges.diff().log()).sum() / 2
            return total

        at = torch.cat([cuts, torch.zeros(1, dtype=torch.float64)])
        information = torch.autograd.functional.hessian(expected, at)
        assert float(odds[k]) == pytest.approx(float(torch.linalg.inv(information)[-1, -1]), rel=1e-9)
        assert float(logistic[k]) == pytest.approx(1 / float(share[-1] * (1 - share[-1])), rel=1e-12)
    both = ps.slope_variances(torch.tensor([0.7, 0.3], dtype=torch.float64))
    assert float(both[0]) == pytest.approx(float(both[1]))


def test_probabilities_add_up_and_the_rare_one_is_the_last():
    beta = ps.draw_truth("dense", 3, torch.Generator().manual_seed(0), classes=4)
    truth = ps.Boundaries(torch.tensor([0.0, 3.5, 5.5]).double().expand(3, 3), beta)
    x = torch.rand(3, 50, 10, dtype=torch.float64) - 0.5
    hat = truth.probabilities(x)
    torch.testing.assert_close(hat.sum(-1), torch.ones(3, 50, dtype=torch.float64))
    torch.testing.assert_close(hat[..., -1], truth.rare(x))
    assert (hat > 0).all()


def test_the_simulation_is_what_it_says():
    g = torch.Generator().manual_seed(1)
    sparse = ps.draw_truth("sparse", 4000, g)
    psi = sparse.diff(dim=1)
    assert set(sparse[:, 0].unique().tolist()) == {0.0, 0.5}
    assert set(psi.unique().tolist()) == {-0.5, 0.0, 0.5}
    assert float((psi != 0).double().mean()) == pytest.approx(1 / 3, abs=0.01)
    assert float(psi.mean()) == pytest.approx(0, abs=0.01)
    assert ps.draw_truth("proportional", 5, g).diff(dim=1).abs().max() == 0
    dense = ps.draw_truth("dense", 4000, g)[:, 0]
    assert float(dense.square().mean()) == pytest.approx(0.25 / 3, rel=0.03)
    beta = sparse[:40]
    cut = 4.0
    x, y = ps.draw_sample(ps.Boundaries(torch.tensor([0.0, cut]).double().expand(40, 2), beta), 2000, g)
    assert float((y == 2).double().mean()) == pytest.approx(
        float((torch.sigmoid(-4 - x @ beta[:, 1, :, None])).mean()), rel=0.1
    )
    assert float((y == 0).double().mean()) == pytest.approx(0.5, abs=0.01)
    assert float(x.abs().max()) <= 1
    assert float(x.square().mean()) == pytest.approx(1 / 3, rel=0.01)


BAD = [
    ({"y": torch.full((1, 60), 3)}, "y"),
    ({"y": torch.zeros(1, 60, dtype=torch.long)}, "y must hold"),
    ({"x": torch.full((1, 60, 2), float("nan")).double()}, "x"),
    ({"x": torch.ones(1, 60, 2)}, "float64"),
    ({"x": torch.ones(1, 60, 2).double()}, "spread"),
    ({"method": "probit"}, "method"),
    ({"norm": "l3"}, "norm"),
    ({"first": -1.0}, "first"),
    ({"differences": -1.0}, "differences"),
    ({"span": (0.1, 1.0)}, "span"),
    ({"strengths": 0}, "strengths"),
    ({"tolerance": 0.0}, "tolerance"),
    ({"steps": 0}, "steps"),
    ({"folds": 1}, "folds"),
    ({"weights": -torch.ones(1, 60).double()}, "weights"),
]


@pytest.mark.parametrize(("change", "name"), BAD, ids=[f"{next(iter(c))}-{i}" for i, (c, _) in enumerate(BAD)])
def test_bad_input_is_named(change, name):
    x, y = sample(draws=1, n=60, p=2)
    with pytest.raises(ValueError, match=name):
        ps.fit_path(**({"x": x, "y": y, "classes": 3, "folds": 0} | change))


@pytest.mark.parametrize("name", ["y", "weights"])
def test_a_row_too_few_is_named(name):
    x, y = sample(draws=1, n=60, p=2)
    bare = inspect.unwrap(ps.fit_path)  # without the check of shapes that the tests put around it
    with pytest.raises(ValueError, match=f"shape of {name}"):
        bare(
            **({"x": x, "y": y, "classes": 3, "weights": torch.ones(1, 60).double()} | {name: torch.ones(1, 59).long()})
        )


def test_a_path_without_folds_has_nothing_to_choose_by():
    x, y = sample(draws=1, n=60, p=2)
    with pytest.raises(ValueError, match="by"):
        ps.fit_path(x, y, classes=3, folds=0, strengths=2).chosen()


def test_bad_simulations_are_named():
    g = torch.Generator().manual_seed(0)
    for call, name in [
        (lambda: ps.draw_truth("odd", 2, g), "truth"),
        (lambda: ps.draw_truth("sparse", 2, g, classes=2), "classes"),
        (lambda: ps.slope_variances(torch.tensor([0.5, 0.4]).double()), "shares"),
        (lambda: ps.draw_sample(ps.Boundaries(torch.tensor([[0.0, 0.1]]).double(),
                                              torch.tensor([[[0.0], [1.0]]]).double()), 99, g), "truth"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=name):
            call()


def test_copies_do_not_disturb_one_another():
    x, y = sample(draws=3)
    together = ps.fit_path(x, y, classes=3, strengths=3, tolerance=1e-9).fits.beta
    for d, k in itertools.product(range(3), [2]):
        alone = ps.fit_path(x[d : d + 1], y[d : d + 1], classes=3, strengths=3, folds=0, tolerance=1e-9).fits.beta
        torch.testing.assert_close(together[d, k], alone[0, k], atol=1e-7, rtol=0)
