"""Muon in float32: torch's own works in bfloat16 only, which most processors emulate, ten times slower."""

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from paperlab.checks import require_at_least, require_between, require_positive

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic whose slope at 0 is steepest (Jordan et al., 2024)


def orthogonalize(matrices: Float[Tensor, "n rows columns"], steps: int = 5) -> Float[Tensor, "n rows columns"]:
    r"""Bring all singular values near 1 and keep the singular vectors, by Newton–Schulz iteration.

    Each step maps a singular value $\sigma$ to $a\sigma + b\sigma^3 + c\sigma^5$; with `COEFFICIENTS` those between
    0.01 and 1 end between about 0.7 and 1.2 after five steps.

    Raises:
        ValueError: ``steps`` is less than 1.
    """
    require_at_least(1, steps=steps)
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices  # the smaller Gram matrix
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: every direction of a weight matrix moves by the same amount (Jordan et al., 2024).

    The step of a matrix with more rows than columns is larger by the root of their ratio.

    Raises:
        ValueError: a parameter is not a matrix; a rate is not positive, or a share is not within its bounds.
    """

    def __init__(
        self, params: Iterable[Tensor], *, lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        require_positive(lr=lr)
        require_between(0, 1, momentum=momentum, weight_decay=weight_decay)
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        if any(p.ndim != 2 for group in self.param_groups for p in group["params"]):
            raise ValueError("params must be matrices, of two dimensions each")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Move every parameter that has a gradient; matrices of one shape are orthogonalised together."""
        for group in self.param_groups:
            alike: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    alike[p.shape].append(p)
            for (rows, columns), params in alike.items():
                updates = []
                for p in params:
                    held = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    held.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(held, group["momentum"]))
                lr = group["lr"] * math.sqrt(max(1.0, rows / columns))
                for p, update in zip(params, orthogonalize(torch.stack(updates)), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-lr)
