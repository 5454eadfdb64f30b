"""Rows of one-hot variables, against plain loops over the variables and against the algebra of folding."""

import pytest
import torch

from paperlab.nn.one_hot import Layout

MIXED = Layout(((3, 2), (2, 4)))  # three binary variables, then two with four states: 14 units
VARIABLES = [[0, 3], [1, 4], [2, 5], [6, 8, 10, 12], [7, 9, 11, 13]]  # the units of each
F64 = torch.float64


def rows(n: int, units: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, units, generator=torch.Generator().manual_seed(seed), dtype=F64)


def test_softmax_and_partners_variable_by_variable():
    logits, same = rows(5, MIXED.units), torch.zeros(14, 14, dtype=torch.bool)
    wanted = torch.empty_like(logits)
    for own in VARIABLES:
        wanted[:, own] = logits[:, own].softmax(-1)
        same[torch.tensor(own)[:, None], own] = True
    torch.testing.assert_close(MIXED.softmax(logits), wanted)
    assert torch.equal(MIXED.same(), same)


def test_split_and_join_are_inverse():
    x = rows(2, MIXED.units)
    assert [tuple(part.shape) for part in MIXED.split(x)] == [(2, 2, 3), (2, 4, 2)]
    assert torch.equal(MIXED.join(MIXED.split(x)), x)
    summed = MIXED.join([part.sum(-2, keepdim=True) for part in MIXED.split(x)])
    torch.testing.assert_close(summed[:, 3], x[:, 0] + x[:, 3])


def test_unfold_is_the_transpose_of_fold_and_its_right_inverse():
    x, s = rows(1, 14)[0], rows(1, MIXED.folded.units, seed=1)[0]
    assert len(s) == 11
    torch.testing.assert_close(MIXED.fold(x) @ s, x @ MIXED.unfold(s))
    torch.testing.assert_close(MIXED.fold(MIXED.unfold(s)), s)


def test_lengths_of_differences_of_probabilities_survive_folding():
    p, q = MIXED.softmax(rows(4, 14)), MIXED.softmax(rows(4, 14, seed=1))
    torch.testing.assert_close((MIXED.fold(p) - MIXED.fold(q)).norm(dim=-1), (p - q).norm(dim=-1))
    torch.testing.assert_close(MIXED.unfold(MIXED.fold(p) - MIXED.fold(q)), p - q)


def test_folded_softmax_is_the_folded_probabilities():
    logits = rows(4, 14)
    torch.testing.assert_close(MIXED.folded.softmax(MIXED.fold(logits)), MIXED.fold(MIXED.softmax(logits)))


def test_a_folded_layout_is_its_own_and_masks_follow():
    folded = MIXED.folded
    assert folded.folded is folded
    s = rows(2, folded.units)
    assert torch.equal(folded.fold(s), s) and torch.equal(folded.unfold(s), s)
    free = torch.ones(14, dtype=torch.bool)
    free[VARIABLES[1] + VARIABLES[3]] = False
    wanted = torch.tensor([True, False, True, *[False, True] * 4])
    assert torch.equal(MIXED.fold_mask(free), wanted)


@pytest.mark.parametrize(("runs", "name"), [(((0, 2),), "variables"), (((3, 1),), "states"), ((), "runs")])
def test_bad_layouts_are_named(runs, name):
    with pytest.raises(ValueError, match=name):
        Layout(runs)
