"""Samplers against data whose best denoiser is known in closed form; the denoiser against torch, and by what must not
matter.
"""

import math

import pytest
import torch
from torch import nn

from paperlab.nn import diffusion as d
from paperlab.nn.denoiser import CrossAttention, Denoiser, guided, time_features
from paperlab.nn.hooks import edited, hook_points, recorded
from paperlab.nn.transformer import TransformerConfig, Visible


def double(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def at(*times):
    return torch.tensor(times, dtype=torch.float64)


def gaussian(mean, std):
    """The velocity of the best denoiser for data N(mean, std²): E[x0 | x] is the regression of x0 on x."""

    def field(x, t):
        alpha, sigma = (w.reshape(-1, *[1] * (x.ndim - 1)) for w in d.schedule(t))
        x0 = mean + std**2 * alpha * (x - alpha * mean) / (alpha**2 * std**2 + sigma**2)
        eps = sigma * (x - alpha * mean) / (alpha**2 * std**2 + sigma**2)
        return alpha * eps - sigma * x0

    return field


def test_the_schedule_keeps_the_variance_and_its_ends():
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    alpha, sigma = d.schedule(t)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(t))
    torch.testing.assert_close(torch.stack([alpha[[0, -1]], sigma[[0, -1]]]), torch.eye(2).double())
    torch.testing.assert_close(d.log_snr(t[1:-1]), -d.log_snr(1 - t[1:-1]))
    assert d.log_snr(at(0.5)).abs() < 1e-12


def test_the_velocity_is_the_derivative_by_the_angle():
    x0, eps, t = double(4, 3), double(4, 3, seed=1), at(0.1, 0.4, 0.6, 0.9)
    change = (d.diffuse(x0, eps, t + 1e-5) - d.diffuse(x0, eps, t - 1e-5)) / (1e-5 * math.pi)
    torch.testing.assert_close(d.velocity(x0, eps, t), change)


def test_each_of_picture_noise_and_velocity_gives_the_others():
    x0, eps, t = double(4, 2, 3), double(4, 2, 3, seed=1), at(0.01, 0.4, 0.6, 0.99)
    x, v = d.diffuse(x0, eps, t), d.velocity(x0, eps, t)
    torch.testing.assert_close(d.split(x, v, t), (x0, eps))
    torch.testing.assert_close(d.from_noise(x, eps, t), v)
    torch.testing.assert_close(d.from_picture(x, x0, t), v)
    torch.testing.assert_close(d.split(eps, d.velocity(x0, eps, at(1.0)), at(1.0)), (x0, eps))


def test_the_posterior_is_that_of_ho_et_al():
    # Equations 6 and 7 in the paper's own symbols: beta, and the cumulative products of 1 - beta.
    x, x0, t, s = double(3, 2), double(3, 2, seed=1), at(0.3, 0.7, 1.0), at(0.0, 0.6, 0.2)
    bar_t, bar_s = torch.cos(math.pi * t / 2)[:, None] ** 2, torch.cos(math.pi * s / 2)[:, None] ** 2
    beta = 1 - bar_t / bar_s
    mean = bar_s.sqrt() * beta / (1 - bar_t) * x0 + (1 - beta).sqrt() * (1 - bar_s) / (1 - bar_t) * x
    found, variance = d.posterior(x, x0, t, s)
    torch.testing.assert_close(found, mean)
    torch.testing.assert_close(variance, ((1 - bar_s) / (1 - bar_t) * beta)[:, 0])


def test_a_step_with_eta_1_is_a_draw_from_the_posterior():
    x, v, z, t, s = double(3, 2), double(3, 2, seed=1), double(3, 2, seed=2), at(0.3, 0.7, 1.0), at(0.0, 0.6, 0.2)
    mean, variance = d.posterior(x, d.split(x, v, t)[0], t, s)
    found = d.step(x, v, t, s, eta=1.0, noise=z)
    torch.testing.assert_close(found, mean + variance.sqrt()[:, None] * z)


def test_ddim_carries_noise_to_gaussian_data_by_the_known_map():
    # The flow of a Gaussian moves quantiles to quantiles: z ends at mean + std z.
    z, error = double(64, 1), {}
    for steps in (50, 100):
        error[steps] = (d.sample(gaussian(0.7, 0.4), z, steps=steps) - (0.7 + 0.4 * z)).abs().max().item()
    assert error[100] < 0.03
    assert error[50] / error[100] == pytest.approx(2, rel=0.1)  # a method of first order


def test_a_point_is_reached_in_one_step():
    torch.testing.assert_close(d.sample(gaussian(0.7, 0.0), double(8, 1), steps=1), torch.full((8, 1), 0.7).double())


def test_the_ancestral_sampler_ends_with_the_datas_mean_and_spread():
    found = {}
    for steps in (50, 100):
        g = torch.Generator().manual_seed(1)
        x = d.sample(gaussian(0.7, 0.4), double(20_000, 1), steps=steps, eta=1.0, generator=g)
        assert x.mean().item() == pytest.approx(0.7, abs=4 * 0.4 / 20_000**0.5)
        found[steps] = x.std().item()
    assert found[50] < found[100] < 0.4
    assert 2 * found[100] - found[50] == pytest.approx(0.4, rel=0.02)  # first order: what ever finer steps tend to
    assert torch.equal(x, d.sample(gaussian(0.7, 0.4), double(20_000, 1), steps=100, eta=1.0,
                                   generator=g.manual_seed(1)))  # fmt: skip


def test_from_0_to_1_a_picture_becomes_its_noise():
    z, field = double(64, 1), gaussian(0.7, 0.4)
    *_, back = d.walk(field, 0.7 + 0.4 * z, torch.linspace(0, 1, 101).tolist())
    torch.testing.assert_close(back, z, atol=0.1, rtol=0)


def test_what_is_walked_is_what_is_sampled():
    z, field = double(4, 1), gaussian(0.7, 0.4)
    seen = list(d.walk(field, z, [1.0, 0.75, 0.5, 0.25, 0.0]))
    assert len(seen) == 4
    assert torch.equal(seen[-1], d.sample(field, z, steps=4))


def test_clipping_bounds_the_picture_and_nothing_else():
    z = double(64, 1)
    x = d.sample(gaussian(3.0, 0.1), z, steps=10, clip=1.0)
    torch.testing.assert_close(x, torch.ones_like(z))
    torch.testing.assert_close(d.sample(gaussian(0.0, 0.1), z, steps=10, clip=9.0),
                               d.sample(gaussian(0.0, 0.1), z, steps=10))  # fmt: skip


class Means(Denoiser):
    """Caption k asks for data N(k, 0.4²): what guidance does to it is known."""

    def __init__(self):
        nn.Module.__init__(self)
        self.pad = 0

    def read(self, captions):
        return captions[:, :, None].double()

    def forward(self, x, t, captions, *, words=None):
        return gaussian(words[:, 0, :, None, None], 0.4)(x, t)


def small(**changes):
    """A tiny denoiser whose weights are large enough for differences to show."""
    torch.manual_seed(0)
    sizes = {"size": 8, "patch": 4, "width": 8, "layers": 2, "heads": 2, "reader_layers": 1} | changes
    model = Denoiser(50, **sizes).eval().double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


CAPTIONS = torch.tensor([[1, 5, 6, 7], [1, 8, 0, 0]])
X, T = double(2, 3, 8, 8), at(0.2, 0.8)


def test_an_untrained_denoiser_says_nothing():
    assert torch.equal(Denoiser(50, size=8)(X.float(), T.float(), CAPTIONS), torch.zeros(2, 3, 8, 8))


def test_time_features_turn():
    found = time_features(torch.tensor([0.0, 0.37]))
    torch.testing.assert_close(found[0], torch.cat([torch.ones(32), torch.zeros(32)]))
    torch.testing.assert_close(found.square().sum(1), torch.full((2,), 32.0))
    assert found[1, 31] == pytest.approx(math.cos(0.037))
    assert found[1, 32] == pytest.approx(math.sin(37), abs=1e-4)


def test_cross_attention_is_torchs():
    torch.manual_seed(0)
    ours = CrossAttention(TransformerConfig(vocab=1, layers=1, width=8, heads=2, context=4, hidden=8), 0).double()
    theirs = nn.MultiheadAttention(8, 2, bias=False, batch_first=True).double()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.W_q.weight, ours.W_k.weight, ours.W_v.weight]))
        theirs.out_proj.weight.copy_(ours.W_o.weight)
    x, words, padding = double(2, 4, 8), double(2, 3, 8, seed=1), torch.tensor([[False] * 3, [False, False, True]])
    visible = Visible((x, x), ~padding[:, None, None], causal=False, bias=None)
    expected, weights = theirs(x, words, words, key_padding_mask=padding, average_attn_weights=False)
    torch.testing.assert_close(ours(x, words, visible), expected)
    with recorded(ours) as seen:
        torch.testing.assert_close(ours(x, words, visible), expected)
    torch.testing.assert_close(seen["pattern"], weights)


def test_a_patchs_token_is_the_linear_map_of_its_pixels():
    model = small()
    with recorded(model, "embed") as seen:
        model(X, T, CAPTIONS)
    pixels = X[:, :, 4:8, 0:4].flatten(1)  # second row, first column
    torch.testing.assert_close(seen["embed"][:, 2], model.patches(pixels) + model.places[2])


def test_velocities_return_to_where_their_patch_was():
    model, final = small(), double(2, 4, 8)
    with edited(model, {"final": lambda value: final}):
        v = model(X, T, CAPTIONS)
    torch.testing.assert_close(v[:, :, 0:4, 4:8].flatten(1), model.pixels(final[:, 1]))


def test_padding_and_neighbours_in_the_batch_do_not_matter():
    model = small()
    v = model(X, T, CAPTIONS)
    torch.testing.assert_close(model(X[1:], T[1:], CAPTIONS[1:, :2]), v[1:])
    padded = torch.cat([CAPTIONS, torch.zeros(2, 3, dtype=torch.long)], dim=1)
    torch.testing.assert_close(model(X, T, padded), v)


def test_the_caption_acts_by_cross_attention_alone():
    model = small()
    other = CAPTIONS.flip(0)
    assert (model(X, T, CAPTIONS) - model(X, T, other)).abs().min() > 1e-6
    names = [name for name in hook_points(model) if name.endswith("cross.out")]
    assert len(names) == 2
    with edited(model, dict.fromkeys(names, torch.zeros_like)):
        torch.testing.assert_close(model(X, T, CAPTIONS), model(X, T, other))


def test_words_can_be_read_before():
    model = small()
    words = model.read(CAPTIONS)
    torch.testing.assert_close(model(X, T, CAPTIONS, words=words), model(X, T, CAPTIONS))
    assert (model(X, T, CAPTIONS, words=words.flip(0)) - model(X, T, CAPTIONS)).abs().max() > 1e-3


def test_maps_can_be_recorded_and_edited():
    model = small()
    names = [name for name in hook_points(model) if name.endswith("cross.pattern")]
    with recorded(model, names) as seen:
        torch.testing.assert_close(model(X, T, CAPTIONS), (fused := model(X, T, CAPTIONS)))
    for pattern in seen.values():
        assert pattern.shape == (2, 2, 4, 4)  # batch heads patches words
        torch.testing.assert_close(pattern.sum(-1), torch.ones(2, 2, 4).double())
        assert (pattern[1, :, :, 2:] == 0).all()
    first = lambda pattern: torch.zeros_like(pattern).index_fill(-1, torch.tensor([0]), 1.0)  # noqa: E731
    words = model.read(CAPTIONS)
    with edited(model, dict.fromkeys(names, first)):
        found = [model(X, T, CAPTIONS, words=torch.cat([words[:, :1], rest], 1)) for rest in double(2, 2, 3, 8)]
    torch.testing.assert_close(found[0], found[1])
    assert (found[0] - fused).abs().max() > 1e-3


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0, -1.0])
def test_guidance_moves_a_gaussian_past_what_was_asked_for(scale):
    # Fields of two Gaussians of one variance differ by a constant: their extrapolation is the field of another one.
    z, asked, against = double(4, 1, 2, 2), torch.tensor([[2], [2], [3], [3]]), torch.tensor([[1]])
    found = d.sample(guided(Means(), asked, against, scale), z, steps=100)
    means = 1 + scale * (asked.double() - 1)
    torch.testing.assert_close(found, means[:, :, None, None] + 0.4 * z, atol=0.06, rtol=0)


def test_guidance_is_the_extrapolation_of_two_passes():
    model, null = small(), torch.tensor([[1]])
    asked, rival = model(X, T, CAPTIONS), model(X, T, null.expand(2, -1))
    torch.testing.assert_close(guided(model, CAPTIONS, null, 3.0)(X, T), rival + 3 * (asked - rival))
    torch.testing.assert_close(guided(model, CAPTIONS, null, 1.0)(X, T), asked)
    torch.testing.assert_close(guided(model, CAPTIONS[:, :2], CAPTIONS, 0.0)(X, T), asked)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: d.schedule(at(1.1)), "t must"),
        (lambda: d.log_snr(at(float("nan"))), "t must"),
        (lambda: d.diffuse(X, X, at(0.1, 0.2, 0.3)), "t must"),
        (lambda: d.from_noise(X, X, at(1.0)), "t must"),
        (lambda: d.from_picture(X, X, at(0.0)), "t must"),
        (lambda: d.posterior(X, X, at(0.5), at(0.5)), "s must"),
        (lambda: d.step(X, X, at(0.5), at(0.4), eta=2.0), "eta"),
        (lambda: d.step(X, X, at(0.5), at(0.4), eta=1.0), "noise"),
        (lambda: d.step(X, X, at(0.5), at(0.4), clip=0.0), "clip"),
        (lambda: d.sample(gaussian(0, 1), X, steps=0), "steps"),
        (lambda: list(d.walk(gaussian(0, 1), X, [1.0])), "times"),
        (lambda: list(d.walk(gaussian(0, 1), X, [2.0, 1.0])), "times"),
        (lambda: Denoiser(50, size=0), "size"),
        (lambda: Denoiser(50, patch=5), "patch"),
        (lambda: Denoiser(50, width=9), "width"),
        (lambda: small()(X[..., :4, :4], T, CAPTIONS), "x must"),
        (lambda: small()(X, T * float("nan"), CAPTIONS), "t must"),
        (lambda: small()(X, T, CAPTIONS, words=double(2, 4, 9)), "words"),
        (lambda: small()(X, T, torch.zeros_like(CAPTIONS)), "captions"),
        (lambda: small().read(torch.full((1, 2), 50)), "captions|tokens"),
        (lambda: guided(small(), CAPTIONS, CAPTIONS, math.inf), "scale"),
    ],
)
def test_bad_input_names_the_argument(call, name):
    with pytest.raises(ValueError, match=name):
        call()


@pytest.mark.gpu
def test_gpu_agrees_with_cpu():
    model = small().float()
    found = model.cuda()(X.float().cuda(), T.float().cuda(), CAPTIONS.cuda()).cpu()
    torch.testing.assert_close(found, model.cpu()(X.float(), T.float(), CAPTIONS), rtol=1e-3, atol=1e-4)
