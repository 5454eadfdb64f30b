"""Naive Bayes and logistic regression against scikit-learn, closed forms, invariances and simulation."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm
from sklearn.covariance import ledoit_wolf
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.naive_bayes import GaussianNB

from paperlab.output_layers import naive_bayes_vs_logistic as nl


def sample(draws: int = 2, m: int = 60, n: int = 5, classes: int = 3, seed: int = 0):
    """Overlapping classes of unequal size with correlated features of unequal scale."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=g, dtype=torch.float64)
    y = torch.cat([torch.arange(classes).repeat(2), torch.randint(classes, (m - 2 * classes,), generator=g)])
    y = torch.stack([y[torch.randperm(m, generator=g)] for _ in range(draws)])
    x = torch.randn(draws, m, n, generator=g, dtype=torch.float64) @ mix
    return x + 0.8 * torch.randn(classes, n, generator=g, dtype=torch.float64)[y], y


def centred(logits):
    return logits - logits.mean(-1, keepdims=True)


def test_naive_bayes_is_sklearns_with_its_variances_pooled_by_hand():
    x, y = sample()
    head = nl.naive_bayes(x, y, classes=3)
    for k in range(2):
        sk = GaussianNB(var_smoothing=0).fit(x[k], y[k])
        sk.var_[:] = sk.class_prior_ @ sk.var_
        expected = sk.predict_joint_log_proba(x[k])
        np.testing.assert_allclose(centred(head.scores(x)[k].numpy()), centred(expected), atol=1e-6)


def test_naive_bayes_counts_one_column_at_a_time_and_ignores_units():
    x, y = sample()
    head = nl.naive_bayes(x, y, classes=3)
    alone = nl.naive_bayes(x[..., 2:3], y, classes=3)
    torch.testing.assert_close(alone.weight[..., 0], head.weight[..., 2])
    scale, shift = torch.tensor([1e-2, 3, 50, 0.4, 7]), torch.arange(5.0)
    other = nl.naive_bayes(x * scale + shift, y, classes=3).scores(x * scale + shift)
    torch.testing.assert_close(other.softmax(-1), head.scores(x).softmax(-1), atol=1e-4, rtol=0)


def test_one_example_a_class_is_the_nearest_mean_and_smoothing_moves_the_prior():
    x, _ = sample(m=30)
    means = x[:, :3]
    head = nl.naive_bayes(means, torch.arange(3).expand(2, 3), classes=3)
    assert (head.scores(x).argmax(-1) == torch.cdist(x, means).argmin(-1)).all()
    y = torch.tensor([[0, 0, 0, 1]])
    bare, smooth = (nl.naive_bayes(torch.zeros(1, 4, 1), y, classes=2, smoothing=s).bias.softmax(-1) for s in (0.0, 1))
    torch.testing.assert_close(bare, torch.tensor([[0.75, 0.25]]))
    torch.testing.assert_close(smooth, torch.tensor([[4 / 6, 2 / 6]]))


@pytest.mark.parametrize("penalty", [100.0, 1.0, 0.01])
def test_logistic_regression_is_sklearns(penalty):
    x, y = sample()
    head = nl.logistic_regression(x, y, classes=3, penalties=[7.0, penalty], tolerance=1e-9)
    for k in range(2):
        sk = LogisticRegression(C=1 / penalty, tol=1e-10, max_iter=10_000).fit(x[k], y[k])
        np.testing.assert_allclose(head.weight[k, 1].numpy(), sk.coef_, atol=1e-5)
        np.testing.assert_allclose(centred(head.bias[k, 1].numpy()), centred(sk.intercept_), atol=1e-5)


def test_two_classes_have_half_the_penalty_of_sklearns_single_vector():
    x, y = sample(classes=2, m=30)
    head = nl.logistic_regression(x, y, classes=2, penalties=[2.0], tolerance=1e-9)
    sk = LogisticRegression(C=1.0, tol=1e-10, max_iter=10_000).fit(x[0], y[0])
    np.testing.assert_allclose((head.weight[0, 0, 1] - head.weight[0, 0, 0]).numpy(), sk.coef_[0], atol=1e-6)


def test_a_copy_sees_only_the_rows_it_may():
    x, y = sample()
    kept = torch.ones(2, 2, 60, dtype=torch.bool)
    kept[:, 1, 40:] = False
    x[:, 40:] += 100 * (~kept[:, 1, 40:, None])  # what is hidden must not matter
    head = nl.logistic_regression(x, y, classes=3, penalties=[1.0, 1.0], kept=kept, tolerance=1e-9, steps=2000)
    alone = nl.logistic_regression(x[:, :40], y[:, :40], classes=3, penalties=[1.0], tolerance=1e-9)
    torch.testing.assert_close(head.weight[:, 1], alone.weight[:, 0], atol=1e-5, rtol=0)


def test_separable_data_stay_finite_and_arrived_copies_leave():
    x, y = torch.tensor([[[-1.0], [-2], [1], [2]]], dtype=torch.float64), torch.tensor([[0, 0, 1, 1]])
    head = nl.logistic_regression(x, y, classes=2, penalties=[1e3, 1.0, 1e-6], tolerance=1e-8, steps=500)
    slope = (head.weight[0, :, 1] - head.weight[0, :, 0])[:, 0]
    assert slope.isfinite().all()
    assert (slope.diff() > 0).all()  # a weaker penalty, a steeper curve


def test_a_heavy_penalty_points_at_the_difference_of_the_means():
    x, y = sample(classes=2, m=30)
    y = torch.arange(30).expand(2, 30) % 2
    head = nl.logistic_regression(x, y, classes=2, penalties=[1e7], tolerance=1e-12)
    w = head.weight[:, 0, 1] - head.weight[:, 0, 0]
    gap = x[:, 1::2].mean(1) - x[:, ::2].mean(1)
    torch.testing.assert_close(torch.cosine_similarity(w, gap), torch.ones(2, dtype=torch.float64), atol=1e-4, rtol=0)


def test_a_heavy_penalty_knows_only_how_far_each_class_mean_lies_from_the_mean_of_all():
    x, y = sample()
    head = nl.logistic_regression(x, y, classes=3, penalties=[1e7], tolerance=1e-12)
    member = torch.nn.functional.one_hot(y, 3).to(x.dtype)
    gap = member.mT @ x - member.sum(1)[..., None] * x.mean(1, keepdim=True)
    torch.testing.assert_close(1e7 * head.weight[:, 0], gap, atol=1e-3, rtol=1e-3)


def test_penalty_search_is_cross_validation_by_hand():
    x, y = sample(draws=1)
    penalties = [30.0, 0.3]
    heads, loss = nl.penalty_search(x, y, classes=3, penalties=penalties, folds=3)
    turn, seen = np.zeros(60, int), [0, 0, 0]
    for i, label in enumerate(y[0].tolist()):
        turn[i], seen[label] = seen[label] % 3, seen[label] + 1
    for k, penalty in enumerate(penalties):
        total = 0.0
        for fold in range(3):
            sk = LogisticRegression(C=1 / penalty, tol=1e-9, max_iter=5000).fit(x[0][turn != fold], y[0][turn != fold])
            held = y[0][turn == fold].numpy()
            total += log_loss(held, sk.predict_proba(x[0][turn == fold].numpy()), labels=[0, 1, 2]) * len(held)
        assert float(loss[0, k]) == pytest.approx(total / 60, abs=2e-3)
        full = LogisticRegression(C=1 / penalty, tol=1e-9, max_iter=5000).fit(x[0], y[0])
        np.testing.assert_allclose(heads.weight[0, k].numpy(), full.coef_, atol=0.02)


def test_shrunk_discriminant_is_ledoit_and_wolfs_and_forgets_shrinkage_with_data():
    x, y = sample(draws=1, m=40)
    member = torch.nn.functional.one_hot(y[0]).double()
    means = (member.T @ x[0]) / member.sum(0)[:, None]
    covariance, _ = ledoit_wolf((x[0] - member @ means).numpy(), assume_centered=True)
    expected = means.numpy() @ np.linalg.inv(covariance)
    np.testing.assert_allclose(nl.shrunk_discriminant(x, y, classes=3).weight[0].numpy(), expected, rtol=1e-5)
    x, y = sample(draws=1, m=20_000)
    sk = LinearDiscriminantAnalysis(solver="lsqr").fit(x[0], y[0])
    ours = nl.shrunk_discriminant(x, y, classes=3).scores(x)[0]
    np.testing.assert_allclose(ours.softmax(-1).numpy(), sk.predict_proba(x[0]), atol=0.02)


def test_naive_bayes_and_discriminant_analysis_agree_where_the_covariance_is_diagonal():
    x, y = nl.released_mixture(6).draw(1, 40_000, torch.Generator().manual_seed(1))
    a, b = (f(x, y, classes=2).scores(x[:, :500]).softmax(-1) for f in (nl.naive_bayes, nl.shrunk_discriminant))
    torch.testing.assert_close(a, b, atol=0.03, rtol=0)


def test_exact_error_and_log_loss_are_those_of_a_large_sample():
    mixture = nl.paired_mixture(4, 0.6, 2.0)
    head = nl.Head(torch.tensor([[0.1, 0, 0.2, 0], [0.5, -0.3, 1.0, 0.4]], dtype=torch.float64),
                   torch.tensor([0.0, 0.3], dtype=torch.float64))  # fmt: skip
    x, y = mixture.draw(1, 400_000, torch.Generator().manual_seed(2))
    scores = head.scores(x[0])
    assert float(mixture.error(head)) == pytest.approx(float((scores.argmax(-1) != y[0]).double().mean()), abs=2e-3)
    sampled = float(torch.nn.functional.cross_entropy(scores, y[0]))
    assert float(mixture.log_loss(head)) == pytest.approx(sampled, rel=5e-3)
    np.testing.assert_allclose(np.cov(x[0, ::2].T.numpy()), mixture.covariance.numpy(), atol=0.04)


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_limits_have_their_closed_forms(rho):
    mixture = nl.paired_mixture(12, rho, 3.0)
    assert mixture.distance == pytest.approx(3.0)
    naive, bayes = (float(mixture.error(head)) for head in mixture.limits())
    assert bayes == pytest.approx(norm.cdf(-1.5))
    assert naive == pytest.approx(norm.cdf(-1.5 * math.sqrt(1 - rho**2)))
    assert nl.released_mixture(10).distance == pytest.approx(math.sqrt(22))
    assert nl.released_mixture(10, 2.5).distance == pytest.approx(2.5)
    x, y = mixture.draw(1, 60_000, torch.Generator().manual_seed(3))
    assert float(mixture.error(nl.naive_bayes(x, y, classes=2))[0]) == pytest.approx(naive, abs=5e-3)


def test_log_loss_bounds_the_error():
    """The H-consistency bound: the error gap is at most the root of twice the log-loss gap."""
    mixture, g = nl.released_mixture(4, 2.0), torch.Generator().manual_seed(4)
    best = mixture.limits()[1]
    heads = nl.Head(torch.randn(500, 2, 4, generator=g, dtype=torch.float64),
                    torch.randn(500, 2, generator=g, dtype=torch.float64))  # fmt: skip
    gap, extra = mixture.log_loss(heads) - mixture.log_loss(best), mixture.error(heads) - mixture.error(best)
    assert (gap > 0).all()
    assert (extra >= 0).all()
    assert (extra <= (2 * gap).sqrt()).all()


def test_the_angle_formula_predicts_naive_bayes_with_known_variances():
    n, distance, epsilon = 200, 3.0, 0.03
    m = round(nl.naive_bayes_samples(n, distance, epsilon) / 2) * 2
    mixture = nl.released_mixture(n, distance)
    x, _ = mixture.draw(60, m, torch.Generator().manual_seed(5))
    deviation = mixture.covariance.diagonal().sqrt()
    means = torch.stack([x[:, ::2].mean(1), x[:, 1::2].mean(1)], 1) / deviation**2
    heads = nl.Head(means, -(means * means * deviation**2).sum(-1) / 2)
    assert float(mixture.error(heads).mean()) == pytest.approx(norm.cdf(-1.5) + epsilon, abs=4e-3)
    assert nl.naive_bayes_samples(2 * n, distance, epsilon) == pytest.approx(
        2 * nl.naive_bayes_samples(n, distance, epsilon)
    )


def test_samples_to_reach_is_the_last_crossing():
    sizes = [10, 100, 1000]
    values = np.array([[3.0, 1.0, 0.0], [0.0, 3.0, 1.0], [1.0, 1.0, 1.0], [5.0, 5.0, 5.0]])
    found = nl.samples_to_reach(sizes, values, 2.0)
    np.testing.assert_allclose(found, [10**1.5, 10**2.5, 10, np.inf])
    np.testing.assert_allclose(nl.samples_to_reach(sizes, values[:2], np.array([3.5, 2.0])), [10, 10**2.5])


X, Y = torch.zeros(1, 4, 2, dtype=torch.float64), torch.tensor([[0, 1, 0, 1]])


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: nl.naive_bayes(X, Y, classes=3), "y"),
        (lambda: nl.naive_bayes(X, Y + 1, classes=2), "y"),
        (lambda: nl.naive_bayes(X / 0, Y, classes=2), "x"),
        (lambda: nl.naive_bayes(X, Y, classes=2, floor=0.0), "floor"),
        (lambda: nl.naive_bayes(X, Y, classes=2, smoothing=-1.0), "smoothing"),
        (lambda: nl.shrunk_discriminant(X, Y, classes=2, floor=-1.0), "floor"),
        (lambda: nl.logistic_regression(X, Y, classes=2, penalties=[]), "penalties"),
        (lambda: nl.logistic_regression(X, Y, classes=2, penalties=[0.0]), "penalties"),
        (lambda: nl.penalty_search(X, Y, classes=2, penalties=[1.0], folds=1), "folds"),
        (lambda: nl.penalty_search(X[:, :2], Y[:, :2], classes=2, penalties=[1.0]), "y"),
        (lambda: nl.released_mixture(7), "n"),
        (lambda: nl.released_mixture(8, -1.0), "distance"),
        (lambda: nl.paired_mixture(8, 1.0, 3.0), "correlation"),
        (lambda: nl.paired_mixture(6, 0.5, 3.0), "n"),
        (lambda: nl.naive_bayes_samples(8, 3.0, 0.9), "epsilon"),
        (lambda: nl.samples_to_reach([1, 2], np.zeros((1, 3)), 0.0), "values"),
    ],
)
def test_bad_input_is_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()


@pytest.mark.gpu
def test_cuda_agrees_with_cpu():
    x, y = sample()
    cuda = torch.device("cuda")
    for fit in (nl.naive_bayes, nl.shrunk_discriminant):
        torch.testing.assert_close(fit(x.to(cuda), y.to(cuda), classes=3).weight.cpu(), fit(x, y, classes=3).weight)
    cpu, gpu = (
        nl.logistic_regression(x.to(d), y.to(d), classes=3, penalties=[1.0], tolerance=1e-9) for d in ("cpu", cuda)
    )
    torch.testing.assert_close(gpu.weight.cpu(), cpu.weight, atol=1e-5, rtol=0)
