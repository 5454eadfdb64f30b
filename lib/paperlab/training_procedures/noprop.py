r"""NoProp: every block of a network learns alone to clean up a noisy label; nothing is propagated while it learns.

Backpropagation makes each layer wait for all the others, forwards and then backwards. Here block t is shown the image
and a label drowned in a known amount of noise, and must say which label it was. The blocks never meet before they are
used: then they turn pure noise into a label, one after the other, like the steps of a diffusion model.

Li, Teh and Pascanu (2025), https://arxiv.org/abs/2503.24322. $u_y$ is the embedding of class y (a row of `embedding`),
$z_0$ noise, $z_T$ the last state, $\bar\alpha_t$ the share of signal in $z_t$. S independent runs (seeds) lie side by
side on the leading axis, so that all blocks of all runs are one batched matrix product.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from paperlab.checks import require_at_least, require_between, require_finite, require_ndim, require_nonnegative
from paperlab.nn import StackedLinear
from paperlab.nn.layerwise import cross_entropy

FREQUENCIES = 4  # in CT and FM the time enters as sines and cosines of this many octaves
SHARPNESS = 5.0  # before training, the read-out's logit for a clean label of the right class


def cosine_schedule(T: int, *, first: float = 1e-3, last: float = 0.99) -> Float[Tensor, " T_plus_1"]:
    r"""$\bar\alpha_t = \sin^2(\frac\pi2 t/T)$, t = 0..T, clipped to [first, last]: the SNR stays finite.

    Raises:
        ValueError: T below 1, or an end outside [0, 1].
    """
    require_at_least(1, T=T)
    require_between(0, 1, first=first, last=last)
    return torch.sin(torch.linspace(0, math.pi / 2, T + 1)).square().clamp(first, last)


def snr(alpha_bar: Float[Tensor, "*t"]) -> Float[Tensor, "*t"]:
    r"""Signal-to-noise ratio $\bar\alpha/(1-\bar\alpha)$."""
    return alpha_bar / (1 - alpha_bar)


def posterior(alpha_bar: Float[Tensor, " T1"]) -> tuple[Float[Tensor, " T"], Float[Tensor, " T"], Float[Tensor, " T"]]:
    r"""$a_t, b_t, c_t$ for t = 1..T: $q(z_t \mid z_{t-1}, y) = \mathcal N(a_t u_y + b_t z_{t-1},\ c_t I)$.

    With $\alpha_{t-1} = \bar\alpha_{t-1}/\bar\alpha_t$ and $w = 1/(1-\bar\alpha_{t-1})$:
    $a_t = w\sqrt{\bar\alpha_t}(1-\alpha_{t-1})$, $b_t = w\sqrt{\alpha_{t-1}}(1-\bar\alpha_t)$ and
    $c_t = w(1-\bar\alpha_t)(1-\alpha_{t-1})$. As $\bar\alpha_t \to 1$: $a_t \to 1$ and $b_t, c_t \to 0$.

    Raises:
        ValueError: values outside [0, 1], or fewer than two.
    """
    require_between(0, 1, alpha_bar=alpha_bar)
    require_at_least(2, **{"number of values in alpha_bar": len(alpha_bar)})
    before, after = alpha_bar[:-1], alpha_bar[1:]
    alpha, w = before / after, 1 / (1 - before)
    return w * after.sqrt() * (1 - alpha), w * alpha.sqrt() * (1 - after), w * (1 - after) * (1 - alpha)


def noised(
    u: Float[Tensor, "*batch d"], alpha_bar: Float[Tensor, "*#batch"], g: torch.Generator
) -> Float[Tensor, "*batch d"]:
    r"""A draw from $q(z \mid y) = \mathcal N(\sqrt{\bar\alpha}\,u_y,\ (1-\bar\alpha) I)$."""
    noise = torch.randn(u.shape, generator=g, device=u.device, dtype=u.dtype)
    return alpha_bar.sqrt()[..., None] * u + (1 - alpha_bar).sqrt()[..., None] * noise


def prototypes(images: Float[Tensor, "n p"], labels: Int[Tensor, " n"], classes: int) -> Float[Tensor, "classes p"]:
    """An embedding in image space: of each class the image with the smallest median distance to the rest of its class.

    Raises:
        ValueError: a class without an image.
    """
    absent = set(range(classes)) - set(labels.tolist())
    if absent:
        raise ValueError(f"labels must hold every class, there is no image of {sorted(absent)}")
    groups = [images[labels == c] for c in range(classes)]
    return torch.stack([group[torch.cdist(group, group).median(1).values.argmin()] for group in groups])


def probabilities(logits: Float[Tensor, "*k b C"]) -> Float[Tensor, "*k b C"]:
    """Softmax over the classes, transposed first: over rows as short as ten the CPU kernel is several times slower."""
    return logits.mT.contiguous().softmax(-2).mT


class Denoiser(nn.Module):
    """One block up to its last step: a path for the image, one with a skip for z, joined, then ``out`` numbers."""

    def __init__(self, copies: int, pixels: int, d: int, hidden: int, out: int) -> None:
        super().__init__()
        self.see, self.lift = StackedLinear(copies, pixels, hidden), StackedLinear(copies, d, hidden)
        self.bend, self.join = StackedLinear(copies, hidden, hidden), StackedLinear(copies, 2 * hidden, hidden)
        self.out = StackedLinear(copies, hidden, out)

    def forward(self, x: Float[Tensor, "copies b p"], z: Float[Tensor, "copies #b d"]) -> Float[Tensor, "copies b out"]:
        """Logits over the classes (in flow matching: a velocity). A z of b = 1 serves every image."""
        return self.judge(self.see(x).relu(), z, [(m.bias, m.weight) for m in [*self.children()][1:]])

    def parts(self, T: int) -> list[tuple[tuple[Tensor, Tensor], ...]]:
        """The layers of `judge`, as (bias, weight), for each of T blocks that lie one after the other on the stack."""
        pieces = [zip(m.bias.chunk(T), m.weight.chunk(T), strict=True) for m in [*self.children()][1:]]
        return list(zip(*pieces, strict=True))

    @staticmethod
    def judge(seen: Float[Tensor, "k b h"], z: Float[Tensor, "k #b d"], layers: Sequence) -> Float[Tensor, "k b out"]:
        """What is left to do when the image's own layer has answered: the path for z, the join, the output."""
        lift, bend, join, out = layers
        h = torch.baddbmm(lift[0], z, lift[1]).relu()
        h = (h + torch.baddbmm(bend[0], h, bend[1]).relu()).expand(-1, seen.shape[1], -1)
        h = torch.baddbmm(join[0], torch.cat([seen, h], dim=-1), join[1]).relu()
        return torch.baddbmm(out[0], h, out[1])


class Labels(nn.Module):
    r"""What the variants share: class embeddings, the read-out $\hat p_{out}(y \mid z)$ and the two losses around them.

    ``embedding`` is (S, classes, d). With ``learn`` it is trained, and is then the one thing that the blocks share. The
    read-out begins as a nearest-label rule, in every method, so that none has to spend its steps on finding it.

    Raises:
        ValueError: ``embedding`` has not three axes or is not finite, ``eta`` is negative, ``hidden`` below 1.
    """

    def __init__(
        self, embedding: Float[Tensor, "S C d"], *, learn: bool = False, hidden: int = 40, eta: float = 0.1
    ) -> None:
        super().__init__()
        require_ndim(3, embedding=embedding)
        require_finite(embedding=embedding)
        require_nonnegative(eta=eta)
        require_at_least(1, hidden=hidden)
        self.S, self.C, self.d = embedding.shape
        self.eta, self.hidden = eta, hidden
        self.embedding = nn.Parameter(embedding.clone(), requires_grad=learn)
        one_hot = torch.eye(self.C, device=embedding.device, dtype=embedding.dtype).expand_as(embedding[..., : self.C])
        self.fixed_one_hot = not learn and torch.equal(embedding, one_hot)
        self.head = StackedLinear(self.S, self.d, self.C)
        with torch.no_grad():
            self.head.weight.copy_(SHARPNESS * (embedding / embedding.square().sum(-1, keepdim=True)).mT)
            self.head.bias.zero_()

    def embed(self, y: Int[Tensor, "S b"]) -> Float[Tensor, "S b d"]:
        """The clean label $u_y$."""
        return self.embedding[torch.arange(self.S, device=y.device)[:, None], y]

    def guess(self, p: Float[Tensor, "*k S b C"]) -> Float[Tensor, "*k S b d"]:
        r"""$\hat u = p\,W_{Embed}$ for class probabilities p: a guess can only be a mixture of clean labels."""
        return p if self.fixed_one_hot else p @ self.embedding

    def read(self, z: Float[Tensor, "S b d"], y: Int[Tensor, "S b"]) -> Float[Tensor, ""]:
        r"""$-\log \hat p_{out}(y \mid z)$, mean over the batch, sum over the runs."""
        return cross_entropy(self.head(z), y)

    def prior(self, u: Float[Tensor, "S b d"], alpha_bar: Float[Tensor, " S"]) -> Float[Tensor, ""]:
        r"""$KL(q(z_0 \mid y)\,\|\,\mathcal N(0, I))$: the start must look like noise. Constant unless it is learned."""
        spread = self.d * (-alpha_bar - torch.log1p(-alpha_bar))
        return (alpha_bar * u.square().sum(-1).mean(1) + spread).sum() / 2

    def noise(self, x: Float[Tensor, "S b p"], g: torch.Generator) -> Float[Tensor, "S b d"]:
        """Standard normal noise of an embedding's size, one draw for each image."""
        return torch.randn(*x.shape[:2], self.d, generator=g, device=x.device, dtype=x.dtype)


class NoPropDT(Labels):
    r"""NoProp in discrete time: T blocks with weights of their own, trained side by side.

    ``sees`` (T,) multiplies the image that each block is shown; ``weight`` (T,) is $\mathrm{SNR}(t)-\mathrm{SNR}(t-1)$.
    Both are plain buffers, so that an ablation is one assignment.
    """

    def __init__(self, embedding: Float[Tensor, "S C d"], T: int, pixels: int, **options: bool | int | float) -> None:
        super().__init__(embedding, **options)
        self.T = T
        self.blocks = Denoiser(T * self.S, pixels, self.d, self.hidden, self.C)  # copy t * S + s: block t of run s
        self.register_buffer("alpha_bar", cosine_schedule(T).to(embedding))
        self.register_buffer("weight", snr(self.alpha_bar).diff())
        self.register_buffer("sees", torch.ones_like(self.weight))

    def own(self) -> list[Callable]:
        """Each block of every run by itself: a function of (x, z), from that block's weights only."""
        parts = {name: p.chunk(self.T) for name, p in self.blocks.named_parameters()}

        def block(t: int, x: Tensor, z: Tensor) -> Tensor:
            return functional_call(self.blocks, {k: part[t] for k, part in parts.items()}, (self.sees[t] * x, z))

        return [partial(block, t) for t in range(self.T)]

    def logits(self, x: Float[Tensor, "S b p"], z: Float[Tensor, "T S #b d"]) -> Float[Tensor, "T S b C"]:
        """All blocks at once, each on a state of its own: no block waits for another."""
        return self.blocks(self.shown(x), z.flatten(0, 1)).unflatten(0, (self.T, self.S))

    def shown(self, x: Float[Tensor, "S b p"]) -> Float[Tensor, "T_S b p"]:
        """The images as every block of every run is shown them."""
        return (self.sees[:, None, None, None] * x).flatten(0, 1)

    def noisy_labels(self, u: Float[Tensor, "S b d"], g: torch.Generator) -> Float[Tensor, "T S b d"]:
        r"""$z_{t-1} \sim q(\cdot \mid y)$ for every block at once, straight from the label: no block has to run."""
        return noised(u.expand(self.T, -1, -1, -1), self.alpha_bar[:-1, None, None], g)

    def block_loss(
        self, t: int, x: Float[Tensor, "S b p"], y: Int[Tensor, "S b"], z: Float[Tensor, "S b d"]
    ) -> Float[Tensor, ""]:
        r"""Block t's own term $\frac\eta2\Delta\mathrm{SNR}_t\|\hat u_t(z, x) - u_y\|^2$: all its trainer needs."""
        error = (self.guess(probabilities(self.own()[t](x, z))) - self.embed(y)).square().sum(-1)
        return self.eta / 2 * self.weight[t] * error.mean(1).sum()

    def loss(self, x: Float[Tensor, "S b p"], y: Int[Tensor, "S b"], g: torch.Generator) -> Float[Tensor, ""]:
        r"""$-\log\hat p_{out}(y|z_T) + KL + \frac\eta2\sum_t\Delta\mathrm{SNR}_t\|\hat u_t(z_{t-1}, x) - u_y\|^2$."""
        u = self.embed(y)
        p = probabilities(self.logits(x, self.noisy_labels(u, g)))
        error = F.mse_loss(self.guess(p), u.expand(self.T, -1, -1, -1), reduction="none").sum((1, 2, 3)) / len(y[0])
        z_T = noised(u, self.alpha_bar[-1].expand(u.shape[:-1]), g)
        ends = self.read(z_T, y) + self.prior(u, self.alpha_bar[0].expand(self.S))
        return ends + self.eta / 2 * (self.weight * error).sum()

    def chain(
        self, x: Float[Tensor, "S b p"], g: torch.Generator, z: Float[Tensor, "S b d"] | None = None, start: int = 0
    ) -> tuple[Float[Tensor, "states S b d"], Float[Tensor, "blocks S b C"]]:
        r"""Inference: $z_t = a_t\hat u_t(z_{t-1}, x) + b_t z_{t-1} + \sqrt{c_t}\,\epsilon_t$, from block ``start`` on.

        Begins with ``z`` where it is given, else with noise. Returns all states and each block's class probabilities.
        The layers that see nothing but the image need not wait for a state: they run at once, in all blocks.
        """
        (a, b, c), layers = posterior(self.alpha_bar), self.blocks.parts(self.T)
        seen = self.blocks.see(self.shown(x)).relu().chunk(self.T)
        states, opinions = [self.noise(x, g) if z is None else z], []
        for t in range(start, self.T):
            opinions.append(probabilities(self.blocks.judge(seen[t], states[-1], layers[t])))
            states.append(a[t] * self.guess(opinions[-1]) + b[t] * states[-1] + c[t].sqrt() * self.noise(x, g))
        return torch.stack(states), torch.stack(opinions)

    def predict(self, x: Float[Tensor, "S b p"], g: torch.Generator) -> Float[Tensor, "S b C"]:
        """Class scores: the read-out of the last state."""
        return self.head(self.chain(x, g)[0][-1])


class BackpropChain(NoPropDT):
    """The same inference graph, noise and all, trained as usual: one loss at the end, gradients through every block."""

    def loss(self, x: Float[Tensor, "S b p"], y: Int[Tensor, "S b"], g: torch.Generator) -> Float[Tensor, ""]:
        r"""$-\log\hat p_{out}(y \mid z_T)$ with $z_T$ from the chain itself."""
        return self.read(self.chain(x, g)[0][-1], y)


class Ensemble(NoPropDT):
    """The control: T of the same blocks, each a classifier that sees the image and z = 0; their mean decides."""

    def members(self, x: Float[Tensor, "S b p"]) -> Float[Tensor, "T S b C"]:
        """Logits of every member."""
        return self.logits(x, x.new_zeros(self.T, self.S, 1, self.d))

    def loss(self, x: Float[Tensor, "S b p"], y: Int[Tensor, "S b"], g: torch.Generator) -> Float[Tensor, ""]:
        """Cross-entropy of each member by itself."""
        return cross_entropy(self.members(x).flatten(0, 1), y.repeat(self.T, 1))

    def predict(self, x: Float[Tensor, "S b p"], g: torch.Generator) -> Float[Tensor, "S b C"]:
        """The members' mean probability."""
        return probabilities(self.members(x)).mean(0)


class LearnedSchedule(nn.Module):
    r"""$\bar\alpha(t) = \mathrm{sigmoid}(-\gamma(t))$; $\gamma$ falls from $\gamma(0)$ to $\gamma(1)$, both learned.

    In between it follows a straight line plus ``knots`` sigmoids with positive weights, normalised to run from 0 to 1.
    """

    def __init__(self, S: int, knots: int = 8, first: float = 1e-3, last: float = 0.99) -> None:
        super().__init__()
        self.ends = nn.Parameter(torch.tensor([first, last]).logit().neg().repeat(S, 1))
        self.weight = nn.Parameter(torch.full((S, 1, knots), -3.0))
        self.centre = nn.Parameter(torch.linspace(0, 1, knots).repeat(S, 1, 1))
        self.slope = nn.Parameter(torch.full((S, 1, knots), 8.0))

    def forward(self, t: Float[Tensor, "S n"]) -> tuple[Float[Tensor, "S n"], Float[Tensor, "S n"]]:
        r"""$\gamma(t)$ and $\gamma'(t) < 0$."""
        weight, slope = F.softplus(self.weight), F.softplus(self.slope)
        times = torch.cat([torch.zeros_like(t[:, :1]), torch.ones_like(t[:, :1]), t], dim=1)
        rise = torch.sigmoid(slope * (times[..., None] - self.centre))
        total = times + (weight * rise).sum(-1)
        steepness = 1 + (weight * slope * rise * (1 - rise)).sum(-1)
        drop = (self.ends[:, 1:] - self.ends[:, :1]) / (total[:, 1:2] - total[:, :1])
        return self.ends[:, :1] + drop * (total[:, 2:] - total[:, :1]), drop * steepness[:, 2:]


class Flow(Labels):
    """What the continuous variants share: one network for all t in [0, 1] that is told the time, and Euler's method.

    ``draws`` pairs (t, z_t) are drawn for each image and step: a step then costs what it costs the T blocks of DT.
    """

    def __init__(
        self,
        embedding: Float[Tensor, "S C d"],
        pixels: int,
        outputs: int,
        draws: int = 5,
        **options: bool | int | float,
    ) -> None:
        super().__init__(embedding, **options)
        require_at_least(1, draws=draws)
        self.draws = draws
        self.net = Denoiser(self.S, pixels, self.d + 2 * FREQUENCIES, self.hidden, outputs)

    def answer(self, x: Tensor, z: Float[Tensor, "S n d"], t: Float[Tensor, "S n"]) -> Float[Tensor, "S n out"]:
        r"""The network at time t, which enters beside z as $\sin$ and $\cos$ of $2^k \pi t/2$."""
        angle = t[..., None] * math.pi / 2 * 2.0 ** torch.arange(FREQUENCIES, device=t.device)
        return self.net(x, torch.cat([z, angle.sin(), angle.cos()], dim=-1))

    def draw(self, x: Tensor, y: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Image, label and a time uniform in [0, 1], ``draws`` times over."""
        x, y = x.repeat(1, self.draws, 1), y.repeat(1, self.draws)
        return x, y, torch.rand(y.shape, generator=g, device=x.device, dtype=x.dtype)

    def flow(self, x: Float[Tensor, "S b p"], g: torch.Generator, steps: int = 20) -> Float[Tensor, "S b d"]:
        """Inference: follow ``velocity`` from noise at t = 0 to t = 1.

        Raises:
            ValueError: fewer than one step.
        """
        require_at_least(1, steps=steps)
        z = self.noise(x, g)
        for k in range(steps):
            z = z + self.velocity(x, z, torch.full_like(z[..., 0], k / steps)) / steps
        return z

    def predict(self, x: Float[Tensor, "S b p"], g: torch.Generator) -> Float[Tensor, "S b C"]:
        """Class scores: the read-out of the flow's end."""
        return self.head(self.flow(x, g))


class NoPropCT(Flow):
    """NoProp in continuous time: a denoiser for every t at once, and a noise schedule that is learned with it."""

    def __init__(self, embedding: Float[Tensor, "S C d"], pixels: int, **options: bool | int | float) -> None:
        super().__init__(embedding, pixels, embedding.shape[1], **options)
        self.schedule = LearnedSchedule(self.S).to(embedding)

    def loss(self, x: Float[Tensor, "S b p"], y: Int[Tensor, "S b"], g: torch.Generator) -> Float[Tensor, ""]:
        r"""$-\log\hat p_{out}(y|z_1) + KL + \frac\eta2\mathbb E_t[\mathrm{SNR}'(t)\|\hat u(z_t, x, t) - u_y\|^2]$."""
        x, y, t = self.draw(x, y, g)
        u = self.embed(y)
        gamma, slope = self.schedule(t)
        z = noised(u, torch.sigmoid(-gamma), g)
        error = (self.guess(probabilities(self.answer(x, z, t))) - u).square().sum(-1)
        denoise = self.eta / 2 * (-slope * torch.exp(-gamma) * error).mean(1).sum()  # SNR = exp(-gamma)
        start, end = torch.sigmoid(-self.schedule.ends).unbind(-1)  # (S,) each
        return self.read(noised(u, end[:, None].expand_as(t), g), y) + self.prior(u, start) + denoise

    def velocity(self, x: Tensor, z: Float[Tensor, "S n d"], t: Float[Tensor, "S n"]) -> Float[Tensor, "S n d"]:
        r"""$\dot z = -\frac12\gamma'(\sqrt{\bar\alpha}\,\hat u - \bar\alpha z)$; no noise, same $q(z_t \mid y)$."""
        gamma, slope = self.schedule(t)
        alpha_bar, guess = torch.sigmoid(-gamma)[..., None], self.guess(probabilities(self.answer(x, z, t)))
        return -slope[..., None] / 2 * (alpha_bar.sqrt() * guess - alpha_bar * z)


class NoPropFM(Flow):
    r"""Flow matching: noise moves to the label on a line, $z_t = t u_y + (1-t) z_0$; its velocity is learned."""

    def __init__(self, embedding: Float[Tensor, "S C d"], pixels: int, **options: bool | int | float) -> None:
        super().__init__(embedding, pixels, embedding.shape[2], **options)

    def loss(self, x: Float[Tensor, "S b p"], y: Int[Tensor, "S b"], g: torch.Generator) -> Float[Tensor, ""]:
        r"""$\|v(z_t, x, t) - (u_y - z_0)\|^2 - \log\hat p_{out}(y|\tilde z_1)$, $\tilde z_1 = z_t + (1-t)v$."""
        x, y, t = self.draw(x, y, g)
        u, z_0, time = self.embed(y), self.noise(x, g), t[..., None]
        z = time * u + (1 - time) * z_0
        v = self.velocity(x, z, t)
        return (v - (u - z_0)).square().sum(-1).mean(1).sum() + self.read(z + (1 - time) * v, y)

    def velocity(self, x: Tensor, z: Float[Tensor, "S n d"], t: Float[Tensor, "S n"]) -> Float[Tensor, "S n d"]:
        """The network's answer as it is."""
        return self.answer(x, z, t)
