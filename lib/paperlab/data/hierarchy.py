"""A tree of living things, and the properties that its branches share: a data set whose SVD can be written down.

Every leaf of a full binary tree is an item (canary, robin, salmon, ...). Every node is a property that all items below
it have (everything can grow, every animal can move, only the canary is yellow). The matrix of who has what carries
the whole tree, and its singular vectors are the splits of the tree, the broadest first.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from paperlab.checks import require_between


def tree_properties(depth: int, dtype: torch.dtype = torch.float64) -> Float[Tensor, "properties items"]:
    """Entry 1 where item j lies below node i, else 0.

    The 2**(depth + 1) - 1 properties stand in breadth-first order, root first; the 2**depth items from left to right.

    Raises:
        ValueError: ``depth`` is not within 1 to 12.
    """
    require_between(1, 12, depth=depth)
    levels = [torch.eye(2**level, dtype=dtype).repeat_interleave(2 ** (depth - level), 1) for level in range(depth + 1)]
    return torch.cat(levels)


def tree_svd(
    depth: int, dtype: torch.dtype = torch.float64
) -> tuple[Float[Tensor, "properties items"], Float[Tensor, " items"], Float[Tensor, "items items"]]:
    r"""The singular value decomposition of `tree_properties` in closed form: ``U``, ``s``, ``V``.

    Two items share one property for every ancestor they share, so the item-by-item matrix is a sum of nested
    blocks. Its eigenvectors are the Haar wavelets of the tree: at depth D the mean over all items ($s^2 = 2^{D+1} - 1$)
    and, for every inner node at level l, the contrast of its halves ($s^2 = 2^{D-l} - 1$). Broad splits are strong.

    Raises:
        ValueError: ``depth`` is not within 1 to 12.
    """
    require_between(1, 12, depth=depth)
    items = 2**depth
    vectors, squares = [torch.ones(1, items, dtype=dtype) / math.sqrt(items)], [2.0 ** (depth + 1) - 1]
    for level in range(depth):
        half = 2 ** (depth - level - 1)
        contrast = torch.cat([torch.ones(half, dtype=dtype), -torch.ones(half, dtype=dtype)]) / math.sqrt(2 * half)
        vectors.append(torch.kron(torch.eye(2**level, dtype=dtype), contrast))
        squares += [2.0 ** (depth - level) - 1] * 2**level
    v, s = torch.cat(vectors).T, torch.tensor(squares, dtype=dtype).sqrt()
    return tree_properties(depth, dtype) @ v / s, s, v
