r"""Comp-sum losses: cross-entropy and its relatives on one dial, and what each is worth in classification errors.

Nobody wants a low cross-entropy; everybody wants few errors. The losses here differ in one number $\tau$, and for each
there is an inequality that turns its value into a limit on the errors, for the family of functions actually trained.

Mao, Mohri and Zhong, "Cross-Entropy Loss Functions: Theoretical Analysis and Applications" (2023),
https://arxiv.org/abs/2304.07288.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from paperlab.checks import (
    require_at_least,
    require_between,
    require_finite,
    require_labels,
    require_nonnegative,
    require_positive,
)


def surprise(
    scores: Float[Tensor, "*batch classes"], labels: Int[Tensor, "*batch"], rho: float = 1.0
) -> Float[Tensor, "*batch"]:
    r"""$s = \log(1 + u)$ with $u = \sum_{y' \ne y} e^{(h(x, y') - h(x, y)) / \rho}$; at $\rho = 1$ it is $-\log p_y$.

    $u$ itself is never formed, only its logarithm: $s$ is finite for all finite scores, and keeps its relative accuracy
    where $p_y$ rounds to 1.

    Raises:
        ValueError: fewer than 2 classes, a label outside them, or ``rho`` not positive.
    """
    require_positive(rho=rho)
    require_labels(scores, labels)
    margins = (scores - scores.gather(-1, labels[..., None])) / rho
    return F.softplus(margins.scatter(-1, labels[..., None], -torch.inf).logsumexp(-1))


def comp_sum(
    scores: Float[Tensor, "*batch classes"], labels: Int[Tensor, "*batch"], tau: float | Tensor, rho: float = 1.0
) -> Float[Tensor, "*batch"]:
    r"""The comp-sum loss $\Phi^\tau(u) = \frac{(1 + u)^{1 - \tau} - 1}{1 - \tau}$, and $\log(1 + u)$ at $\tau = 1$.

    The sum of exponentials $u$ at $\tau = 0$, cross-entropy at 1, generalised cross-entropy with $q = \tau - 1$ between
    1 and 2, and $1 - p_y$, half the mean absolute error, at 2. A tensor ``tau`` gives every example its own.

    Raises:
        ValueError: ``tau`` is negative, or as in `surprise`.
    """
    require_nonnegative(tau=tau)
    s = surprise(scores, labels, rho)
    a = _one_minus(torch.as_tensor(tau, dtype=s.dtype, device=s.device))
    return torch.expm1(a * s) / a


def _one_minus(tau: Tensor) -> Tensor:
    """``a = 1 - tau``, with 0 replaced by so small a number that ``expm1(a s) / a`` is ``s`` to the last digit."""
    a, tiny = 1 - tau, torch.finfo(tau.dtype).tiny ** 0.5
    return torch.where(a.abs() < tiny, tiny, a)


def _log_power_sum(q: Float[Tensor, "*batch classes"], extra: float) -> Float[Tensor, "*batch"]:
    """``log(sum(q ** (1 + extra)))`` of distributions ``q``, with all its digits also where ``extra`` is close to 0."""
    log_q = q.clamp(min=torch.finfo(q.dtype).tiny).log()
    if abs(extra) < 0.5:
        return torch.log1p((q * torch.expm1(extra * log_q)).sum(-1))
    return ((1 + extra) * log_q).logsumexp(-1)


def least_conditional(q: Float[Tensor, "*batch classes"], tau: float) -> Float[Tensor, "*batch"]:
    r"""The least expected loss $\inf_h \sum_y q_y\, \ell_\tau(h, x, y)$ at an input whose labels follow $q$.

    Below $\tau = 2$ the best probabilities are proportional to $q_y^{1/(2-\tau)}$ and the value is
    $\frac{Z^{2-\tau} - 1}{1-\tau}$ with $Z = \sum_y q_y^{1/(2-\tau)}$: the entropy at $\tau = 1$. From $\tau = 2$ on
    all of the probability goes to the likeliest label: $\frac{1 - \max_y q_y}{\tau - 1}$.

    Raises:
        ValueError: ``q`` is not a distribution over its last axis, or ``tau`` is negative.
    """
    require_nonnegative(tau=tau, q=q)
    require_between(1 - 1e-6, 1 + 1e-6, **{"sum of q": q.sum(-1)})
    if tau >= 2:
        return (1 - q.amax(-1)) / (tau - 1)
    a = _one_minus(torch.tensor(tau, dtype=q.dtype, device=q.device)).item()
    return torch.expm1((1 + a) * _log_power_sum(q, -a / (1 + a))) / a


def transform(beta: Float[Tensor, "*batch"], tau: float, classes: int) -> Float[Tensor, "*batch"]:
    r"""$\mathcal T_\tau(\beta)$: a zero-one regret of $\beta$ needs at least this surrogate regret.

    Exactly the least for $\tau \le 1$ and, with two classes, for $\tau \le 2$; otherwise a lower bound.
    With $A = \frac12\big((1+\beta)^{1/(2-\tau)} + (1-\beta)^{1/(2-\tau)}\big)$ it is $\frac{c^{1-\tau}}{1-\tau}
    (1 - A^{2-\tau})$, where $c = 2$ for $\tau < 1$ and $c = n$, the number of classes, for $1 < \tau < 2$; the limit in
    between is $\frac{1+\beta}2\log(1+\beta) + \frac{1-\beta}2\log(1-\beta)$; from 2 on $\frac{\beta}{(\tau-1)
    n^{\tau-1}}$.

    Raises:
        ValueError: ``beta`` is outside [0, 1], ``tau`` is negative, or there are fewer than 2 classes.
    """
    require_between(0, 1, beta=beta)
    require_nonnegative(tau=tau)
    require_at_least(2, classes=classes)
    if tau >= 2:
        return beta / ((tau - 1) * classes ** (tau - 1))
    a = _one_minus(torch.tensor(tau, dtype=beta.dtype, device=beta.device)).item()
    log_a = _log_power_sum(torch.stack([1 + beta, 1 - beta], -1) / 2, -a / (1 + a)) - a / (1 + a) * math.log(2)
    return (-((2 if tau <= 1 else classes) ** a) * torch.expm1((1 + a) * log_a) / a).clamp(min=0)


def gamma(regret: Float[Tensor, "*batch"], tau: float, classes: int) -> Float[Tensor, "*batch"]:
    r"""$\Gamma_\tau = \mathcal T_\tau^{-1}$ by bisection; 1, the largest regret there is, beyond $\mathcal T_\tau(1)$.

    Raises:
        ValueError: ``regret`` is negative, or as in `transform`.
    """
    require_nonnegative(regret=regret)
    low, high = torch.zeros_like(regret), torch.ones_like(regret)
    for _ in range(40):  # to 1e-12; the upper end is returned, so that no bound comes out too small
        middle = (low + high) / 2
        below = transform(middle, tau, classes) < regret
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return high


def regrets(
    scores: Float[Tensor, "*batch inputs classes"], q: Float[Tensor, "*batch inputs classes"], tau: float
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    r"""Both sides of the bound, $R(h) - R^*(H) + M(H) = R(h) - \mathbb E_x \inf_h$: zero-one, then $\ell_\tau$.

    Inputs are equally likely, and the family can take any scores at any one input. Ties go to the last of the labels.

    Raises:
        ValueError: as in `comp_sum` and `least_conditional`.
    """
    require_finite(scores=scores)
    classes = q.shape[-1]
    chosen = classes - 1 - scores.flip(-1).argmax(-1, keepdim=True)
    zero_one = (q.amax(-1, keepdim=True) - q.gather(-1, chosen))[..., 0].mean(-1)
    every_label = torch.arange(classes, device=q.device).expand(q.shape)
    losses = comp_sum(scores[..., None, :].expand(*q.shape, classes), every_label, tau)
    return zero_one, ((q * losses).sum(-1) - least_conditional(q, tau)).mean(-1)


def best_labelling(q: Float[np.ndarray, "inputs classes"]) -> float:
    """The least zero-one risk of linear scorers over inputs on a line, in their order and equally likely; exact.

    Linear scores leave each class one interval at most, in any order along the line: all cuts are tried, and for each
    the intervals get their classes by optimal assignment.

    Raises:
        ValueError: ``q`` has a negative entry or one that is not finite.
    """
    require_nonnegative(q=q)
    total, best = len(q), 0.0
    for cuts in itertools.product((False, True), repeat=total - 1):
        starts = np.flatnonzero((True, *cuts))
        if len(starts) <= q.shape[1]:
            hits = np.add.reduceat(q, starts, axis=0)
            best = max(best, hits[linear_sum_assignment(hits, maximize=True)].sum())
    return 1 - best / total


def fit_linear(
    q: Float[Tensor, "worlds inputs classes"],
    features: Float[Tensor, "inputs features"],
    tau: float,
    start: Float[Tensor, "starts worlds features classes"],
    steps: int = 60,
) -> tuple[Float[Tensor, "worlds features classes"], Float[Tensor, " worlds"]]:
    r"""The linear scorer with the least risk of $\ell_\tau$ in every world, and that risk, by damped Newton steps.

    The gradient of the loss in the scores is $p_y^{\tau-1}(p - e_y)$. Convex up to $\tau = 1$; beyond, the best of the
    starts is returned. Ends before ``steps`` when a step no longer moves any of the risks by 1e-13.

    Raises:
        ValueError: ``q`` or ``tau`` is negative or not finite, or ``steps`` < 1.
    """
    require_nonnegative(q=q, tau=tau)
    require_at_least(1, steps=steps)
    a = _one_minus(torch.tensor(tau, dtype=q.dtype, device=q.device))

    def risk(w: Tensor) -> tuple[Tensor, Tensor]:
        log_p = (features @ w).log_softmax(-1)
        return (q * torch.expm1(-a * log_p) / a).sum(-1).mean(-1), log_p

    w, size = start.clone(), start[0, 0].numel()
    value, log_p = risk(w)
    damping = torch.full_like(value, 1e-2)
    for _ in range(steps):
        p, v = log_p.exp(), q * torch.exp(-a * log_p)
        total = v.sum(-1, keepdim=True)
        g = torch.einsum("if,swic->swfc", features, total * p - v).flatten(-2) / len(features)
        outer = (a - 1) * total[..., None] * p[..., None] * p[..., None, :]
        cross = a * p[..., None] * v[..., None, :]
        h = torch.diag_embed(total * p + a * v) + outer - cross - cross.mT
        h = torch.einsum("if,ig,swicd->swfcgd", features, features, h).reshape(*g.shape, size) / len(features)
        h.diagonal(dim1=-2, dim2=-1).add_(damping[..., None])
        trial = w - torch.linalg.solve(h, g).view_as(w)
        new, new_log_p = risk(trial)
        better = new < value
        w = torch.where(better[..., None, None], trial, w)
        log_p = torch.where(better[..., None, None], new_log_p, log_p)
        gain, value = value - new, torch.where(better, new, value)
        if gain.abs().max() < 1e-13:
            break
        damping = (damping * torch.where(better, 0.2, 5.0)).clamp(1e-12, 1e6)
    best = value.argmin(0)
    worlds = torch.arange(q.shape[0], device=q.device)
    return w[best, worlds], value[best, worlds]


def smooth_term(
    scores: Float[Tensor, "*batch classes"], moved: Float[Tensor, "*batch classes"], labels: Int[Tensor, "*batch"]
) -> Float[Tensor, "*batch"]:
    r"""$\|\bar\Delta(x') - \bar\Delta(x)\|_2$; $\bar\Delta$ stacks the margins $h(x, y) - h(x, y')$ for $y' \ne y$."""
    change = moved - scores
    return torch.linalg.vector_norm(change.gather(-1, labels[..., None]) - change, dim=-1)


def divergence(
    scores: Float[Tensor, "*batch classes"], moved: Float[Tensor, "*batch classes"], labels: Int[Tensor, "*batch"]
) -> Float[Tensor, "*batch"]:
    """Kullback-Leibler divergence of the moved input's probabilities from the clean ones (TRADES); ignores labels."""
    log_p = scores.log_softmax(-1)
    return (log_p.exp() * (log_p - moved.log_softmax(-1))).sum(-1)


def attack(
    x: Float[Tensor, "*batch features"],
    objective: Callable[[Tensor], Tensor],
    *,
    radius: float,
    steps: int,
    generator: torch.Generator,
) -> Float[Tensor, "*batch features"]:
    """Projected gradient ascent on ``objective(moved)`` in the max-norm ball around ``x``, within [0, 1] (PGD).

    From a random start, by signs, with steps of 2.5 ``radius / steps``. A ``radius`` of 0 returns ``x``.

    Raises:
        ValueError: ``radius`` is negative, ``steps`` < 1, or ``x`` is outside [0, 1].
    """
    require_nonnegative(radius=radius)
    require_at_least(1, steps=steps)
    require_between(0, 1, x=x)
    low, high = (x - radius).clamp_(min=0), (x + radius).clamp_(max=1)
    noise = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    moved = torch.lerp(low, high, noise)
    for _ in range(steps):
        (slope,) = torch.autograd.grad(objective(moved.requires_grad_()), moved)
        moved = moved.detach().add_(slope.sign_(), alpha=2.5 * radius / steps).clamp_(low, high)
    return moved


@dataclass(frozen=True)
class Defence:
    """What the attacker raises while training, and what the learner lowers, both from the scores at x and at x'."""

    inner: Callable[[Tensor, Tensor, Tensor], Tensor]  # scores, scores at the moved input, labels
    outer: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # the same, and the trade-off


DEFENCES = {
    "smooth comp-sum": Defence(smooth_term, lambda h, m, y, nu: comp_sum(h, y, 1.0) + nu * smooth_term(h, m, y)),
    "TRADES": Defence(divergence, lambda h, m, y, beta: comp_sum(h, y, 1.0) + beta * divergence(h, m, y)),
    "PGD training": Defence(
        lambda h, m, y: comp_sum(m, y, 1.0),
        lambda h, m, y, share: (1 - share) * comp_sum(h, y, 1.0) + share * comp_sum(m, y, 1.0),
    ),
}


def adversarial_loss(
    network: torch.nn.Module,
    x: Float[Tensor, "copies batch features"],
    labels: Int[Tensor, "copies batch"],
    plan: Sequence[tuple[Defence, slice]],
    trade_off: Float[Tensor, "copies 1"],
    *,
    radius: float,
    steps: int,
    generator: torch.Generator,
) -> Float[Tensor, ""]:
    """One training loss of many copies side by side: ``plan`` says which defence the copies of each slice use.

    Every copy pays the same number of passes: one clean, ``steps`` for its own attack, one at the moved input.
    """
    scores = network(x)

    def objective(moved: Tensor) -> Tensor:
        h, m = scores.detach(), network(moved)
        return sum(defence.inner(h[part], m[part], labels[part]).sum() for defence, part in plan)

    m = network(attack(x, objective, radius=radius, steps=steps, generator=generator))
    losses = [defence.outer(scores[part], m[part], labels[part], trade_off[part]) for defence, part in plan]
    return torch.cat(losses).mean(1).sum()


def accuracy_under_attack(
    network: torch.nn.Module,
    x: Float[Tensor, "copies batch features"],
    labels: Int[Tensor, "copies batch"],
    *,
    radius: float,
    steps: int,
    generator: torch.Generator,
) -> tuple[Float[Tensor, " copies"], Float[Tensor, " copies"]]:
    """Clean accuracy, and accuracy that survives the clean input and two attacks: on the margin, on cross-entropy."""
    safe = clean = network(x).argmax(-1) == labels

    def margin(h: Tensor) -> Tensor:
        own = labels[..., None]
        return h.scatter(-1, own, -torch.inf).amax(-1) - h.gather(-1, own)[..., 0]

    for lure in (margin, lambda h: comp_sum(h, labels, 1.0)):

        def objective(moved: Tensor, lure: Callable[[Tensor], Tensor] = lure) -> Tensor:
            return lure(network(moved)).sum()

        moved = attack(x, objective, radius=radius, steps=steps, generator=generator)
        safe = safe & (network(moved).argmax(-1) == labels)
    return clean.float().mean(1), safe.float().mean(1)
