r"""Label distributionally robust losses: margins under the worst weighting of the classes, and a dial on how bad.

A hinge listens to the worst rival class only, the average margin to all alike; cross-entropy stands between the two.
One number $\lambda$ runs through all of them, and an example can be left to choose its own.

Zhu, Ying and Yang, "Label Distributionally Robust Losses for Multi-class Classification: Consistency, Robustness and
Adaptivity" (2021, ICML 2023), https://arxiv.org/abs/2112.14869.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from paperlab.checks import (
    require_at_least,
    require_between,
    require_finite,
    require_labels,
    require_nonnegative,
    require_one_of,
    require_positive,
)
from paperlab.devices import generator
from paperlab.nn import StackedLinear
from paperlab.training import fit


def margins(
    scores: Float[Tensor, "*batch classes"], labels: Int[Tensor, "*batch"], c: float | Float[Tensor, "*batch"] = 0.0
) -> Float[Tensor, "*batch classes"]:
    r"""$\delta_k = f_k - f_y + c\,[k \ne y]$: by how much class k comes too close to the true one; $\delta_y = 0$.

    Raises:
        ValueError: fewer than 2 classes, a label outside them, or ``c`` negative.
    """
    require_labels(scores, labels)
    require_nonnegative(c=c)
    delta = scores - scores.gather(-1, labels[..., None]) + torch.as_tensor(c).to(scores)[..., None]
    return delta.scatter(-1, labels[..., None], 0.0)


def ldr_kl(
    scores: Float[Tensor, "*batch classes"],
    labels: Int[Tensor, "*batch"],
    lam: float | Float[Tensor, "*batch"],
    c: float = 0.0,
) -> Float[Tensor, "*batch"]:
    r"""LDR-KL: $\max_{p \in \Delta_K} \sum_k p_k \delta_k - \lambda\,\mathrm{KL}(p, 1/K)
    = \lambda \log\big(\frac1K \sum_k e^{\delta_k / \lambda}\big)$.

    $\lambda \to 0$ gives Crammer and Singer's hinge $\max_k \delta_k$, $\lambda = 1$ and $c = 0$ cross-entropy less
    $\log K$, $\lambda \to \infty$ the mean margin, whose sum over all y is a constant. Written around the largest
    margin, with ``expm1`` and ``log1p``, so that neither end overflows or cancels. A tensor ``lam`` gives every example
    its own.

    Raises:
        ValueError: ``lam`` is not positive, or as in `margins`.
    """
    require_positive(lam=lam)
    delta = margins(scores, labels, c)
    top = delta.amax(-1)
    lam = torch.as_tensor(lam, dtype=delta.dtype, device=delta.device)
    return top + lam * torch.log1p(torch.expm1((delta - top[..., None]) / lam[..., None]).mean(-1))


def worst_case(
    scores: Float[Tensor, "*batch classes"],
    labels: Int[Tensor, "*batch"],
    lam: float | Float[Tensor, "*batch"],
    c: float = 0.0,
) -> Float[Tensor, "*batch classes"]:
    r"""The weights that attain the maximum in `ldr_kl`, $p_k \propto e^{\delta_k / \lambda}$: also its gradient in
    $\delta$.

    Raises:
        ValueError: as in `ldr_kl`.
    """
    return _log_worst_case(scores, labels, lam, c).exp()


def _log_worst_case(scores: Tensor, labels: Tensor, lam: float | Tensor, c: float) -> Tensor:
    require_positive(lam=lam)
    delta = margins(scores, labels, c)
    return (delta / torch.as_tensor(lam, dtype=delta.dtype, device=delta.device)[..., None]).log_softmax(-1)


def bounded(scores: Float[Tensor, "*batch classes"]) -> Float[Tensor, "*batch classes"]:
    r"""$f / (\frac1K \|f\|_1)$: scores whose mean size is 1, so that none is larger than K. All-zero scores stay 0."""
    size = scores.abs().mean(-1, keepdim=True)
    return scores / size.clamp(min=torch.finfo(scores.dtype).tiny)


def adapt(
    lam: float | Float[Tensor, "*batch"],
    scores: Float[Tensor, "*batch classes"],
    labels: Int[Tensor, "*batch"],
    *,
    lam0: float | Tensor,
    alpha: float,
    c: float = 0.0,
) -> Float[Tensor, "*batch"]:
    r"""One alternation of ALDR-KL: $p$ from the old $\lambda_i$, then $\lambda_i = \lambda_0\big(1 -
    \frac{\mathrm{KL}(p, 1/K)}{\alpha \log K}\big)_+$.

    It maximises $\sum_k p_k \delta_k - \lambda\,\mathrm{KL}(p, 1/K) - \frac{\bar\alpha}2 (\lambda - \lambda_0)^2$ in
    turn, with $\bar\alpha = \alpha \log K / \lambda_0$ as in the released code, which also leaves the margin out of $p$
    (``c`` = 0): then $p$ is the softmax of $f / \lambda_i$ and the label has no part in it. For $\alpha > 1$ every
    $\lambda_i$ stays above $\lambda_0 (1 - 1/\alpha)$; otherwise $10^{-4} \lambda_0$ stands for 0.

    Raises:
        ValueError: ``lam``, ``lam0`` or ``alpha`` is not positive, or as in `margins`.
    """
    require_positive(lam0=lam0, alpha=alpha)
    log_p, largest = _log_worst_case(scores, labels, lam, c), math.log(scores.shape[-1])
    divergence = largest + (log_p.exp() * log_p).sum(-1)
    return lam0 * (1 - divergence / (alpha * largest)).clamp(min=1e-4)


def absolute_error(scores: Float[Tensor, "*batch classes"], labels: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    r"""MAE between softmax and one-hot label, $2(1 - p_y)$: summed over all y it is $2(K - 1)$ whatever the scores."""
    return 2 * (1 - scores.softmax(-1).gather(-1, labels[..., None])[..., 0])


def round_loss(scores: Float[Tensor, "*batch classes"], labels: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    r"""Not the paper's: $-z_y / \sqrt{1 + \|z\|_2^2}$ with $z_k = f_k - \frac1K\sum_j f_j$. Its sum over all y is 0.

    The mean margin, held by the Euclidean length of the scores. The values for the K labels form a vector in the open
    unit ball of the plane of sum 0, and reach all of it; plus $\sqrt{1 - 1/K}$, they are non-negative with infimum 0.
    """
    z = scores - scores.mean(-1, keepdim=True)
    return -(z / (1 + z.square().sum(-1, keepdim=True)).sqrt()).gather(-1, labels[..., None])[..., 0]


def expected_loss(
    loss: Callable[[Tensor, Tensor], Tensor],
    scores: Float[Tensor, "*batch classes"],
    q: Float[Tensor, "*#batch classes"],
) -> Float[Tensor, "*batch"]:
    r"""$\sum_y q_y\, \psi(f, y)$, the risk at one input whose label follows $q$.

    Raises:
        ValueError: ``q`` is not a distribution over its last axis.
    """
    require_nonnegative(q=q)
    require_between(1 - 1e-6, 1 + 1e-6, **{"sum of q": q.sum(-1)})
    every = torch.arange(scores.shape[-1], device=scores.device).expand(scores.shape)
    return (q * loss(scores[..., None, :].expand(*scores.shape, -1), every)).sum(-1)


def newton(
    risk: Callable[[Tensor], Tensor], start: Float[Tensor, "problems classes"], steps: int = 60
) -> Float[Tensor, "problems classes"]:
    """Minimise ``risk``, one number a row, by damped Newton steps; a step that does not help raises the damping.

    Raises:
        ValueError: ``steps`` < 1, or ``start`` is not finite.
    """
    require_at_least(1, steps=steps)
    require_finite(start=start)
    f, damping = start.clone(), torch.full_like(start[:, 0], 1e-3)
    for _ in range(steps):
        f.requires_grad_()
        value = risk(f)
        (slope,) = torch.autograd.grad(value.sum(), f, create_graph=True)
        rows = [torch.autograd.grad(slope[:, k].sum(), f, retain_graph=True)[0] for k in range(f.shape[1])]
        f, slope, value, curvature = f.detach(), slope.detach(), value.detach(), torch.stack(rows, 1)
        scale = curvature.diagonal(dim1=1, dim2=2).abs().amax(1).clamp(min=1e-30)
        eye = torch.eye(f.shape[1], dtype=f.dtype, device=f.device)
        trial = f - torch.linalg.solve(curvature + (damping * scale)[:, None, None] * eye, slope)
        better = risk(trial) <= value
        f = torch.where(better[:, None], trial, f)
        damping = (damping * torch.where(better, 0.2, 8.0)).clamp(1e-13, 1e9)
    return f - f.mean(1, keepdim=True)


def flip(
    labels: Int[Tensor, "*batch"], kind: str, rate: float, classes: int, generator: torch.Generator
) -> Int[Tensor, "*batch"]:
    """Labels with noise: ``uniform`` draws a label at random, its own included; ``pair`` moves it to the next class.

    Each label is hit with probability ``rate``.

    Raises:
        ValueError: an unknown kind, a rate outside [0, 1], or a label outside the classes.
    """
    require_one_of(("uniform", "pair"), kind=kind)
    require_between(0, 1, rate=rate)
    require_between(0, classes - 1, labels=labels)
    hit = (torch.rand(labels.shape, generator=generator) < rate).to(labels.device)
    other = torch.randint(classes, labels.shape, generator=generator).to(labels) if kind == "uniform" else labels + 1
    return torch.where(hit, other % classes, labels)


def _ldr(f: Tensor, y: Tensor, lam: float | Tensor) -> Tensor:
    return ldr_kl(f, y, lam, 1.0)


# Every loss of the race, of scores, labels and its one setting. All hinges have the margin 1, like LDR-KL's.
LOSSES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "CE": lambda f, y, _: -f.log_softmax(-1).gather(-1, y[..., None])[..., 0],
    "MAE": lambda f, y, _: absolute_error(f, y),
    "GCE": lambda f, y, q: (1 - torch.exp(q * f.log_softmax(-1).gather(-1, y[..., None])[..., 0])) / q,
    "SCE": lambda f, y, a: a * LOSSES["CE"](f, y, 0) + 2 * absolute_error(f, y),  # log 0 read as -4
    "CS": lambda f, y, c: margins(f, y, c).amax(-1),
    "WW": lambda f, y, c: margins(f, y, c).clamp(min=0).sum(-1),
    "LDR-KL": lambda f, y, lam: _ldr(bounded(f), y, lam),
    "LDR-KL, free": _ldr,
    "round": lambda f, y, _: round_loss(f, y),
}


@dataclass(frozen=True)
class Arm:
    r"""One candidate of a search: a loss, its setting, a learning rate; $\alpha$ where $\lambda_i$ adapts from
    $\lambda_0$, the setting, with ``c`` the margin in the weights $p$ (the released code has none).
    """

    loss: str
    setting: float
    rate: float
    alpha: float | None = None
    c: float = 0.0


class Perceptrons(torch.nn.Module):
    """One hidden layer for every arm, noise and seed: those of a seed share their images, hence one product a seed.

    From (seeds, batch, features) to (arms, noises, seeds, batch, classes). All of a seed begin with the same weights.
    """

    def __init__(
        self, arms: int, noises: int, seeds: int, widths: tuple[int, int, int], generator: torch.Generator
    ) -> None:
        super().__init__()
        self.shape, many = (arms, noises, seeds), arms * noises
        features, hidden, classes = widths
        self.into, self.out = (
            StackedLinear(seeds, features, many * hidden),
            StackedLinear(many * seeds, hidden, classes),
        )
        with torch.no_grad():
            for layer, one, times in (
                (self.into, StackedLinear(seeds, features, hidden, generator=generator), (1, 1, many)),
                (self.out, StackedLinear(seeds, hidden, classes, generator=generator), (many, 1, 1)),
            ):
                for own, first in zip(layer.parameters(), one.parameters(), strict=True):
                    own.copy_(first.repeat(times))

    def forward(self, x: Float[Tensor, "seeds batch features"]) -> Float[Tensor, "arms noises seeds batch classes"]:
        """Scores of the same images under every network."""
        hidden = rearrange(self.into(x).relu(), "s b (a n h) -> (a n s) b h", a=self.shape[0], n=self.shape[1])
        return self.out(hidden).unflatten(0, self.shape)


@dataclass(frozen=True)
class Trained:
    """The networks of a search, one stack for each learning rate, and the learned $\\lambda_i$, by arm."""

    networks: dict[float, Perceptrons]
    order: tuple[Arm, ...]
    lam: dict[Arm, Float[Tensor, "noises seeds n"]]

    @torch.no_grad()
    def scores(self, x: Float[Tensor, "seeds n features"]) -> Float[Tensor, "arms noises seeds n classes"]:
        """Scores of the same inputs under every network, arms in the order in which they were given."""
        found = {rate: iter(network(x)) for rate, network in self.networks.items()}
        return torch.stack([next(found[arm.rate]) for arm in self.order])


def train(
    arms: Sequence[Arm],
    x: Float[Tensor, "seeds n features"],
    labels: Int[Tensor, "noises seeds n"],
    *,
    classes: int,
    hidden: int,
    steps: int,
    batch: int,
    seed: int,
) -> Trained:
    r"""Train a perceptron for every arm, noise and seed, side by side, by Adam with a cosine schedule.

    All of a seed begin with the same weights and see the same images in the same order. An adaptive arm keeps one
    $\lambda_i$ for every training example, begun at $\lambda_0$ and renewed by `adapt` whenever the example is drawn;
    the loss takes it as a constant.

    Raises:
        ValueError: no arms, an unknown loss, or as in `paperlab.training.fit`.
    """
    require_at_least(1, **{"number of arms": len(arms), "batch": batch})
    for arm in arms:
        require_one_of(LOSSES, loss=arm.loss)
    noises, seeds, n = labels.shape
    drawn = torch.randint(n, (steps, seeds, batch), generator=generator(seed)).to(x.device)
    rows, networks, lam = torch.arange(seeds, device=x.device)[:, None], {}, {}
    for rate in dict.fromkeys(arm.rate for arm in arms):
        stack = [arm for arm in arms if arm.rate == rate]
        network = Perceptrons(len(stack), noises, seeds, (x.shape[-1], hidden, classes), generator(seed)).to(x)
        kinds = [list(some) for _, some in groupby(stack, key=lambda arm: (arm.loss, arm.alpha, arm.c))]
        settings = [torch.tensor([arm.setting for arm in kind]).to(x)[:, None, None, None] for kind in kinds]
        memory = [own.repeat(1, noises, seeds, n) for own in settings]

        def loss(step: int, *, network=network, kinds=kinds, settings=settings, memory=memory) -> Tensor:
            scores = network(x[rows, drawn[step]]).split([len(kind) for kind in kinds])
            y, total = labels[:, rows, drawn[step]], 0.0
            for (arm, *_), f, setting, own in zip(kinds, scores, settings, memory, strict=True):
                target = y.expand(f.shape[:-1])
                if arm.alpha:
                    seen, at = f.detach(), drawn[step].expand(f.shape[:-1])
                    seen = bounded(seen) if arm.loss == "LDR-KL" else seen
                    setting = adapt(own.gather(-1, at), seen, target, lam0=setting, alpha=arm.alpha, c=arm.c)
                    own.scatter_(-1, at, setting)
                total = total + LOSSES[arm.loss](f, target, setting.expand(target.shape)).mean(-1).sum()
            return total

        fit(network.parameters(), loss, steps=steps, lr=rate, schedule="cosine")
        networks[rate] = network
        lam |= {
            arm: one
            for kind, own in zip(kinds, memory, strict=True)
            for arm, one in zip(kind, own, strict=True)
            if arm.alpha
        }
    return Trained(networks, tuple(arms), lam)


def top_k(
    scores: Float[Tensor, "*batch n classes"], labels: Int[Tensor, "*batch n"], k: int
) -> Float[Tensor, "*batch"]:
    """Percent of examples whose label is among the k largest scores; a tie counts against.

    Raises:
        ValueError: k is not between 1 and the number of classes.
    """
    require_between(1, scores.shape[-1], k=k)
    within: Bool[Tensor, "*batch n"] = (scores >= scores.gather(-1, labels[..., None])).sum(-1) <= k
    return 100 * within.double().mean(-1)


def area(values: Float[Tensor, "*batch n"], positive: Bool[Tensor, "*batch n"]) -> Float[Tensor, "*batch"]:
    """Area under the ROC curve of every row: the chance that a positive has a larger value than a negative.

    Raises:
        ValueError: a row in which all or none are positive.
    """
    require_between(1, positive.shape[-1] - 1, **{"number of positive": positive.sum(-1)})
    ordered = values.sort(-1).values
    below, upto = (torch.searchsorted(ordered, values.contiguous(), side=side).double() for side in ("left", "right"))
    ranks, count = (below + upto + 1) / 2, positive.sum(-1).double()
    return ((ranks * positive).sum(-1) - count * (count + 1) / 2) / (count * (positive.shape[-1] - count))
