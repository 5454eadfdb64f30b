"""One training loop, for everything whose loop has nothing to teach."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from paperlab.checks import require_at_least, require_nonnegative, require_one_of, require_positive

OPTIMIZERS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}


def fit(
    parameters: Iterable[Tensor],
    loss: Callable[[int], Tensor],
    *,
    steps: int,
    lr: float,
    optimizer: str = "adamw",
    weight_decay: float = 0.0,
    schedule: str | None = None,
) -> list[float]:
    """Minimise ``loss(step)`` over ``parameters`` for ``steps`` steps; returns the loss of every step.

    ``loss`` draws its own batch and returns a scalar tensor. With ``schedule="cosine"`` the rate falls from ``lr`` to 0
    along half a cosine.

    Raises:
        ValueError: steps < 1, a rate that is not positive, an unknown optimizer or schedule.
        FloatingPointError: the loss is no longer finite, with the step at which that happened.
    """
    require_at_least(1, steps=steps)
    require_positive(lr=lr)
    require_nonnegative(weight_decay=weight_decay)
    require_one_of(OPTIMIZERS, optimizer=optimizer)
    require_one_of((None, "cosine"), schedule=schedule)
    opt = OPTIMIZERS[optimizer](list(parameters), lr=lr, weight_decay=weight_decay)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps) if schedule else None
    losses = []
    for step in range(steps):
        opt.zero_grad(set_to_none=True)
        value = loss(step)
        value.backward()
        opt.step()
        if scheduler:
            scheduler.step()
        losses.append(value.detach())
    history = torch.stack(losses).tolist()  # one transfer at the end: reading each step would stall a GPU
    for step, value in enumerate(history):
        if not abs(value) < float("inf"):
            raise FloatingPointError(f"the loss is {value} at step {step}; a smaller lr than {lr} may help")
    return history
