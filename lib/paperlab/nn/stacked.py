"""Many small networks at once.

Ten seeds of a 64-unit network cost ten times one seed when they run in a loop, and hardly more than one when they run
as a single batched matrix product. The leading axis is the copy: a seed, a block, a client, a learning rate.
"""

import itertools
import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paperlab.checks import require_at_least


class StackedLinear(nn.Module):
    r"""``copies`` independent affine maps, $y_c = x_c W_c + b_c$, as one `torch.baddbmm`.

    Weights are drawn as `torch.nn.Linear` draws them: uniform with bound $1/\sqrt{\text{in}}$.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(
        self, copies: int, in_features: int, out_features: int, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        require_at_least(1, copies=copies, in_features=in_features, out_features=out_features)
        bound = 1 / math.sqrt(in_features)
        weight, bias = torch.empty(copies, in_features, out_features), torch.empty(copies, 1, out_features)
        self.weight = nn.Parameter(weight.uniform_(-bound, bound, generator=generator))
        self.bias = nn.Parameter(bias.uniform_(-bound, bound, generator=generator))

    def forward(self, x: Float[Tensor, "copies *batch in"]) -> Float[Tensor, "copies *batch out"]:
        """Apply copy c to every row of ``x[c]``."""
        return torch.baddbmm(self.bias, x.flatten(1, -2), self.weight).unflatten(1, x.shape[1:-1])


def stacked_mlp(
    copies: int, *widths: int, activation: type[nn.Module] = nn.ReLU, generator: torch.Generator | None = None
) -> nn.Sequential:
    """``copies`` independent perceptrons, from (copies, batch, widths[0]) to (copies, batch, widths[-1]).

    Raises:
        ValueError: fewer than two widths.
    """
    if len(widths) < 2:
        raise ValueError(f"widths must hold at least an input and an output size, got {widths}")
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [StackedLinear(copies, a, b, generator=generator), activation()]
    return nn.Sequential(*layers[:-1])
