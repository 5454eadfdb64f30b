r"""The Z-loss: standardise the scores across the classes, and ask the right one to stand out by b standard deviations.

It needs three numbers of the D scores: the target's, their sum and their sum of squares. A loss that needs no more can
be trained, by exact gradient steps, in a time that does not depend on the number of classes.

De Brébisson and Vincent, "The Z-loss: a shift and scale invariant classification loss belonging to the Spherical
Family" (2016), https://arxiv.org/abs/1604.08859. The factored update is that of Vincent, de Brébisson and Bouthillier
(2015), https://arxiv.org/abs/1412.7091. Not to be confused with the penalty on the squared logarithm of softmax's
normaliser that later took the same name.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from paperlab.checks import require_at_least, require_between, require_finite, require_labels, require_positive

Knob = float | Tensor


class Summary(NamedTuple):
    """All that a spherical loss may know of a row of D scores: $o_c$, $s = \\sum_k o_k$, $q = \\sum_k o_k^2$, and D."""

    target: Float[Tensor, "*batch"]
    total: Float[Tensor, "*batch"]
    square: Float[Tensor, "*batch"]
    classes: int


def moments(scores: Float[Tensor, "*batch classes"], labels: Int[Tensor, "*batch"]) -> Summary:
    """The three numbers from the scores themselves.

    Raises:
        ValueError: fewer than 2 classes, or a label outside them.
    """
    require_labels(scores, labels)
    target = scores.gather(-1, labels[..., None])[..., 0]
    return Summary(target, scores.sum(-1), scores.square().sum(-1), scores.shape[-1])


class _Implicit(torch.autograd.Function):
    """Target, total and square of ``hidden @ weight.mT``, and their gradients, without that product."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        flat = labels + weight.shape[1] * torch.arange(len(weight), device=labels.device)[:, None]
        rows, total = weight.flatten(0, 1)[flat], weight.sum(1, keepdim=True)
        spread = hidden @ (weight.mT @ weight)
        ctx.save_for_backward(hidden, weight, flat, rows, total, spread)
        return (hidden * rows).sum(-1), (hidden * total).sum(-1), (hidden * spread).sum(-1)

    @staticmethod
    def backward(ctx, gamma: Tensor, beta: Tensor, half: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight, flat, rows, total, spread = ctx.saved_tensors
        gamma, beta, alpha = gamma[..., None], beta[..., None], 2 * half[..., None]
        by_weight = torch.baddbmm((beta * hidden).sum(1, keepdim=True), weight, hidden.mT @ (alpha * hidden))
        by_weight.flatten(0, 1).index_add_(0, flat.flatten(), (gamma * hidden).flatten(0, 1))
        return alpha * spread + beta * total + gamma * rows, by_weight, None


def implicit_moments(
    hidden: Float[Tensor, "copies batch d"],
    weight: Float[Tensor, "copies classes d"],
    labels: Int[Tensor, "copies batch"],
) -> Summary:
    r"""The same of $o = Wh$ without forming $o$: $q = h^\top Q h$ and $s = \bar w^\top h$ with $Q = W^\top W$.

    Many layers side by side; differentiable in ``hidden`` and ``weight``. O(D d² + m d²) for m examples, not O(m D d).

    Raises:
        ValueError: a label outside the classes.
    """
    require_between(0, weight.shape[1] - 1, labels=labels)
    return Summary(*_Implicit.apply(hidden, weight, labels), weight.shape[1])


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy and both gradients in one pass over the scores, which are of one layer at a time and never kept."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, smoothing: Tensor) -> Tensor:
        (m, classes), each = (hidden.shape[1], weight.shape[1]), torch.arange(hidden.shape[1], device=hidden.device)
        by_hidden, by_weight, losses = torch.empty_like(hidden), torch.empty_like(weight), []
        scores, p = hidden.new_empty(2, m, classes)
        for h, w, c, smooth, to_h, to_w in zip(hidden, weight, labels, smoothing, by_hidden, by_weight, strict=True):
            torch.mm(h, w.T, out=scores)
            torch.softmax(scores, 1, out=p)
            log_sum = scores.amax(1) - p.amax(1).log()  # the largest probability is never below 1 / classes
            losses.append((log_sum - (1 - smooth) * scores[each, c] - smooth * scores.mean(1)).mean())
            p -= smooth / classes
            p[each, c] -= 1 - smooth
            torch.mm(p, w, out=to_h)
            torch.mm(p.T, h, out=to_w)
        ctx.save_for_backward(by_hidden.div_(m), by_weight.div_(m))
        return torch.stack(losses)

    @staticmethod
    def backward(ctx, slope: Tensor) -> tuple[Tensor, Tensor, None, None]:
        by_hidden, by_weight = ctx.saved_tensors
        return slope[:, None, None] * by_hidden, slope[:, None, None] * by_weight, None, None


def cross_entropy(
    hidden: Float[Tensor, "copies batch d"],
    weight: Float[Tensor, "copies classes d"],
    labels: Int[Tensor, "copies batch"],
    smoothing: Float[Tensor, " copies"],
) -> Float[Tensor, " copies"]:
    r"""Every layer's mean log-softmax loss, its targets smoothed: $\log \sum_k e^{o_k} - (1 - \epsilon) o_c -
    \epsilon \mu$. The rival, at its quickest: the scores are made, used and forgotten while the cache holds them.

    Raises:
        ValueError: a label outside the classes, or a ``smoothing`` outside [0, 1].
    """
    require_between(0, weight.shape[1] - 1, labels=labels)
    require_between(0, 1, smoothing=smoothing)
    return _CrossEntropy.apply(hidden, weight, labels, smoothing)


def z_score(m: Summary, *, shift: bool = True, scale: bool = True) -> Float[Tensor, "*batch"]:
    r"""$z_c = (o_c - \mu) / \sigma$ with $\mu = s/D$ and $\sigma^2 = q/D - \mu^2$; never above $\sqrt{D - 1}$.

    The ablations: without ``shift`` nothing is subtracted and $\sigma^2 = q/D$; without ``scale`` nothing is divided.
    """
    mean = m.total / m.classes if shift else torch.zeros_like(m.total)
    centred = m.target - mean
    if not scale:
        return centred
    variance = m.square / m.classes - mean.square()
    return centred / variance.clamp(min=torch.finfo(variance.dtype).eps ** 2).sqrt()


def z_loss(m: Summary, a: Knob, b: Knob, *, shift: bool = True, scale: bool = True) -> Float[Tensor, "*batch"]:
    r"""$L_Z = \frac1a \mathrm{softplus}(a (b - z_c))$: a hinge at $z_c = b$, the sharper the larger $a$.

    The same for $\alpha o + \beta$ as for $o$, for any $\alpha > 0$. Tensors ``a`` and ``b`` give every row its own.

    Raises:
        ValueError: ``a`` is not positive, or ``b`` not finite.
    """
    require_positive(a=a)
    require_finite(b=b)
    return F.softplus(a * (b - z_score(m, shift=shift, scale=scale))) / a


def squared_error(m: Summary, height: Knob = 1.0) -> Float[Tensor, "*batch"]:
    r"""$\frac12 \sum_k (o_k - t\,\delta_{kc})^2 = \frac12 (q - 2 t o_c + t^2)$ for a target of ``height`` t.

    Raises:
        ValueError: ``height`` is not positive.
    """
    require_positive(height=height)
    return (m.square - 2 * height * m.target + height**2) / 2


def spherical_softmax(m: Summary, eps: Knob = 1e-2) -> Float[Tensor, "*batch"]:
    r"""$-\log \frac{o_c^2 + \epsilon}{\sum_k (o_k^2 + \epsilon)}$: the exponential of softmax becomes a square.

    Raises:
        ValueError: ``eps`` is not positive.
    """
    require_positive(eps=eps)
    return (m.square + m.classes * eps).log() - (m.target.square() + eps).log()


def taylor_softmax(m: Summary, temperature: Knob = 1.0) -> Float[Tensor, "*batch"]:
    r"""$-\log \frac{1 + u_c + u_c^2/2}{\sum_k (1 + u_k + u_k^2/2)}$ with $u = o / \tau$: its second-order polynomial.

    Raises:
        ValueError: ``temperature`` is not positive.
    """
    require_positive(temperature=temperature)
    t, s, q = m.target / temperature, m.total / temperature, m.square / temperature**2
    return (m.classes + s + q / 2).log() - (1 + t + t.square() / 2).log()


# What puts the classes in order: the two softmaxes are not monotone in the score.
RANKING: dict[str, Callable[[Tensor, Knob], Tensor]] = {
    "spherical softmax": lambda scores, _: scores.square(),
    "Taylor softmax": lambda scores, temperature: scores / temperature + (scores / temperature).square() / 2,
}


class ScoreGradient(NamedTuple):
    r"""The output gradient of a spherical loss: $\partial L / \partial o = \alpha o + \beta \mathbf 1 + \gamma e_c$."""

    alpha: Float[Tensor, " batch"]
    beta: Float[Tensor, " batch"]
    gamma: Float[Tensor, " batch"]


def slopes(loss: Callable[[Summary], Tensor], m: Summary) -> ScoreGradient:
    r"""Of any spherical loss: $\alpha = 2 \partial L/\partial q$, $\beta = \partial L/\partial s$, and $\gamma =
    \partial L/\partial o_c$.
    """
    inputs = [x.detach().requires_grad_() for x in m[:3]]
    with torch.enable_grad():
        value = loss(Summary(*inputs, m.classes)).sum()
    by_target, by_total, by_square = torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True)
    return ScoreGradient(2 * by_square, by_total, by_target)


def z_slopes(m: Summary, a: float, b: float) -> ScoreGradient:
    r"""Of the Z-loss: $\frac{\partial z_c}{\partial o_k} = \frac1\sigma (\delta_{kc} - \frac1D - \frac{z_c z_k}D)$.

    With $g = \mathrm{sigmoid}(a(b - z_c)) / \sigma$: $\gamma = -g$, $\alpha = \frac{g z_c}{\sigma D}$ and
    $\beta = \frac gD - \alpha\mu$. Written for the clock: scores that are all equal, where $\sigma = 0$, give NaN.
    """
    mean = m.total / m.classes
    sigma = (m.square / m.classes - mean * mean).sqrt()
    z = (m.target - mean) / sigma
    g = torch.sigmoid(a * (b - z)) / sigma
    alpha = g * z / (sigma * m.classes)
    return ScoreGradient(alpha, g / m.classes - alpha * mean, -g)


class FactoredOutput:
    r"""A layer of D classes, $W = V U + \mathbf 1 \omega^\top$, whose gradient step never touches all of its rows.

    U is d × d and V, the only large matrix, D × d. Beside them are kept $U^{-1}$, $Q = W^\top W$ and
    $\bar w = W^\top \mathbf 1$. A step with m examples costs O(m d²) and moves m rows of V.

    Raises:
        ValueError: ``weight`` has fewer than 2 classes or is not finite.
    """

    def __init__(self, weight: Float[Tensor, "classes d"]) -> None:
        require_at_least(2, **{"number of classes in weight": weight.shape[0]})
        require_finite(weight=weight)
        self.rows = weight.clone()
        self._begin()

    def _begin(self) -> None:
        d = self.rows.shape[1]
        self.mix = torch.eye(d, dtype=self.rows.dtype, device=self.rows.device)  # U
        self.unmix, self.offset = self.mix.clone(), torch.zeros_like(self.mix[0])  # the inverse of U, omega
        self.gram, self.total = self.rows.T @ self.rows, self.rows.sum(0)  # Q, w-bar

    def weight(self) -> Float[Tensor, "classes d"]:
        """W itself, in O(D d²): for evaluation and tests."""
        return torch.addmm(self.offset, self.rows, self.mix)

    def refactor(self) -> None:
        """Begin again from W itself, with U = 1: what rounding has done to the small matrices is forgotten. O(D d²)."""
        self.rows = self.weight()
        self._begin()

    def step(
        self,
        hidden: Float[Tensor, "batch d"],
        labels: Int[Tensor, " batch"],
        slopes_of: Callable[[Summary], ScoreGradient],
        lr: float,
    ) -> Float[Tensor, "batch d"]:
        r"""One gradient step on the sum of the batch's losses; returns their gradient in ``hidden``.

        With $A = \mathrm{diag}(\eta\alpha)$, $M = 1 - H^\top A H$, $x = -\eta H^\top\beta$ and $G = -\mathrm{diag}
        (\eta\gamma) H$, the step is $W \leftarrow W M + \mathbf 1 x^\top + E_c^\top G$: $U$ takes $M$, $\omega$ takes
        $x$, and the rows c of V take $G U^{-1}$. $M^{-1}$ is that of Sherman, Morrison and Woodbury.

        Raises:
            ValueError: no examples, unequal numbers of ``hidden`` and ``labels``, a label outside the classes, or an
                ``lr`` that is not positive.
        """
        if not len(hidden) == len(labels) > 0:
            raise ValueError(f"hidden and labels must hold as many examples, got {len(hidden)} and {len(labels)}")
        if not lr > 0:
            raise ValueError(f"lr must be positive, got {lr}")
        require_between(0, len(self.rows) - 1, labels=labels)
        old = self.rows[labels] @ self.mix + self.offset  # rows c of W
        spread, sums, overlap = hidden @ self.gram, hidden @ self.total, hidden @ hidden.T
        found = Summary((old * hidden).sum(1), sums, (spread * hidden).sum(1), len(self.rows))
        alpha, beta, gamma = (x[:, None] for x in slopes_of(found))
        back = alpha * spread + beta * self.total + gamma * old

        shrunk, x, g = lr * alpha * hidden, -lr * (beta * hidden).sum(0), -lr * gamma * hidden  # A H, x, G
        now = old - (old @ hidden.T) @ shrunk + x
        same = (labels[:, None] == labels).to(g)
        total = self.total - (sums[:, None] * shrunk).sum(0)
        left = torch.cat([shrunk, x[None], g])
        squared = 0.5 * (spread @ hidden.T) @ shrunk - spread
        right = torch.cat([squared, (total + 0.5 * len(self.rows) * x)[None], now + 0.5 * same @ g])
        change = left.T @ right
        self.gram += change + change.T
        self.total = total + len(self.rows) * x + g.sum(0)

        self.offset = self.offset - (hidden @ self.offset) @ shrunk + x
        self.mix -= (self.mix @ hidden.T) @ shrunk
        shrunk_back = shrunk @ self.unmix
        if len(labels) == 1:
            solved = shrunk_back / (1 - lr * alpha * overlap)
        else:
            inner = torch.eye(len(labels), dtype=g.dtype, device=g.device) - lr * alpha * overlap
            solved = torch.linalg.solve(inner, shrunk_back)
        self.unmix += hidden.T @ solved
        self.rows.index_add_(0, labels, g @ self.unmix)
        return back


def softmax_step(
    weight: Float[Tensor, "classes d"], hidden: Float[Tensor, "batch d"], labels: Int[Tensor, " batch"], lr: float
) -> Float[Tensor, "batch d"]:
    """One dense gradient step on log-softmax, in place and by hand; returns the gradient in ``hidden``. O(m D d).

    A rival for the clock: its input is not checked.
    """
    p = hidden @ weight.T
    torch.softmax(p, 1, out=p)
    p[torch.arange(len(labels)), labels] -= 1
    back = p @ weight
    weight.addmm_(p.T, hidden, alpha=-lr)
    return back


def two_level_step(
    head: Float[Tensor, "groups d"],
    words: Float[Tensor, "groups size d"],
    hidden: Float[Tensor, "batch d"],
    labels: Int[Tensor, " batch"],
    lr: float,
    gather: bool = True,
) -> Float[Tensor, "batch d"]:
    r"""The same on a two-level softmax, $p_c = p(\text{group}) \, p(c \mid \text{group})$. O(m √D d).

    Class c is number ``c % size`` of group ``c // size``. The examples' groups are gathered into one batched product,
    or (better for few examples and large groups) visited one by one, each with all of its examples. Nor is it checked.
    """
    size = words.shape[1]
    groups, within = labels // size, labels % size
    back = softmax_step(head, hidden, groups, lr)
    if gather:
        rows = words[groups]
        p = torch.softmax(rows @ hidden[:, :, None], 1)
        p[torch.arange(len(labels)), within] -= 1
        back += (rows.mT @ p)[:, :, 0]
        words.index_add_(0, groups, p * hidden[:, None], alpha=-lr)
        return back
    for group in groups.unique().tolist():
        inside = (groups == group).nonzero()[:, 0]
        back[inside] += softmax_step(words[group], hidden[inside], within[inside], lr)
    return back


def ranks(scores: Float[Tensor, "*batch classes"], labels: Int[Tensor, "*batch"]) -> Int[Tensor, "*batch"]:
    """Where the label stands, from 1: one more than the other classes that do not score lower, so that ties, and scores
    that are not numbers, count against it.

    Raises:
        ValueError: a label outside the classes.
    """
    require_between(0, scores.shape[-1] - 1, labels=labels)
    own = scores.gather(-1, labels[..., None])
    beaten = torch.lt(scores, own, out=torch.empty_like(scores)).sum(-1)  # as floats: far faster to add
    return scores.shape[-1] - beaten.round().long()
