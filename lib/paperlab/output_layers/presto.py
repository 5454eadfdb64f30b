r"""PRESTO: let the frequent steps before a rare event help to estimate its probability.

Somebody sees an advertisement, clicks, buys. Purchases are too rare to learn ten weights from, clicks are not. One set
of weights for both steps (proportional odds) is stable and may be wrong; PRESTO gives each step its own weights and
charges an L1 penalty for every difference between neighbours.

Faletto and Bien (2023), https://arxiv.org/abs/2305.18700. The leading axis is the draw, a sample of its own; the second
is the copy: a fold, a penalty, a method on the same sample. All of them are solved side by side in float64.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from paperlab.checks import (
    require_at_least,
    require_between,
    require_finite,
    require_nonnegative,
    require_one_of,
    require_positive,
)


class Boundaries(NamedTuple):
    r"""The $K - 1$ boundaries of a cumulative model, $P(y \le k \mid x) = F(\alpha_k + \beta_k^\top x)$, F logistic."""

    alpha: Float[Tensor, "*copies boundaries"]
    beta: Float[Tensor, "*copies boundaries p"]

    def cumulative(self, x: Float[Tensor, "... n p"]) -> Float[Tensor, "... n boundaries"]:
        r"""$P(y \le k \mid x)$ at each boundary."""
        return torch.sigmoid(x @ self.beta.mT + self.alpha[..., None, :])

    def probabilities(self, x: Float[Tensor, "... n p"]) -> Float[Tensor, "... n classes"]:
        """One probability a class; where boundaries cross, one of them is negative."""
        below = self.cumulative(x)
        return torch.cat([below, torch.ones_like(below[..., :1])], -1).diff(
            dim=-1, prepend=torch.zeros_like(below[..., :1])
        )

    def rare(self, x: Float[Tensor, "... n p"]) -> Float[Tensor, "... n"]:
        r"""$P(y = K \mid x)$: only the last boundary has a say."""
        return torch.sigmoid(-(x @ self.beta[..., -1, :, None])[..., 0] - self.alpha[..., -1:])


class _Sample:
    """Rows of all draws, with what every evaluation of the likelihood needs of them."""

    def __init__(self, x: Tensor, y: Tensor, classes: int, shown: Tensor) -> None:
        self.draws, self.n, p = x.shape
        self.q, self.edges = p + 1, classes - 1
        self.rows = torch.cat([x.new_ones(self.draws, self.n, 1), x], 2)
        self.columns = self.rows.mT.contiguous()
        self.shown = shown / shown.sum(-1, keepdim=True)
        self.seen = shown > 0
        self.upper, self.lower = (i.clamp(0, classes - 2)[:, None, None] for i in (y, y - 1))
        self.member = [(y == k).to(x.dtype)[:, None] for k in range(classes)]
        self.bounded = [1 - self.member[-1], 1 - self.member[0]]  # has a boundary above, below
        self.left, self.right = torch.triu_indices(self.q, self.q, device=x.device)
        # for the curvature single precision will do: it gives a direction, and where that ends the gradient decides
        self.products = (self.rows[..., self.left] * self.rows[..., self.right]).float()

    def scores(self, theta: Tensor) -> Tensor:
        """Log-odds at every boundary, (draws, copies, boundaries, n)."""
        w = theta.cumsum(2)
        return (w.flatten(1, 2) @ self.columns).unflatten(1, w.shape[1:3])

    def value(self, eta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r"""Mean of $-\log [F(u) - F(l)]$, and $a = e^{-u}$, $b = e^l$; infinite where boundaries cross at a seen row.

        $u$ and $l$ are the log-odds at the boundaries above and below the row's class. The bracket is
        $(1 - ab) / ((1 + a)(1 + b))$: nothing is subtracted but $ab$ from 1, and an absent boundary is a zero.
        """
        wide = (*eta.shape[:2], 1, self.n)
        a = (-eta.gather(2, self.upper.expand(wide))[:, :, 0]).exp() * self.bounded[0]
        b = eta.gather(2, self.lower.expand(wide))[:, :, 0].exp() * self.bounded[1]
        bracket = (1 - a * b) / ((1 + a) * (1 + b))
        loss = -(torch.where(self.seen, bracket, 1).log() * self.shown).sum(-1)
        crossed = ((eta.diff(dim=2) <= 0).any(2) & self.seen).any(-1)
        return torch.where(crossed, math.inf, loss.nan_to_num(nan=math.inf)), a, b

    def gradient(self, a: Tensor, b: Tensor) -> Tensor:
        """Of the mean loss in theta, (draws, copies, boundaries, q)."""
        c = a * b / (1 - a * b)
        up, down = -(a / (1 + a) + c) * self.shown, (b / (1 + b) + c) * self.shown
        g = torch.stack([self.member[k] * up + self.member[k + 1] * down for k in range(self.edges)], 2)
        w = (g.flatten(1, 2) @ self.rows).unflatten(1, g.shape[1:3])
        return w.flip(2).cumsum(2).flip(2)  # theta_k moves boundary k and all above it

    def curvature(self, a: Tensor, b: Tensor) -> Tensor:
        """Second derivatives in theta, (draws, copies, m, m) with m = boundaries * q; never indefinite."""
        c = (a * b / (1 - a * b).square()).float()
        a, b, shown = a.clamp_max(1e18).float(), b.clamp_max(1e18).float(), self.shown.float()
        up, down = (a / (1 + a).square() + c) * shown, (b / (1 + b).square() + c) * shown
        member = [m.float() for m in self.member]
        weights = [member[k] * up + member[k + 1] * down for k in range(self.edges)]
        weights += [-member[k + 1] * c * shown for k in range(self.edges - 1)]
        sums = (torch.stack(weights, 2).flatten(1, 2) @ self.products).to(self.rows).unflatten(1, (-1, len(weights)))
        blocks = sums.new_empty(*sums.shape[:-1], self.q, self.q)
        blocks[..., self.left, self.right] = blocks[..., self.right, self.left] = sums
        whole = blocks.new_zeros(*a.shape[:2], self.edges, self.q, self.edges, self.q)
        for k in range(self.edges):
            whole[:, :, k, :, k] = blocks[:, :, k]
        for k in range(self.edges - 1):
            whole[:, :, k, :, k + 1] = whole[:, :, k + 1, :, k] = blocks[:, :, self.edges + k]
        for k in (2, 4):  # from boundaries to differences of boundaries
            whole = whole.flip(k).cumsum(k).flip(k)
        return whole.flatten(4, 5).flatten(2, 3)


def _step(theta: Tensor, g: Tensor, h: Tensor, l1: Tensor, l2: Tensor, tolerance: float) -> Tensor:
    r"""$\arg\min_z g^\top(z - \theta) + \frac12 (z - \theta)^\top H (z - \theta)$ + penalty, one coordinate at a time.

    Every few sweeps the zeros and signs are taken for settled and the linear system that is left is solved, as far as
    the first sign that would change. Coordinates come first and problems last; ``h`` is (problems, m, m).
    """
    z, r = theta.clone(), g.clone()
    h = h.permute(1, 2, 0).contiguous()
    own = h.diagonal().mT + 1e-12
    for sweep in range(1, 201):
        before = z.clone()
        for j in l1.isfinite().any(1).nonzero().flatten().tolist():
            pull = own[j] * z[j] - r[j]
            new = torch.copysign((pull.abs() - l1[j]).clamp_min(0), pull) / (own[j] + l2[j])
            r.addcmul_(h[j], new - z[j])
            z[j] = new
        if ((z - before).abs() * own).max() < tolerance:
            break
        if sweep % 3 == 0:
            live = z != 0
            left = h.masked_fill(~live | ~live[:, None], 0) + torch.diag_embed((l2 + 1e-12 + ~live).mT).permute(1, 2, 0)
            force = torch.where(live, (h * z).sum(1) - r - l1 * z.sign(), 0)
            new = torch.linalg.solve(left.permute(2, 0, 1), force.mT).mT
            part = torch.where((l1 > 0) & (new * z < 0), z / (z - new), 1.0)
            least = part.amin(0)
            new = torch.where((part == least) & (part < 1), 0.0, z + least * (new - z))
            r += (h * (new - z)).sum(1)
            z = new
    return z


@torch.no_grad()
def _solve(
    sample: _Sample, start: Tensor, l1: Tensor, l2: Tensor, tolerance: Tensor, steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Proximal Newton with backtracking from ``start``: theta, its log-odds, and its KKT residual a problem."""
    shape, free = start.shape, l1.isfinite()
    price, smooth = torch.where(free, l1, 0), not (l1[free] > 0).any()

    def charge(theta: Tensor) -> Tensor:
        return (price * theta.abs() + l2 / 2 * theta.square()).sum((2, 3))

    theta = torch.where(free, start, 0)
    eta = sample.scores(theta)
    loss, a, b = sample.value(eta)
    stuck = torch.zeros_like(loss, dtype=torch.bool)
    for turn in range(steps + 1):
        g = sample.gradient(a, b)
        ridge = g + l2 * theta
        kkt = torch.where(theta != 0, (ridge + price * theta.sign()).abs(), (ridge.abs() - price).clamp_min(0))
        residual = torch.where(free, kkt, 0).amax((2, 3))
        going = (residual >= tolerance) & ~stuck
        if turn == steps or not going.any():
            break
        at, slope1, one, two = (t[going].flatten(1) for t in (theta, g, l1, l2))
        h = sample.curvature(a, b)[going]
        if smooth:
            fixed = one.isinf()
            h = h.masked_fill(fixed[:, None] | fixed[..., None], 0) + torch.diag_embed(two + 1e-10 + fixed)
            z = at - torch.linalg.solve(h, (slope1 + two * at).masked_fill(fixed, 0))
        else:
            z = _step(
                *(t.mT.contiguous() for t in (at, slope1)), h, *(t.mT for t in (one, two)), float(tolerance.min()) / 10
            ).mT
        d = torch.zeros_like(theta)
        d[going] = (z - at).unflatten(1, shape[2:])
        slope, old = (g * d).sum((2, 3)) + charge(theta + d) - charge(theta), loss + charge(theta)
        t, move = torch.ones_like(loss), sample.scores(d)
        for _ in range(16):  # an infinite loss, boundaries that cross, is refused like any other that is too high
            new = eta + t[..., None, None] * move
            loss, a, b = sample.value(new)
            fine = loss + charge(theta + t[..., None, None] * d) <= old + 1e-4 * t * slope + 1e-13
            if fine.all():
                break
            t = torch.where(fine, t, t / 2)
        else:  # whoever found nothing better stays where it is
            stuck, t = stuck | ~fine, torch.where(fine, t, 0)
            new = eta + t[..., None, None] * move
            loss, a, b = sample.value(new)
        theta, eta = theta + t[..., None, None] * d, new
    return theta, eta, residual


class Path(NamedTuple):
    """Solutions from the strongest penalty to the weakest, with what each promises for rows it has not seen."""

    strengths: Float[Tensor, "draws strengths"]
    fits: Boundaries  # (draws, strengths, ...)
    residual: Float[Tensor, "draws strengths"]
    scores: dict[str, Float[Tensor, "draws strengths"]]

    def chosen(self, by: str = "brier") -> Boundaries:
        """The fit with the least cross-validated score; of several, the one with the strongest penalty.

        Raises:
            ValueError: no such score, as after a path without folds.
        """
        require_one_of(self.scores, by=by)
        best = self.scores[by].argmin(1)
        each = torch.arange(len(best), device=best.device)
        return Boundaries(self.fits.alpha[each, best], self.fits.beta[each, best])


def fit_path(
    x: Float[Tensor, "draws n p"],
    y: Int[Tensor, "draws n"],
    *,
    classes: int,
    method: str = "presto",
    norm: str = "l1",
    first: float = 1.0,
    differences: float = 1.0,
    strengths: int = 12,
    span: tuple[float, float] | None = None,
    folds: int = 5,
    weights: Float[Tensor, "draws n"] | None = None,
    tolerance: float = 1e-5,
    steps: int = 25,
) -> Path:
    r"""With $\psi_1 = \beta_1$, $\psi_k = \beta_k - \beta_{k-1}$, minimise at each of a falling sequence of $\lambda$

    $$-\frac1n \sum_i \log\big[F(\alpha_{y_i} + \beta_{y_i}^\top x_i)
    - F(\alpha_{y_i - 1} + \beta_{y_i - 1}^\top x_i)\big] + \lambda \sum_k c_k \|\psi_k\|_1 .$$

    PRESTO has all $c_k = 1$: ``first`` is $c_1$ and ``differences`` the others. "proportional" holds the differences at
    0; "logistic" sees the last class against the rest. ``norm`` "l2" charges $\frac12\|\psi_k\|_2^2$ instead, "none"
    nothing ("non-proportional" says the same of the whole model), with one strength. The strengths run from
    ``span[0]`` to ``span[1]`` times the least $\lambda$ at which the L1 path is at its start (span 1 to 0.01; L2: 100
    to 0.01). Features are standardised inside; the fits are in the units of ``x``. Classes are 0 to K - 1.

    Boundaries must not cross at a row that is seen: a step over that wall is refused, as in the released code. A
    solution that leans on the wall shows it in its residual.

    Every class is dealt to the folds in turn. The scores are means over the held-out rows: "brier" over all classes, as
    in the released code, "rare" of the last class alone, and "log loss". ``weights`` count a row several times.
    No KKT residual of a fit exceeds ``tolerance``, of a fold ten times that, unless ``steps`` run out.

    Raises:
        ValueError: a label outside the classes or a class without rows; features not finite, not float64 or constant;
            an unknown method or norm; a negative factor; a span that does not
            fall; a tolerance that is not positive; fewer than 1 strength or step; a single fold; ``y`` or ``weights``
            not one number a row of ``x``; a negative weight.
    """
    require_finite(x=x)
    w = x.new_ones(x.shape[:2]) if weights is None else weights
    require_one_of((x.shape[:2],), **{"shape of y": y.shape, "shape of weights": w.shape})
    if x.dtype != torch.float64:
        raise ValueError(f"x must be float64, or the tolerance cannot be reached, got {x.dtype}")
    require_at_least(2, classes=classes)
    require_between(0, classes - 1, y=y)
    require_one_of(("presto", "proportional", "non-proportional", "logistic"), method=method)
    require_one_of(("l1", "l2", "none"), norm=norm)
    require_at_least(1, strengths=strengths, steps=steps)
    require_at_least(2, **{"folds, if not 0,": folds or 2})
    if method == "logistic":
        y, classes = (y == classes - 1).long(), 2
    norm = "none" if method == "non-proportional" else norm
    span = span or {"l1": (1.0, 0.01), "l2": (100.0, 0.01), "none": (1.0, 1.0)}[norm]
    require_positive(tolerance=tolerance, span=span)
    if span[0] < span[1]:
        raise ValueError(f"span must fall from the strongest to the weakest, got {span}")
    draws, _, p = x.shape
    require_nonnegative(first=first, differences=differences, weights=w)
    share = torch.stack([((y == k) * w).sum(1) for k in range(classes)], 1) / w.sum(1, keepdim=True)
    if (share == 0).any():
        raise ValueError(f"y must hold every one of the {classes} classes in each draw")
    heavy = (w / w.sum(1, keepdim=True))[..., None]
    mean = (heavy * x).sum(1, keepdim=True)
    spread = (heavy * (x - mean).square()).sum(1, keepdim=True).sqrt()
    require_positive(**{"spread of each feature of x": spread - 1e-12 * mean.abs()})

    member = torch.nn.functional.one_hot(y, classes)
    turn = ((member.cumsum(1) - 1) * member).sum(2) % max(folds, 1)
    held = torch.stack([turn == f for f in range(folds)] + [turn < 0], 1)  # the last copy sees every row
    sample = _Sample((x - mean) / spread, y, classes, torch.where(held, 0, w[:, None]))
    full = (draws, folds + 1, classes - 1, p + 1)
    factor = x.new_zeros(full[2:])
    factor[0, 1:] = first
    factor[1:, 1:] = differences
    fixed = torch.zeros_like(factor)
    fixed[1:, 1:] = math.inf if method == "proportional" else 0
    charged = (factor > 0) & fixed.isfinite()
    nothing = x.new_zeros(full)
    enough = torch.tensor([10.0] * folds + [1.0], dtype=x.dtype, device=x.device) * tolerance

    theta = nothing.clone()
    theta[..., 0] = torch.logit(share.cumsum(1)[:, :-1]).diff(dim=1, prepend=x.new_zeros(draws, 1))[:, None]
    if norm == "none" or not charged.any():
        grid = x.new_zeros(draws, 1)
    else:
        shut = torch.where(charged, math.inf, fixed).expand(full)
        theta, eta, _ = _solve(sample, theta, shut, nothing, enough, steps)
        pull = sample.gradient(*sample.value(eta)[1:])[:, -1].abs()
        least = torch.where(charged, pull / factor, 0).amax((1, 2))
        grid = least[:, None] * torch.logspace(
            *(math.log10(s) for s in span), strengths, dtype=x.dtype, device=x.device
        )

    hit, out = member.mT[:, None].to(x.dtype), held * (w / w.sum(1, keepdim=True))[:, None]
    found = []
    for strength in grid.unbind(1):
        charge = strength[:, None, None, None] * factor
        l1 = ((charge if norm == "l1" else nothing) + fixed).expand(full)
        theta, eta, residual = _solve(
            sample, theta, l1, charge.expand(full) if norm == "l2" else nothing, enough, steps
        )
        hat = eta.sigmoid().diff(dim=2, prepend=0 * eta[:, :, :1], append=0 * eta[:, :, :1] + 1)
        miss = (hat - hit).square()
        each = miss.sum(2), miss[:, :, -1], -(hat * hit).sum(2).clamp_min(1e-12).log()
        found.append([theta[:, -1], residual[:, -1], *((score * out).sum((1, 2)) for score in each)])
    theta, residual, *scores = (torch.stack(values, 1) for values in zip(*found, strict=True))
    beta = theta.cumsum(2)[..., 1:] / spread[:, :, None]
    alpha = theta.cumsum(2)[..., 0] - (beta * mean[:, :, None]).sum(-1)
    names = ("brier", "rare", "log loss") if folds else ()
    return Path(grid, Boundaries(alpha, beta), residual, dict(zip(names, scores, strict=False)))


def slope_variances(
    shares: Float[Tensor, "*copies classes"],
) -> tuple[Float[Tensor, "*copies"], Float[Tensor, "*copies"]]:
    r"""$n\sigma_x^2$ times the variance of a slope, where no feature matters: proportional odds, logistic regression.

    With class shares $\pi_k$ they are $3 / (1 - \sum_k \pi_k^3)$ and $1 / (\pi_K (1 - \pi_K))$; for two classes they
    are the same.

    Raises:
        ValueError: shares that are not positive or do not add up to 1.
    """
    require_positive(shares=shares)
    require_between(1 - 1e-6, 1 + 1e-6, **{"sum of shares": shares.sum(-1)})
    rare = shares[..., -1]
    return 3 / (1 - shares.pow(3).sum(-1)), 1 / (rare * (1 - rare))


def draw_truth(
    truth: str, draws: int, generator: torch.Generator, *, p: int = 10, classes: int = 3, size: float = 0.5
) -> Float[Tensor, "draws boundaries p"]:
    r"""Slopes of the released simulation. "sparse": entries of $\beta_1$ are ``size`` with probability 1/3, those of
    each difference $\pm$``size`` with probability 1/3, the rest 0. "dense": all uniform on $\pm$``size``.
    "proportional": $\beta_1$ as in "sparse", no differences.

    Raises:
        ValueError: an unknown truth, ``draws`` or ``p`` below 1, or fewer than 3 classes.
    """
    require_one_of(("sparse", "dense", "proportional"), truth=truth)
    require_at_least(1, draws=draws, p=p)
    require_at_least(3, classes=classes)
    there, sign, even = (
        torch.rand(draws, classes - 1, p, generator=generator, dtype=torch.float64, device=generator.device)
        for _ in range(3)
    )
    few = torch.where(there < 1 / 3, torch.where(sign < 0.5, -size, size), 0.0).to(even)
    few[:, 0] = few[:, 0].abs()
    psi = (2 * even - 1) * size if truth == "dense" else few
    psi[:, 1:] *= truth != "proportional"
    return psi.cumsum(1)


def draw_sample(
    truth: Boundaries, n: int, generator: torch.Generator
) -> tuple[Float[Tensor, "draws n p"], Int[Tensor, "draws n"]]:
    """``n`` rows a draw: x uniform in the cube from -1 to 1, one uniform number a row that picks its class.

    Raises:
        ValueError: ``n`` below 1, or boundaries that cross inside the sample.
    """
    require_at_least(1, n=n)
    draws, _, p = truth.beta.shape
    x = 2 * torch.rand(draws, n, p, generator=generator, dtype=truth.beta.dtype, device=truth.beta.device) - 1
    picked = torch.rand(draws, n, 1, generator=generator, dtype=truth.beta.dtype, device=truth.beta.device)
    below = truth.cumulative(x)
    if (below.diff(dim=-1) <= 0).any():
        raise ValueError("truth has boundaries that cross: a class with a negative probability")
    return x, (picked > below).sum(-1)
