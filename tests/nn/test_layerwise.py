"""Layer-wise learning rules and the meter of saved bytes, each against something computed another way."""

import pytest
import torch

from paperlab.devices import generator
from paperlab.nn.layerwise import (
    ForwardForward,
    LayerStack,
    LocalClassifiers,
    TargetPropagation,
    accuracy,
    cross_entropy,
    distance,
    tanh,
    train,
)
from paperlab.nn.saved_bytes import SavedBytes

S, C, P = 2, 3, 5


def data(n=200):
    torch.manual_seed(0)
    y = torch.randint(C, (S, n))
    return 2 * torch.eye(C, P)[y] + 0.1 * torch.randn(S, n, P), y


def stack(kind, depth=3):
    torch.manual_seed(1)
    return kind(S, P, 16, depth, C)


def test_cross_entropy_is_torchs_run_by_run():
    logits, y = torch.randn(S, 7, C), torch.randint(C, (S, 7))
    expected = sum(torch.nn.functional.cross_entropy(logits[s], y[s]) for s in range(S))
    torch.testing.assert_close(cross_entropy(logits, y), expected)


@pytest.mark.parametrize("kind", [LayerStack, LocalClassifiers, ForwardForward, TargetPropagation])
def test_every_rule_learns_a_separable_task(kind):
    (x, y), net = data(), stack(kind)
    train(net, x, y, generator(0), steps=400, lr=1e-2)
    assert min(accuracy(net, x, y, generator(1))) > 0.9  # chance is a third


@pytest.mark.parametrize("kind", [LocalClassifiers, ForwardForward])
def test_no_error_passes_from_layer_to_layer(kind):
    # The gradient of the first layer must not depend on what the later layers are.
    x, y = data(16)
    grads = []
    for scale in (1.0, 3.0):
        net = stack(kind)
        with torch.no_grad():
            net.layers[1].weight.mul_(scale)
            net.heads[2].weight.mul_(scale)
        net.loss(x, y, generator(0)).backward()
        grads.append(net.layers[0].weight.grad)
    torch.testing.assert_close(*grads)


def test_one_rate_a_run_is_two_separate_trainings():
    x, y = data(40)
    together, first, second = (stack(LayerStack) for _ in range(3))
    train(together, x, y, generator(0), steps=5, lr=[1e-2, 1e-3])
    train(first, x, y, generator(0), steps=5, lr=1e-2)
    train(second, x, y, generator(0), steps=5, lr=1e-3)
    for p, a, b in zip(together.parameters(), first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(p[0], a[0])
        torch.testing.assert_close(p[1], b[1])


def test_backpropagation_does_pass_errors():
    x, y = data(16)
    net = stack(LayerStack)
    net.loss(x, y, generator(0)).backward()
    assert net.layers[0].weight.grad.abs().sum() > 0


def test_target_of_a_perfect_inverse_is_the_gradient_step():
    # One layer: the target is h - reach * dL/dh, so the layer's pull is 2 * reach * dL/dh: backpropagation's direction.
    x, y = data(16)
    net = stack(TargetPropagation, depth=1)
    net.loss(x, y, generator(0)).backward()
    ours = net.layers[0].weight.grad.clone()
    net.zero_grad()
    cross_entropy(net.heads[-1](net.layers[0](x).tanh()), y).backward()
    torch.testing.assert_close(ours, 2 * net.reach * net.layers[0].weight.grad, rtol=1e-4, atol=1e-6)


def test_tanh_is_torchs():
    x = torch.linspace(-20, 20, 999)
    torch.testing.assert_close(tanh(x), x.tanh(), atol=3e-7, rtol=0)
    assert torch.autograd.gradcheck(tanh, torch.linspace(-3, 3, 9, dtype=torch.float64, requires_grad=True))


def test_distance_of_known_points():
    a = torch.tensor([[[3.0, 4.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]])
    assert distance(a, torch.zeros_like(a)).item() == pytest.approx(25 / 2 + 2 / 2)


def test_loss_of_forward_forward_is_the_true_and_the_false_pairs():
    (x, y), net = data(16), ForwardForward(S, P, 16, 3, 2)
    y = y % 2  # two classes: the false label is the other one
    good, bad = net.goodness(x, y), net.goodness(x, 1 - y)
    expected = (torch.log1p(torch.exp(1.0 - good)) + torch.log1p(torch.exp(bad - 1.0))).mean(-1).sum()
    torch.testing.assert_close(net.loss(x, y, generator(0)), expected)


def test_target_below_a_perfect_inverse_is_the_inverse_of_the_target():
    # Layers of the identity on small numbers: tanh is its own inverse to third order, so every target is top's step.
    (x, y), net = data(16), TargetPropagation(S, P, P, 2, C, jitter=1e-6, reach=1e-3)
    with torch.no_grad():
        for layer in (*net.layers, *net.inverses):
            layer.weight.copy_(torch.eye(P).expand(S, P, P))
            layer.bias.zero_()
    net.loss(1e-2 * x, y, generator(0)).backward()
    torch.testing.assert_close(net.layers[0].bias.grad, net.layers[1].bias.grad, rtol=0.02, atol=1e-6)
    assert net.layers[0].bias.grad.abs().max() > 1e-5


def test_goodness_of_a_known_layer():
    net = ForwardForward(1, 2, 2, 1, 2)
    with torch.no_grad():
        net.layers[0].weight.copy_(torch.eye(4)[:, :2][None])
        net.layers[0].bias.zero_()
    g = net.goodness(torch.tensor([[[3.0, 4.0]]]), torch.tensor([[0]]))  # input (3, 4, 1, 0), scaled to length 2
    assert g.item() == pytest.approx((3**2 + 4**2) * 4 / 26 / 2)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: LayerStack(S, P, 0, 1, C), "width"),
        (lambda: ForwardForward(S, P, 4, 1, C, threshold=0.0), "threshold"),
        (lambda: TargetPropagation(S, P, 4, 1, C, reach=-1.0), "reach"),
        (lambda: train(stack(LayerStack), *data(), generator(0), steps=1, lr=1e-2, batch=0), "batch"),
        (lambda: train(stack(LayerStack), *data(), generator(0), steps=1, lr=[1e-2] * 3), "lr"),
        (lambda: train(stack(LayerStack), *data(), generator(0), steps=1, lr=0.0), "lr"),
        (lambda: SavedBytes([]), "ignore"),
    ],
)
def test_bad_input_names_the_argument(call, name):
    with pytest.raises(ValueError, match=name):
        call()


def test_saved_bytes_of_known_graphs():
    w = torch.nn.Parameter(torch.ones(1000))
    with SavedBytes([w]) as meter:
        a = torch.ones(1000) * w  # keeps the ones; w itself is ignored
        b = a.exp()  # keeps its result
        c = b.square()  # keeps b, which is alive already
        assert meter.now == 8000
        c.sum().backward()
    assert (meter.peak, meter.now) == (8000, 0)


def test_saved_bytes_are_let_go_one_after_the_other():
    w = torch.nn.Parameter(torch.ones(1000))
    with SavedBytes([w]) as meter:
        for _ in range(5):
            (w * torch.ones(1000)).exp().sum().backward()
    assert meter.peak == 8000  # not five times that


@pytest.mark.gpu
def test_gpu_agrees_with_cpu():
    x, y = data(16)
    losses = [stack(LocalClassifiers).to(d).loss(x.to(d), y.to(d), generator(0, d)).item() for d in ("cpu", "cuda")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
