"""Bytes alive, against sums by hand."""

import subprocess
import sys

import torch
from torch.nn import functional as F

from paperlab.nn.live_bytes import LiveBytes

KB = torch.zeros(256)  # 1,024 bytes in float32


def test_what_is_dropped_no_longer_counts():
    with LiveBytes() as meter:
        a = KB + 1
        b = a * 2
        del a
        c = b * 2
        del b, c
    assert (meter.peak, meter.now) == (2048, 0)


def test_views_arguments_and_in_place_operations_make_nothing():
    with LiveBytes() as meter:
        a = KB.view(16, 16).T[2:]
        KB.add_(0)
        b = KB + 1
        b.mul_(2)
        c = b.view(4, 64)
        del b
    assert (meter.peak, meter.now) == (1024, 1024)
    del a, c
    assert meter.now == 0


def test_attention_holds_scores_and_weights_at_once():
    q = torch.randn(2, 64, 8)
    with LiveBytes() as meter:
        scores = q @ q.mT
        weights = scores.softmax(-1)
        del scores
        out = weights @ q
    assert meter.peak == 2 * (2 * 64 * 64 * 4)
    with LiveBytes() as fused:
        F.scaled_dot_product_attention(q[None], q[None], q[None])
    assert fused.peak < meter.peak / 4
    assert out.shape == q.shape


def test_the_backward_pass_is_metered_as_well():
    x = torch.randn(256, requires_grad=True)
    with LiveBytes() as meter:
        y = x.exp()  # kept for its own gradient
        z = y.sin()  # keeps y
        z.sum().backward()
    assert meter.peak > 2 * 1024 + 4  # the forward pass alone
    del y, z
    assert meter.now == x.grad.nbytes


def test_the_first_use_does_not_import_torchs_compiler():
    code = """
import sys, torch
from paperlab.nn.live_bytes import LiveBytes
with LiveBytes() as meter:
    a = torch.zeros(256) + 1
assert meter.peak == 2048
sys.exit("torch._dynamo" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
