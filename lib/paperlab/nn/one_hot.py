r"""Rows of one-hot variables: where their states lie, and the coordinates in which they can move.

A model of discrete variables keeps all their probabilities in one row, two entries for a binary variable, ten for a
digit's label. Two probabilities that sum to 1 are one number: folded, a row of binary variables is half as long, and a
matrix between such rows has a quarter of the entries.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from paperlab.checks import require_at_least, require_nonempty


@dataclass(frozen=True)
class Layout:
    """Where the states of each variable lie in a row: ``runs`` of (number of variables, states of each).

    Within a run the states are outermost: state 0 of all its variables, then state 1 of all of them, and so on.

    Raises:
        ValueError: no run, a run without variables, or a variable with fewer than 2 states.
    """

    runs: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        require_nonempty(runs=self.runs)
        require_at_least(1, **{"number of variables in a run": min(n for n, _ in self.runs)})
        require_at_least(2, **{"number of states in runs": min(k for _, k in self.runs)})

    @property
    def units(self) -> int:
        """Length of a row."""
        return sum(n * k for n, k in self.runs)

    def split(self, x: Shaped[Tensor, "*batch units"]) -> list[Shaped[Tensor, "*batch states variables"]]:
        """The row run by run, with an axis for the states."""
        parts = x.split([n * k for n, k in self.runs], dim=-1)
        return [part.unflatten(-1, (k, n)) for part, (n, k) in zip(parts, self.runs, strict=True)]

    def join(self, parts: Sequence[Shaped[Tensor, "*batch _ _"]]) -> Shaped[Tensor, "*batch units"]:
        """The inverse of `split`; what was summed over the states is repeated for each of them."""
        full = [p.expand(*p.shape[:-2], k, n).flatten(-2) for p, (n, k) in zip(parts, self.runs, strict=True)]
        return torch.cat(full, dim=-1)

    def softmax(self, logits: Float[Tensor, "*batch units"]) -> Float[Tensor, "*batch units"]:
        """Softmax over the states of each variable."""
        return self.join([_softmax(part) for part in self.split(logits)])

    @property
    def folded(self) -> "Layout":
        """The layout of folded rows, where a binary variable has one unit."""
        return _Folded(tuple((n, k if k > 2 else 1) for n, k in self.runs))

    def fold(self, x: Float[Tensor, "*batch units"]) -> Float[Tensor, "*batch folded"]:
        r"""What can move: of a binary variable $(x_1 - x_0)/\sqrt2$, as the sum of its $q$ is 1; else all states."""
        return self.folded.join([_difference(p) if p.shape[-2] == 2 else p for p in self.split(x)])

    def unfold(self, s: Float[Tensor, "*batch folded"]) -> Float[Tensor, "*batch units"]:
        """The transpose of `fold`."""
        return self.join([torch.cat([-p, p], -2) / 2**0.5 if p.shape[-2] == 1 else p for p in self.folded.split(s)])

    def fold_mask(self, free: Bool[Tensor, "*batch units"]) -> Bool[Tensor, "*batch folded"]:
        """Which entries of a folded row are free."""
        return self.folded.join([p[..., :1, :] if p.shape[-2] == 2 else p for p in self.split(free)])

    def same(self) -> Bool[Tensor, "units units"]:
        """Which pairs of units are states of one variable."""
        first = itertools.accumulate([0] + [n for n, _ in self.runs])
        owner = self.join([start + torch.arange(n)[None] for start, (n, _) in zip(first, self.runs, strict=False)])
        return owner[:, None] == owner


class _Folded(Layout):
    """Nothing is left to fold: every fold is the identity."""

    def __post_init__(self) -> None:
        pass

    @property
    def folded(self) -> Layout:
        return self

    def fold(self, x: Tensor) -> Tensor:
        return x

    unfold = fold_mask = fold


def _difference(pair: Tensor) -> Tensor:
    return (pair[..., 1:, :] - pair[..., :1, :]) / 2**0.5


def _softmax(logits: Tensor) -> Tensor:
    if logits.shape[-2] == 1:
        return torch.tanh(logits / 2**0.5) / 2**0.5  # a folded pair
    if logits.shape[-2] > 2:
        return logits.softmax(-2)
    u = logits[..., 1:, :] - logits[..., :1, :]  # the same for two states, and several times as fast
    on = torch.sigmoid(u)
    return torch.cat([1 - on, on], -2)
