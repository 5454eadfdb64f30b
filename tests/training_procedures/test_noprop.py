"""NoProp against Bayes' rule, closed forms, limits and invariances."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from paperlab.devices import generator
from paperlab.nn.layerwise import accuracy, train
from paperlab.training_procedures.noprop import (
    BackpropChain,
    Denoiser,
    Ensemble,
    LearnedSchedule,
    NoPropCT,
    NoPropDT,
    NoPropFM,
    cosine_schedule,
    noised,
    posterior,
    prototypes,
    snr,
)

S, T, C, PIXELS = 2, 4, 3, 6
ONE_HOT = torch.eye(C).repeat(S, 1, 1)


def model(kind=NoPropDT, **options):
    torch.manual_seed(0)
    return kind(ONE_HOT, T, PIXELS, hidden=8, **options)


def batch(n=16):
    torch.manual_seed(1)
    return torch.rand(S, n, PIXELS), torch.randint(C, (S, n))


def test_posterior_is_bayes_rule():
    # Multiply the two Gaussians q(z_t | y) and q(z_{t-1} | z_t) on a grid and normalise: nothing but Bayes' rule.
    alpha_bar, u, z_before = cosine_schedule(5).double(), 1.7, 0.4
    a, b, c = posterior(alpha_bar)
    grid = np.linspace(-12, 12, 40001)
    for t in range(1, 6):
        after, alpha = float(alpha_bar[t]), float(alpha_bar[t - 1] / alpha_bar[t])
        prior = stats.norm.pdf(grid, math.sqrt(after) * u, math.sqrt(1 - after))
        joint = prior * stats.norm.pdf(z_before, math.sqrt(alpha) * grid, math.sqrt(1 - alpha))
        density = joint / integrate.trapezoid(joint, grid)
        mean = integrate.trapezoid(grid * density, grid)
        variance = integrate.trapezoid((grid - mean) ** 2 * density, grid)
        assert mean == pytest.approx(float(a[t - 1]) * u + float(b[t - 1]) * z_before, abs=1e-6)
        assert variance == pytest.approx(float(c[t - 1]), abs=1e-6)


def test_limits_of_the_posterior():
    a, b, c = posterior(torch.tensor([0.2, 1.0], dtype=torch.float64))  # no noise left: z_T is the guess
    assert (a.item(), b.item(), c.item()) == pytest.approx((1, 0, 0))
    a, b, c = posterior(torch.tensor([0.0, 0.6], dtype=torch.float64))  # the first state knows nothing
    assert (a.item(), b.item(), c.item()) == pytest.approx((math.sqrt(0.6), 0, 0.4))
    a, b, c = posterior(torch.tensor([0.3, 0.3], dtype=torch.float64))  # nothing happens between equal noise levels
    assert (a.item(), b.item(), c.item()) == pytest.approx((0, 1, 0))


def test_perfect_guesses_keep_the_chain_on_q():
    # With u_hat = u_y, the chain's states must have the mean and variance of q(z_t | y) at every t.
    net = model()
    u = torch.tensor([0.0, 2.0, 0.0])
    net.guess = lambda p: u.expand(*p.shape[:-1], C)
    start = noised(u.expand(S, 20000, C), net.alpha_bar[0].expand(S, 20000), generator(1))
    with torch.no_grad():
        states, _ = net.chain(torch.zeros(S, 20000, PIXELS), generator(2), z=start)
    for z, alpha_bar in zip(states, net.alpha_bar, strict=True):
        torch.testing.assert_close(z.mean((0, 1)), alpha_bar.sqrt() * u, atol=0.03, rtol=0)
        torch.testing.assert_close(z.var((0, 1)), (1 - alpha_bar).expand(C), atol=0.03, rtol=0)


def test_without_noise_at_the_end_the_last_state_is_the_last_guess():
    net = model()
    net.alpha_bar[-1] = 1.0
    x, _ = batch()
    states, opinions = net.chain(x, generator(0))
    torch.testing.assert_close(states[-1], opinions[-1])  # one-hot embedding: the guess is the probability


def test_no_gradient_between_blocks():
    net, (x, y) = model(), batch()
    z = net.noisy_labels(net.embed(y), generator(0))
    for t in range(T):
        net.zero_grad()
        net.block_loss(t, x, y, z[t]).backward()
        for p in net.blocks.parameters():
            by_block = p.grad.unflatten(0, (T, S)).flatten(1).abs().sum(1)
            assert by_block[t] > 0
            assert (by_block[torch.arange(T) != t] == 0).all()


def test_backprop_twin_has_gradients_in_every_block():
    net, (x, y) = model(BackpropChain), batch()
    net.loss(x, y, generator(0)).backward()
    assert (net.blocks.see.weight.grad.unflatten(0, (T, S)).flatten(1).abs().sum(1) > 0).all()


def test_runs_do_not_touch_each_other():
    for kind in (NoPropDT, BackpropChain):
        net, (x, y) = model(kind), batch()
        other = x.clone().requires_grad_()
        net.loss(other, y, generator(0)).backward()
        grad = [p.grad[1::S].clone() for p in net.blocks.parameters()]
        net.zero_grad()
        changed = x.clone()
        changed[0] += 1  # run 0 sees other images
        net.loss(changed, y, generator(0)).backward()
        for before, p in zip(grad, net.blocks.parameters(), strict=True):
            torch.testing.assert_close(before, p.grad[1::S])


def test_loss_by_hand():
    # An untrained block whose logits are all zero guesses the mean of the embeddings: the loss has a closed form.
    net, (x, y) = model(eta=0.3), batch()
    with torch.no_grad():
        net.blocks.out.weight.zero_()
        net.blocks.out.bias.zero_()
        net.head.weight.zero_()
    distance = (1 - 1 / C) ** 2 + (C - 1) / C**2  # between a one-hot label and the uniform mixture
    first = net.alpha_bar[0].double()
    kl = 0.5 * (first * 1 + C * (1 - first) - C - C * torch.log(1 - first))  # of two Gaussians, written out
    expected = S * (math.log(C) + kl + 0.3 / 2 * (99 - snr(first)) * distance)  # the weights telescope: SNR(T) - SNR(0)
    assert net.loss(x, y, generator(0)).item() == pytest.approx(expected.item(), rel=1e-4)


def test_parallel_loss_is_the_sum_of_the_blocks_own():
    net, (x, y) = model(eta=1.0), batch()
    z = torch.randn(T, S, 16, C)
    net.noisy_labels = lambda u, g: z
    rest = model(eta=0.0)
    rest.noisy_labels = net.noisy_labels
    alone = sum(net.block_loss(t, x, y, z[t]) for t in range(T))
    torch.testing.assert_close(net.loss(x, y, generator(3)) - rest.loss(x, y, generator(3)), alone)


def test_schedule_of_ct_is_monotone_with_the_right_slope():
    torch.manual_seed(0)
    schedule = LearnedSchedule(S)
    with torch.no_grad():
        for p in (schedule.weight, schedule.centre, schedule.slope):
            p.add_(torch.randn_like(p))
    t = torch.linspace(0, 1, 101, requires_grad=True).expand(S, -1)
    gamma, slope = schedule(t)
    assert (gamma.diff(dim=1) < 0).all()
    torch.testing.assert_close(gamma[:, [0, -1]], schedule.ends, atol=1e-5, rtol=0)
    (automatic,) = torch.autograd.grad(gamma.sum(), t)
    torch.testing.assert_close(slope, automatic)


def test_flow_of_ct_follows_the_gaussian_path():
    # With u_hat = u_y the ODE must carry q(z_0 | y) into q(z_t | y); its closed form keeps each sample's own noise.
    torch.manual_seed(0)
    net = NoPropCT(ONE_HOT, PIXELS, hidden=8)
    u = torch.tensor([1.0, 0.0, 0.0])
    net.guess = lambda p: u.expand(*p.shape[:-1], C)
    noise = torch.randn(S, 50, C)
    first, last = torch.sigmoid(-net.schedule.ends).detach().unbind(-1)
    net.noise = lambda x, g: first.sqrt()[:, None, None] * u + (1 - first).sqrt()[:, None, None] * noise
    with torch.no_grad():
        end = net.flow(torch.zeros(S, 50, PIXELS), generator(0), steps=2000)
    expected = last.sqrt()[:, None, None] * u + (1 - last).sqrt()[:, None, None] * noise
    torch.testing.assert_close(end, expected, atol=5e-3, rtol=0)


def test_fine_steps_of_dt_tend_to_the_ode_of_ct():
    # The posterior's mean over a short step, less half the noise's share of the score, is the flow's velocity.
    schedule = LearnedSchedule(1).double()
    t, h = 0.4, 1e-5
    gamma, slope = schedule(torch.tensor([[t, t + h]], dtype=torch.float64))
    alpha_bar = torch.sigmoid(-gamma)[0].detach()
    a, b, c = posterior(alpha_bar)
    z, u = 0.3, 1.0
    score = -(z - alpha_bar[0].sqrt() * u) / (1 - alpha_bar[0])
    drift = (a[0] * u + b[0] * z - z) / h - c[0] / h / 2 * score
    velocity = -slope[0, 0] / 2 * (alpha_bar[0].sqrt() * u - alpha_bar[0] * z)
    assert drift.item() == pytest.approx(velocity.item(), rel=1e-3)


def test_flow_matching_with_the_true_velocity_ends_at_the_label():
    torch.manual_seed(0)
    net = NoPropFM(ONE_HOT, PIXELS, hidden=8)
    u = torch.tensor([0.0, 1.0, 0.0])
    net.velocity = lambda x, z, t: (u - z) / (1 - t[..., None])  # the line from z to u in the time that is left
    torch.testing.assert_close(net.flow(torch.zeros(S, 5, PIXELS), generator(0), steps=7), u.expand(S, 5, C))


def silent(kind, **options):
    """A network whose outputs are all zero, and a read-out that prefers no class."""
    torch.manual_seed(0)
    net = kind(ONE_HOT, PIXELS, hidden=8, **options)
    with torch.no_grad():
        net.net.out.weight.zero_()
        net.net.out.bias.zero_()
        net.head.weight.zero_()
    return net


def test_loss_of_ct_by_hand():
    # Zero logits guess the mean label at every time, so the integral of SNR'(t) over t leaves SNR(1) - SNR(0).
    net, n, eta = silent(NoPropCT, eta=0.3), 4000, 0.3
    _, y = batch(n)
    times = ((torch.arange(n) + 0.5) / n).expand(S, n)  # the midpoint rule instead of random times
    net.draw = lambda x, y, g: (x, y, times)
    distance = (1 - 1 / C) ** 2 + (C - 1) / C**2
    first, last = 1e-3, 0.99  # the schedule's ends before training
    kl = 0.5 * (first + C * (1 - first) - C - C * math.log(1 - first))
    weights = last / (1 - last) - first / (1 - first)
    expected = S * (math.log(C) + kl + eta / 2 * weights * distance)
    assert net.loss(torch.zeros(S, n, PIXELS), y, generator(0)).item() == pytest.approx(expected, rel=1e-3)


def test_loss_of_fm_by_hand():
    # A velocity of zero misses u - z_0 by |u|^2 + d on average, and the read-out is left with log C.
    _, y = batch(40000)
    expected = S * (1 + C + math.log(C))
    loss = silent(NoPropFM, draws=1).loss(torch.zeros(S, 40000, PIXELS), y, generator(0)).item()
    assert loss == pytest.approx(expected, rel=0.01)


def test_loss_of_fm_with_the_true_velocity_is_the_read_out_of_clean_labels():
    # Then the line ends at u_y exactly, where the untrained read-out gives the right class a logit of 5, others 0.
    net, (x, y) = NoPropFM(ONE_HOT, PIXELS, hidden=8), batch()
    net.velocity = lambda x, z, t: (net.embed(y.repeat(1, net.draws)) - z) / (1 - t[..., None])
    expected = S * math.log(1 + (C - 1) * math.exp(-5))
    assert net.loss(x, y, generator(0)).item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("kind", [NoPropDT, BackpropChain, NoPropCT, NoPropFM, Ensemble])
def test_everything_learns_a_separable_task(kind):
    torch.manual_seed(0)
    centres = 2 * torch.eye(C, PIXELS)
    y = torch.randint(C, (S, 300))
    x = centres[y] + 0.1 * torch.randn(S, 300, PIXELS)
    if kind in (NoPropCT, NoPropFM):
        net = kind(ONE_HOT, PIXELS, hidden=16, learn=True)
    else:
        net = kind(ONE_HOT, T, PIXELS, hidden=16, learn=True)
    train(net, x, y, generator(0), steps=250, lr=1e-2)
    assert min(accuracy(net, x, y, generator(1))) > 0.97


def test_a_label_that_is_only_in_the_training_states_is_not_in_the_answers():
    # Images without content: in training the last blocks read the label off their state, in use there is none to read.
    net, n = model(eta=1.0), 600
    x, (_, y) = torch.zeros(S, n, PIXELS), batch(n)
    train(net, x, y, generator(0), steps=300, lr=1e-2)
    with torch.no_grad():
        states = net.noisy_labels(net.embed(y), generator(1))
        last = (net.logits(x, states)[-1].argmax(-1) == y).double().mean().item()
    assert last > 0.9  # the leak: what the last block was trained on spells out the answer
    assert max(accuracy(net, x, y, generator(2))) < 0.45  # chance is a third, with a standard error of 0.02


def test_a_member_of_the_ensemble_is_a_block_with_a_state_of_zero():
    net, (x, y) = model(Ensemble), batch()
    members = net.members(x)
    for t, block in enumerate(net.own()):
        torch.testing.assert_close(members[t], block(x, torch.zeros(S, 16, C)))
    apart = sum(torch.nn.functional.cross_entropy(m, y[s]) for member in members for s, m in enumerate(member))
    torch.testing.assert_close(net.loss(x, y, generator(0)), apart)


def test_prototype_is_the_most_central_image():
    images = torch.tensor([[0.0], [1.0], [1.1], [9.0], [5.0]])
    assert prototypes(images, torch.tensor([0, 0, 0, 0, 1]), 2).flatten().tolist() == pytest.approx([1.0, 5.0])
    with pytest.raises(ValueError, match="labels"):
        prototypes(images, torch.zeros(5, dtype=torch.int64), 2)


def test_snr_rises_and_schedule_is_clipped():
    alpha_bar = cosine_schedule(10)
    assert (snr(alpha_bar).diff() > 0).all()
    assert alpha_bar[0] == pytest.approx(1e-3)
    assert alpha_bar[-1] == pytest.approx(0.99)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: cosine_schedule(0), "T"),
        (lambda: cosine_schedule(3, last=1.2), "last"),
        (lambda: posterior(torch.tensor([0.5])), "alpha_bar"),
        (lambda: posterior(torch.tensor([0.5, float("nan")])), "alpha_bar"),
        (lambda: NoPropDT(ONE_HOT, T, PIXELS, eta=-1.0), "eta"),
        (lambda: NoPropDT(ONE_HOT * float("inf"), T, PIXELS), "embedding"),
        (lambda: NoPropDT(ONE_HOT, T, PIXELS, hidden=0), "hidden"),
        (lambda: NoPropCT(ONE_HOT, PIXELS, draws=0), "draws"),
        (lambda: NoPropFM(ONE_HOT, PIXELS).flow(torch.zeros(S, 1, PIXELS), generator(0), steps=0), "steps"),
        (lambda: Denoiser(1, 0, 2, 2, 2), "in_features"),
    ],
)
def test_bad_input_names_the_argument(call, name):
    with pytest.raises(ValueError, match=name):
        call()


@pytest.mark.gpu
def test_gpu_agrees_with_cpu():
    (x, y), z = batch(), torch.randn(T, S, 16, C)
    losses = []
    for device in ("cpu", "cuda"):
        net = model().to(device)
        losses.append([net.block_loss(t, x.to(device), y.to(device), z[t].to(device)).item() for t in range(T)])
        train(net, x.to(device), y.to(device), generator(0, device), steps=3, lr=1e-3, batch=4)
        NoPropCT(ONE_HOT, PIXELS).to(device).predict(x.to(device), generator(0, device))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
