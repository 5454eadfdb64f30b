"""mesa: against torch's own operations and gradients, torch's fake quantisation, and closed forms of the rounding."""

import pytest
import torch
from torch.nn import functional as F

from paperlab.nn.live_bytes import LiveBytes
from paperlab.nn.saved_bytes import SavedBytes
from paperlab.sequence_operators import mesa
from paperlab.sequence_operators.mesa import Quantiser, StackedViT, Storage, gradient, pack, unpack


def restored(kept):
    return kept.restored()


@pytest.fixture(autouse=True)
def same_draws():
    torch.manual_seed(0)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 8, 37])
def test_packing_loses_nothing_and_wastes_nothing(bits, count):
    codes = torch.randint(2**bits, (count,), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert torch.equal(unpack(packed, bits, count), codes)
    assert packed.numel() == count if bits == 8 else packed.numel() == -(-count // 8) * bits


def test_nearest_rounding_is_torchs_fake_quantisation():
    # Torch's zero point is a whole number: the smallest value of every channel must be a multiple of its step.
    steps, zeros = torch.tensor([0.25, 0.5, 2.0]), torch.tensor([3, 0, 100], dtype=torch.int32)
    codes = torch.randint(256, (40, 3)) + 0.4 * (torch.rand(40, 3) - 0.5)
    codes[0], codes[1] = 0, 255
    x = (codes - zeros) * steps
    theirs = torch.fake_quantize_per_channel_affine(x, steps, zeros, 1, 0, 255)
    ours = restored(Quantiser(1, 3, stochastic=False)(x[None]))[0]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_stochastic_rounding_has_the_mean_and_variance_of_the_closed_form(bits):
    draws, x = 20_000, torch.linspace(-1, 2, 23)
    q = Quantiser(1, bits=bits, decay=1.0)
    q(x[None, :, None])
    copies = restored(q(x.repeat(draws, 1)[None]))[0].double()
    step = 3 / (2**bits - 1)
    f = ((x.double() + 1) / step) % 1
    variance = step**2 * f * (1 - f)
    assert ((copies.mean(0) - x).abs() < 4.5 * (variance / draws).sqrt() + 1e-5).all()
    torch.testing.assert_close(copies.var(0), variance, atol=0.02 * step**2, rtol=0)
    assert ((copies - x).abs() < step * (1 + 1e-4)).all()


def test_running_estimates_follow_the_recursion_and_clip():
    q = Quantiser(1, 2, decay=0.9, stochastic=False)
    first = torch.tensor([[0.0, -1.0], [2.0, 3.0]])[None]
    torch.testing.assert_close(restored(q(first)), first)  # the first batch sets the range
    kept = q(10 * first)
    torch.testing.assert_close(q.range, torch.tensor([[0.9 * 2 + 0.1 * 20, 0.9 * 4 + 0.1 * 40]]))
    torch.testing.assert_close(q.offset, torch.tensor([[0.0, 0.9 * -1 + 0.1 * -10]]))
    torch.testing.assert_close(restored(kept)[0, :, 1], torch.tensor([-1.9, -1.9 + 7.6]))  # -10 and 30, cut off
    frozen = Quantiser(1, decay=1.0)
    frozen(first), frozen(10 * first)
    assert (frozen.range, frozen.offset) == (torch.tensor([[4.0]]), torch.tensor([[-1.0]]))


def test_a_range_a_head_is_not_the_range_of_the_layer():
    x = torch.rand(2, 5, 3, 7, 4) * torch.tensor([1.0, 10.0, 100.0]).view(3, 1, 1)  # copies batch heads tokens channels
    by_head, by_layer = Quantiser(2, 3), Quantiser(2, 1)
    by_head(x), by_layer(x)
    expected = x.transpose(1, 2).flatten(2)
    torch.testing.assert_close(by_head.range, expected.amax(2) - expected.amin(2))
    torch.testing.assert_close(by_layer.range[:, 0], x.flatten(1).amax(1) - x.flatten(1).amin(1))
    blocks = Quantiser(1, 2)
    blocks(torch.tensor([[[0.0, 1.0, 5.0, 8.0], [2.0, 0.5, 6.0, 7.0]]]))  # channels 0-1 and 2-3
    assert blocks.range.tolist() == [[2.0, 3.0]]


def test_copies_may_have_their_own_bits():
    x = torch.rand(2, 50, 4)
    mixed = restored(Quantiser(2, bits=[8, 2], stochastic=False)(x))
    for copy, bits in ((0, 8), (1, 2)):
        alone = restored(Quantiser(1, bits=bits, stochastic=False)(x[copy : copy + 1]))
        torch.testing.assert_close(mixed[copy], alone[0])
    assert len(mixed[1].unique()) == 4


class Lossless(mesa.Kept):
    """A copy that loses nothing: the limit of many levels."""

    def __init__(self, x):
        self.__dict__.update(x=x.detach(), coding=self)

    tensors = property(lambda self: (self.x, self.x, self.x))

    def restored(self, x, *_):
        return x


class LosslessQuantiser(Quantiser):
    def forward(self, x):
        return Lossless(x)


def operations(quantiser):
    """Every operation: Mesa's, torch's, and their inputs."""
    a, b = torch.randn(2, 6, 5, dtype=torch.float64), torch.randn(2, 5, 4, dtype=torch.float64)
    bias, s = torch.randn(2, 1, 4, dtype=torch.float64), torch.randn(2, 3, 5, 5, dtype=torch.float64)

    def keep(x):
        return quantiser(2).double()(x)

    return {
        "linear": (lambda x, w, c: mesa.linear(x, w, c, keep(x)), lambda x, w, c: x @ w + c, (a, b, bias)),
        "matmul": (lambda x, y: mesa.matmul(x, y, keep(x), keep(y)), torch.matmul, (a, b)),
        "softmax": (lambda x: mesa.softmax(x, quantiser(2).double())[0], lambda x: F.softmax(x, -1), (s,)),
        "gelu": (lambda x: mesa.gelu(x, keep(x)), F.gelu, (a,)),
        "layer_norm": (lambda x: mesa.layer_norm(x, keep(x)), lambda x: F.layer_norm(x, (5,)), (a,)),
    }


@pytest.mark.parametrize(("quantiser", "tolerance"), [(Quantiser, 0.05), (LosslessQuantiser, 1e-12)])
@pytest.mark.parametrize("name", ["linear", "matmul", "softmax", "gelu", "layer_norm"])
def test_forward_is_exact_and_gradients_tend_to_autograds(name, quantiser, tolerance):
    ours, theirs, inputs = operations(quantiser)[name]
    inputs = [x.requires_grad_() for x in inputs]
    value, expected = ours(*inputs), theirs(*inputs)
    torch.testing.assert_close(value, expected, atol=1e-14, rtol=0)
    g = torch.randn_like(expected)
    for slope, true in zip(*(torch.autograd.grad(y, inputs, g) for y in (value, expected)), strict=True):
        assert (slope - true).norm() / true.norm() < tolerance


def test_the_gradient_of_a_linear_map_is_exact_below_and_noisy_by_the_closed_form_beside():
    draws = 3000
    x, g = torch.randn(32, 6), torch.randn(32, 5)
    w = torch.randn(6, 5)
    many = x.expand(draws, -1, -1).requires_grad_()
    weight = w.expand(draws, -1, -1).clone().requires_grad_()
    kept = Quantiser(draws, bits=4)(many)
    y = mesa.linear(many, weight, torch.zeros(draws, 1, 5), kept)
    dx, dw = torch.autograd.grad(y, (many, weight), g.expand(draws, -1, -1))
    torch.testing.assert_close(dx[0], g @ w.T)
    step = (x.max() - x.min()) / 15
    f = ((x - x.min()) / step) % 1
    variance = step**2 * (f * (1 - f)).T @ g.square()
    z = (dw.mean(0) - x.T @ g) / (variance / draws).sqrt()
    assert z.abs().max() < 4.5
    assert 0.4 < z.square().mean() < 2
    torch.testing.assert_close(dw.var(0) / variance, torch.ones(6, 5), atol=0.2, rtol=0)


def test_model_with_mesa_has_the_loss_of_plain_autograd_and_nearly_its_gradient():
    x, y = torch.randn(3, 8, 16, 4), torch.randint(10, (3, 8))
    models = [StackedViT(3, storage=s, generator=torch.Generator().manual_seed(1)) for s in (None, Storage())]
    torch.testing.assert_close(*(m(x) for m in models), atol=1e-5, rtol=1e-5)
    true, ours = (gradient(m, x, y) for m in models)
    assert (torch.cosine_similarity(true, ours, dim=1) > 0.999).all()
    rivals = [
        StackedViT(3, generator=torch.Generator().manual_seed(1), **k)
        for k in ({"fused": True}, {"checkpointed": True})
    ]
    for rival in rivals:
        torch.testing.assert_close(gradient(rival, x, y), true, atol=1e-5, rtol=1e-4)


def test_copies_do_not_feel_each_other():
    x, y = torch.randn(2, 8, 16, 4), torch.randint(10, (2, 8))
    model = StackedViT(2, storage=Storage(bits=[8, 2], stochastic=False))
    both = gradient(model, x, y)
    x[1], model.places.data[1] = 0, 7.0
    assert torch.equal(gradient(model.use(model.storage), x, y)[0], both[0])


def test_all_that_is_kept_passes_autograds_hooks():
    x, y = torch.randn(1, 16, 16, 4), torch.randint(10, (1, 16))
    kept = {}
    for name, how in {"plain": {}, "8": {"storage": Storage()}, "twice": {"storage": Storage(share=False)},
                      "4": {"storage": Storage(bits=4)}}.items():  # fmt: skip
        model = StackedViT(1, **how)
        weights = list(model.parameters())
        with SavedBytes(weights) as saved, LiveBytes() as alive:
            loss = mesa.stacked_loss(model(x), y)
            held = alive.now
            loss.backward()
        assert saved.peak == pytest.approx(held, rel=0.02)  # an attribute or a closure would be in `held` alone
        kept[name] = saved.peak
    assert kept["8"] < 0.3 * kept["plain"]
    assert kept["4"] < 0.6 * kept["8"]
    weights_of_attention = 2 * 4 * 16 * 16 * 16  # layers heads tokens tokens batch, a byte each
    assert kept["twice"] - kept["8"] == pytest.approx(weights_of_attention, rel=0.01)


def test_without_gradients_nothing_is_kept_and_no_estimate_moves():
    model = StackedViT(1, storage=Storage())
    with torch.no_grad():
        model(torch.randn(1, 2, 16, 4))
    assert not any(q.started for q in model.quantisers.values())


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: Quantiser(1, bits=9), "bits"),
        (lambda: Quantiser(3, bits=[8, 8]), "bits"),
        (lambda: Quantiser(0), "copies"),
        (lambda: Quantiser(1, decay=1.5), "decay"),
        (lambda: Quantiser(1, 3)(torch.zeros(1, 4, 4)), "x must"),
        (lambda: Quantiser(2)(torch.zeros(1, 4, 4)), "x must"),
        (lambda: Quantiser(1)(torch.zeros(1, 0, 4)), "x must"),
        (lambda: StackedViT(1, width=30), "width"),
        (lambda: pack(torch.zeros(3, dtype=torch.uint8), 0), "bits"),
    ],
)
def test_bad_input_names_the_argument(call, name):
    with pytest.raises(ValueError, match=name):
        call()


def test_a_constant_group_is_kept_exactly():
    torch.testing.assert_close(restored(Quantiser(1)(torch.full((1, 4, 2), 0.7))), torch.full((1, 4, 2), 0.7))


@pytest.mark.gpu
def test_gpu_agrees_with_cpu():
    x, y = torch.randn(2, 8, 16, 4), torch.randint(10, (2, 8))
    model = StackedViT(2, storage=Storage(stochastic=False))
    on_cpu = gradient(model, x, y)
    on_gpu = gradient(model.use(model.storage).cuda(), x.cuda(), y.cuda()).cpu()
    assert (torch.cosine_similarity(on_cpu, on_gpu, dim=1) > 0.9999).all()
