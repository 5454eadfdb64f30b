"""Bags of instances for multiple-instance learning: a label for the whole bag, none for what is in it.

A bag is positive when it holds an instance of the wanted class. Which one it is, nobody says: that is the difficulty.
"""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from paperlab.checks import require_at_least, require_between
from paperlab.devices import generator


def draw_bags(
    labels: Int[Tensor, " n"], *, target: int, bags: int, size: int, seed: int, hits: int = 1
) -> tuple[Int[Tensor, "bags size"], Bool[Tensor, " bags"]]:
    """Choose the members of ``bags`` bags of ``size``; half of the bags hold ``hits`` instances of class ``target``.

    All other members are of other classes; everything is drawn with replacement, at a random place in its bag.
    Returns the members as indices, so that ``images[members]`` are the bags and ``labels[members]`` what is in them
    (which a learner must not see), and whether each bag is positive; of an odd number of bags one more is negative.

    Raises:
        ValueError: ``bags`` or ``size`` below 1, ``hits`` not within 1 to ``size``, or labels that lack the target or
            lack every other class.
    """
    require_at_least(1, bags=bags, size=size)
    require_between(1, size, hits=hits)
    labels = labels.cpu()
    wanted, others = (labels == target).nonzero()[:, 0], (labels != target).nonzero()[:, 0]
    if not len(wanted) or not len(others):
        raise ValueError(f"labels must hold the target {target} and at least one other class")
    g = generator(seed)
    positive = torch.randperm(bags, generator=g) % 2 == 1
    members = others[torch.randint(len(others), (bags, size), generator=g)]
    places = torch.rand(bags, size, generator=g).argsort(1)[:, :hits]
    drawn = wanted[torch.randint(len(wanted), (bags, hits), generator=g)]
    return torch.where(positive[:, None], members.scatter(1, places, drawn), members), positive
