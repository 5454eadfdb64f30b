r"""Naive Bayes or logistic regression: two ways to fit the same linear head, and how many labels each of them needs.

Whoever puts a classifier on frozen features takes logistic regression and hardly thinks about it. Naive Bayes draws the
same straight lines from class means and variances alone, with nothing to optimise, and in theory from far fewer labels.

Zheng, Wu, Bao, Cao, Li and Zhu (2023), https://arxiv.org/abs/2302.02334. The leading axis is the draw: a sample of the
same task with its own labels. All draws, penalties and folds are fitted side by side.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from paperlab.checks import (
    require_at_least,
    require_between,
    require_finite,
    require_nonempty,
    require_nonnegative,
    require_positive,
)


class Head(NamedTuple):
    r"""A linear classifier: class k scores $w_k^\top x + b_k$, the largest score wins. Leading axes are copies."""

    weight: Float[Tensor, "*copies classes n"]
    bias: Float[Tensor, "*copies classes"]

    def scores(self, x: Float[Tensor, "... m n"]) -> Float[Tensor, "... m classes"]:
        """Log-odds up to a constant a row; their softmax is what the classifier believes."""
        return x @ self.weight.mT + self.bias[..., None, :]


def _class_moments(x: Tensor, y: Tensor, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Counts (draws, classes), means (draws, classes, n) and the residuals (draws, m, n) from each row's class mean."""
    require_nonempty(x=x)
    require_at_least(2, classes=classes)
    require_finite(x=x)
    require_between(0, classes - 1, y=y)
    member = F.one_hot(y, classes).to(x.dtype)
    counts = member.sum(1)
    if (counts == 0).any():
        raise ValueError(f"y must hold every one of the {classes} classes in each draw")
    means = member.mT @ x / counts[..., None]
    return counts, means, x - member @ means


def naive_bayes(
    x: Float[Tensor, "draws m n"],
    y: Int[Tensor, "draws m"],
    *,
    classes: int,
    smoothing: float = 0.0,
    floor: float = 1e-9,
) -> Head:
    r"""Gaussian naive Bayes with one variance a feature, shared by the classes, in closed form:

    $$\log\hat\pi_k - \sum_i \frac{(x_i - \hat\mu_{ki})^2}{2\hat\sigma_i^2}
    \;\to\; w_{ki} = \frac{\hat\mu_{ki}}{\hat\sigma_i^2}, \quad
    b_k = \log\hat\pi_k - \sum_i \frac{\hat\mu_{ki}^2}{2\hat\sigma_i^2},$$

    after dropping $x_i^2$, which all classes have in common. $\hat\sigma_i^2$ is the prior-weighted mean of the
    variances within the classes plus ``floor``, and $\hat\pi_k = (m_k + s) / (m + sK)$ with $s$ = ``smoothing`` (the
    released code has 0). With one example a class every variance is the floor: the nearest class mean wins.

    Raises:
        ValueError: a label outside the classes or a class without examples; ``smoothing`` negative, ``floor`` not
            positive; features that are empty or not finite.
    """
    require_nonnegative(smoothing=smoothing)
    require_positive(floor=floor)
    counts, means, residuals = _class_moments(x, y, classes)
    variance = residuals.square().mean(1, keepdim=True) + floor
    prior = (counts + smoothing) / (x.shape[1] + smoothing * classes)
    return Head(means / variance, prior.log() - (means.square() / variance).sum(-1) / 2)


def shrunk_discriminant(
    x: Float[Tensor, "draws m n"], y: Int[Tensor, "draws m"], *, classes: int, floor: float = 1e-9
) -> Head:
    r"""Linear discriminant analysis, the generative model that does see correlations: $w_k = \hat\Sigma^{-1}\hat\mu_k$.

    $\hat\Sigma = (1 - a) S + a \bar s I$ with the covariance $S$ within the classes, its mean variance $\bar s$, and
    the share $a$ that Ledoit and Wolf (2004) derive from the data.

    Raises:
        ValueError: as `naive_bayes`.
    """
    require_positive(floor=floor)
    counts, means, residuals = _class_moments(x, y, classes)
    m, n = x.shape[1:]
    covariance = residuals.mT @ residuals / m
    level = covariance.diagonal(dim1=1, dim2=2).mean(1)
    square = covariance.square().sum((1, 2))
    spread = square / n - level.square()
    noise = (residuals.square().sum(2).square().mean(1) - square) / (n * m)
    share = (noise / spread.clamp_min(1e-300)).clamp(0, 1)[:, None, None]
    eye = torch.eye(n, dtype=x.dtype, device=x.device)
    shrunk = (1 - share) * covariance + (share * level[:, None, None] + floor) * eye
    weight = torch.linalg.solve(shrunk, means.mT).mT
    return Head(weight, (counts / m).log() - (means * weight).sum(-1) / 2)


@torch.no_grad()
def logistic_regression(
    x: Float[Tensor, "draws m n"],
    y: Int[Tensor, "draws m"],
    *,
    classes: int,
    penalties: Sequence[float],
    kept: Bool[Tensor, "draws copies m"] | None = None,
    tolerance: float = 1e-4,
    steps: int = 200,
    memory: int = 6,
) -> Head:
    r"""Multinomial logistic regression, one copy a penalty $\lambda$: the weights that minimise

    $$\sum_i \Big(\log \sum_k e^{w_k^\top x_i + b_k} - w_{y_i}^\top x_i - b_{y_i}\Big)
    + \frac\lambda2 \sum_k \|w_k\|^2 .$$

    Batched L-BFGS, preconditioned by the curvature at zero; it stops when no entry of the gradient exceeds
    ``tolerance`` times the number of examples, or after ``steps``. ``kept`` says which rows each copy may see. The
    penalty is that of scikit-learn with $C = 1/\lambda$; its two-class form has one weight vector, $w_1 - w_0$, and so
    $C = 2/\lambda$.

    Raises:
        ValueError: a penalty that is not positive, a label outside the classes, or features that are not finite.
    """
    require_nonempty(x=x, penalties=penalties)
    require_positive(penalties=penalties, tolerance=tolerance)
    require_finite(x=x)
    require_between(0, classes - 1, y=y)
    draws, m, n = x.shape
    rows = torch.cat([x, x.new_ones(draws, m, 1)], 2)
    columns = rows.mT.contiguous()
    shown = x.new_ones(draws, len(penalties), 1, m) if kept is None else kept[:, :, None].to(x.dtype)
    wanted = (F.one_hot(y, classes).to(x.dtype).mT[:, None] * shown).flatten(1, 2) @ rows
    wanted = wanted.unflatten(1, (len(penalties), classes))
    decay = x.new_tensor(list(penalties))[None, :, None, None].repeat(1, 1, 1, n + 1)
    decay[..., -1] = 0
    curvature = shown.mean(-1, keepdim=True) / classes * (columns @ rows)[:, None]
    # a tenth more on the diagonal: else the first step jumps to an interpolating solution where there is one, and stays
    damping = 0.1 * curvature.diagonal(dim1=2, dim2=3) + decay[:, :, 0]
    factor = torch.linalg.cholesky(curvature + torch.diag_embed(damping))

    def logits(w: Tensor) -> Tensor:
        return (w.flatten(1, 2) @ columns).unflatten(1, w.shape[1:3])  # (draws, copies, classes, m)

    def measure(z: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The objective, and the softmax of the logits as its numerator and denominator."""
        top = z.amax(2, keepdim=True)
        e = (z - top).exp_()
        total = e.sum(2, keepdim=True)
        return ((total.log() + top) * shown).sum(-1, keepdim=True) + _dot(w, decay * w / 2 - wanted), e, total

    def gradient(e: Tensor, total: Tensor, w: Tensor) -> Tensor:
        return (e.mul_(shown / total).flatten(1, 2) @ rows).view_as(w) - wanted + decay * w

    w, found, alive = torch.zeros_like(wanted), torch.zeros_like(wanted), torch.arange(len(penalties))
    z, allowed, pairs = logits(w), tolerance * shown.sum(-1, keepdim=True), []
    value, e, total = measure(z, w)
    g = gradient(e, total, w)
    for _ in range(steps):
        going = g.abs().amax((-1, -2), keepdim=True) > allowed
        busy = going.any(0).flatten()
        if not busy.all():  # copies that have arrived in every draw leave the batch
            found[:, alive] = w
            alive = alive[busy.to(alive.device)]
            w, z, g, value, shown, wanted, decay, factor, allowed, going = (
                t[:, busy] for t in (w, z, g, value, shown, wanted, decay, factor, allowed, going)
            )
            pairs = [tuple(t[:, busy] for t in pair) for pair in pairs]
            if not len(alive):
                break
        d = -_two_loop(g, pairs, factor)
        slope, dz, t = _dot(g, d), logits(d), going.to(x.dtype)
        for _ in range(40):
            new_w, new_z = torch.addcmul(w, t, d), torch.addcmul(z, t, dz)
            new, e, total = measure(new_z, new_w)
            fine = new <= value + 1e-4 * t * slope + 1e-12 * value.abs()
            if fine.all():
                break
            t = torch.where(fine, t, t / 2)
        step, old = new_w - w, g
        w, z, value = new_w, new_z, new
        g = gradient(e, total, w)
        pairs = [*pairs, _pair(step, g - old, factor)][-memory:]
    found[:, alive] = w
    return Head(found[..., :-1], found[..., -1])


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((-1, -2), keepdim=True)


def _pair(s: Tensor, r: Tensor, factor: Tensor) -> tuple[Tensor, ...]:
    """A step, the change of the gradient along it, the inverse of their product, and the scale of the curvature."""
    sr, scaled = _dot(s, r), _dot(r, torch.cholesky_solve(r.mT, factor).mT)
    moved = sr > 1e-300  # a copy that has arrived no longer moves
    return s, r, torch.where(moved, 1 / sr.clamp_min(1e-300), 0), torch.where(moved, sr / scaled.clamp_min(1e-300), 1)


def _two_loop(g: Tensor, pairs: list[tuple[Tensor, ...]], factor: Tensor) -> Tensor:
    """L-BFGS's product of the inverse curvature with a gradient (Nocedal and Wright, algorithm 7.4)."""
    q, saved = g, []
    for s, r, rho, _ in reversed(pairs):
        saved.append(rho * _dot(s, q))
        q = torch.addcmul(q, saved[-1], r, value=-1)
    q = torch.cholesky_solve(q.mT, factor).mT
    if pairs:
        q = q * pairs[-1][3]
    for (s, r, rho, _), a in zip(pairs, reversed(saved), strict=True):
        q = torch.addcmul(q, a - rho * _dot(r, q), s)
    return q


def penalty_search(
    x: Float[Tensor, "draws m n"],
    y: Int[Tensor, "draws m"],
    *,
    classes: int,
    penalties: Sequence[float],
    folds: int = 3,
    tolerance: float = 1e-4,
) -> tuple[Head, Float[Tensor, "draws penalties"]]:
    """Logistic regression at every penalty, fitted on all rows, and the cross-validated log loss that chooses one.

    Rows of a class are dealt to the folds in turn; with fewer rows in the scarcest class there are as many folds as
    rows. Every fold and penalty of every draw is a copy of one call.

    Raises:
        ValueError: fewer than 2 folds or rows of a class (nothing can be held out then), or as `logistic_regression`.
    """
    require_at_least(2, folds=folds)
    require_nonempty(x=x, penalties=penalties)
    member = F.one_hot(y, classes)
    scarcest = int(member.sum(1).min())
    require_at_least(2, **{"number of rows of each class in y": scarcest})
    folds = min(folds, scarcest)
    turn = ((member.cumsum(1) - 1) * member).sum(2) % folds  # (draws, m)
    held = torch.stack([turn == fold for fold in range(folds)] + [turn < 0], 1)  # the last copy sees every row
    kept = ~held.repeat_interleave(len(penalties), 1)
    copies = [*penalties] * (folds + 1)
    fitted = logistic_regression(x, y, classes=classes, penalties=copies, kept=kept, tolerance=tolerance)
    heads = Head(*(part.unflatten(1, (folds + 1, len(penalties))) for part in fitted))
    miss = -heads.scores(x[:, None, None]).log_softmax(-1).take_along_dim(y[:, None, None, :, None], -1)[..., 0]
    loss = (miss * held[:, :, None]).sum((1, 3)) / x.shape[1]
    return Head(heads.weight[:, -1], heads.bias[:, -1]), loss


class Mixture(NamedTuple):
    """Two classes of equal weight, normal with one covariance."""

    means: Float[Tensor, "2 n"]
    covariance: Float[Tensor, "n n"]

    @property
    def distance(self) -> float:
        r"""The Mahalanobis distance $\Delta$ of the means: $\Delta^2 = \delta^\top \Sigma^{-1} \delta$."""
        gap = self.means[1] - self.means[0]
        return float((gap @ torch.linalg.solve(self.covariance, gap)).sqrt())

    def draw(
        self, draws: int, m: int, generator: torch.Generator
    ) -> tuple[Float[Tensor, "draws m n"], Int[Tensor, "draws m"]]:
        """``draws`` samples of ``m`` rows, the classes taking turns, so that the first rows are a smaller sample."""
        y = (torch.arange(m, device=generator.device) % 2).expand(draws, m)
        root = torch.linalg.cholesky(self.covariance)
        noise = torch.randn(draws, m, len(root), generator=generator, dtype=root.dtype, device=generator.device)
        return self.means[y] + noise @ root.mT, y

    def margins(self, head: Head) -> tuple[Float[Tensor, "*copies 2"], Float[Tensor, "*copies 1"]]:
        """Mean, in each class, of the log-odds in favour of the right answer, and their standard deviation."""
        w, b = head.weight[..., 1, :] - head.weight[..., 0, :], head.bias[..., 1] - head.bias[..., 0]
        mean = w @ self.means.mT + b[..., None]
        spread = ((w @ self.covariance) * w).sum(-1, keepdim=True).sqrt()
        return mean * mean.new_tensor([-1.0, 1.0]), spread

    def error(self, head: Head) -> Float[Tensor, "*copies"]:
        """Exact error: log-odds of a linear head are normal in each class."""
        mean, spread = self.margins(head)
        return torch.special.ndtr(-mean / spread).mean(-1)

    def log_loss(self, head: Head, nodes: int = 128) -> Float[Tensor, "*copies"]:
        """Exact log loss, by Gauss-Hermite quadrature of the same normal log-odds."""
        mean, spread = self.margins(head)
        at, weight = (mean.new_tensor(part) for part in np.polynomial.hermite_e.hermegauss(nodes))
        return (F.softplus(-(mean[..., None] + spread[..., None] * at)) @ weight / weight.sum()).mean(-1)

    def limits(self) -> tuple[Head, Head]:
        r"""Infinite data: $\mathrm{NB}_\infty$ knows means and variances, $\mathrm{LR}_\infty$ is the Bayes rule."""

        def head(precision: Tensor) -> Head:
            weight = self.means @ precision
            return Head(weight, -(weight * self.means).sum(-1) / 2)

        return head(torch.diag(1 / self.covariance.diagonal())), head(torch.linalg.inv(self.covariance))


def released_mixture(n: int, distance: float | None = None) -> Mixture:
    r"""The authors' simulation for two classes: means $\mp\mathbf 1$, variance $n$ in one half of the features, 1 in
    the other, so that $\Delta^2 = 2n + 2$ grows with every feature; ``distance`` rescales the means to a given one.

    Raises:
        ValueError: ``n`` below 2 or odd, or a distance that is not positive.
    """
    require_at_least(2, n=n)
    if n % 2:
        raise ValueError(f"n must be even, got {n}")
    variance = torch.ones(n, dtype=torch.float64)
    variance[: n // 2] = n
    scale = 1.0
    if distance is not None:
        require_positive(distance=distance)
        scale = distance / math.sqrt(2 * n + 2)
    return Mixture(scale * torch.tensor([[-1.0], [1.0]], dtype=torch.float64).expand(2, n), torch.diag(variance))


def paired_mixture(n: int, correlation: float, distance: float, spread: float | None = None) -> Mixture:
    r"""Features in pairs that share noise with correlation $\rho$, of which the class moves the first, by the same gap.

    The pairs of one half have variance ``spread`` (by default n), those of the other 1, as in `released_mixture`. A
    classifier that sees the correlation subtracts the noise it reads off the second of a pair; to one that does not,
    the second is of no use. The gap is such that $\Delta$, and with it the Bayes error, is the same for every $\rho$:
    naive Bayes ends at $\Phi(-\frac\Delta2 \sqrt{1 - \rho^2})$.

    Raises:
        ValueError: ``n`` below 4 or no multiple of 4, a correlation outside 0 to 0.999, a distance or spread that is
            not positive.
    """
    require_at_least(4, n=n)
    if n % 4:
        raise ValueError(f"n must be a multiple of 4, got {n}")
    require_between(0, 0.999, correlation=correlation)
    require_positive(distance=distance, spread=n if spread is None else spread)
    deviation = torch.ones(n, dtype=torch.float64)
    deviation[: n // 2] = math.sqrt(n if spread is None else spread)
    pair = torch.tensor([[1, correlation], [correlation, 1]], dtype=torch.float64)
    covariance = torch.block_diag(*[pair] * (n // 2)) * deviation[:, None] * deviation
    gap = torch.zeros(n, dtype=torch.float64)
    gap[::2] = 1
    gap *= distance * math.sqrt(1 - correlation**2) / float((gap / deviation).norm())
    return Mixture(torch.stack([-gap / 2, gap / 2]), covariance)


def naive_bayes_samples(n: int, distance: float, epsilon: float) -> float:
    r"""Samples until naive Bayes with known variances errs by ``epsilon`` more than at infinity (our derivation).

    In units of the features' deviations the estimated direction is $\delta + \frac{2}{\sqrt m} z$ with normal $z$, at
    an angle $\theta$ to the right one with $\cos^2\theta \approx \Delta^2 / (\Delta^2 + 4n/m)$, and the error is
    $\Phi(-\frac\Delta2 \cos\theta)$. Solved for $m$: $\frac{4n}{\Delta^2} \frac{\cos^2\theta}{1 - \cos^2\theta}$.

    Raises:
        ValueError: ``n`` below 1, ``distance`` not positive, or ``epsilon`` outside 0 to what chance leaves.
    """
    require_at_least(1, n=n)
    require_positive(distance=distance, epsilon=epsilon)
    allowed = torch.special.ndtr(torch.tensor(-distance / 2, dtype=torch.float64)) + epsilon
    require_between(0, 0.5, **{"epsilon plus the least error": allowed})
    cosine = float(-torch.special.ndtri(allowed)) * 2 / distance
    return 4 * n / distance**2 * cosine**2 / (1 - cosine**2)


def samples_to_reach(
    sizes: Sequence[float], values: Float[np.ndarray, "*curves sizes"], target: float | Float[np.ndarray, "*curves"]
) -> Float[np.ndarray, "*curves"]:
    r"""The sample size from which on a curve stays at or below its target, linear in $\log m$ between two sizes.

    The first size if it is never above, infinity if it ends above.

    Raises:
        ValueError: not one value a size, or values that are not finite.
    """
    require_finite(values=values)
    require_positive(sizes=sizes)
    above = values - np.asarray(target)[..., None]
    if above.shape[-1] != len(sizes):
        raise ValueError(f"values must hold one for each of the {len(sizes)} sizes, got {above.shape[-1]}")
    last = above.shape[-1] - 1 - (above > 0)[..., ::-1].argmax(-1)  # the last size above the target
    k = np.minimum(last, above.shape[-1] - 2)[..., None]
    hi, lo = (np.take_along_axis(above, i, -1)[..., 0] for i in (k, k + 1))
    log_m = np.log(np.asarray(sizes, dtype=float))
    k = k[..., 0]
    found = np.exp(log_m[k] + (log_m[k + 1] - log_m[k]) * hi / np.where(hi > lo, hi - lo, 1))
    return np.where((above > 0).any(-1), np.where(above[..., -1] > 0, np.inf, found), sizes[0])
