"""Muon: its iteration against the same polynomial on singular values, its steps against torch's."""

import pytest
import torch

from paperlab.zoo.muon import Muon, orthogonalize


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4)])
@pytest.mark.parametrize("steps", [1, 5])
def test_singular_vectors_stay_and_singular_values_follow_the_polynomial(shape, steps):
    matrices = torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    s = s / s.square().sum(-1, keepdim=True).sqrt()
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    torch.testing.assert_close(orthogonalize(matrices, steps), u * s[:, None] @ vh)


def test_five_steps_bring_singular_values_near_one():
    values = torch.logspace(-2, 0, 40, dtype=torch.float64)
    padded = torch.diag(values / values.norm())[None]
    found = torch.linalg.svdvals(orthogonalize(padded))[0]
    assert found.min() > 0.3
    assert found.max() < 1.25
    assert torch.equal(orthogonalize(torch.zeros(1, 3, 3)), torch.zeros(1, 3, 3))  # no gradient, no step


@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
def test_steps_are_torchs_up_to_bfloat16(shape):
    """Torch's runs its iteration in bfloat16: agreement to the few digits that leaves."""
    g = torch.Generator().manual_seed(1)
    start, gradients = torch.randn(shape, generator=g), torch.randn(4, *shape, generator=g)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    mine = Muon([ours], lr=0.1, weight_decay=0.3)
    other = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.3, adjust_lr_fn="original")
    for gradient in gradients:
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        mine.step()
        other.step()
    moved = (theirs - start).norm()
    assert moved > 0.5
    assert (ours - theirs).norm() < 0.02 * moved


def test_matrices_of_one_shape_do_not_mix():
    g = torch.Generator().manual_seed(2)
    start, gradients = torch.randn(3, 5, 4, generator=g), torch.randn(3, 5, 4, generator=g)
    together = [torch.nn.Parameter(m.clone()) for m in start]
    alone = [torch.nn.Parameter(m.clone()) for m in start]
    for p, q, gradient in zip(together, alone, gradients, strict=True):
        p.grad, q.grad = gradient.clone(), gradient.clone()
        Muon([q], lr=0.1).step()
    frozen = torch.nn.Parameter(torch.ones(5, 4))  # no gradient: stays
    Muon([*together, frozen], lr=0.1).step()
    for p, q in zip(together, alone, strict=True):
        torch.testing.assert_close(p, q)
    assert torch.equal(frozen, torch.ones(5, 4))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda p: Muon([p], lr=0.0), "lr"),
        (lambda p: Muon([p], lr=0.1, momentum=1.5), "momentum"),
        (lambda p: Muon([p], lr=0.1, weight_decay=-1.0), "weight_decay"),
        (lambda p: Muon([torch.nn.Parameter(torch.ones(3))], lr=0.1), "params"),
        (lambda p: orthogonalize(torch.ones(1, 2, 2), 0), "steps"),
    ],
)
def test_bad_input_names_the_argument(make, name):
    with pytest.raises(ValueError, match=name):
        make(torch.nn.Parameter(torch.ones(2, 2)))
