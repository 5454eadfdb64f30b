"""Profiles: how much a page may spend. `pocket` is seconds on one core, `full` is minutes on a large GPU."""

import os
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

PROFILES = ("pocket", "full")
T = TypeVar("T")


def resolve(profile: str | None = None) -> str:
    """The profile asked for: the environment's `PAPERLAB_PROFILE` where it is set, else the argument, else pocket.

    The environment wins, because a committed notebook always carries the parameter's default.

    Raises:
        ValueError: the name is neither `pocket` nor `full`.
    """
    asked = os.environ.get("PAPERLAB_PROFILE") or profile or "pocket"
    if asked not in PROFILES:
        source = "PAPERLAB_PROFILE" if os.environ.get("PAPERLAB_PROFILE") else "profile"
        raise ValueError(f"{source} must be one of {', '.join(PROFILES)}, got {asked!r}")
    return asked


@dataclass(frozen=True)
class Run:
    """What a page knows about its own run: the profile and the first seed."""

    profile: str
    seed: int

    @property
    def full(self) -> bool:
        """True in the `full` profile."""
        return self.profile == "full"

    @cached_property
    def device(self) -> "torch.device":
        """The CPU in the pocket profile, so that its numbers repeat; the accelerator in the full one."""
        import torch

        from paperlab.devices import default_device

        return default_device() if self.full else torch.device("cpu")

    def seeds(self, n: int) -> list[int]:
        """The page's first ``n`` seeds: consecutive, so that nobody can have chosen them."""
        return list(range(self.seed, self.seed + n))

    def pick(self, *, pocket: T, full: T) -> T:
        """The setting of the current profile."""
        return full if self.full else pocket


def start(profile: str = "pocket", seed: int = 0) -> Run:
    """Begin a page: check the profile, seed every generator, set the figures' style, use one core in `pocket`.

    Raises:
        ValueError: an unknown profile, or a seed that is not a whole number of at least 0.
    """
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise ValueError(f"seed must be a whole number of at least 0, got {seed!r}")
    run = Run(resolve(profile), seed)
    import torch

    from paperbook.figures import use_style
    from paperlab.devices import seed_everything

    seed_everything(seed)
    if not run.full:
        torch.set_num_threads(1)
    use_style()
    return run
