r"""The Fourier head: a last layer that draws a density with a few waves and reads the bins off it.

A language model that predicts numbers cuts them into bins and learns every bin as a word of its own: it has to be told
that bin 17 lies next to bin 18, by examples. Here the layer's outputs are the coefficients of a density on a line, so
that neighbours are neighbours before the first example.

Gillman, Aggarwal, Freeman, Singh and Sun (2024), https://arxiv.org/abs/2410.22269, sections 2 and 3.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from jaxtyping import Complex, Float, Int
from scipy import special
from torch import Tensor, nn
from torch.linalg import vecdot

from paperlab.checks import (
    require_at_least,
    require_between,
    require_finite,
    require_nonnegative,
    require_one_of,
    require_positive,
)
from paperlab.nn import StackedLinear

WORLDS = ("Gaussian", "mixture", "Beta")
SIGMAS = 100  # of the smoothness value: how many terms of its series are taken


def bin_centres(bins: int) -> Float[Tensor, " bins"]:
    r"""The middles of ``bins`` equal bins of $[-1, 1]$: $z_j = -1 + (2j + 1) / m$.

    Raises:
        ValueError: fewer than 2 bins.
    """
    require_at_least(2, bins=bins)
    return (2 * torch.arange(bins, dtype=torch.float64) + 1) / bins - 1


def autocorrelation(a: Complex[Tensor, "*batch n"]) -> Complex[Tensor, "*batch n"]:
    r"""$c_k = \sum_{l=0}^{N-k} a_l \overline{a_{l+k}}$ for $k = 0, \dots, N$, with $N + 1$ entries in $a$.

    Raises:
        ValueError: a value in ``a`` that is not finite.
    """
    require_finite(a=a)
    power = torch.fft.fft(a, n=2 * a.shape[-1]).abs().square()  # padded, so that the ends do not meet
    return torch.fft.ifft(power)[..., : a.shape[-1]].conj()


def series(c: Complex[Tensor, "*batch n"], z: Float[Tensor, " points"]) -> Float[Tensor, "*batch points"]:
    r"""The paper's form: $p(z) = \frac12 + \mathrm{Re} \sum_{k=1}^N \frac{c_k}{\mathrm{Re}\, c_0} e^{i \pi k z}$.

    Raises:
        ValueError: a $c_0$ that is not positive: it is a sum of squares.
    """
    require_positive(**{"c[..., 0]": c[..., 0].real})
    waves = torch.polar(torch.ones_like(z), math.pi * z) ** torch.arange(1, c.shape[-1], device=z.device)[:, None]
    return 0.5 + ((c[..., 1:] / c[..., :1].real) @ waves.to(c.dtype)).real


def density(a: Complex[Tensor, "*batch n"], z: Float[Tensor, " points"]) -> Float[Tensor, "*batch points"]:
    r"""The same function as ``series(autocorrelation(a), z)``, as a square that rounding cannot make negative:

    $$p(z) = \frac{|A(z)|^2}{2 \sum_k |a_k|^2}, \qquad A(z) = \sum_{k=0}^N a_k e^{-i \pi k z}.$$

    It integrates to 1 over $[-1, 1]$, has period 2, and does not change when ``a`` is multiplied by a number.

    Raises:
        ValueError: an ``a`` that is 0 throughout, which has no density, or not finite.
    """
    total = (a.real.square() + a.imag.square()).sum(-1, keepdim=True)
    require_positive(**{"squared length of a": total})
    angle = math.pi * torch.arange(a.shape[-1], dtype=z.dtype, device=z.device)[:, None] * z
    cos, sin = angle.cos(), angle.sin()
    # The real and imaginary part of A, in one product of real matrices.
    parts = torch.cat([a.real, a.imag], -1) @ torch.cat([torch.cat([cos, -sin], 1), torch.cat([sin, cos], 1)])
    power = parts.square().unflatten(-1, (2, len(z))).sum(-2)
    return power / (2 * total)


def penalty(a: Complex[Tensor, "*batch n"]) -> Float[Tensor, "*batch"]:
    r"""The paper's regulariser before its factor $\gamma$ and the mean over the batch: $2 \sum_k 2 \pi^2 k^2 |c_k|^2$.

    The $c_k$ are not divided by $c_0$: multiplying ``a`` by $\lambda$ changes no density, and this by $\lambda^4$.

    Raises:
        ValueError: a value in ``a`` that is not finite.
    """
    c = autocorrelation(a)
    k = torch.arange(a.shape[-1], dtype=a.real.dtype, device=a.device)
    return (4 * math.pi**2 * k**2 * (c.real.square() + c.imag.square())).sum(-1)


@lru_cache
def _waves(bins: int, n: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "2 bins waves"]:
    """What the parts of $a$ are multiplied by, at every bin, to give the real and the imaginary part of $A$."""
    angle = math.pi * torch.arange(n, dtype=torch.float64) * bin_centres(bins)[:, None]
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.cat([cos, sin], -1), torch.cat([-sin, cos], -1)]).to(dtype=dtype, device=device)


def _one_a_copy(copies: int, **named: int | Sequence[int]) -> Int[Tensor, "copies 1"]:
    """A number for every copy, from one for all or a sequence of them."""
    ((name, value),) = named.items()
    counts = [value] * copies if isinstance(value, int) else list(value)
    if len(counts) != copies:
        raise ValueError(f"{name} must be one number or one a copy, got {len(counts)} for {copies} copies")
    return torch.tensor(counts)[:, None]


class FourierHead(nn.Module):
    r"""``copies`` independent heads from ``width`` features to the logits of ``bins`` bins, side by side.

    A linear map gives $a_0, …, a_N$, real parts first; the density that they draw is read at the middles of the bins,
    made to sum to 1 and returned as $\log(y_j + \text{floor})$, for a softmax or a cross-entropy. The map's initial
    weights are divided by ``shrink``. ``frequencies`` is $N$, or one $N$ a copy (the coefficients beyond it stay 0).

    Raises:
        ValueError: a size or number of frequencies below 0, as many frequencies as half the bins or more (bins cannot
            tell them apart), frequencies that are not one a copy, ``shrink`` or ``floor`` not positive.
    """

    def __init__(
        self,
        copies: int,
        width: int,
        bins: int,
        frequencies: int | Sequence[int],
        *,
        shrink: float = 100.0,
        floor: float = 1e-5,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        require_positive(shrink=shrink, floor=floor)
        counts = _one_a_copy(copies, frequencies=frequencies)
        require_between(0, (bins - 1) // 2, frequencies=counts)
        top = int(counts.max())
        self.bins, self.floor = bins, floor
        self.affine = StackedLinear(copies, width, 2 * (top + 1), generator=generator)
        with torch.no_grad():
            for parameter in self.affine.parameters():
                parameter /= shrink
        self.register_buffer("keep", (torch.arange(top + 1).repeat(2) <= counts).float()[:, None])

    def coefficients(self, h: Float[Tensor, "copies batch width"]) -> Complex[Tensor, "copies batch n"]:
        """$a_0, …, a_N$ of every copy and example."""
        return torch.complex(*(self.affine(h) * self.keep).chunk(2, -1))

    def forward(self, h: Float[Tensor, "copies batch width"]) -> Float[Tensor, "copies batch bins"]:
        r"""Logits: $\log(y_j + \text{floor})$."""
        p = density(self.coefficients(h), bin_centres(self.bins).to(h))
        return (p / p.sum(-1, keepdim=True) + self.floor).log()

    def loss(
        self, h: Float[Tensor, "copies batch width"], labels: Int[Tensor, "copies batch"]
    ) -> Float[Tensor, "copies batch"]:
        r"""Cross-entropy of the logits with the labels, from the density at the label's own bin alone.

        Nothing is summed over the bins, because $\sum_j e^{i \pi k z_j} = 0$ for $0 < k < m$: the density at the $m$
        middles sums to $m / 2$, whatever the coefficients.

        Raises:
            ValueError: a label outside the bins.
        """
        require_between(0, self.bins - 1, labels=labels)
        parts = self.affine(h) * self.keep  # real parts, then imaginary parts
        waves = _waves(self.bins, parts.shape[-1] // 2, h.dtype, h.device)
        real, imag = (vecdot(parts, nn.functional.embedding(labels, wave)) for wave in waves)
        y = (real.square() + imag.square()) / (self.bins * vecdot(parts, parts))
        return math.log1p(self.bins * self.floor) - (y + self.floor).log()


class MixtureHead(nn.Module):
    """A mixture of Gaussians read at the middles of the bins: weights, means and deviations all depend on the features.

    ``components`` is a number, or one a copy. They start side by side, as broad as their distance.

    Raises:
        ValueError: a size below 1, or components that are not one a copy.
    """

    def __init__(
        self,
        copies: int,
        width: int,
        bins: int,
        components: int | Sequence[int],
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        counts = _one_a_copy(copies, components=components)
        require_at_least(1, components=counts)
        self.bins, k = bins, torch.arange(int(counts.max()))
        self.affine = StackedLinear(copies, width, 3 * len(k), generator=generator)
        weight = torch.where(k < counts, 0.0, -torch.inf)
        self.register_buffer("start", torch.cat([weight, (2 * k + 1) / counts - 1, -counts.log() + 0 * k], -1)[:, None])

    def forward(self, h: Float[Tensor, "copies batch width"]) -> Float[Tensor, "copies batch bins"]:
        """Log probabilities of the bins."""
        weight, mean, log_scale = (self.affine(h) + self.start)[..., None].chunk(3, -2)
        log_scale = log_scale.clamp(min=-math.log(self.bins))  # half a bin: what is finer falls between the middles
        z = bin_centres(self.bins).to(h)
        exponent = weight.log_softmax(-2) - log_scale - 0.5 * ((z - mean) / log_scale.exp()).square()
        return exponent.logsumexp(-2).log_softmax(-1)


def smoothed_targets(bins: int, width: float) -> Float[Tensor, "bins bins"]:
    """Row j: what to aim at in place of the label j, a Gaussian of ``width`` bins around it; at 0 the label itself.

    Raises:
        ValueError: fewer than 2 bins, or a negative ``width``.
    """
    require_at_least(2, bins=bins)
    require_nonnegative(width=width)
    j = torch.arange(bins, dtype=torch.float32)
    return torch.eye(bins) if width == 0 else (-0.5 * ((j - j[:, None]) / width).square()).softmax(-1)


def smoothness(pmf: Float[Tensor, "*batch bins"]) -> Float[Tensor, "*batch"]:
    r"""The paper's smoothness value, lower for smoother: $s(y) = \sum_{\sigma \ge 1} \frac{6}{\pi^2 \sigma^2}
    \|y - g_\sigma * y\|_2$.

    $g_\sigma$ is a Gaussian of $\sigma$ bins, sampled at whole bins, wrapped around the ends. The norms are taken of
    the discrete Fourier transform, where a convolution is a product (Parseval). The first 100 terms are summed.

    Raises:
        ValueError: a value that is not finite, or fewer than 2 bins.
    """
    require_finite(pmf=pmf)
    bins = pmf.shape[-1]
    require_at_least(2, **{"number of bins in pmf": bins})
    sigma = torch.arange(1, SIGMAS + 1, dtype=pmf.dtype, device=pmf.device)
    tap = torch.arange(1 - bins, bins, dtype=pmf.dtype, device=pmf.device)
    kernel = (-0.5 * (tap / sigma[:, None]).square()).softmax(-1)
    turns = 2 * math.pi / bins * torch.outer(tap, torch.arange(bins, dtype=pmf.dtype, device=pmf.device))
    removed = (1 - kernel @ turns.cos()).square()  # of the power of every wave, for every sigma
    power = torch.fft.fft(pmf).abs().square() / bins
    return (power @ removed.T).sqrt() @ (6 / (math.pi * sigma) ** 2)


def conditional_pmf(
    world: str, x: Float[Tensor, "*batch"], y: Float[Tensor, "*batch"], bins: int
) -> Float[Tensor, "*batch bins"]:
    r"""The probabilities of the bins of $z$ given $(x, y)$; what falls outside $[-1, 1]$ belongs to the end bins.

    Gaussian: $z \sim \mathcal N(y, 0.1^2)$. Mixture: half $\mathcal N(x, 0.1^2)$, half $\mathcal N(y, 0.1^2)$.
    Beta: $\pm\mathrm{Beta}(100|x|, 100|y|)$, either sign as likely.

    Raises:
        ValueError: an unknown world.
    """
    require_one_of(WORLDS, world=world)
    edges = (torch.arange(1, bins, dtype=torch.float64) * 2 / bins - 1).numpy()
    x, y = (v.double().cpu().numpy()[..., None] for v in (x, y))
    if world == "Beta":
        a, b = 100 * abs(x), 100 * abs(y)
        below = (special.betainc(a, b, edges.clip(0)) + special.betaincc(a, b, (-edges).clip(0))) / 2
    else:
        below = special.ndtr((edges - y) / 0.1)
        if world == "mixture":
            below = (below + special.ndtr((edges - x) / 0.1)) / 2
    below = nn.functional.pad(torch.from_numpy(below), (1, 0))
    return torch.diff(nn.functional.pad(below, (0, 1), value=1.0)).clamp(min=0)


def draw_world(
    world: str, count: int, bins: int, generator: torch.Generator
) -> tuple[Float[Tensor, "count 2"], Int[Tensor, " count"], Float[Tensor, "count bins"]]:
    """Inputs (x, y), moved to the middles of their bins; a bin of z drawn for each; and the true probabilities.

    x is uniform on (-0.8, 0.8), and so is y in the mixture; elsewhere y is x plus a normal error of 0.1.

    Raises:
        ValueError: an unknown world, or fewer than 1 example.
    """
    require_one_of(WORLDS, world=world)
    require_at_least(1, count=count)
    x, y = 1.6 * torch.rand(2, count, generator=generator, dtype=torch.float64) - 0.8
    noise = torch.randn(count, generator=generator, dtype=torch.float64)
    y = y if world == "mixture" else x + 0.1 * noise
    place = ((torch.stack([x, y], -1) + 1) * bins / 2).long().clamp(0, bins - 1)
    cells, which = place.unique(dim=0, return_inverse=True)
    pmf = conditional_pmf(world, *bin_centres(bins)[cells].T, bins)[which]
    z = torch.multinomial(pmf, 1, generator=generator)[:, 0]
    return bin_centres(bins)[place].float(), z, pmf


def divergence(truth: Float[Tensor, "*batch bins"], logits: Float[Tensor, "*batch bins"]) -> Float[Tensor, "*batch"]:
    r"""$\sum_j t_j \log(t_j / y_j)$ with $y$ the softmax of the logits; bins without probability count as 0.

    Raises:
        ValueError: a negative probability in ``truth``, or one that is not finite.
    """
    require_nonnegative(truth=truth)
    return (torch.special.xlogy(truth, truth) - truth * logits.to(truth.dtype).log_softmax(-1)).sum(-1)


def ranked_score(logits: Float[Tensor, "*batch bins"], labels: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    r"""Continuous ranked probability score in bins, $\sum_j (F_j - \mathbb 1[\text{label} \le j])^2$; lower is better.

    $F$ is the distribution function. A forecast that is sure of one bin scores its distance to the label.

    Raises:
        ValueError: a label outside the bins.
    """
    require_between(0, logits.shape[-1] - 1, labels=labels)
    reached = labels[..., None] <= torch.arange(logits.shape[-1], device=labels.device)
    return (logits.softmax(-1).cumsum(-1) - reached.to(logits.dtype)).square().sum(-1)
