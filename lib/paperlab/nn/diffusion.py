r"""Diffusion: noise comes in by a schedule, and leaves by a network that says what is noise.

A clean $x_0$ is seen at time t, from 0 to 1, as $x_t = \alpha_t x_0 + \sigma_t \epsilon$ with normal $\epsilon$ and
$\alpha_t^2 + \sigma_t^2 = 1$. Whoever knows one of $x_0$, $\epsilon$ and the velocity
$v = \alpha_t \epsilon - \sigma_t x_0$ knows all three. With $\alpha_t = \cos(\pi t / 2)$ the pair $(x_t, v)$ is
$(x_0, \epsilon)$, turned by the angle $\pi t / 2$: nothing is ever divided by zero.

Ho et al. (2020, arXiv:2006.11239), the ancestral sampler; Song et al. (2020, arXiv:2010.02502), the deterministic one;
Salimans and Ho (2022, arXiv:2202.00512), velocities. Times are tensors that broadcast against the pictures' first axis.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from paperlab.checks import require_at_least, require_between, require_positive

Field = Callable[[Tensor, Tensor], Tensor]  # from x of shape (batch, ...) and times of shape (batch,) to velocities


def schedule(t: Float[Tensor, "*batch"]) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    r"""$\alpha_t = \cos(\pi t/2)$ and $\sigma_t = \sin(\pi t/2)$: what is left of the picture, and how much noise.

    Raises:
        ValueError: a time outside 0 to 1.
    """
    require_between(0, 1, t=t)
    angle = t * (math.pi / 2)
    return angle.cos(), angle.sin()


def log_snr(t: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    r"""$\ln(\alpha_t^2 / \sigma_t^2)$: from +∞ at 0 to −∞ at 1.

    Raises:
        ValueError: a time outside 0 to 1.
    """
    alpha, sigma = schedule(t)
    return 2 * (alpha / sigma).log()


def _pair(t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The schedule, with axes for everything but the batch."""
    if t.shape not in ((), (1,), (len(x),)):
        raise ValueError(f"t must be one time or one for each of {len(x)} rows, got shape {tuple(t.shape)}")
    alpha, sigma = schedule(t)
    shape = (-1, *[1] * (x.ndim - 1))
    return alpha.reshape(shape), sigma.reshape(shape)


def diffuse(x0: Float[Tensor, "batch ..."], eps: Float[Tensor, "batch ..."], t: Tensor) -> Float[Tensor, "batch ..."]:
    r"""$x_t = \alpha_t x_0 + \sigma_t \epsilon$: what is seen at time t.

    Raises:
        ValueError: a time outside 0 to 1, or another number of times; so for all functions below.
    """
    alpha, sigma = _pair(t, x0)
    return alpha * x0 + sigma * eps


def velocity(x0: Float[Tensor, "batch ..."], eps: Float[Tensor, "batch ..."], t: Tensor) -> Float[Tensor, "batch ..."]:
    r"""$v = \alpha_t \epsilon - \sigma_t x_0$: the derivative of $x_t$ by the angle, what the network is trained on."""
    alpha, sigma = _pair(t, x0)
    return alpha * eps - sigma * x0


def split(
    x: Float[Tensor, "batch ..."], v: Float[Tensor, "batch ..."], t: Tensor
) -> tuple[Float[Tensor, "batch ..."], Float[Tensor, "batch ..."]]:
    r"""Picture and noise: $x_0 = \alpha_t x - \sigma_t v$ and $\epsilon = \sigma_t x + \alpha_t v$."""
    alpha, sigma = _pair(t, x)
    return alpha * x - sigma * v, sigma * x + alpha * v


def from_noise(x: Float[Tensor, "batch ..."], eps: Float[Tensor, "batch ..."], t: Tensor) -> Float[Tensor, "batch ..."]:
    r"""The velocity of who predicts the noise: $v = (\epsilon - \sigma_t x) / \alpha_t$.

    Raises:
        ValueError: time 1, where all is noise and the noise tells nothing about the picture.
    """
    alpha, sigma = _pair(t, x)
    if bool((t >= 1).any()):
        raise ValueError("t must be less than 1 for a velocity from the noise")
    return (eps - sigma * x) / alpha


def from_picture(
    x: Float[Tensor, "batch ..."], x0: Float[Tensor, "batch ..."], t: Tensor
) -> Float[Tensor, "batch ..."]:
    r"""The velocity of who predicts the picture: $v = (\alpha_t x - x_0) / \sigma_t$.

    Raises:
        ValueError: time 0, where the picture is seen as it is and tells nothing about the noise.
    """
    alpha, sigma = _pair(t, x)
    if bool((t <= 0).any()):
        raise ValueError("t must be greater than 0 for a velocity from the picture")
    return (alpha * x - x0) / sigma


def posterior(
    x: Float[Tensor, "batch ..."], x0: Float[Tensor, "batch ..."], t: Tensor, s: Tensor
) -> tuple[Float[Tensor, "batch ..."], Float[Tensor, "*times"]]:
    r"""Mean and variance of $x_s$ given $x_t$ and $x_0$, at the earlier time s (Ho et al., equations 6 and 7).

    With $a = \alpha_t/\alpha_s$ and $\sigma_{t|s}^2 = \sigma_t^2 - a^2 \sigma_s^2$ the mean is $(a \sigma_s^2 x_t +
    \alpha_s \sigma_{t|s}^2 x_0)/\sigma_t^2$ and the variance $\tilde\beta = \sigma_{t|s}^2\sigma_s^2/\sigma_t^2$.

    Raises:
        ValueError: s is not before t.
    """
    if not bool((s < t).all()):
        raise ValueError("s must be before t")
    (alpha_t, sigma_t), (alpha_s, sigma_s) = _pair(t, x), _pair(s, x)
    a = alpha_t / alpha_s
    added = sigma_t**2 - a**2 * sigma_s**2
    mean = (a * sigma_s**2 * x + alpha_s * added * x0) / sigma_t**2
    return mean, (added * sigma_s**2 / sigma_t**2).reshape(torch.broadcast_shapes(t.shape, s.shape))


def step(
    x: Float[Tensor, "batch ..."],
    v: Float[Tensor, "batch ..."],
    t: Tensor,
    s: Tensor,
    *,
    eta: float = 0.0,
    noise: Float[Tensor, "batch ..."] | None = None,
    clip: float | None = None,
) -> Float[Tensor, "batch ..."]:
    r"""From time t to time s (Song et al., equation 12), with the variance $\tilde\beta$ of `posterior` and noise z:
    $x_s = \alpha_s x_0 + \sqrt{\sigma_s^2 - \eta^2 \tilde\beta}\,\epsilon + \eta \sqrt{\tilde\beta}\, z$.

    ``eta`` 0 is DDIM: deterministic, and its own inverse to first order, for s may be after t. ``eta`` 1 is a draw from
    `posterior`: the ancestral sampler. With ``clip``, the predicted picture is kept within ± ``clip``, and the noise is
    what then remains.

    Raises:
        ValueError: ``eta`` outside 0 to 1, or not 0 without ``noise`` or with s not before t; a ``clip`` that is not
            positive, or at time 0.
    """
    require_between(0, 1, eta=eta)
    x0, eps = split(x, v, t)
    if clip is not None:
        require_positive(clip=clip)
        x0 = x0.clamp(-clip, clip)
        _, eps = split(x, from_picture(x, x0, t), t)
    alpha, sigma = _pair(s, x)
    if eta == 0:
        return alpha * x0 + sigma * eps
    if noise is None:
        raise ValueError("noise must be given where eta is not 0")
    variance = eta**2 * posterior(x, x0, t, s)[1].reshape(sigma.shape)
    return alpha * x0 + (sigma**2 - variance).clamp(min=0).sqrt() * eps + variance.sqrt() * noise


def walk(
    field: Field,
    x: Float[Tensor, "batch ..."],
    times: Sequence[float],
    *,
    eta: float = 0.0,
    clip: float | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Float[Tensor, "batch ..."]]:
    """`step` along ``times`` by a field of velocities; yields x at each time after the first.

    From 1 to 0 that is sampling, from 0 to 1, without ``eta`` and ``clip``, the inversion of a picture into its noise.
    ``generator`` lives on the CPU: the noise of ``eta`` is the same on every device.

    Raises:
        ValueError: fewer than two times, one outside 0 to 1, or as `step`.
    """
    require_between(0, 1, times=list(times))
    if len(times) < 2:
        raise ValueError(f"times must be at least two, got {len(times)}")
    for t, s in pairwise(x.new_tensor(list(times))):
        z = None if eta == 0 else torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
        x = step(x, field(x, t.expand(len(x))), t, s, eta=eta, noise=z, clip=clip)
        yield x


@torch.no_grad()
def sample(
    field: Field,
    x: Float[Tensor, "batch ..."],
    *,
    steps: int,
    eta: float = 0.0,
    clip: float | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "batch ..."]:
    """Pictures from noise ``x``, by so many even steps from time 1 to time 0; the rest as in `walk`.

    Raises:
        ValueError: ``steps`` below 1, or as `walk`.
    """
    require_at_least(1, steps=steps)
    times = torch.linspace(1, 0, steps + 1).tolist()
    return deque(walk(field, x, times, eta=eta, clip=clip, generator=generator), maxlen=1).pop()
