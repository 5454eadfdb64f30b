"""The tree's closed-form SVD against a numerical one."""

import pytest
import torch

from paperlab.data.hierarchy import tree_properties, tree_svd


@pytest.mark.parametrize("depth", [1, 3, 5])
def test_closed_form_is_the_svd(depth):
    properties = tree_properties(depth)
    u, s, v = tree_svd(depth)
    identity = torch.eye(2**depth, dtype=torch.float64)
    torch.testing.assert_close(u * s @ v.T, properties, atol=1e-12, rtol=0)
    torch.testing.assert_close(u.T @ u, identity, atol=1e-12, rtol=0)
    torch.testing.assert_close(v.T @ v, identity, atol=1e-12, rtol=0)
    torch.testing.assert_close(s, torch.linalg.svdvals(properties), atol=1e-12, rtol=0)


def test_four_items_by_hand():
    # Root, two kingdoms, four species: every item has three properties, cousins share one, sisters two.
    properties = tree_properties(2)
    assert properties.tolist()[:3] == [[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1]]
    assert (properties.T @ properties).tolist() == [[3, 2, 1, 1], [2, 3, 1, 1], [1, 1, 3, 2], [1, 1, 2, 3]]


@pytest.mark.parametrize("make", [tree_properties, tree_svd])
def test_rejects_bad_depth(make):
    with pytest.raises(ValueError, match="depth"):
        make(0)
