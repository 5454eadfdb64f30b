"""Multi-level activation against closed forms, scipy, sklearn, finite differences, and networks that run alone."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage, stats
from sklearn.metrics import f1_score
from torch.nn import functional as F

from paperlab.output_layers import nested_activation as na

F64 = torch.float64


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scores(*shape: int, seed: int = 0):
    return torch.randn(*shape, generator=draws(seed), dtype=F64)


def labels(*shape: int, levels: int = 4, seed: int = 1):
    return torch.randint(levels, shape, generator=draws(seed))


def test_thresholds_of_the_paper():
    torch.testing.assert_close(na.thresholds(4, 0.5), torch.tensor([-0.5, 0.0, 0.5]))
    torch.testing.assert_close(na.thresholds(3, 2.0), torch.tensor([-1.0, 1.0]))
    torch.testing.assert_close(na.thresholds(2, 0.7), torch.zeros(1))


def test_two_levels_are_the_sigmoid_with_binary_cross_entropy():
    x, y, cut = scores(5, 8), labels(5, 8, levels=2), na.thresholds(2).double()
    torch.testing.assert_close(na.staircase(x, cut, 3.0), torch.sigmoid(3 * x))
    expected = F.binary_cross_entropy_with_logits(3 * x, y.double(), reduction="none")
    torch.testing.assert_close(na.modified_cross_entropy(x, y, cut, 3.0), expected)


@pytest.mark.parametrize(("k", "h"), [(10.0, 0.5), (1.0, 0.3), (4.0, 2.0)])
def test_level_probabilities_are_those_of_a_logistic_variable_between_the_steps(k, h):
    """Ordinal regression: y counts the steps below x + noise, the noise logistic with scale 1 / k."""
    x, cuts = scores(50), na.thresholds(4, h).double()
    p = na.level_probabilities(x, cuts, k)
    below = stats.logistic(loc=x[:, None].numpy(), scale=1 / k).cdf(cuts.numpy())
    expected = np.diff(np.pad(below, ((0, 0), (1, 1)), constant_values=((0, 0), (0, 1))), axis=1)
    np.testing.assert_allclose(p.numpy(), expected, atol=1e-12)
    assert (p >= 0).all()
    torch.testing.assert_close(p.sum(-1), torch.ones(50, dtype=F64))
    torch.testing.assert_close(na.staircase(x, cuts, k), p @ torch.arange(4.0, dtype=F64))  # the mean level
    torch.testing.assert_close(na.modified_cross_entropy(x[:, None], labels(50, 1), cuts, k)[:, 0],
                               -p.gather(1, labels(50, 1))[:, 0].log())  # fmt: skip


def test_the_staircase_becomes_a_step_function_and_counting_agrees_with_rounding():
    x, cuts = torch.linspace(-2, 2, 401, dtype=F64) + 1e-4, na.thresholds().double()
    counted = (x[:, None] > cuts).sum(-1)
    torch.testing.assert_close(na.staircase(x, cuts, 1e6), counted.double())
    away = (x[:, None] - cuts).abs().amin(-1) > 0.02
    assert (na.staircase(x, cuts, 10.0).round()[away] == counted[away]).all()


def test_an_inner_level_is_never_surer_than_tanh():
    x = torch.linspace(-3, 3, 60_001, dtype=F64)
    for k, h in ((10.0, 0.5), (3.0, 0.25)):
        p = na.level_probabilities(x, na.thresholds(h=h).double(), k)
        for level in (1, 2):
            assert p[:, level].max().item() == pytest.approx(math.tanh(k * h / 4), abs=1e-7)


@pytest.mark.parametrize(("levels", "critical"), [(3, 4.0), (4, 3.0)])
def test_inner_levels_become_the_likeliest_only_above_a_critical_kh(levels, critical):
    """Solving P_1 > P_0 and P_1 > P_2 by hand gives kh > ln 4 with three levels and kh > ln 3 with four."""
    x = torch.linspace(-20, 20, 400_001, dtype=F64)
    for factor in (0.99, 1.01):
        p = na.level_probabilities(x, na.thresholds(levels, 1.0).double(), factor * math.log(critical))
        assert bool((p.argmax(-1) == 1).any()) == (factor > 1)


def test_only_the_product_of_k_and_h_matters_up_to_a_change_of_unit():
    x, y = scores(6, 7), labels(6, 7)
    for c in (0.5, 4.0):
        one = na.modified_cross_entropy(x, y, na.thresholds(h=0.5).double(), 10.0)
        torch.testing.assert_close(na.modified_cross_entropy(c * x, y, na.thresholds(h=0.5 * c).double(), 10 / c), one)


def test_modified_cross_entropy_stays_finite_where_the_difference_of_sigmoids_rounds_to_zero():
    x, y = torch.tensor([[60.0, -60.0, 9.0]]), torch.tensor([[1, 2, 3]])
    x.requires_grad_()
    loss = na.modified_cross_entropy(x, y, na.thresholds())
    (slope,) = torch.autograd.grad(loss.sum(), x)
    torch.testing.assert_close(loss[0, :2], torch.tensor([600.0, 600.0]), atol=0.1, rtol=0)  # k (x - u), k (l - x)
    torch.testing.assert_close(slope, torch.tensor([[10.0, -10.0, 0.0]]))


@pytest.mark.parametrize("loss", [na.modified_cross_entropy, na.normalised_cross_entropy, na.squared_difference])
def test_gradients_in_scores_and_steps(loss):
    x, y = 0.4 * scores(3, 5), labels(3, 5)
    cuts = torch.tensor([[-0.6, 0.1, 0.5], [-0.5, 0.0, 0.5], [-1.0, -0.2, 0.9]], dtype=F64)
    assert torch.autograd.gradcheck(lambda a, b: loss(a, y, b, 3.0), (x.requires_grad_(), cuts.requires_grad_()))


def test_the_other_two_losses_by_hand():
    x, cuts = torch.tensor([[0.2]], dtype=F64), na.thresholds().double()
    a = sum(1 / (1 + math.exp(-10 * (0.2 - t))) for t in (-0.5, 0.0, 0.5))
    for y in range(4):
        level = torch.tensor([[y]])
        total = sum(math.exp(-10 * abs(a - n)) for n in range(4))
        expected = 10 * abs(a - y) + math.log(total)
        assert na.normalised_cross_entropy(x, level, cuts).item() == pytest.approx(expected)
        assert na.squared_difference(x, level, cuts).item() == pytest.approx((a - y) ** 2)


@pytest.mark.parametrize("name", na.HEADS)
def test_exceedances_and_regions_of_every_head(name):
    head, cuts = na.HEADS[name], na.thresholds().double().repeat(2, 1)
    out = scores(2, 3, head.channels, 4, 4)
    exceed, regions = head.exceed(out, cuts), head.regions(out, cuts)
    assert exceed.shape == regions.shape == (2, 3, 3, 4, 4)
    if name == "three sigmoids":
        assert na.violations(exceed).min() > 0  # it can happen
    else:
        assert na.violations(exceed).max() == 0
        assert (regions[:, :, 1:] <= regions[:, :, :-1]).all()
    if head.channels == 4:
        p = out.softmax(2)
        torch.testing.assert_close(exceed[:, :, 1], p[:, :, 2] + p[:, :, 3])
        assert torch.equal(regions.sum(2), out.argmax(2))
    else:
        assert torch.equal(regions, exceed > 0.5)


def test_losses_of_the_rivals():
    out, y, w = scores(2, 3, 4, 4, 4), labels(2, 3, 4, 4), torch.rand(2, 3, 4, 4, generator=draws(3), dtype=F64)
    plain = F.cross_entropy(out[0], y[0], reduction="none")
    torch.testing.assert_close(na.HEADS["softmax"].loss(out, y, w, out)[0], (w[0] * plain).mean())
    three = na.HEADS["three sigmoids"].loss(out[:, :, :3], y, w, out)
    expected = sum(w[1] * F.softplus(torch.where(y[1] > n, -1, 1) * out[1, :, n]) for n in range(3))
    torch.testing.assert_close(three[1], expected.mean())
    certain = torch.full((1, 3, 4, 4, 4), -40.0, dtype=F64).scatter(2, y[:1, :, None], 40.0)
    assert na.HEADS["softmax + Dice"].loss(certain, y[:1], w, w).item() == pytest.approx(0, abs=1e-9)


def test_the_chained_loss_is_the_log_likelihood_of_its_own_levels():
    out, y, w = scores(2, 3, 3, 4, 4), labels(2, 3, 4, 4), torch.ones(2, 3, 4, 4, dtype=F64)
    head = na.HEADS["three chained"]
    p = -F.pad(F.pad(head.exceed(out, w), (0, 0, 0, 0, 1, 0), value=1.0), (0, 0, 0, 0, 0, 1)).diff(dim=2)
    expected = -p.gather(2, y[:, :, None]).log().mean((1, 2, 3, 4))
    torch.testing.assert_close(head.loss(out, y, w, w), expected)


def test_mla_is_three_sigmoids_on_one_score_up_to_what_leaks_between_the_steps():
    """Far steps add next to nothing: the sum of all three binary losses is the modified cross-entropy + leakage."""
    x, y, cuts = torch.linspace(-0.9, 0.9, 60, dtype=F64)[None], labels(1, 60), na.thresholds().double()
    shared = (10 * (x[..., None] - cuts)).movedim(-1, 1)
    binary = F.binary_cross_entropy_with_logits(shared, (y[:, None] > torch.arange(3)[:, None]).double(),
                                                reduction="none").sum(1)  # fmt: skip
    one = na.modified_cross_entropy(x, y, cuts)
    inside = ((x[..., None] > cuts).sum(-1) == y)[0]
    assert (binary - one)[0, inside].abs().max() < 0.02
    assert (binary >= one - 0.01).all()


def test_dice_against_sklearn():
    a, b = torch.rand(6, 9, 9, generator=draws(4)) > 0.6, torch.rand(6, 9, 9, generator=draws(5)) > 0.4
    a[0], b[0] = False, False
    found = na.dice(a, b)
    assert found[0] == 1
    for i in range(1, 6):
        assert found[i].item() == pytest.approx(f1_score(b[i].flatten(), a[i].flatten()))


def test_jumps_and_violations_by_hand():
    y = torch.tensor([[0, 3, 3], [0, 1, 3], [0, 0, 0]])
    # different neighbours: rows 0-3 | 0-1, 1-3 | none; columns none-none | 3-1, 1-0 | 3-0
    assert na.jumps(y).item() == pytest.approx(2 / 6)
    assert na.jumps(torch.zeros(3, 3, dtype=torch.long)).item() == 0
    p = torch.tensor([0.9, 0.5, 0.6]).view(3, 1, 1).repeat(1, 2, 2)
    p[2, 0] = 0.5
    assert na.violations(p).item() == pytest.approx(0.5)


def test_class_weights_have_mean_one_and_favour_the_rare():
    y = labels(3, 5, 8, 8) * (torch.rand(3, 5, 8, 8, generator=draws(6)) > 0.5)
    w = na.class_weights(y)
    torch.testing.assert_close(w.gather(1, y.flatten(1)).mean(1), torch.ones(3))
    count = F.one_hot(y, 4).sum((1, 2, 3)).float()
    torch.testing.assert_close(w * count.sqrt(), (w * count.sqrt())[:, :1].expand(-1, 4))


def test_stacked_networks_run_as_if_alone_and_equal_seeds_share_the_trunk():
    x = torch.randn(2, 2, 16, 16, generator=draws(7))
    together = na.StackedUNet([5, 6, 5], 3)(x)
    for i, seed in enumerate((5, 6, 5)):
        torch.testing.assert_close(na.StackedUNet([seed], 3)(x)[0], together[i], atol=1e-5, rtol=1e-4)
    a, b = na.StackedUNet([5], 1), na.StackedUNet([5], 4)
    assert all(torch.equal(a.w[name], b.w[name]) for name in a.w if name != "last")
    assert together.shape == (3, 2, 3, 16, 16)


def test_the_network_is_what_its_plain_layers_say():
    """The same weights in torch's own layers, one image."""
    net, x = na.StackedUNet([3], 1), torch.randn(1, 2, 16, 16, generator=draws(8))
    w = {name: value[0] for name, value in net.w.items()}

    def act(m):
        return F.leaky_relu(F.instance_norm(m), 0.01)

    def block(m, name):
        return m + F.conv2d(act(F.conv2d(act(m), w[name + "1"], padding=1)), w[name + "2"], padding=1)

    fine = block(F.conv2d(F.pixel_unshuffle(x, 2), w["stem"], padding=1), "fine")
    coarse = block(F.conv2d(act(fine), w["down"], padding=1, stride=2), "coarse")
    both = torch.cat([act(fine), act(coarse).repeat_interleave(2, -1).repeat_interleave(2, -2)], 1)
    out = F.pixel_shuffle(F.conv2d(act(F.conv2d(both, w["join"], padding=1)), w["last"]), 2)
    torch.testing.assert_close(net(x)[0], out, atol=1e-4, rtol=1e-4)


def test_side_by_side_training_is_training_alone():
    sets = [torch.stack(part) for part in zip(*(na.make_images(6, seed=s, size=16) for s in (1, 2)), strict=True)]
    head = na.mla(learn=True)
    images = sets[0][0]
    both = na.train(head, *(part[[0, 0, 1, 1]] for part in sets), seeds=[1, 1, 2, 2], rates=[0.01, 0.03] * 2, steps=4,
                    batch=2)  # fmt: skip
    alone = na.train(head, sets[0][1:], sets[1][1:], seeds=[2], rates=[0.03], steps=4, batch=2)
    torch.testing.assert_close(both.scores(images)[3], alone.scores(images)[0], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(both.cuts[3], alone.cuts[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(both.take([3, 0]).scores(images), both.scores(images)[[3, 0]], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        (both.take([1]) + alone).scores(images)[1], alone.scores(images)[0], atol=1e-5, rtol=1e-4
    )
    assert (both.cuts.diff(dim=1) > 0).all()
    assert (both.cuts != na.thresholds()).any(1).all()


def test_heads_that_train_together_train_alone():
    images, y = (part[None] for part in na.make_images(6, seed=1, size=16))
    heads = na.mla(k=4.0, h=1.0), na.mla(na.squared_difference, learn=True)
    both = na.train(na.together(*heads), images.repeat(2, 1, 1, 1, 1), y.repeat(2, 1, 1, 1), seeds=[3, 3],
                    rates=[0.02, 0.02], steps=3, batch=2)  # fmt: skip
    assert torch.equal(both.cuts[0], na.thresholds(h=1.0))
    for i, head in enumerate(heads):
        alone = na.train(head, images, y, seeds=[3], rates=[0.02], steps=3, batch=2)
        torch.testing.assert_close(both.scores(images[0])[i], alone.scores(images[0])[0], atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(both.cuts[i], alone.cuts[0], atol=1e-4, rtol=1e-4)
        exceed = both.head.exceed(both.scores(images[0]), both.cuts)[i]
        torch.testing.assert_close(exceed, head.exceed(alone.scores(images[0]), alone.cuts)[0], atol=1e-2, rtol=0)


def test_a_head_beside_one_with_more_channels_reads_only_its_own():
    out, y, w = scores(4, 3, 4, 4, 4), labels(4, 3, 4, 4), torch.rand(4, 3, 4, 4, generator=draws(9), dtype=F64)
    heads, cuts = (na.HEADS["softmax"], na.HEADS["MLA"]), na.thresholds().double().repeat(4, 1)
    both = na.together(*heads)
    for i, head in enumerate(heads):
        own = slice(2 * i, 2 * i + 2)
        alone = head.loss(out[own, :, : head.channels], y[own], w[own], cuts[own])
        torch.testing.assert_close(both.loss(out, y, w, cuts)[own], alone)
    images, truth = (part[None].repeat(2, *[1] * part.ndim) for part in na.make_images(4, seed=1, size=16))
    trained = na.train(both, images, truth, seeds=[1, 2], rates=[0.02, 0.01], steps=2, batch=2)
    assert trained.scores(images[0]).shape == (2, 4, 4, 16, 16)
    assert trained.take([1], heads[1]).scores(images[0]).shape == (1, 4, 1, 16, 16)


def test_a_step_of_training_is_a_step_on_the_unfolded_picture():
    """One step of AdamW by hand, from the loss of the pixels as they lie."""
    images, y = (part[None] for part in na.make_images(5, seed=2, size=16))
    head, pick = na.HEADS["softmax"], torch.randint(5, (3,), generator=draws(4))
    net, weight = na.StackedUNet([4], 4), na.class_weights(y)
    nll = F.cross_entropy(net(images[0, pick])[0], y[0, pick], reduction="none")
    (weight[0][y[0, pick]] * nll).mean().backward()
    trained = na.train(head, images, y, seeds=[4], rates=[0.01], steps=1, batch=3)
    for name, w in net.w.items():
        clear = w.grad.abs() > 1e-5  # Adam's first step is the sign of the gradient
        moved = (trained.net.w[name] - w)[clear]
        torch.testing.assert_close(moved, -0.01 * w.grad[clear].sign(), atol=1e-4, rtol=0)


def test_the_layouts_have_equal_areas_and_only_one_is_nested():
    (x, y), (_, z) = na.make_images(20, seed=4), na.make_images(20, seed=4, nested=False)
    assert torch.equal(F.one_hot(y, 4).sum((1, 2)), F.one_hot(z, 4).sum((1, 2)))
    assert x.shape == (20, 2, 32, 32)

    def surrounded(level_map):  # the share of the active pixels that the core, grown by a pixel, holds
        core = torch.from_numpy(np.stack([ndimage.binary_dilation(m == 2) for m in level_map.numpy()]))
        return (core & (level_map == 3)).sum() / (level_map == 3).sum()

    assert na.jumps(y).mean() < 0.02 < 0.1 < na.jumps(z).mean()
    assert surrounded(y) > 3 * surrounded(z)
    flat = na.make_images(20, seed=4, contrast=[(0.0, 0.0)] * 4)
    assert torch.equal(flat[1], y)
    clear = (x - flat[0]).movedim(1, -1)  # noise, bias and specks cancel
    torch.testing.assert_close(clear, torch.tensor(na.CONTRAST)[y], atol=1e-5, rtol=0)
    again, other = na.make_images(20, seed=4), na.make_images(20, seed=5)
    assert torch.equal(again[0], x)
    assert not torch.equal(other[0], x)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: na.thresholds(1), "levels"),
        (lambda: na.thresholds(h=0.0), "h must"),
        (lambda: na.exceedances(torch.zeros(2), torch.tensor([0.5, 0.0]), 1.0), "cuts"),
        (lambda: na.exceedances(torch.zeros(2), na.thresholds(), -1.0), "k must"),
        (lambda: na.modified_cross_entropy(torch.zeros(1, 2), torch.tensor([[0, 4]]), na.thresholds()), "y must"),
        (lambda: na.squared_difference(torch.zeros(1, 2), torch.tensor([[0, -1]]), na.thresholds()), "y must"),
        (lambda: na.mla(k=0.0), "k must"),
        (lambda: na.together(), "heads"),
        (lambda: na.StackedUNet([], 1), "seeds"),
        (lambda: na.class_weights(torch.zeros(1, 1, 4, 4, dtype=torch.long)), "share of every class"),
        (lambda: na.jumps(torch.zeros(2, 2, dtype=torch.long), height=0), "height"),
        (lambda: na.make_images(0, seed=0), "count"),
        (lambda: na.make_images(2, seed=0, size=8), "size"),
        (
            lambda: na.train(na.mla(), torch.zeros(2, 3, 2, 16, 16), torch.zeros(2, 3, 16, 16, dtype=torch.long),
                             seeds=[1, 2], rates=[0.1], steps=1),
            "seeds and rates",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()
