"""Real handwritten digits, 8 x 8: the UCI optical recognition set as bundled with scikit-learn (1,797 images).

Small enough to train on in a second, real enough that methods fail on it in the ways they fail on larger sets.
"""

from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from paperlab.checks import require_between
from paperlab.devices import generator


@cache
def _raw() -> tuple[Tensor, Tensor]:
    import sklearn.datasets  # here, because it takes a second and every page that uses `paperlab.data` would pay

    bunch = sklearn.datasets.load_digits()
    return torch.tensor(bunch.images / 16.0), torch.tensor(bunch.target, dtype=torch.int64)


def load_digits(dtype: torch.dtype = torch.float32) -> tuple[Float[Tensor, "n 8 8"], Int[Tensor, " n"]]:
    """All 1,797 images, intensities in [0, 1], and their labels 0 to 9, in the order of the original file."""
    images, labels = _raw()
    return images.to(dtype), labels.clone()


def digits_split(
    seed: int, test: float = 0.3, dtype: torch.dtype = torch.float32
) -> tuple[Float[Tensor, "train 8 8"], Int[Tensor, " train"], Float[Tensor, "held 8 8"], Int[Tensor, " held"]]:
    """A random split into training and held-out digits: train images, train labels, test images, test labels.

    Raises:
        ValueError: the share ``test`` is not within 0.01 to 0.99, or ``seed`` is negative.
    """
    require_between(0.01, 0.99, test=test)
    images, labels = load_digits(dtype)
    order = torch.randperm(len(labels), generator=generator(seed))
    held = round(test * len(labels))
    train, rest = order[held:], order[:held]
    return images[train], labels[train], images[rest], labels[rest]
