"""Devices and seeds: one place that knows about accelerators, so that no other has to."""

import random

import numpy as np
import torch

from paperlab.checks import require_nonnegative


def default_device() -> torch.device:
    """The accelerator where there is one, else the CPU."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators.

    Raises:
        ValueError: ``seed`` is negative.
    """
    require_nonnegative(seed=seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def generator(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator of its own, so that one experiment's draws never shift another's.

    Raises:
        ValueError: ``seed`` is negative.
    """
    require_nonnegative(seed=seed)
    return torch.Generator(device=device).manual_seed(seed)
