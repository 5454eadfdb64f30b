"""Checks, devices, the training loop, stacked networks and the digits."""

import subprocess
import sys

import numpy as np
import pytest
import sklearn.datasets
import torch
from torch import nn

from paperlab import checks, devices
from paperlab.data import digits_split, load_digits
from paperlab.nn import StackedLinear, stacked_mlp
from paperlab.training import eager, fit


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: checks.require_finite(x=torch.tensor([1.0, torch.nan])), "x must be finite"),
        (lambda: checks.require_finite(x=np.inf), "x must be finite, got inf"),
        (lambda: checks.require_positive(rate=0), "rate must be positive and finite, got 0"),
        (lambda: checks.require_positive(rate=float("nan")), "rate must be positive"),
        (lambda: checks.require_nonnegative(n=[1, -1]), "n must be at least 0"),
        (lambda: checks.require_between(0, 1, p=1.5), "p must be between 0 and 1, got 1.5"),
        (lambda: checks.require_between(0, 1, p=float("nan")), "p must be between"),
        (lambda: checks.require_at_least(2, k=1), "k must be at least 2, got 1"),
        (lambda: checks.require_one_of(("a", "b"), mode="c"), "mode must be one of 'a', 'b', got 'c'"),
        (lambda: checks.require_nonempty(x=torch.zeros(0, 3)), "x must not be empty"),
        (lambda: checks.require_nonempty(x=[]), "x must not be empty"),
        (lambda: checks.require_ndim(2, x=torch.zeros(3)), r"x must have 2 axes, got shape \(3,\)"),
        (lambda: checks.require_same_length(a=[1], b=[1, 2]), "a has 1, b has 2"),
        (lambda: checks.require_labels(torch.zeros(3, 4), torch.tensor([0, 4, 1])), "labels must be between 0 and 3"),
        (lambda: checks.require_labels(torch.zeros(3, 1), torch.zeros(3)), "number of classes in scores"),
        (lambda: devices.generator(-1), "seed must be at least 0"),
        (lambda: devices.seed_everything(-1), "seed must be at least 0"),
        (lambda: digits_split(0, test=0.0), "test must be between"),
        (lambda: StackedLinear(0, 1, 1), "copies must be at least 1"),
        (lambda: stacked_mlp(2, 3), "widths must hold at least"),
        (lambda: fit([], lambda step: torch.zeros(()), steps=0, lr=0.1), "steps must be at least 1"),
        (lambda: fit([], lambda step: torch.zeros(()), steps=1, lr=0.0), "lr must be positive"),
        (lambda: fit([torch.ones(4, requires_grad=True)], lambda step: 0, steps=1, lr=[1.0] * 3), "lr has 3 rates"),
        (lambda: fit([], lambda step: torch.zeros(()), steps=1, lr=1.0, optimizer="magic"), "optimizer must be one of"),
        (lambda: fit([], lambda step: torch.zeros(()), steps=1, lr=1.0, schedule="x"), "schedule must be one of"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_checks_accept_what_is_right():
    checks.require_finite(x=torch.ones(2, dtype=torch.bfloat16))
    checks.require_between(0, 1, p=torch.tensor([0.0, 1.0]))
    checks.require_nonempty(x=[1])


def test_a_generator_is_independent_of_the_global_one():
    first = torch.rand(3, generator=devices.generator(5))
    torch.rand(10)
    assert torch.equal(first, torch.rand(3, generator=devices.generator(5)))


def test_stacked_linear_is_many_linears():
    stack = StackedLinear(3, 4, 2).double()
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    for c in range(3):
        expected = nn.functional.linear(x[c], stack.weight[c].T, stack.bias[c, 0])
        torch.testing.assert_close(stack(x)[c], expected)


def test_copies_do_not_see_each_other():
    net = stacked_mlp(3, 4, 8, 2).double()
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    net(x)[1].sum().backward()
    grad = net[0].weight.grad
    assert grad[1].abs().sum() > 0
    assert grad[0].abs().sum() == grad[2].abs().sum() == 0


def test_stacked_init_is_that_of_linear():
    stack = StackedLinear(200, 16, 16, generator=devices.generator(0))
    assert stack.weight.abs().max() <= 0.25  # 1/sqrt(16)
    torch.testing.assert_close(stack.weight.var(), torch.tensor(0.25**2 / 3), rtol=0.05, atol=0)


def test_fit_finds_the_least_squares_solution():
    gen = devices.generator(0)
    a, b = torch.randn(30, 4, generator=gen, dtype=torch.float64), torch.randn(30, generator=gen, dtype=torch.float64)
    w = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    losses = fit([w], lambda step: ((a @ w - b) ** 2).mean(), steps=2000, lr=0.05, optimizer="adam", schedule="cosine")
    torch.testing.assert_close(w.detach(), torch.linalg.lstsq(a, b).solution, atol=1e-6, rtol=0)
    assert len(losses) == 2000
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_fit_with_a_rate_a_run_is_one_training_after_the_other(optimizer):
    gen = devices.generator(0)
    a, b = torch.randn(30, 4, generator=gen), torch.randn(30, generator=gen)
    start, rates = torch.randn(4, generator=gen), (0.03, 0.01, 0.002)

    def trained(copies, lr):
        w = start.repeat(copies, 1).requires_grad_()
        task = lambda step: ((a @ w.T - b[:, None]) ** 2).mean(0).sum()  # noqa: E731
        fit([w], task, steps=20, lr=lr, optimizer=optimizer, weight_decay=0.1, schedule="cosine")
        return w.detach()

    together = trained(6, rates)  # run j modulo 3
    for j in range(6):
        torch.testing.assert_close(together[j], trained(1, rates[j % 3])[0])


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD])
def test_eager_optimisers_step_as_torch_does(kind):
    """Bit for bit, under a schedule, from one start."""
    ends = []
    for optimizer in (kind, eager(kind)):
        w = torch.linspace(-1, 1, 12).requires_grad_()
        opt = optimizer([w], lr=0.1, weight_decay=0.1, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 10)
        for _ in range(10):
            opt.zero_grad()
            (w.sin() * torch.arange(12)).sum().backward()
            opt.step()
            schedule.step()
        ends.append(w.detach())
    assert torch.equal(*ends)


def test_what_every_page_imports_is_quick_to_import():
    """Each of these packages takes longer to import than many a page's training."""
    program = """
import sys, torch
import paperlab.data, paperlab.stats, paperlab.zoo
from paperlab.training import fit
w = torch.ones(3, requires_grad=True)
fit([w], lambda step: (w**2).sum(), steps=2, lr=0.1)
paperlab.zoo.load("pocket-gpt-2l")
sys.exit(" ".join({"torch._dynamo", "scipy.stats", "sklearn", "pandas"} & set(sys.modules)) or 0)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_fit_says_where_it_diverged():
    w = torch.ones(1, requires_grad=True)
    with pytest.raises(FloatingPointError, match="at step [0-9]+; a smaller lr"):
        fit([w], lambda step: (w**4).sum(), steps=50, lr=100.0, optimizer="sgd")


def test_digits_are_scikit_learns():
    images, labels = load_digits(torch.float64)
    raw = sklearn.datasets.load_digits()
    assert np.array_equal(images.numpy() * 16, raw.images)
    assert np.array_equal(labels.numpy(), raw.target)


def test_splits_are_disjoint_complete_and_depend_on_the_seed_alone():
    x, y, x_test, y_test = digits_split(3, test=0.25)
    assert len(y) + len(y_test) == 1797
    assert len(y_test) == round(0.25 * 1797)
    rows = {tuple(row) for row in torch.cat([x, x_test]).flatten(1).tolist()}
    assert rows == {tuple(row) for row in load_digits()[0].flatten(1).tolist()}
    assert torch.equal(y, digits_split(3, test=0.25)[1])
    assert not torch.equal(y, digits_split(4, test=0.25)[1])
