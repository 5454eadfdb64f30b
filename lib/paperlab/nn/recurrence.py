r"""Linear recurrences in their three forms: token by token, as one masked matrix, and chunk by chunk.

Linear attention and state space models with a scalar gate keep one matrix $S_t$ and read it with a vector:

$$S_t = a_t S_{t-1} + k_t v_t^\top, \qquad y_t = S_t^\top q_t .$$

Unrolled, that is attention without a softmax:

$$y_i = \sum_{j \le i} \Big(\prod_{l=j+1}^{i} a_l\Big)\,(q_i^\top k_j)\, v_j .$$

State space models call q, k, v by other names: C, B, x. `recurrent` costs one small step a token, `masked` one large
matrix product a sequence, and `chunked` goes between: masked inside chunks, recurrent from one to the next. All three
compute the same numbers (Dao and Gu, 2024, arXiv:2405.21060).

A system that does not change with time is a convolution: `zero_order_hold`, `diagonal_kernel`, `causal_convolution`.
"""

import math

import torch
from jaxtyping import Complex, Float, Shaped
from torch import Tensor
from torch.nn import functional as F

from paperlab.checks import require_at_least
from paperlab.nn.transformer import causal_mask

Keys = Float[Tensor, "*batch tokens state"]
Values = Float[Tensor, "*batch tokens dim"]
Decay = Float[Tensor, "*batch tokens"]
State = Float[Tensor, "*batch state dim"]


def recurrent(q: Keys, k: Keys, v: Values, log_decay: Decay, state: State | None = None) -> tuple[Values, State]:
    """Outputs and the state behind the last token, one token after another; ``log_decay`` holds $\\log a_t$.

    ``state`` is what the tokens before have left, by default nothing.
    """
    if state is None:
        state = q.new_zeros(*q.shape[:-2], q.shape[-1], v.shape[-1])
    outputs = []
    for t in range(q.shape[-2]):
        state = log_decay[..., t, None, None].exp() * state + k[..., t, :, None] * v[..., t, None, :]
        outputs.append((q[..., t, None, :] @ state).squeeze(-2))
    return torch.stack(outputs, dim=-2), state


def decay_matrix(log_decay: Decay) -> Float[Tensor, "*batch tokens tokens"]:
    r"""$\prod_{l=j+1}^{i} a_l$ for $j \le i$, else 0: how much of token j is left when token i is read."""
    total = log_decay.cumsum(-1)
    span = total[..., :, None] - total[..., None, :]
    seen = causal_mask(span.shape[-1], span.shape[-1], span.device)
    return span.masked_fill(~seen, -math.inf).exp()  # masked before exp: the future's sums may overflow


def masked(q: Keys, k: Keys, v: Values, log_decay: Decay) -> Values:
    """The outputs of `recurrent` by one matrix product: quadratic in the tokens, nothing in sequence."""
    return (q @ k.mT * decay_matrix(log_decay)) @ v


def chunked(q: Keys, k: Keys, v: Values, log_decay: Decay, size: int = 64) -> Values:
    """The outputs of `recurrent` with ``size`` tokens at a time: linear in the tokens, and mostly matrix products.

    Raises:
        ValueError: ``size`` below 1.
    """
    require_at_least(1, size=size)
    tokens = q.shape[-2]
    missing = -tokens % size  # zeros behind the end change nothing before it
    q, k, v = (F.pad(x, (0, 0, 0, missing)).unflatten(-2, (-1, size)) for x in (q, k, v))
    log_decay = F.pad(log_decay, (0, missing)).unflatten(-1, (-1, size))
    within = log_decay.cumsum(-1)
    left = (within[..., -1:] - within).exp()  # of each token at its chunk's end
    made = (k * left[..., None]).mT @ v  # what each chunk adds to the state
    kept = within[..., -1, None, None].exp()
    state, before = torch.zeros_like(made[..., 0, :, :]), []
    for c in range(made.shape[-3]):
        before.append(state)
        state = kept[..., c, :, :] * state + made[..., c, :, :]
    earlier = (q * within.exp()[..., None]) @ torch.stack(before, dim=-3)
    return (masked(q, k, v, log_decay) + earlier).flatten(-3, -2)[..., :tokens, :]


def zero_order_hold(
    A: Shaped[Tensor, "*batch state"], B: Shaped[Tensor, "*batch state"], step: Float[Tensor, "*#batch"]
) -> tuple[Shaped[Tensor, "*batch state"], Shaped[Tensor, "*batch state"]]:
    r"""$\dot h = A h + B u$ with diagonal A and u constant over each ``step``: $h_t = \bar A h_{t-1} + \bar B u_t$.

    $\bar A = e^{\Delta A}$, $\bar B = A^{-1}(\bar A - I) B$; where A is 0, its limit $\Delta B$.
    """
    z = step[..., None] * A
    safe = torch.where(z == 0, torch.ones_like(z), z)
    return z.exp(), torch.where(z == 0, torch.ones_like(z), torch.expm1(safe) / safe) * step[..., None] * B


def diagonal_kernel(
    A: Complex[Tensor, "*batch state"],
    B: Complex[Tensor, "*batch state"],
    C: Complex[Tensor, "*batch state"],
    length: int,
) -> Float[Tensor, "*batch length"]:
    r"""$K_t = \mathrm{Re} \sum_n C_n A_n^t B_n$ for t below ``length``: the response to a 1 at time 0 (Gu et al., 2022,
    arXiv:2206.11893).

    Raises:
        ValueError: ``length`` below 1.
    """
    require_at_least(1, length=length)
    powers = A[..., None] ** torch.arange(length, device=A.device)
    return ((B * C)[..., None, :] @ powers).squeeze(-2).real


def causal_convolution(u: Float[Tensor, "*batch length"], kernel: Float[Tensor, "*#batch length"]) -> Tensor:
    r"""$y_t = \sum_{s \le t} K_s u_{t-s}$ by FFT, padded so that the end does not wrap to the beginning."""
    length = u.shape[-1]
    return torch.fft.irfft(torch.fft.rfft(u, 2 * length) * torch.fft.rfft(kernel, 2 * length), 2 * length)[..., :length]
