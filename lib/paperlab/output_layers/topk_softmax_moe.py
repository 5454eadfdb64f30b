r"""Mixtures of linear experts behind a top-K gate: sampling, maximum likelihood, and losses that know no labels.

A sparse layer of experts lets K of k speak at each input. Whether its experts can be learnt, and how fast, is a
question of statistics: this module fits such mixtures to data drawn from one, and measures how far they are from it.

Nguyen, Akbarian, Yan and Ho (2023), https://arxiv.org/abs/2309.13850, sections 2 and 3.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from paperlab.checks import require_at_least, require_between, require_finite, require_nonempty, require_positive

ORDER = {0: 1, 1: 1, 2: 4, 3: 6}  # r-bar by the number of experts in a cell; from 4 on the paper knows: at least 7
# the compact set of the theorems, for standard deviations instead of variances
BOX = {"gate_bias": (-3.0, 3.0), "gate_slope": (-8.0, 8.0), "line": (-5.0, 5.0), "sd": (0.2, 2.0)}
LEAST = 1e-300  # no density is taken to be smaller: an observation that all experts miss by 35 deviations
TIE = 1e-6  # gate slopes closer than this count as tied
CHUNK = 20_000  # observations handled at a time


class Experts(NamedTuple):
    r"""k experts in each of several copies. Column 0 holds intercepts, the others slopes, one for each feature.

    ``gate`` is $(\beta_{0i}, \beta_{1i})$, ``mean`` is $(b_i, a_i)$, ``log_sd`` half the logarithm of $\sigma_i$, which
    the paper uses for the variance. Adding one vector to all gates changes nothing: the last expert's gate is 0.
    """

    gate: Float[Tensor, "copies k d1"]
    mean: Float[Tensor, "copies k d1"]
    log_sd: Float[Tensor, "copies k"]

    def flat(self) -> Float[Tensor, "copies k p"]:
        """Everything about an expert in one row."""
        return torch.cat([self.gate, self.mean, self.log_sd[..., None]], -1)

    @staticmethod
    def of(flat: Float[Tensor, "copies k p"]) -> "Experts":
        """The inverse of `flat`."""
        d1 = (flat.shape[-1] - 1) // 2
        return Experts(flat[..., :d1], flat[..., d1 : 2 * d1], flat[..., -1])

    def take(self, rows: Sequence[int]) -> "Experts":
        """These experts in this order, the gates shifted so that the last one's is 0."""
        gate, mean, log_sd = (part[:, list(rows)] for part in self)
        return Experts(gate - gate[:, -1:], mean, log_sd)


class Fitted(NamedTuple):
    """Fitted experts, their mean log-likelihood, and the largest entry of its gradient (inside the box)."""

    experts: Experts
    log_likelihood: Float[Tensor, " copies"]
    gradient: Float[Tensor, " copies"]


def make_experts(gate: Sequence, mean: Sequence, sd: Sequence, **kind: object) -> Experts:
    """One copy of k experts from lists: rows (β₀, β₁…), rows (b, a…) and standard deviations, in float64.

    Raises:
        ValueError: lengths differ, numbers that are not finite, or a deviation that is not positive.
    """
    require_positive(sd=sd)
    parts = [torch.tensor([part], **{"dtype": torch.float64, **kind}) for part in (gate, mean, sd)]
    require_finite(gate=parts[0], mean=parts[1])
    if parts[0].shape != parts[1].shape or parts[0].shape[:2] != parts[2].shape:
        raise ValueError(f"gate, mean and sd must agree, got {', '.join(str(tuple(p.shape)) for p in parts)}")
    return Experts(parts[0] - parts[0][:, -1:], parts[1], parts[2].log())


def gate_weights(
    gate: Float[Tensor, "copies k d1"], z: Float[Tensor, "#copies d1 n"], selected: int, with_bias: bool = False
) -> Float[Tensor, "copies k n"]:
    r"""$\mathrm{Softmax}(\mathrm{TopK}(\beta_1^\top x, K; \beta_0))$, 0 for the experts that are not selected.

    Selection goes by $\beta_{1i}^\top x$ alone; ``with_bias`` selects by the whole logit. A tie
    goes to the earlier expert. With ``selected`` = k this is the ordinary softmax gate. ``z`` is (1, x) in columns.

    Raises:
        ValueError: ``selected`` outside 1 to k.
    """
    require_between(1, gate.shape[1], selected=selected)
    logits = gate @ z
    if selected < gate.shape[1]:
        line = gate.shape[2] == 2 and not with_bias
        at = z.new_tensor([[[1.0, 1.0], [-1.0, 1.0]]]) if line else z  # on a line only the sign of x decides
        score = gate @ at if with_bias else gate[..., 1:] @ at[..., 1:, :]
        out = score.argsort(dim=1, descending=True, stable=True).argsort(1) >= selected
        logits = logits.masked_fill(torch.where(z[:, 1:] > 0, out[..., 1:], out[..., :1]) if line else out, -math.inf)
    return logits.softmax(1)


def columns(x: Float[Tensor, "copies n d"]) -> Float[Tensor, "copies d1 n"]:
    """Inputs as columns, with a first row of ones."""
    return torch.cat([torch.ones_like(x[..., :1]), x], -1).mT


def log_density(
    e: Experts, x: Float[Tensor, "#copies n d"], y: Float[Tensor, "#copies n"], selected: int, with_bias: bool = False
) -> Float[Tensor, "copies n"]:
    r"""$\log g(y \mid x)$, the mixture of the selected experts' normal densities (equation 1).

    Raises:
        ValueError: as `gate_weights`.
    """
    return _parts(e, columns(x), y, selected, with_bias)[1].sum(1).clamp_min(LEAST).log()


def _parts(e: Experts, z: Tensor, y: Tensor, selected: int, with_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gate, gate times normal density, and standardised residuals, all (copies, k, n)."""
    gate, precise = gate_weights(e.gate, z, selected, with_bias), (-e.log_sd).exp()[..., None]
    u = (y[:, None] - e.mean @ z) * precise
    return gate, gate * (u.square() * -0.5).exp_() * (precise / math.sqrt(2 * math.pi)), u


def scores(e: Experts, z: Tensor, y: Tensor, selected: int, with_bias: bool = False) -> tuple[Tensor, ...]:
    r"""$\log g$, (copies, n), its derivative in every parameter, (copies, k, p, n), and $\pi$, r, u, (copies, k, n).

    With the responsibility $r_i$ of expert i for y and its gate $\pi_i$: $(r_i - \pi_i) z$ for the gate,
    $r_i u_i z / s_i$ for the mean, $r_i (u_i^2 - 1)$ for $\log s_i$, where $u_i = (y - b_i - a_i^\top x) / s_i$.
    The regions are held as they are.
    """
    gate, joint, u = _parts(e, z, y, selected, with_bias)
    total = joint.sum(1, keepdim=True).clamp_min(LEAST)
    r, precise = joint / total, (-e.log_sd).exp()[..., None]
    moves = (r - gate)[:, :, None] * z[:, None], (r * u * precise)[:, :, None] * z[:, None]
    return total[:, 0].log(), torch.cat([*moves, (r * (u.square() - 1))[:, :, None]], 2), gate, r, u


def curvature(e: Experts, z: Tensor, y: Tensor, selected: int, with_bias: bool = False) -> tuple[Tensor, ...]:
    r"""Sums over the observations: $\log g$, its scores s, $s s^\top$, and minus the second derivative of $\log g$.

    The last is $s s^\top + s \tilde\pi^\top + \tilde\pi s^\top$, where $\tilde\pi$ has $\pi_i z$ in the gates' places
    and 0 elsewhere, and a block for each expert by itself: $\pi_i z z^\top - r_i f^{-1} \partial^2 f$, where f is
    $e^{\beta_{0i} + \beta_{1i}^\top x}$ times its normal density.
    """
    value, s, gate, r, u = scores(e, z, y, selected, with_bias)
    (copies, k, p, _), d1, rows = s.shape, z.shape[1], s.flatten(1, 2)
    outer, cross = rows @ rows.mT, rows @ (gate[:, :, None] * z[:, None]).flatten(1, 2).mT
    whole, cross = outer.view(copies, k, p, k, p).clone(), cross.view(copies, k, p, k, d1)
    whole[..., :d1] += cross
    whole[:, :, :d1] += cross.permute(0, 3, 4, 1, 2)

    by_z, wide, tail = (rows @ z.mT).view(copies, k, p, d1), s[:, :, -1], u.square() - 3  # wide is r (u² - 1)
    spread = ((wide[:, :, None] * z[:, None]).flatten(1, 2) @ z.mT).view(copies, k, d1, d1)
    own = -torch.cat([by_z, s.new_zeros(copies, k, p, p - d1)], -1)  # the columns of the gate, the others follow
    own[:, :, :d1, d1:] = own[:, :, d1:, :d1].mT
    own[:, :, d1:-1, d1:-1] = -spread * (-2 * e.log_sd).exp()[..., None, None]
    own[:, :, d1:-1, -1] = own[:, :, -1, d1:-1] = -(s[:, :, d1] * tail) @ z.mT
    own[:, :, -1, -1] = (2 * r - wide * tail).sum(2)
    whole.diagonal(dim1=1, dim2=3).add_(own.permute(0, 2, 3, 1))
    return value.sum(1), by_z[..., 0].flatten(1), outer, whole.view(copies, k * p, k * p)


def draw(
    truth: Experts, copies: int, n: int, selected: int, generator: torch.Generator
) -> tuple[Float[Tensor, "copies n d"], Float[Tensor, "copies n"]]:
    """``copies`` samples of n observations, x uniform on the cube from -1 to 1, y from one copy of experts.

    Raises:
        ValueError: copies or n below 1, or as `gate_weights`.
    """
    require_at_least(1, copies=copies, n=n)
    kind = {"generator": generator, "dtype": truth.gate.dtype, "device": truth.gate.device}
    x = 2 * torch.rand(copies, n, truth.gate.shape[2] - 1, **kind) - 1
    z = columns(x)
    gate = gate_weights(truth.gate.expand(copies, -1, -1), z, selected)
    chosen = (torch.rand(copies, 1, n, **kind) > gate.cumsum(1)[:, :-1]).sum(1, keepdim=True)
    mean, sd = truth.mean @ z, truth.log_sd.exp()[..., None].expand_as(gate)
    return x, mean.gather(1, chosen)[:, 0] + sd.gather(1, chosen)[:, 0] * torch.randn(copies, n, **kind)


def _climb(
    measure: Callable, theta: Tensor, free: Tensor, steps: int, tolerance: float, selected: int | None
) -> tuple[Tensor, ...]:
    """Damped Newton, one damping a copy: (curvature + damping) step = gradient, kept only where the value rises.

    ``measure(theta, rows)`` gives value, gradient, information and curvature of those copies: minus the second
    derivative, in whose place the information stands where that is not positive. ``free`` says what may move. With
    one feature the regions depend on the order of the gates' slopes alone: ``edges`` are the places in that order
    where a swap changes which are ``selected``, and no step may go across (None: it may). A maximum may lie on an
    edge, where two slopes tie and can only move together.
    """
    (copies, k, p), d1 = theta.shape, (theta.shape[2] - 1) // 2
    span = [BOX["gate_bias"], *[BOX["gate_slope"]] * (d1 - 1), *[BOX["line"]] * d1, tuple(map(math.log, BOX["sd"]))]
    low, high = theta.new_tensor(span * k).T
    edges = torch.tensor(sorted({selected, k - selected} - {0, k}) if d1 == 2 and selected else [], device=theta.device)
    edges, unit = edges.long(), torch.eye(k * p, dtype=theta.dtype, device=theta.device)
    theta, free, everyone = (
        theta.flatten(1),
        free.flatten().expand(copies, k * p),
        torch.arange(copies, device=low.device),
    )
    damping, blocked = theta.new_full((copies,), 1e-2), torch.zeros(copies, 1, dtype=torch.bool, device=low.device)
    state = [theta.clone(), *measure(theta.view(copies, k, p), everyone)]
    theta, value, slope, info, curve = state

    def allowed(rows: Tensor, blocked: Tensor | bool = False) -> Tensor:
        """Projection on the directions that leave neither the box nor the regions, (rows, k p, k p)."""
        at, pull = theta[rows], slope[rows]
        may = free[rows] & ~(((at >= high) & (pull > 0)) | ((at <= low) & (pull < 0)))
        pull, order = pull * may, at[:, 1::p].argsort(1) * p + 1
        under, over = order[:, edges - 1], order[:, edges]
        shut = ((pull.gather(1, over) < pull.gather(1, under)) | blocked) & (
            at.gather(1, over) - at.gather(1, under) < TIE
        )
        wall = (unit[over] - unit[under]) * shut[..., None] * may[:, None]
        gram = wall @ wall.mT + 1e-12 * unit[: len(edges), : len(edges)]
        return unit * may[:, None] - wall.mT @ torch.linalg.solve(gram, wall)

    def inside(old: Tensor, new: Tensor) -> Tensor:
        """The share of the step from old to new that ends at the first edge, (rows, 1)."""
        rank = old[:, 1::p].argsort(1).argsort(1)[..., None]
        gap, left = (s[:, None, 1::p] - s[:, 1::p, None] for s in (old, new))
        hit = (
            ((rank < edges)[:, :, None] & (rank >= edges)[:, None]).any(-1) & (left < TIE / 100) & (gap - left > 1e-12)
        )
        return torch.where(hit, (gap - TIE / 100).clamp_min(0) / (gap - left), 1.0).amin((1, 2))[:, None]

    for _ in range(steps):
        rows = ((allowed(everyone) @ slope[..., None]).abs().amax((1, 2)) > tolerance).nonzero()[:, 0]
        if not len(rows):
            break
        may, scale = allowed(rows, blocked[rows]), info[rows].diagonal(dim1=1, dim2=2)
        lifted = torch.diag_embed(damping[rows, None] * (scale + 1e-3 * scale.mean(1, keepdim=True)) + 1e-12)
        matrix, safe = (may @ (m[rows] + lifted) @ may + unit - may for m in (curve, info))
        matrix = torch.where(torch.linalg.cholesky_ex(matrix).info[:, None, None] > 0, safe, matrix)
        step = torch.linalg.solve(matrix, (may @ slope[rows][..., None])[..., 0])
        new = torch.where(free[rows], (theta[rows] + step).clamp(low, high), theta[rows])
        share = inside(theta[rows], new)
        new, blocked[rows] = theta[rows] + share * (new - theta[rows]), share < 1e-3  # next time along the edge
        found = new, *measure(new.view(-1, k, p), rows)
        better = found[1] > value[rows]
        for old, part in zip(state, found, strict=True):
            old[rows[better]] = part[better]
        damping[rows] = torch.where(better, damping[rows] / 4, damping[rows] * 5).clamp(1e-9, 1e9)
    return theta.view(copies, k, p), value, (allowed(everyone) @ slope[..., None]).abs().amax((1, 2))


def _likelihood(x: Tensor, y: Tensor, selected: int, with_bias: bool) -> Callable:
    """What `_climb` measures, as means over the observations. With more rows than samples these begin anew."""
    (copies, n), z, size = y.shape, columns(x), max(1, CHUNK // y.shape[1])

    def measure(theta: Tensor, rows: Tensor) -> list[Tensor]:
        parts = zip(theta.split(size), (rows % copies).split(size), strict=True)
        found = [curvature(Experts.of(part), z[at], y[at], selected, with_bias) for part, at in parts]
        return [torch.cat(part) / n for part in zip(*found, strict=True)]

    return measure


@torch.no_grad()
def fit(
    starts: Sequence[Experts],
    x: Float[Tensor, "copies n d"],
    y: Float[Tensor, "copies n"],
    *,
    selected: int,
    steps: int = 60,
    screen: int = 5,
    screened: int = 1000,
    with_bias: bool = False,
    tolerance: float = 1e-8,
) -> Fitted:
    """Maximum likelihood in the box `BOX`, by damped Newton steps from the most promising of the starts.

    If there are several, each gets ``screen`` steps on the first ``screened`` observations, and of each copy the one
    with the best likelihood on all of them goes on. From there the likelihood never falls. A start has one copy, or
    one for each sample; its last expert's gate stays 0.

    Raises:
        ValueError: no start, no observation, data that are not finite, or as `gate_weights`.
    """
    require_nonempty(starts=starts, y=y)
    require_finite(x=x, y=y)
    free, fixed = torch.ones_like(starts[0].flat()[0], dtype=torch.bool), None if with_bias else selected
    free[-1, : x.shape[2] + 1] = False
    measure, theta = (
        _likelihood(x, y, selected, with_bias),
        torch.cat([s.flat().expand(len(y), -1, -1) for s in starts]),
    )
    if len(starts) > 1:
        first = _likelihood(x[:, :screened], y[:, :screened], selected, with_bias)
        theta, rows = _climb(first, theta, free, screen, tolerance, fixed)[0], torch.arange(len(theta), device=y.device)
        best = measure(theta, rows)[0].view(-1, len(y)).argmax(0)
        theta = theta[best * len(y) + rows[: len(y)]]
    found = _climb(measure, theta, free, steps, tolerance, fixed)
    return Fitted(Experts.of(found[0]), *found[1:])


class Quadrature(NamedTuple):
    """Points (x, y) that carry one density exactly enough to integrate against it; weights include that of x."""

    x: Float[Tensor, "1 n d"]
    y: Float[Tensor, "1 n"]
    weight: Float[Tensor, " n"]


def grid(truth: Experts, panels: int = 2, nodes: int = 16, x: Tensor | None = None) -> Quadrature:
    """Gauss-Legendre in x on equal panels of [-1, 1] (regions end at panels' ends), the trapezoid rule in y.

    With more than one feature give the points ``x``, (points, d), all of the same weight.

    Raises:
        ValueError: panels or nodes below 1.
    """
    require_at_least(1, panels=panels, nodes=nodes)
    kind = {"dtype": truth.gate.dtype, "device": truth.gate.device}
    if x is None:
        at, weight = (torch.tensor(part, **kind) for part in np.polynomial.legendre.leggauss(nodes))
        left = torch.linspace(-1, 1, panels + 1, **kind)[:-1, None]
        x, weight = (left + (at + 1) / panels).reshape(-1, 1), (weight / (2 * panels)).repeat(panels)
    else:
        weight = torch.full((len(x),), 1 / len(x), **kind)
    sd, reach = truth.log_sd.exp(), truth.mean[..., 1:].abs().sum(-1)
    step = float(sd.min()) / 5
    low, high = (truth.mean[..., 0] - reach - 8 * sd).min(), (truth.mean[..., 0] + reach + 8 * sd).max()
    y = torch.arange(float(low), float(high), step, **kind)
    return Quadrature(
        x.repeat_interleave(len(y), 0)[None], y.repeat(len(x))[None], weight.repeat_interleave(len(y)) * step
    )


@torch.no_grad()
def hellinger(
    e: Experts, truth: Experts, at: Quadrature, selected: int, truth_selected: int, with_bias: bool = False
) -> Float[Tensor, " copies"]:
    r"""Hellinger distance of the conditional densities, $h^2 = \frac12 E_x \int (\sqrt g - \sqrt{g_*})^2 dy$, 0 to 1.

    Raises:
        ValueError: as `gate_weights`.
    """
    known = log_density(truth, at.x, at.y, truth_selected).div(2).exp()
    return ((log_density(e, at.x, at.y, selected, with_bias).div(2).exp() - known).square() @ at.weight).div(2).sqrt()


@torch.no_grad()
def nearest(
    start: Experts,
    truth: Experts,
    at: Quadrature,
    *,
    selected: int,
    truth_selected: int,
    held: Bool[Tensor, "k p"],
    steps: int,
    tolerance: float = 1e-10,
) -> Fitted:
    """The experts nearest to the truth in Hellinger distance with some parameters ``held``: no data, no noise.

    The value returned is minus the squared distance.

    Raises:
        ValueError: as `gate_weights`.
    """
    z, known = columns(at.x), log_density(truth, at.x, at.y, truth_selected).div(2).exp()

    def measure(theta: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        value, s, *_ = scores(Experts.of(theta), z, at.y, selected)
        root, s = value.div(2).exp(), s.flatten(1, 2)
        s *= (root * at.weight.sqrt() / 2)[:, None]  # now the derivative of the weighted root of the density
        miss = (known - root) * at.weight.sqrt()
        return -miss.square().sum(1) / 2, (s @ miss[..., None])[..., 0], *[s @ s.mT] * 2

    found = _climb(measure, start.flat(), ~held, steps, tolerance, selected)
    return Fitted(Experts.of(found[0]), *found[1:])


def _places(e: Experts) -> Float[Tensor, "copies k q"]:
    """What the Voronoi cells are cells of: slope of the gate, intercept, slope and variance of the expert."""
    return torch.cat([e.gate[..., 1:], e.mean, (2 * e.log_sd).exp()[..., None]], -1)


def voronoi(e: Experts, truth: Experts) -> Int[Tensor, "copies k"]:
    """The true expert nearest to each fitted one: cell $A_j$ holds the fitted experts with entry j."""
    return torch.cdist(_places(e), _places(truth).expand(len(e.gate), -1, -1)).argmin(2)


def _misses(e: Experts, truth: Experts) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cells and their sizes (copies, k), distances in (gate slope, b, a, variance) and their powers (copies, k, 4).

    The power is 1 for an expert alone in its cell, else r-bar or half of it.
    """
    cell, d = voronoi(e, truth), e.gate.shape[2] - 1
    miss = (_places(e) - _places(truth)[0][cell]).split([d, 1, d, 1], -1)
    size = torch.nn.functional.one_hot(cell, truth.gate.shape[1]).sum(1).gather(1, cell)
    r = miss[0].new_tensor([ORDER.get(m, 7) for m in range(e.gate.shape[1] + 1)])[size][..., None]
    power = torch.where(r > 1, r * r.new_tensor([1, 1, 0.5, 0.5]), 1.0)
    return cell, size, torch.stack([part.norm(dim=-1) for part in miss], -1), power


def voronoi_loss(e: Experts, truth: Experts, selected: int, exact: bool = False) -> Float[Tensor, " copies"]:
    r"""The paper's $D_1$ (``exact``: every exponent is 1) or $D_2$, for one copy of true experts.

    Each cell gives $\sum_{i \in A_j} e^{\beta_{0i}}$ times the distances of its experts, raised to the powers of its
    size, and $|\sum_{i \in A_j} e^{\beta_{0i}} - e^{\beta_{0j}^*}|$; the worst K = ``selected`` cells are added up.

    Raises:
        ValueError: ``selected`` outside 1 to the number of true experts.
    """
    require_between(1, truth.gate.shape[1], selected=selected)
    cell, _, miss, power = _misses(e, truth)
    weight, known = e.gate[..., 0].exp(), truth.gate[..., 0].exp()
    none, lost = torch.zeros_like(known).repeat(len(cell), 1), weight * (miss if exact else miss**power).sum(-1)
    cells = none.scatter_add(1, cell, lost) + (none.scatter_add(1, cell, weight) - known).abs()
    return cells.topk(selected, dim=1).values.sum(1)


def errors(e: Experts, truth: Experts) -> tuple[Float[Tensor, "copies 4"], Float[Tensor, "copies 4"]]:
    r"""Errors in (gate slope, b, a, variance) of experts that share a cell, and of those alone (their mean).

    Where a cell is shared, the mean is the one that $D_2$ bounds: of powers $\bar r$ (or $\bar r/2$), weighted by
    $e^{\beta_{0i}}$, and then the root. NaN where no expert shares or none is alone.
    """
    _, size, miss, power = _misses(e, truth)
    weight, most = e.gate[..., :1].exp() * (size > 1)[..., None], power.amax(1)
    shared = ((weight * miss ** most[:, None]).sum(1) / weight.sum(1)) ** (1 / most)
    lone = (size == 1).to(miss.dtype)[..., None]
    return shared, (miss * lone).sum(1) / lone.sum(1)


def twins(e: Experts, i: int, offset: Sequence[float]) -> Experts:
    """Expert i of each copy twice, its weight halved, moved by minus and plus ``offset`` (a row of `Experts.flat`).

    Raises:
        ValueError: no such expert but the last, or an offset of another length.
    """
    require_between(0, e.gate.shape[1] - 2, i=i)
    flat = e.flat()[:, [*range(i + 1), *range(i, e.gate.shape[1])]]
    move = flat.new_tensor(offset)
    if move.shape != flat.shape[-1:]:
        raise ValueError(f"offset must have {flat.shape[-1]} entries, got {len(move)}")
    flat[:, i : i + 2, 0] -= math.log(2)
    flat[:, i : i + 2] += torch.stack([-move, move])
    return Experts.of(flat)
