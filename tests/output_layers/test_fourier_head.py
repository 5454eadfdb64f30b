"""The Fourier head against NumPy, SciPy, integrals and the released code's own route through the coefficients."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from scipy.ndimage import gaussian_filter1d
from torch.nn import functional as F

from paperlab.output_layers import fourier_head as fh
from paperlab.training import fit

F64 = torch.float64


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def coefficients(n: int = 6, count: int = 5, seed: int = 0):
    return torch.complex(*torch.randn(2, count, n, generator=draws(seed), dtype=F64))


def random_head(frequencies=8, copies: int = 3, bins: int = 50, **options):
    return fh.FourierHead(copies, 7, bins, frequencies, generator=draws(1), **options).double()


def features(copies: int = 3, batch: int = 9):
    return torch.randn(copies, batch, 7, generator=draws(2), dtype=F64)


def test_autocorrelation_is_numpys_correlate():
    a = coefficients()
    for row in a.numpy():
        expected = np.correlate(row, row, "full")[len(row) - 1 :: -1]
        np.testing.assert_allclose(fh.autocorrelation(torch.from_numpy(row)).numpy(), expected, atol=1e-12)


def test_the_square_is_the_papers_series_at_any_point():
    a, z = coefficients(), torch.linspace(-3, 3, 101, dtype=F64)
    torch.testing.assert_close(fh.density(a, z), fh.series(fh.autocorrelation(a), z))
    waves = np.exp(-1j * np.pi * np.outer(np.arange(6), z.numpy()))
    expected = abs(a.numpy() @ waves) ** 2 / (2 * (abs(a.numpy()) ** 2).sum(-1, keepdims=True))
    np.testing.assert_allclose(fh.density(a, z).numpy(), expected, atol=1e-12)


def test_a_density_of_period_two_whatever_the_scale():
    a = coefficients()
    for row in a:
        total, _ = integrate.quad(lambda t, row=row: fh.density(row, torch.tensor([t], dtype=F64)).item(), -1, 1)
        assert total == pytest.approx(1, abs=1e-9)
    z = torch.linspace(-1, 1, 401, dtype=F64)
    assert (fh.density(a, z) >= 0).all()
    torch.testing.assert_close(fh.density(a, z + 2), fh.density(a, z))
    torch.testing.assert_close(fh.density((3 - 4j) * a, z), fh.density(a, z))


def test_by_hand_with_one_frequency():
    z = fh.bin_centres(4)
    torch.testing.assert_close(z, torch.tensor([-0.75, -0.25, 0.25, 0.75], dtype=F64))
    a = torch.tensor([1 + 0j, 0 - 0.5j], dtype=torch.complex128)  # c_0 = 1.25, c_1 = 0.5j
    torch.testing.assert_close(fh.autocorrelation(a), torch.tensor([1.25 + 0j, 0.5j], dtype=torch.complex128))
    torch.testing.assert_close(fh.density(a, z), 0.5 - 0.4 * torch.sin(math.pi * z))


def test_no_frequencies_is_the_uniform_distribution():
    torch.testing.assert_close(random_head(0, floor=1e-12)(features()).exp(), torch.full((3, 9, 50), 0.02, dtype=F64))


def test_head_follows_the_released_steps():
    head, h = random_head(8), features()
    w, b = head.affine.weight.detach().numpy(), head.affine.bias.detach().numpy()
    for copy in range(3):
        raw = h[copy].numpy() @ w[copy] + b[copy]
        a = raw[:, :9] + 1j * raw[:, 9:]
        c = np.stack([np.correlate(row, row, "full")[8::-1] for row in a])
        z = (np.linspace(-1, 1, 51)[:-1] + np.linspace(-1, 1, 51)[1:]) / 2
        p = 0.5 + ((c[:, 1:] / c[:, :1].real) @ np.exp(1j * np.pi * np.arange(1, 9)[:, None] * z)).real
        expected = np.log(p / p.sum(-1, keepdims=True) + 1e-5)
        np.testing.assert_allclose(head(h)[copy].detach().numpy(), expected, atol=1e-9)
        expected = 2 * (2 * np.pi**2 * np.arange(9) ** 2 * np.abs(c) ** 2).sum(-1)
        np.testing.assert_allclose(fh.penalty(head.coefficients(h)[copy]).detach(), expected)


@pytest.mark.parametrize("frequencies", [1, 8, 24])
def test_loss_at_the_label_alone_is_the_cross_entropy(frequencies):
    head, h, labels = random_head(frequencies), features(), torch.randint(50, (3, 9), generator=draws(3))
    ours, expected = head.loss(h, labels), F.cross_entropy(head(h).mT, labels, reduction="none")
    torch.testing.assert_close(ours, expected)
    slopes = [torch.autograd.grad(v.sum(), head.affine.weight)[0] for v in (ours, expected)]
    torch.testing.assert_close(*slopes)


def test_a_number_of_frequencies_for_each_copy():
    head, h = random_head([2, 5, 8]), features()
    assert head.coefficients(h)[0, :, 3:].abs().max() == 0
    for copy, n in enumerate((2, 5, 8)):
        alone = random_head(n, copies=1)
        with torch.no_grad():
            for mine, its in ((alone.affine.weight, head.affine.weight), (alone.affine.bias, head.affine.bias)):
                mine.copy_(torch.cat([its[copy : copy + 1, :, : n + 1], its[copy : copy + 1, :, 9 : 10 + n]], -1))
        torch.testing.assert_close(alone(h[copy : copy + 1])[0], head(h)[copy])


def test_shrinking_the_start_changes_no_density_but_the_penalty():
    large, small, h = random_head(8, shrink=1.0), random_head(8, shrink=100.0), features()
    torch.testing.assert_close(large(h), small(h), atol=1e-5, rtol=0)
    few, many = (fh.penalty(head.coefficients(h)) for head in (small, large))
    torch.testing.assert_close(many, 100**4 * few, rtol=1e-4, atol=0)
    norm = torch.nn.Linear(7, 18).weight.detach()
    assert small.affine.weight.abs().max() <= norm.abs().max() * 1.1 / 100


def test_a_representable_target_is_recovered():
    target = fh.density(coefficients(n=5, count=1, seed=7), fh.bin_centres(50))[0] / 25
    head = fh.FourierHead(4, 1, 50, 4, generator=draws(8)).double()
    one = torch.ones(4, 1, 1, dtype=F64)

    def gap():
        return fh.divergence(target.expand(4, 50), head(one)[:, 0])

    fit(head.parameters(), lambda step: gap().sum(), steps=200, lr=0.003, schedule="cosine")
    assert gap().min() < 1e-4


def test_smoothness_against_scipys_wrapped_filter():
    pmf = torch.rand(3, 20, generator=draws(4), dtype=F64).softmax(-1)
    for row, value in zip(pmf.numpy(), fh.smoothness(pmf), strict=True):
        expected = sum(
            6 / (np.pi * s) ** 2 * np.linalg.norm(row - gaussian_filter1d(row, s, mode="wrap", radius=19))
            for s in range(1, 101)
        )
        assert value.item() == pytest.approx(expected, rel=1e-9)
    assert fh.smoothness(torch.full((1, 30), 1 / 30, dtype=F64)).item() == pytest.approx(0, abs=1e-12)
    comb, bump = torch.tensor([1.0, 0.0]).repeat(25) / 25, torch.linspace(-4, 4, 50).square().neg().softmax(-1)
    assert fh.smoothness(comb) > fh.smoothness(bump)


def test_worlds_against_scipy_and_their_draws_against_themselves():
    x, y = torch.tensor([0.3, -0.46]), torch.tensor([0.1, 0.22])
    edges = np.linspace(-1, 1, 11)
    for k in range(2):
        gaussian = np.diff(stats.norm(y[k], 0.1).cdf(edges))
        gaussian[0] += stats.norm(y[k], 0.1).cdf(-1)
        gaussian[-1] += stats.norm(y[k], 0.1).sf(1)
        np.testing.assert_allclose(fh.conditional_pmf("Gaussian", x, y, 10)[k], gaussian, atol=1e-7)
        one = np.diff(stats.beta(100 * abs(x[k]), 100 * abs(y[k])).cdf(edges[5:]))
        np.testing.assert_allclose(fh.conditional_pmf("Beta", x, y, 10)[k], np.r_[one[::-1], one] / 2, atol=1e-7)
    halves = [fh.conditional_pmf("Gaussian", x, v, 10) for v in (x, y)]
    torch.testing.assert_close(fh.conditional_pmf("mixture", x, y, 10), sum(halves) / 2)
    for world in fh.WORLDS:
        xy, z, pmf = fh.draw_world(world, 20_000, 10, draws(5))
        torch.testing.assert_close(pmf.sum(-1), torch.ones(20_000, dtype=F64))
        torch.testing.assert_close(pmf, fh.conditional_pmf(world, *xy.double().T, 10), atol=1e-5, rtol=0)
        np.testing.assert_allclose(torch.bincount(z, minlength=10) / 20_000, pmf.mean(0), atol=0.012)


def test_mixture_head_draws_a_gaussian_and_starts_broad():
    head = fh.MixtureHead(1, 3, 200, 2).double()
    with torch.no_grad():
        for p in head.parameters():
            p.zero_()
        head.affine.bias += torch.tensor([9.0, -9, 0.25, 0, 0, 0])  # weights, means, log deviations
    found = head(torch.zeros(1, 1, 3, dtype=F64))[0, 0].exp().detach().numpy()
    z = fh.bin_centres(200).numpy()
    expected = stats.norm(-0.25, 1 / 2).pdf(z) / stats.norm(-0.25, 1 / 2).pdf(z).sum()
    np.testing.assert_allclose(found, expected, atol=1e-6)
    with torch.no_grad():
        head.affine.bias.copy_(torch.tensor([0.3, -0.2, 0.1, -0.2, -0.5, 0.2]))
    share = 1 / (1 + math.exp(-0.5))
    both = share * stats.norm(-0.4, math.exp(-0.5) / 2).pdf(z) + (1 - share) * stats.norm(0.3, math.exp(0.2) / 2).pdf(z)
    found = head(torch.zeros(1, 1, 3, dtype=F64))[0, 0].exp().detach().numpy()
    np.testing.assert_allclose(found, both / both.sum(), atol=1e-6)
    two = fh.MixtureHead(2, 3, 50, [1, 3])(torch.zeros(2, 1, 3))
    torch.testing.assert_close(two.exp().sum(-1), torch.ones(2, 1))


def test_smoothed_targets_against_scipy_and_their_limit():
    table = fh.smoothed_targets(12, 1.5)
    expected = stats.norm(3, 1.5).pdf(np.arange(12))
    np.testing.assert_allclose(table[3], expected / expected.sum(), atol=1e-6)
    torch.testing.assert_close(fh.smoothed_targets(12, 0.0), torch.eye(12))
    torch.testing.assert_close(fh.smoothed_targets(12, 0.1), torch.eye(12))


def test_scores_against_scipy_and_against_expected_distances():
    truth = torch.rand(4, 9, generator=draws(6), dtype=F64).softmax(-1)
    truth[0] = F.one_hot(torch.tensor(2), 9)
    logits = torch.randn(4, 9, generator=draws(7), dtype=F64)
    expected = stats.entropy(truth.numpy(), logits.softmax(-1).numpy(), axis=-1)
    np.testing.assert_allclose(fh.divergence(truth, logits), expected)
    p, j = logits.softmax(-1).numpy(), np.arange(9)
    far, apart = np.abs(j - 4), np.abs(j[:, None] - j)
    energy = p @ far - 0.5 * np.einsum("ri,ij,rj->r", p, apart, p)  # the score's other form
    np.testing.assert_allclose(fh.ranked_score(logits, torch.full((4,), 4)), energy)
    sure = torch.full((9,), -1e9).index_fill(0, torch.tensor(6), 0.0)
    assert fh.ranked_score(sure, torch.tensor(2)).item() == pytest.approx(4)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: fh.FourierHead(1, 4, 50, 25), "frequencies"),
        (lambda: fh.FourierHead(1, 4, 50, -1), "frequencies"),
        (lambda: fh.FourierHead(3, 4, 50, [4, 8]), "frequencies"),
        (lambda: fh.FourierHead(1, 4, 50, 8, floor=0.0), "floor"),
        (lambda: fh.FourierHead(1, 4, 50, 8, shrink=-1.0), "shrink"),
        (lambda: fh.FourierHead(1, 0, 50, 8), "in_features"),
        (lambda: fh.bin_centres(1), "bins"),
        (lambda: fh.autocorrelation(torch.tensor([1 + 0j, complex(math.nan, 0)])), "a must be finite"),
        (lambda: fh.penalty(torch.tensor([complex(math.inf, 0)])), "a must be finite"),
        (lambda: fh.series(torch.zeros(3, dtype=torch.complex64), torch.zeros(2)), r"c\["),
        (lambda: fh.density(torch.zeros(3, dtype=torch.complex64), torch.zeros(2)), "squared length of a"),
        (lambda: fh.divergence(torch.tensor([-0.5, 1.5]), torch.zeros(2)), "truth"),
        (lambda: random_head().loss(features(), torch.full((3, 9), 50)), "labels"),
        (lambda: fh.MixtureHead(1, 4, 50, 0), "components"),
        (lambda: fh.MixtureHead(2, 4, 50, [1, 2, 3]), "components"),
        (lambda: fh.smoothed_targets(9, -1.0), "width"),
        (lambda: fh.smoothness(torch.tensor([0.5, math.nan])), "pmf"),
        (lambda: fh.conditional_pmf("Cauchy", torch.zeros(1), torch.zeros(1), 9), "world"),
        (lambda: fh.draw_world("Beta", 0, 9, draws()), "count"),
        (lambda: fh.ranked_score(torch.zeros(2, 5), torch.tensor([0, 5])), "labels"),
    ],
)
def test_bad_input_is_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()
