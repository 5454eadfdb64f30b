"""The residual network and the vision transformer against plain torch, by hand, and by what must not matter."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from paperlab.nn.resnet import ResidualBlock, ResNet
from paperlab.nn.vit import ViT


def test_a_block_that_does_nothing_is_its_shortcut():
    block = ResidualBlock(3, 3).eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(block(x), x.relu())


def test_the_network_by_hand():
    torch.manual_seed(0)
    net = ResNet(5, width=4, depth=1).eval()
    for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 3, 16, 16)

    def normed(norm, y):
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        return (y - norm.running_mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]

    y = normed(net.stem[1], F.conv2d(x, net.stem[0].weight, padding=1)).relu()
    for stage, stride in zip(net.stages, (1, 2, 2), strict=True):
        block = stage[0]
        inner = normed(block.norm1, F.conv2d(y, block.conv1.weight, stride=stride, padding=1)).relu()
        inner = normed(block.norm2, F.conv2d(inner, block.conv2.weight, padding=1))
        if stride == 2:
            y = normed(block.shortcut[1], F.conv2d(y, block.shortcut[0].weight, stride=2))
        y = (y + inner).relu()
    expected = y.mean((2, 3)) @ net.head.weight.T + net.head.bias
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)


def test_maps_become_coarser_and_wider():
    maps = ResNet(5, width=8).maps(torch.zeros(2, 3, 16, 16))
    assert [tuple(m.shape) for m in maps] == [(2, 8, 16, 16), (2, 16, 8, 8), (2, 32, 4, 4)]


def test_a_shift_by_four_pixels_shifts_the_last_map_by_one():
    torch.manual_seed(0)
    net = ResNet(5, width=4, depth=1).eval()
    x = torch.zeros(1, 3, 64, 64)
    x[:, :, 24:32, 24:32] = torch.randn(1, 3, 8, 8)
    a, b = net.maps(x)[-1], net.maps(x.roll(4, 3))[-1]
    torch.testing.assert_close(a[..., 3:11], b[..., 4:12], rtol=1e-4, atol=1e-5)


def test_a_patchs_token_is_the_linear_map_of_its_pixels():
    torch.manual_seed(0)
    net = ViT(5, width=8, layers=1, heads=2)
    x = torch.randn(2, 3, 16, 16)
    tokens = net.tokens(x)
    assert tokens.shape == (2, 17, 8)
    pixels = x[:, :, 4:8, 8:12].flatten(1)  # second row, third column: patch 6, token 7
    torch.testing.assert_close(tokens[:, 7], net.embed(pixels) + net.places[7])
    torch.testing.assert_close(tokens[:, 0], (net.first + net.places[0]).expand(2, -1))


def test_without_places_the_order_of_patches_does_not_matter():
    torch.manual_seed(0)
    net = ViT(5, width=8, layers=2, heads=2).eval()
    with torch.no_grad():
        net.places.zero_()
        for p in net.body.parameters():
            p.mul_(5)
    x = torch.randn(2, 3, 16, 16)
    shuffled = torch.cat([x[..., 8:], x[..., :8]], dim=-1)  # whole patches change places
    torch.testing.assert_close(net(x), net(shuffled), rtol=1e-4, atol=1e-5)
    nn.init.normal_(net.places)
    assert (net(x) - net(shuffled)).abs().max() > 1e-2


def test_hook_points_are_those_of_the_body():
    net = ViT(5, width=8, layers=2, heads=2).eval()
    x = torch.randn(2, 3, 16, 16)
    _, seen = net.body.run_with_cache(embeddings=net.tokens(x), names=["blocks.1.attn.pattern"])
    assert seen["blocks.1.attn.pattern"].shape == (2, 2, 17, 17)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: ResNet(0), "classes"),
        (lambda: ResNet(2, width=0), "width"),
        (lambda: ResidualBlock(0, 1), "inputs"),
        (lambda: ViT(2, patch=5), "patch"),
        (lambda: ViT(2, size=0), "size"),
    ],
)
def test_bad_input_names_the_argument(call, name):
    with pytest.raises(ValueError, match=name):
        call()


@pytest.mark.gpu
@pytest.mark.parametrize("build", [lambda: ResNet(5), lambda: ViT(5)])
def test_gpu_agrees_with_cpu(build):
    net, x = build().eval(), torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(net.cuda()(x.cuda()).cpu(), net.cpu()(x), rtol=1e-3, atol=1e-4)
