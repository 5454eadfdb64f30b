r"""Monotone deep Boltzmann machines: any connections you like, and still only one answer to every question.

A Boltzmann machine with free connections can settle in many places, and its parallel updates may never settle at all.
Written in a particular way its weights make the mean-field problem convex: one answer, found from any start, through
which one can also differentiate.

Feng, Winston and Kolter (2023), https://arxiv.org/abs/2307.04990. The model is
$p(x) \propto \exp(\frac12 x^\top \Phi x + b^\top x)$ over one-hot variables; $q$ holds all their marginals in one row.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from paperlab.checks import require_at_least, require_between, require_finite, require_one_of
from paperlab.nn.one_hot import Layout


def monotone_weights(
    A: Float[Tensor, "*copies r units"], layout: Layout, m: float | Tensor
) -> Float[Tensor, "*copies units units"]:
    r"""$\Phi = \mathrm{blkdiag}(\hat A^\top \hat A) - \hat A^\top \hat A$, so that $I - \Phi \succeq m I$.

    The columns $A_i$ of a variable are scaled to a spectral norm of at most $\sqrt{1 - m}$:
    $\hat A_i = \min\{\sqrt{1-m} / \|A_i\|_2, 1\}\,A_i$. As $m \to 1$ all weights vanish. The paper takes $m > 0$; one
    solution there is for every $m > -1$: $v^\top \mathrm{diag}(1/q)\,v \ge 2\|v\|^2$ if $v$ sums to 0 in each variable.

    Raises:
        ValueError: ``m`` outside (-1, 1].
    """
    require_between(-1 + 1e-9, 1, m=m)
    bound, scale, first, gram = (1 - torch.as_tensor(m, dtype=A.dtype, device=A.device)).sqrt(), [], 0, A.mT @ A
    for n, k in layout.runs:
        units = first + torch.arange(k * n, device=A.device).view(k, n).T  # the states of each variable
        top = _largest_eigenvalue(gram[..., units[:, :, None], units[:, None]])
        scale.append((bound[..., None] / top.clamp(min=1e-12).sqrt()).clamp(max=1)[..., None, :])
        first += k * n
    d = layout.join(scale)
    return -(d[..., None] * gram * d[..., None, :]).masked_fill(layout.same().to(A.device), 0)


def _largest_eigenvalue(block: Tensor) -> Tensor:
    if block.shape[-1] != 2:
        return block[..., 0, 0] if block.shape[-1] == 1 else torch.linalg.eigvalsh(block)[..., -1]
    a, b, c = block[..., 0, 0], block[..., 0, 1], block[..., 1, 1]  # a quadratic equation, much faster than LAPACK
    return (a + c) / 2 + ((a - c).square() / 4 + b.square()).clamp(min=1e-24).sqrt()


def free_weights(W: Float[Tensor, "*copies units units"], layout: Layout) -> Float[Tensor, "*copies units units"]:
    """The unconstrained rival: any symmetric weights without links inside a variable."""
    return ((W + W.mT) / 2).masked_fill(layout.same().to(W.device), 0)


def exact_marginals(
    phi: Float[Tensor, "*copies units units"], b: Float[Tensor, "*copies units"], layout: Layout
) -> Float[Tensor, "*copies units"]:
    """Marginals by enumeration of all states.

    Raises:
        ValueError: more than 4096 states.
    """
    variables = [k for n, k in layout.runs for _ in range(n)]
    require_between(1, 4096, **{"number of states": math.prod(variables)})
    states = torch.cartesian_prod(*(torch.arange(k) for k in variables)).view(-1, len(variables))
    runs = states.split([n for n, _ in layout.runs], dim=-1)
    x = layout.join([F.one_hot(run, k).mT for run, (_, k) in zip(runs, layout.runs, strict=True)]).to(phi)
    return (((x @ phi) * x).sum(-1) / 2 + b @ x.T).softmax(-1) @ x


def prox(
    y: Float[Tensor, "*batch states variables"],
    alpha: float | Tensor,
    start: tuple[Tensor, Tensor] | None = None,
    *,
    newton: int = 50,
    halley: int = 3,
    precision: float = 0.0,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    r"""$\mathrm{prox}_{\alpha f}(y)$ with $f(q) = \sum q \log q - \frac12 \|q\|^2$ on the simplex, for each variable.

    It is the $z$ with $\alpha \log z_i + (1 - \alpha) z_i = y_i + \nu - \alpha$ and $\sum_i z_i = 1$: Halley's method
    in $\log z$ (which keeps $z$ positive) for given $\nu$, Newton's for $\nu$. At $\alpha = 1$ it is the softmax, as
    $\alpha \to 0$ the projection onto the simplex. Returns $z$, and $(\log z, \nu)$ as the ``start`` of a similar call.

    Of two states the difference is enough: a ``y`` with a single state is a pair that `Layout.fold` has folded.

    Newton begins at the $\nu$ where the likeliest state alone has $z = 1$. The sum of $z$ is convex and rising in
    $\nu$, so that it comes down from there without ever passing the root. It stops early once all sums are within
    ``precision`` of 1.

    Raises:
        ValueError: ``alpha`` outside (0, 1].
    """
    require_between(1e-9, 1, alpha=alpha)
    if y.shape[-2] == 2:
        s, warm = prox((y[..., 1:, :] - y[..., :1, :]) / 2**0.5, alpha, start, newton=newton, precision=precision)
        return torch.cat([0.5 - s / 2**0.5, 0.5 + s / 2**0.5], -2), warm
    if y.shape[-2] == 1:
        return _prox_of_two(y, alpha, start, newton, precision)
    rest, highest = 1 - alpha, 1 - y.amax(-2, keepdim=True)
    lowest = highest - (rest * (1 - 1 / y.shape[-2]) + alpha * math.log(y.shape[-2]))  # there it has 1 / states
    log_z, nu = start or (((y + highest - alpha) / alpha).clamp(max=0), highest)
    for _ in range(newton):
        nu = nu.clamp(lowest, highest)
        c = y + (nu - alpha)
        for _ in range(halley):
            t = rest * log_z.exp()  # the equation is h(log z) = c; t is also the second derivative of h
            slope, miss = alpha + t, alpha * log_z + t - c
            square = slope.square()
            log_z = (log_z - miss * slope / torch.maximum(square - miss * t / 2, square / 2)).clamp_(max=0)
        z = log_z.exp()
        slope = alpha + rest * z
        excess = z.sum(-2, keepdim=True) - 1
        move = excess / (z / slope).sum(-2, keepdim=True)
        nu, log_z = nu - move, (log_z - move / slope).clamp_(max=0)
        if precision and excess.abs().max() <= precision:
            break
    return log_z.exp(), (log_z, nu)


def _prox_of_two(
    y: Tensor, alpha: float | Tensor, start: tuple[Tensor, Tensor] | None, newton: int, precision: float
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    r"""Two states need no $\nu$: their equations' difference is $\alpha u + (1 - \alpha) \tanh(u/2) = y_1 - y_0$.

    Newton's method for the log-odds $u$, taken without its sign. For $u > 0$ the left side is concave, so that it
    climbs from the lower bound without ever passing the root; whoever starts above is sent back to the bound at worst.
    Input and output are folded, $(y_1 - y_0)/\sqrt2$ and $\tanh(u/2)/\sqrt2$.
    """
    size, rest, mean = y.abs().mul_(2**0.5), 1 - alpha, (1 + alpha) / 2
    least = ((size - rest) / alpha).clamp_(min=0)
    u = least if start is None else torch.maximum(start[0], least)
    for _ in range(newton):
        th = torch.sigmoid(u).mul_(2).sub_(1)  # tanh(u / 2), twice as fast
        miss = (th * rest).add_(alpha * u).sub_(size)
        u = torch.maximum(u - miss / (mean - th.square_().mul_(rest / 2)), least)
        if precision and miss.abs().max() <= precision:
            break
    return torch.sigmoid(u).mul_(2**0.5).sub_(0.5**0.5).copysign_(y), (u, u)


def prox_jacobian(
    z: Float[Tensor, "*batch states variables"], v: Float[Tensor, "*batch states variables"], alpha: float | Tensor
) -> Float[Tensor, "*batch states variables"]:
    r"""$J v$ for the derivative $J = D - D 1 1^\top D / 1^\top D 1$ of `prox` where its value is $z$.

    $D = \mathrm{diag}(z / (\alpha + (1 - \alpha) z))$; at $\alpha = 1$ it is that of the softmax. A folded pair has
    one number instead, that of the tanh.
    """
    return _project(_slope(z, alpha), v)


def _slope(z: Tensor, alpha: float | Tensor) -> Tensor:
    if z.shape[-2] == 1:
        return 1 / (1 - alpha + 2 * alpha / (1 - 2 * z.square()).clamp(min=0))
    return z / (alpha + (1 - alpha) * z)


def _project(D: Tensor, v: Tensor) -> Tensor:
    Dv = D * v
    return Dv if D.shape[-2] == 1 else Dv - D * (Dv.sum(-2, keepdim=True) / D.sum(-2, keepdim=True))


def settle(
    phi: Float[Tensor, "*copies units units"],
    b: Float[Tensor, "*copies 1 units"],
    layout: Layout,
    values: Float[Tensor, "*copies batch units"],
    free: Bool[Tensor, "*copies batch units"],
    *,
    alpha: float | Float[Tensor, "*copies 1 1"],
    steps: int,
    damping: str = "prox",
    inner: tuple[int, int] = (2, 1),
    tolerance: float = 0.0,
) -> Float[Tensor, "*copies batch units"]:
    r"""Mean-field inference: marginals $q_i = \mathrm{softmax}(\sum_j \Phi_{ij} q_j + b_i)$, the observed ones clamped.

    ``prox``: $q \leftarrow \mathrm{prox}_{\alpha f}((1 - \alpha) q + \alpha(\Phi q + b))$, the paper's;
    ``average``: $q \leftarrow (1 - \alpha) q + \alpha\,\mathrm{softmax}(\Phi q + b)$, undamped at $\alpha = 1$.
    ``values`` holds the observed states and, where ``free``, the start. ``inner`` counts the steps of Newton and Halley
    in a prox, which begins where the last one ended. Stops early once no marginal moves by more than ``tolerance``
    times $\alpha$. The rows are folded first (`Layout.fold`): the same steps in other orthogonal coordinates, and
    between binary variables a quarter of the multiplications.

    Raises:
        ValueError: an unknown ``damping``, ``alpha`` outside (0, 1], ``steps`` below 1, or weights that are not finite.
    """
    require_one_of(("prox", "average"), damping=damping)
    require_at_least(1, steps=steps)
    require_between(1e-9, 1, alpha=alpha)
    require_finite(phi=phi, b=b)
    inside = alpha[..., None] if isinstance(alpha, Tensor) else alpha  # one axis more where states have their own
    middle = layout.join([torch.full((1, 1), 0.5 if k == 2 else 0.0) for _, k in layout.runs]).to(values)[None]
    folded, pull, still = layout.folded, layout.fold(layout.fold(phi).mT), layout.fold(b + middle @ phi)
    s, mask, warm = layout.fold(values), layout.fold_mask(free).to(values), [None] * len(layout.runs)
    fixed = s * (1 - mask)
    for step in range(steps):
        field = s @ pull + still
        if damping == "average":
            new = torch.lerp(s, folded.softmax(field), alpha)
        else:
            newton, halley = inner if step else (4, 3)
            ys = folded.split(torch.lerp(s, field, alpha))
            found = [prox(y, inside, w, newton=newton, halley=halley) for y, w in zip(ys, warm, strict=True)]
            new, warm = folded.join([z for z, _ in found]), [w for _, w in found]
        s, old = torch.addcmul(fixed, new, mask), s
        if tolerance and ((s - old).abs() <= tolerance * alpha).all():
            break
    return torch.where(free, middle + layout.unfold(s), values)


def unsettled(
    phi: Float[Tensor, "*copies units units"],
    b: Float[Tensor, "*copies 1 units"],
    layout: Layout,
    q: Float[Tensor, "*copies batch units"],
    free: Bool[Tensor, "*copies batch units"],
) -> Float[Tensor, "*copies batch"]:
    r"""How far from a solution: the largest $|q - \mathrm{softmax}(\Phi q + b)|$ over the free units."""
    return ((layout.softmax(q @ phi + b) - q) * free).abs().amax(-1)


def steepness(phi: Float[Tensor, "*copies units units"]) -> Float[Tensor, "*copies 1 1"]:
    r"""$L = \|I - \Phi\|_2$. The paper's step is at most $2m/L^2$; as $\Phi$ is symmetric, any below $2/L$ will do."""
    return (1 - torch.linalg.eigvalsh(phi)).abs().amax(-1)[..., None, None]


class Equilibrium(torch.autograd.Function):
    r"""The marginals of `settle`, with the gradient of the fixed point itself and not of the steps that led to it.

    At the fixed point $dq = J\,d(\Phi q + b)$ with $J$ the derivative of the softmax, so a gradient $g$ in $q$ becomes
    $w = J (g + \Phi w)$ in $b$ and $w q^\top$ in $\Phi$. The equation for $w$ is solved as that for $q$ was, by
    $w \leftarrow J_\alpha((1 - \alpha) w + \alpha (g + \Phi w))$ with $J_\alpha$ of `prox_jacobian`, and
    ends at the same $w$ for every $\alpha$.
    """

    @staticmethod
    def forward(ctx, phi, b, values, free, layout, options):
        """The marginals; ``options`` go to `settle`."""
        q = settle(phi, b, layout, values, free, **options)
        ctx.save_for_backward(phi, q, free)
        ctx.layout, ctx.options = layout, options
        return q

    @staticmethod
    def backward(ctx, g):
        """Gradients in the weights and the biases."""
        phi, q, free = ctx.saved_tensors
        layout, alpha, steps = ctx.layout, ctx.options["alpha"], ctx.options["steps"]
        average = ctx.options.get("damping") == "average"
        inside = 1.0 if average else alpha[..., None] if isinstance(alpha, Tensor) else alpha
        folded, pull, mask = layout.folded, layout.fold(layout.fold(phi).mT), layout.fold_mask(free).to(q)
        g, slopes = layout.fold(g), [_slope(z, inside) for z in folded.split(layout.fold(q))]
        w = torch.zeros_like(g)
        for _ in range(steps):
            vs = folded.split(torch.lerp(w, g + w @ pull, 1.0 if average else alpha))
            new = folded.join([_project(D, v) for D, v in zip(slopes, vs, strict=True)]) * mask
            w = torch.lerp(w, new, alpha) if average else new
        w = layout.unfold(w)
        return q.mT @ w, w.sum(-2, keepdim=True), None, None, None, None


class Machine(nn.Module):
    r"""Boltzmann machines side by side: pixels, hidden binary units and a label, all connected with all.

    ``ink`` (copies, pixels) is the mean training image. It sets the biases at the start and the centre $\mu$ from which
    activity is counted: $\Phi (q - \mu) + b$ is the same family of models and easier to train. ``m`` is the
    monotonicity of each copy, None for the unconstrained rival. The square $A$ starts near $I$, where all weights are
    0. Read off is $\mathrm{softmax}(\tau^2 (\Phi q + b))$ with a learned $\tau$ for every pixel and one for the label.

    ``alpha`` is the largest step; a copy takes less where $1/\|I - \Phi\|$ (by power iteration) is less.

    Raises:
        ValueError: a size below 1, or ``ink`` outside 0 to 1.
    """

    def __init__(
        self,
        ink: Float[Tensor, "copies pixels"],
        hidden: int,
        classes: int,
        m: float | Sequence[float] | None,
        *,
        tau_label: float = 10**0.5,
        alpha: float = 0.25,
        steps: int = 15,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        require_between(0, 1, ink=ink)
        require_at_least(1, hidden=hidden, steps=steps)
        copies, self.pixels = ink.shape
        self.layout = layout = Layout(((self.pixels + hidden, 2), (1, classes)))
        self.monotone, self.steps, self.largest, n = m is not None, steps, alpha, layout.units
        on = F.pad(ink, (0, hidden), value=0.5)[:, None, None].clamp(0.02, 0.98)
        centre = layout.join([torch.cat([1 - on, on], -2), torch.full((copies, 1, classes, 1), 1 / classes)])
        self.register_buffer("m", torch.as_tensor(m if self.monotone else 1.0, dtype=ink.dtype).expand(copies).clone())
        self.register_buffer("centre", centre)
        self.register_buffer("direction", layout.fold(torch.randn(copies, 1, n, generator=generator)).mT)
        noise = 0.1 / n**0.5 * torch.randn(copies, n, n, generator=generator)
        self.weight = nn.Parameter(noise + torch.eye(n) if self.monotone else noise)
        self.b = nn.Parameter(centre.log())
        self.tau = nn.Parameter(torch.ones(copies, 1, self.pixels))
        self.tau_label = nn.Parameter(torch.full((copies, 1, 1), tau_label))

    def model(self) -> tuple[Float[Tensor, "copies units units"], Float[Tensor, "copies 1 units"]]:
        r"""$\Phi$ and $b - \Phi\mu$. What in $A$ is common to all states of a variable is only a bias, and left out."""
        if self.monotone:
            phi = self.layout.unfold(self.layout.unfold(self.folded_model()[0]).mT)
        else:
            phi = free_weights(self._without_common(self.weight, self.layout), self.layout)
        return phi, self.b - self.centre @ phi

    def folded_model(self) -> tuple[Float[Tensor, "copies folded folded"], Float[Tensor, "copies 1 folded"]]:
        """The same, folded: all that inference needs, and a quarter of the entries."""
        layout, folded = self.layout, self.layout.folded
        W = self._without_common(layout.fold(self.weight), folded)
        phi = monotone_weights(W, folded, self.m) if self.monotone else free_weights(layout.fold(W.mT), folded)
        return phi, layout.fold(self.b) - layout.fold(self.centre) @ phi

    @staticmethod
    def _without_common(W: Tensor, layout: Layout) -> Tensor:
        return layout.join([p if p.shape[-2] == 1 else p - p.mean(-2, keepdim=True) for p in layout.split(W)])

    def clamp(
        self, images: Float[Tensor, "copies batch pixels"], seen: Bool[Tensor, "copies batch pixels"]
    ) -> tuple[Float[Tensor, "copies batch units"], Bool[Tensor, "copies batch units"]]:
        """Observed states (uniform where nothing is observed), and which units are free."""
        (n, _), (_, classes) = self.layout.runs
        known = F.pad(seen, (0, n - self.pixels))[..., None, :]
        on = torch.where(known, F.pad(images, (0, n - self.pixels))[..., None, :], 0.5)
        label = on.new_full((*on.shape[:-2], classes, 1), 1 / classes)
        free = [~known, torch.ones_like(label, dtype=torch.bool)]
        return self.layout.join([torch.cat([1 - on, on], -2), label]), self.layout.join(free)

    def step_size(self, phi: Float[Tensor, "copies units units"]) -> float | Float[Tensor, "copies 1 1"]:
        """The largest step that both the setting and the weights allow; a plain half for the unconstrained rival."""
        if not self.monotone:
            return 0.5
        phi = phi.detach()
        if phi.shape[-1] == self.layout.units:
            phi = self.layout.fold(self.layout.fold(phi).mT)
        for _ in range(3):
            self.direction = F.normalize(self.direction - phi @ self.direction, dim=1)
        stretch = (self.direction - phi @ self.direction).norm(dim=1, keepdim=True)
        return (1 / stretch).clamp(max=self.largest)

    def forward(
        self, images: Float[Tensor, "copies batch pixels"], seen: Bool[Tensor, "copies batch pixels"]
    ) -> tuple[Float[Tensor, "copies batch pixels"], Float[Tensor, "copies batch classes"]]:
        """Log-odds of every pixel given the others, and logits of the label."""
        layout, (phi, b), (values, free) = self.layout, self.folded_model(), self.clamp(images, seen)
        options = {
            "alpha": self.step_size(phi), "steps": self.steps, "damping": "prox" if self.monotone else "average",
            "inner": (1, 1),
        }  # fmt: skip
        s = Equilibrium.apply(phi, b, layout.fold(values), layout.fold_mask(free), layout.folded, options)
        return self._scaled(s @ phi + b)

    def read(
        self, q: Float[Tensor, "copies batch units"], phi: Tensor, b: Tensor
    ) -> tuple[Float[Tensor, "copies batch pixels"], Float[Tensor, "copies batch classes"]]:
        """Log-odds of the pixels and logits of the label at the marginals ``q``."""
        return self._scaled(self.layout.fold(q @ phi + b))

    def _scaled(self, field: Tensor) -> tuple[Tensor, Tensor]:
        odds, label = field[..., : self.pixels] * 2**0.5, field[..., -self.layout.runs[1][1] :]
        return odds * self.tau.square(), label * self.tau_label.square()


class RestrictedMachine(nn.Module):
    """The classical rival: pixels and label on one side, hidden units on the other, and no links within a side.

    Raises:
        ValueError: a size below 1, or ``ink`` outside 0 to 1.
    """

    def __init__(
        self,
        ink: Float[Tensor, "copies pixels"],
        hidden: int,
        classes: int,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        require_between(0, 1, ink=ink)
        require_at_least(1, hidden=hidden, classes=classes)
        self.pixels, visible = ink.shape[1], ink.shape[1] + classes
        self.W = nn.Parameter(0.05 * torch.randn(len(ink), visible, hidden, generator=generator))
        self.a = nn.Parameter(F.pad(ink.clamp(0.02, 0.98).logit(), (0, classes))[:, None])
        self.c = nn.Parameter(torch.zeros(len(ink), 1, hidden))

    def free_energy(self, v: Float[Tensor, "copies batch visible"]) -> Float[Tensor, "copies batch"]:
        """Minus the logarithm of the unnormalised probability of ``v``: the hidden units are summed out."""
        return -(v * self.a).sum(-1) - F.softplus(v @ self.W + self.c).sum(-1)

    @torch.no_grad()
    def gibbs(self, v: Float[Tensor, "copies batch visible"], generator: torch.Generator) -> Tensor:
        """One sweep of Gibbs sampling, hidden units and then pixels and label."""

        def on(field: Tensor) -> Tensor:
            return (torch.rand(field.shape, generator=generator, device=v.device) < torch.sigmoid(field)).to(v)

        pixels, label = (on(v @ self.W + self.c) @ self.W.mT + self.a).tensor_split([self.pixels], -1)
        noise = torch.rand(label.shape, generator=generator, device=v.device).clamp(min=1e-9)
        chosen = (label - (-noise.log()).log()).argmax(-1)  # Gumbel's way to draw from a softmax
        return torch.cat([on(pixels), F.one_hot(chosen, label.shape[-1])], -1)

    def forward(
        self, images: Float[Tensor, "copies batch pixels"], seen: Bool[Tensor, "copies batch pixels"], steps: int = 30
    ) -> tuple[Float[Tensor, "copies batch pixels"], Float[Tensor, "copies batch classes"]]:
        """Mean-field fill-in of what is not seen: log-odds of the pixels and logits of the label."""
        v = torch.softmax(self.a[..., self.pixels :], -1).expand(*images.shape[:-1], -1)
        v = torch.cat([torch.where(seen, images, torch.sigmoid(self.a[..., : self.pixels])), v], -1)
        for _ in range(steps):
            odds, label = (torch.sigmoid(v @ self.W + self.c) @ self.W.mT + self.a).tensor_split([self.pixels], -1)
            v = torch.cat([torch.where(seen, images, torch.sigmoid(odds)), label.softmax(-1)], -1)
        return odds, label


def completion_loss(
    odds: Float[Tensor, "copies batch pixels"],
    label_logits: Float[Tensor, "copies batch classes"],
    images: Float[Tensor, "copies batch pixels"],
    labels: Int[Tensor, "copies batch"],
    seen: Bool[Tensor, "copies batch pixels"],
    share: float | Float[Tensor, " copies"] = 0.9,
) -> Float[Tensor, " copies"]:
    r"""``share`` of the label's cross-entropy, the rest of the hidden pixels' focal loss $-(1 - p)^2 \log p$.

    Raises:
        ValueError: ``share`` outside 0 to 1.
    """
    require_between(0, 1, share=share)
    log_p = F.logsigmoid(torch.where(images > 0.5, odds, -odds))
    focal = -(1 - log_p.exp()).square() * log_p * ~seen
    label = F.cross_entropy(label_logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    return (1 - share) * focal.sum((1, 2)) / (~seen).sum((1, 2)).clamp(min=1) + share * label.mean(1)
