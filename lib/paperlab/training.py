"""One training loop, for everything whose loop has nothing to teach."""

from collections.abc import Callable, Iterable, Sequence
from inspect import unwrap

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from paperlab.checks import require_at_least, require_nonnegative, require_one_of, require_positive


def eager(optimizer: type[Optimizer]) -> type[Optimizer]:
    """The same optimiser, bit for bit, without the wrappers that import torch's compiler at its first use: that takes
    1.5 seconds, longer than many a page's training.
    """
    plain = {name: unwrap(getattr(optimizer, name)) for name in ("add_param_group", "zero_grad")}
    return type(optimizer.__name__, (optimizer,), plain | {"step": torch.no_grad()(unwrap(optimizer.step))})


OPTIMIZERS = {"adamw": eager(AdamW), "adam": eager(Adam), "sgd": eager(SGD)}


def fit(
    parameters: Iterable[Tensor],
    loss: Callable[[int], Tensor],
    *,
    steps: int,
    lr: float | Sequence[float],
    optimizer: str = "adamw",
    weight_decay: float = 0.0,
    schedule: str | None = None,
) -> list[float]:
    """Minimise ``loss(step)`` over ``parameters`` for ``steps`` steps; returns the loss of every step.

    ``loss`` draws its own batch and returns a scalar tensor. With ``schedule="cosine"`` the rate falls from ``lr`` to 0
    along half a cosine.

    ``lr`` may hold one rate for each of R runs that lie side by side on the parameters' leading axis, so that a whole
    search is one call: entry j of that axis belongs to run j modulo R. The optimiser steps at the largest rate, and a
    run keeps the share of the step that its own rate is of the largest; for these optimisers that is the step it would
    have made alone, because a step is proportional to the rate.

    Raises:
        ValueError: steps < 1, a rate that is not positive, a leading axis that is not a multiple of the number of
            rates, an unknown optimizer or schedule.
        FloatingPointError: the loss is no longer finite, with the step at which that happened.
    """
    require_at_least(1, steps=steps)
    require_positive(lr=lr)
    require_nonnegative(weight_decay=weight_decay)
    require_one_of(OPTIMIZERS, optimizer=optimizer)
    require_one_of((None, "cosine"), schedule=schedule)
    learned = [p for p in parameters if p.requires_grad]
    shares = _shares(learned, lr)
    top = max(lr) if shares else lr
    opt = OPTIMIZERS[optimizer](learned, lr=top, weight_decay=weight_decay, fused=True)
    before = [torch.empty_like(p) for p in learned] if shares else []
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps) if schedule else None
    losses = []
    for step in range(steps):
        opt.zero_grad(set_to_none=True)
        value = loss(step)
        value.backward()
        with torch.no_grad():
            if shares:
                torch._foreach_copy_(before, learned)
            opt.step()
            for p, old, share in zip(learned if shares else [], before, shares, strict=True):
                torch.lerp(old, p, share, out=p)
        if scheduler:
            scheduler.step()
        losses.append(value.detach())
    history = torch.stack(losses).tolist()  # one transfer at the end: reading each step would stall a GPU
    for step, value in enumerate(history):
        if not abs(value) < float("inf"):
            raise FloatingPointError(f"the loss is {value} at step {step}; a smaller lr than {top} may help")
    return history


def _shares(learned: Sequence[Tensor], lr: float | Sequence[float]) -> list[Tensor]:
    """Each parameter's share of a step at the largest rate, broadcast over its leading axis; empty for one rate."""
    if not isinstance(lr, Sequence):
        return []
    for p in learned:
        if p.ndim == 0 or len(p) % len(lr):
            raise ValueError(f"lr has {len(lr)} rates, which do not divide a parameter of shape {tuple(p.shape)}")
    rates = torch.tensor(lr, dtype=torch.float64) / max(lr)
    return [rates.repeat(len(p) // len(lr)).to(p).view(-1, *[1] * (p.ndim - 1)) for p in learned]
