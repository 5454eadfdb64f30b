r"""Deep linear networks: a straight line for a function, a cliff for a learning curve.

A stack of matrices computes nothing that one matrix could not. Yet gradient descent on the stack waits on plateaus,
drops off cliffs and learns one thing after another, as nonlinear networks do, and here these curves have a formula.

Saxe, McClelland and Ganguli (2013), https://arxiv.org/abs/1312.6120. Weights are lists $W^1, \dots, W^M$, first layer
first; $M = N_l - 1$ counts matrices. The leading axis of each is the copy: a seed, a learning rate, an initialisation.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from paperlab.checks import (
    require_at_least,
    require_between,
    require_finite,
    require_nonempty,
    require_positive,
    require_same_length,
)

Weights = list[Tensor]
DIVERGED = 1e6  # an error this many times the task's own size is not coming back


def mode_strength(t: Float[np.ndarray, "*t"], s: float, u0: float, tau: float = 1.0) -> Float[np.ndarray, "*t"]:
    r"""Equation 12: $u(t) = s\,e^{2st/\tau} / (e^{2st/\tau} - 1 + s/u_0)$; two layers, $a = b$, white inputs.

    Raises:
        ValueError: ``s``, ``u0`` or ``tau`` is not positive.
    """
    require_positive(s=s, u0=u0, tau=tau)
    return s / (1 + (s / u0 - 1) * np.exp(-2 * s * t / tau))


def learning_time(u0: float, u: float, s: float, tau: float = 1.0) -> float:
    r"""Equation 11: from $u_0$ to $u$ takes $\frac{\tau}{2s} \ln \frac{u (s - u_0)}{u_0 (s - u)}$.

    Raises:
        ValueError: a value is not positive, or ``u0`` and ``u`` are not below ``s``.
    """
    require_positive(u0=u0, u=u, s=s, tau=tau, **{"s - u0": s - u0, "s - u": s - u})
    return tau / (2 * s) * math.log(u * (s - u0) / (u0 * (s - u)))


def unbalanced_strength(
    t: Float[np.ndarray, "*t"], s: float, a0: float, b0: float, tau: float = 1.0
) -> Float[np.ndarray, "*t"]:
    r"""Appendix A, with its two factors of 2 put right: the product $u = ab$ of two unequal layers, $a \ne b$.

    $a^2 - b^2 = \pm c_0 = \pm 2c$ is conserved, so $\tau\dot u = 2\sqrt{c^2 + u^2}\,(s - u)$. With $u = c \sinh\theta$
    that is $\tau\dot\theta = 2 (s - c \sinh\theta) = 2s - c_0 \sinh\theta$, solved in $\tanh(\theta/2)$.

    Equation 25 is printed as $\tau\dot\theta = s - c_0 \sinh\theta$. But $a = \sqrt{c_0} \cosh\frac\theta2$ and
    $b = \sqrt{c_0} \sinh\frac\theta2$ (equation 23) make $ab = \frac{c_0}2 \sinh\theta$ and
    $\dot a = \frac12 b\,\dot\theta$: one 2 is lost in each.

    Raises:
        ValueError: ``s``, ``a0``, ``b0`` or ``tau`` is not positive, or ``a0`` equals ``b0`` (use `mode_strength`).
    """
    require_positive(s=s, a0=a0, b0=b0, tau=tau, **{"the difference of a0 and b0": abs(a0 - b0)})
    c = abs(a0**2 - b0**2) / 2
    r = math.hypot(c, s)
    start = c + s * math.tanh(math.asinh(a0 * b0 / c) / 2)
    decay = (r - start) / (r + start) * np.exp(-2 * r * t / tau)
    half = (r * (1 - decay) / (1 + decay) - c) / s  # tanh(theta / 2)
    return 2 * c * half / (1 - half**2)


def deep_strength(t: Float[np.ndarray, " t"], s: float, u0: float, layers: int) -> Float[np.ndarray, " t"]:
    r"""Equation 15 integrated: $\dot u = M u^{2 - 2/M} (s - u)$ from $u_0 < s$, with $M$ = ``layers`` and $\tau = 1$.

    In $z = \ln \frac{u}{s - u}$ the equation is $\frac{dt}{dz} = u^{2/M - 1} / (M s)$, a plain integral.

    Raises:
        ValueError: ``s`` or ``u0`` is not positive, ``u0`` is not below ``s``, or ``layers`` < 1.
    """
    require_positive(s=s, u0=u0, **{"s - u0": s - u0})
    require_at_least(1, layers=layers)
    z = np.linspace(math.log(u0 / (s - u0)), 35.0, 40_001)
    speed = layers * s * (s / (1 + np.exp(-z))) ** (1 - 2 / layers)
    when = np.concatenate([[0.0], np.cumsum(np.diff(z) * (1 / speed[1:] + 1 / speed[:-1]) / 2)])
    return s / (1 + np.exp(-np.interp(t, when, z)))


def orthogonal(copies: int, rows: int, cols: int, generator: torch.Generator) -> Float[Tensor, "copies rows cols"]:
    """Random matrices with all singular values 1: the Q of a Gaussian's QR, signs fixed so that the law is uniform."""
    q, r = torch.linalg.qr(gaussian(copies, max(rows, cols), min(rows, cols), generator))
    q = q * r.diagonal(dim1=1, dim2=2).sign()[:, None]
    return q if rows >= cols else q.mT


def gaussian(copies: int, rows: int, cols: int, generator: torch.Generator) -> Float[Tensor, "copies rows cols"]:
    """Independent normal entries of variance 1/cols: the norm of a vector is preserved on average (section 3)."""
    shape = (copies, rows, cols)
    return torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device) / math.sqrt(cols)


def decoupled(
    u: Float[Tensor, "out modes"],
    v: Float[Tensor, "in modes"],
    strengths: Float[Tensor, "copies layers modes"],
    width: int,
    generator: torch.Generator,
) -> Weights:
    r"""Section 2: $W^l = R_{l+1} D_l R_l^\top$ with $R_1 = V$, $R_{M+1} = U$, and random orthonormal $R_l$ between.

    ``strengths[c, l]`` is the diagonal of $D_l$ in copy c, one number a mode: $a, b$ in the two-layer case.

    Raises:
        ValueError: fewer hidden units than modes.
    """
    copies, layers, modes = strengths.shape
    require_at_least(modes, width=width)
    inner = [orthogonal(copies, width, modes, generator) for _ in range(layers - 1)]
    frames = [v.expand(copies, -1, -1), *inner, u.expand(copies, -1, -1)]
    return [frames[k + 1] * strengths[:, k, None] @ frames[k].mT for k in range(layers)]


def descent_directions(
    weights: Sequence[Tensor], sigma31: Float[Tensor, "... out in"], sigma11: Float[Tensor, "... in in"]
) -> tuple[Weights, Float[Tensor, "copies out in"]]:
    r"""Equation 13: the directions $\tau\dot W^l$, and the end-to-end map $W = W^M \cdots W^1$.

    $\tau\dot W^l = (W^M \cdots W^{l+1})^\top [\Sigma^{31} - W \Sigma^{11}] (W^{l-1} \cdots W^1)^\top$ is minus the
    gradient of half the squared error. One pass up collects the products below each layer, one pass down carries the
    error.
    """
    below = [weights[0]]
    for w in weights[1:]:
        below.append(w @ below[-1])
    total = below.pop()
    error = sigma31 - total @ sigma11
    directions = []
    for w, prefix in zip(reversed(weights[1:]), reversed(below), strict=True):
        directions.append(error @ prefix.mT)
        error = w.mT @ error
    directions.append(error)
    return directions[::-1], total


@torch.no_grad()
def descend(
    weights: Sequence[Tensor],
    sigma31: Float[Tensor, "... out in"],
    sigma11: Float[Tensor, "... in in"],
    *,
    rate: float | Float[Tensor, " copies"],
    steps: int,
    watch: Callable[[Tensor], Tensor] | None = None,
    every: int = 1,
) -> tuple[Weights, Float[Tensor, "records *watched"] | None]:
    r"""Batch gradient descent at ``rate`` $= 1/\tau$; gives the weights and ``watch(W)`` of every ``every``-th step.

    ``rate`` may hold one rate a copy. Directions are linear in the two correlations, so the rate is a factor on those.

    Raises:
        ValueError: a rate that is not positive, not one rate a copy, no step, no layer, or correlations that are not
            finite.
    """
    require_nonempty(weights=weights)
    require_positive(rate=rate)
    require_at_least(1, steps=steps, every=every)
    require_finite(sigma31=sigma31, sigma11=sigma11)
    if isinstance(rate, Tensor):
        require_same_length(rate=rate, weights=weights[0])
        rate = rate[:, None, None]
    sigma31, sigma11 = rate * sigma31, rate * sigma11
    weights, records = list(weights), []
    for step in range(steps):
        directions, total = descent_directions(weights, sigma31, sigma11)
        if watch is not None and step % every == 0:
            records.append(watch(total))
        weights = [w + d for w, d in zip(weights, directions, strict=True)]
    return weights, torch.stack(records) if records else None


@torch.no_grad()
def steps_to_learn(
    weights: Sequence[Tensor],
    sigma31: Float[Tensor, "... out in"],
    sigma11: Float[Tensor, "in in"],
    *,
    rates: Float[Tensor, " copies"],
    criterion: float,
    limit: int,
    rivals: int = 1,
) -> Float[Tensor, " copies"]:
    r"""The first step with an excess error of at most ``criterion``; infinite if there is none in ``limit`` steps.

    The excess error is $\|(W - W^*) L\|^2 / \|W^* L\|^2$ with the best map $W^* = \Sigma^{31} (\Sigma^{11})^{-1}$ and
    $L L^\top = \Sigma^{11}$: the squared error above the least possible, as a share of what there is to learn.
    Every copy has its own rate; copies that have learned or blown up leave the batch.

    Every ``rivals`` copies in a row race each other: once one of them has learned, the others are called off and keep
    infinity. The least of each race is the same as without, for a fraction of the work.

    Raises:
        ValueError: a rate that is not positive, not one rate a copy, a criterion outside (0, 1), or a number of copies
            that is not a multiple of ``rivals``.
    """
    require_nonempty(weights=weights)
    require_same_length(rates=rates, weights=weights[0])
    require_positive(rates=rates)
    require_between(1e-12, 1, criterion=criterion)
    require_at_least(1, rivals=rivals)
    if len(rates) % rivals:
        raise ValueError(f"rivals must divide the number of copies, got {rivals} for {len(rates)}")
    root = torch.linalg.cholesky(sigma11)
    best = torch.linalg.solve(sigma11, sigma31, left=False).expand(len(rates), -1, -1)
    scale = (best @ root).square().sum((1, 2))
    weights, pace = list(weights), rates[:, None, None]
    kept = [best, scale, pace * sigma31, pace * sigma11]  # what belongs to a copy and leaves with it
    taken, alive = torch.full_like(rates, math.inf), torch.arange(len(rates), device=rates.device)
    for step in range(limit + 1):
        best, scale, *paced = kept
        directions, total = descent_directions(weights, *paced)
        error = ((total - best) @ root).square().sum((1, 2)) / scale
        learned = error <= criterion
        taken[alive[learned]] = step
        won = taken.view(-1, rivals).isfinite().any(1)
        stay = ~won[alive // rivals] & (error < DIVERGED)
        if not stay.any():
            break
        weights = [w + d for w, d in zip(weights, directions, strict=True)]
        if not stay.all():
            alive, kept, weights = alive[stay], [x[stay] for x in kept], [w[stay] for w in weights]
    return taken


def pretrain(
    sigma11: Float[Tensor, "in in"],
    widths: Sequence[int],
    copies: int,
    generator: torch.Generator,
    *,
    steps: int,
    scale: float = 0.1,
) -> Weights:
    r"""Greedy layer-wise pretraining (section 3): layer l learns to reconstruct the output of layer l - 1.

    Each is a two-layer autoencoder on inputs of covariance $C = Q \Lambda Q^\top$, so $\Sigma^{31} = \Sigma^{11} = C$.
    It starts from Gaussian weights times ``scale`` and steps at half the inverse of $C$'s largest eigenvalue. Its
    encoder nears $R\,G\,Q^\top$ with orthogonal $R$ and diagonal gains $G$ (the paper's $M^{1/2}$), and $G \to I$ with
    more ``steps``, directions of low variance last. One encoder a width.

    Raises:
        ValueError: no width, or ``scale`` not positive.
    """
    require_nonempty(widths=widths)
    require_positive(scale=scale)
    c, encoders = sigma11.expand(copies, -1, -1), []
    for width in widths:
        units = c.shape[-1]
        pair = [scale * gaussian(copies, width, units, generator), scale * gaussian(copies, units, width, generator)]
        white = c / torch.linalg.eigvalsh(c)[:, -1, None, None]  # the rate is 1/2 in these units
        (encoder, _), _ = descend(pair, white, white, rate=0.5, steps=steps)
        encoders.append(encoder)
        c = encoder @ c @ encoder.mT
    return encoders


def jacobians(
    weights: Sequence[Tensor], x: Float[Tensor, "copies n"], gain: float
) -> Iterator[Float[Tensor, "copies n n"]]:
    r"""Equations 20 and 22: $\partial x^{l+1} / \partial x^1$ after every layer of $x^{l+1} = g\,W^l \tanh(x^l)$.

    Raises:
        ValueError: ``gain`` is not positive, or ``x`` is not finite.
    """
    require_positive(gain=gain)
    require_finite(x=x)
    jacobian = torch.eye(x.shape[1], dtype=x.dtype, device=x.device).expand(len(x), -1, -1)
    for w in weights:
        activity = torch.tanh(x)
        jacobian = w @ (gain * (1 - activity**2)[:, :, None] * jacobian)
        x = gain * (w @ activity[:, :, None])[:, :, 0]
        yield jacobian
