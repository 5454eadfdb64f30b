r"""Attention as an associative memory: one softmax step walks downhill on an energy and lands on a stored pattern.

Show the memory a damaged pattern and it returns the stored one. A classical Hopfield network manages that for some
0.138 patterns a dimension; with a log-sum-exp energy the number grows exponentially, and the update is attention.

Ramsauer et al. (2020), https://arxiv.org/abs/2008.02217. Patterns are rows here, $X \in \mathbb R^{N \times d}$ (in the
paper columns); $\xi$ is a state, $\beta$ the inverse temperature, $M = \max_i \|x_i\|$.
"""

import math
from collections.abc import Callable

import torch
from einops import rearrange
from jaxtyping import Float, Int
from scipy.sparse.csgraph import connected_components
from scipy.special import lambertw
from torch import Tensor, nn

from paperlab.checks import require_at_least, require_between, require_finite, require_nonempty, require_positive
from paperlab.data.sphere import unit_vectors
from paperlab.search import largest


def energy(X: Float[Tensor, "n d"], xi: Float[Tensor, "*batch d"], beta: float) -> Float[Tensor, "*batch"]:
    r"""$E = -\mathrm{lse}(\beta, X\xi) + \frac12\xi^\top\xi + \beta^{-1}\log N + \frac12 M^2 \ge 0$ (equation 2).

    $\mathrm{lse}(\beta, z) = \beta^{-1}\log\sum_i e^{\beta z_i}$ is a smooth maximum.

    Raises:
        ValueError: no pattern, values that are not finite, or ``beta`` not positive.
    """
    _check(X, xi, beta)
    lse = torch.logsumexp(beta * xi @ X.T, dim=-1) / beta
    return -lse + xi.square().sum(-1) / 2 + math.log(len(X)) / beta + X.square().sum(-1).max() / 2


def update(X: Float[Tensor, "n d"], xi: Float[Tensor, "*batch d"], beta: float) -> Float[Tensor, "*batch d"]:
    r"""$\xi^{\text{new}} = X^\top\,\mathrm{softmax}(\beta X \xi)$ (equation 3): attention of query $\xi$ to keys $X$.

    $\beta \to 0$ gives the mean of the patterns, $\beta \to \infty$ the pattern with the largest dot product.

    Raises:
        ValueError: as `energy`.
    """
    _check(X, xi, beta)
    return torch.softmax(beta * xi @ X.T, dim=-1) @ X


def retrieve(
    X: Float[Tensor, "n d"], xi: Float[Tensor, "*batch d"], beta: float, *, precision: float = 1e-9, limit: int = 5000
) -> Float[Tensor, "*batch d"]:
    """Repeat `update` for each state until it moves by at most ``precision`` times M, at most ``limit`` times.

    Raises:
        ValueError: as `energy`.
    """
    _check(X, xi, beta)
    states, least = xi.reshape(-1, X.shape[1]).clone(), precision * X.norm(dim=-1).max()
    moving = torch.arange(len(states), device=xi.device)
    for _ in range(limit):
        old = states[moving]
        new = torch.softmax(beta * old @ X.T, dim=-1) @ X
        states[moving] = new
        moving = moving[(new - old).norm(dim=-1) > least]
        if not len(moving):
            break
    return states.reshape(xi.shape)


def separation(X: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    r"""$\Delta_i = x_i^\top x_i - \max_{j \ne i} x_i^\top x_j$ (equation 5): how far pattern i stands out.

    Raises:
        ValueError: fewer than 2 patterns.
    """
    require_at_least(2, **{"number of patterns in X": len(X)})
    dots = X @ X.T
    return dots.diagonal() - dots.clone().fill_diagonal_(-math.inf).amax(1)


def error_bound(X: Float[Tensor, "n d"], r: Float[Tensor, "*batch n"], beta: float) -> Float[Tensor, "*batch n"]:
    r"""$2(N-1)\,e^{-\beta(\Delta_i - 2 r_i M)} M$ (theorem 5, equation 8): where one update can end.

    $r_i = \max(\|\xi - x_i\|, \|x_i^* - x_i\|)$ is the distance from $x_i$ of the cue or the fixed point, the larger.
    """
    M = X.norm(dim=-1).max()
    return 2 * (len(X) - 1) * torch.exp(-beta * (separation(X) - 2 * r * M)) * M


def fixed_points(
    X: Float[Tensor, "n d"], beta: float, *, merge: float = 0.01
) -> tuple[Float[Tensor, "k d"], Int[Tensor, " n"]]:
    """The distinct fixed points that the patterns themselves run to, and which of them each pattern reaches.

    End points closer than ``merge`` times M count as one (single linkage).
    """
    ends = retrieve(X, X, beta, precision=1e-6)
    near = torch.cdist(ends, ends) <= merge * X.norm(dim=-1).max()
    count, member = connected_components(near.cpu().numpy(), directed=False)
    return ends[[int((member == k).argmax()) for k in range(count)]], torch.tensor(member, dtype=torch.int64)


def patterns_for_mass(weights: Float[Tensor, "*batch n"], mass: float = 0.9) -> Int[Tensor, "*batch"]:
    """The smallest number k of patterns that together hold ``mass`` of the softmax weight: the head statistic.

    Raises:
        ValueError: ``mass`` is not within 0 to 1.
    """
    require_between(0, 1, mass=mass)
    held = weights.sort(dim=-1, descending=True).values.cumsum(-1)
    return ((held < mass - 1e-6).sum(-1) + 1).clamp(max=weights.shape[-1])


def binary_recall(
    X: Float[Tensor, "n d"], xi: Float[Tensor, "b d"], degree: int, limit: int = 30
) -> Float[Tensor, "b d"]:
    r"""Rivals: $\xi_i \leftarrow \mathrm{sgn} \sum_\mu x_{\mu i}(\sum_{j \ne i} x_{\mu j}\xi_j)^{n-1}$ until stable.

    ``degree`` n = 2 is the classical Hopfield network, n = 3 the dense memory of Krotov and Hopfield (2016) with its
    quadratic capacity. The binomial theorem takes $j = i$ out of the power without an array of shape (b, n, d); of the
    powers of X, which is $\pm 1$, the even ones are 1 and need no product.

    Raises:
        ValueError: ``degree`` below 2, or an entry of ``X`` that is neither 1 nor -1.
    """
    require_at_least(2, degree=degree)
    require_between(1, 1, **{"the size of every entry of X": X.abs()})
    p, xi = degree - 1, xi.clone()
    moving = torch.arange(len(xi), device=xi.device)
    for _ in range(limit):
        old = xi[moving]
        m, field = old @ X.T, torch.zeros_like(old)
        for k in range(degree):
            sums = m ** (p - k) @ X if k % 2 == 0 else (m ** (p - k)).sum(1, keepdim=True)
            field += math.comb(p, k) * (-old) ** k * sums
        xi[moving] = new = torch.where(field >= 0, torch.ones_like(old), -1)
        moving = moving[(new != old).any(1)]
        if not len(moving):
            break
    return xi


def capacity(
    pool: Float[Tensor, "n d"],
    recall: Callable[[Tensor, Tensor], Tensor],
    g: torch.Generator,
    *,
    tolerance: float = 0.1,
    share: float = 0.99,
    cues: int = 200,
) -> int:
    """How many of the first patterns of ``pool`` can be stored until recall fails; ``len(pool)`` means "at least".

    A cue is a stored pattern plus a random vector of length 0.1 M. N patterns are held when a ``share`` of the ``cues``
    comes back within ``tolerance`` times M. N grows by half until that fails, and is then bisected to 2%.

    Raises:
        ValueError: an empty pool, or a ``share`` outside 0 to 1.
    """
    require_nonempty(pool=pool)
    require_between(0, 1, share=share)
    M = pool.norm(dim=-1).max()
    shift = 0.1 * M * unit_vectors(cues, pool.shape[1], generator=g).to(pool)

    def held(n: int) -> bool:
        x = pool[torch.arange(cues, device=pool.device) % n]
        return bool(((recall(pool[:n], x + shift) - x).norm(dim=-1) <= tolerance * M).double().mean() >= share)

    return largest(held, most=len(pool), growth=1.5, rough=0.02)


def guaranteed_base(d: int, K: float, beta: float, p: float) -> float:
    r"""The base c of the proved capacity $N \ge \sqrt p\, c^{(d-1)/4}$ on radius $K\sqrt{d-1}$ (theorem 3).

    $c = b / W_0(e^{a + \log b})$, $a = \frac{2}{d-1}(1 + \log(2\beta K^2 p (d-1)))$, $b = \frac25\beta K^2$, proved
    where $c \ge (2/\sqrt p)^{4/(d-1)}$, else 0; $W_0$ is Lambert's function, p the probability of failure.

    Raises:
        ValueError: ``K``, ``beta`` or ``p`` not positive, or ``d`` below 2.
    """
    require_positive(K=K, beta=beta, p=p)
    require_at_least(2, d=d)
    a, b = 2 / (d - 1) * (1 + math.log(2 * beta * K**2 * p * (d - 1))), 2 * K**2 * beta / 5
    c = b / float(lambertw(math.exp(a) * b).real)
    return c if c >= (2 / math.sqrt(p)) ** (4 / (d - 1)) else 0.0


class Hopfield(nn.Module):
    r"""Association of two sets: $\mathrm{softmax}(\beta Q K^\top)\,K W_V$ with $Q = R W_Q$, $K = Y W_K$ (equation 10).

    R holds the states (queries), Y the stored patterns; both are layer-normalised, as in the authors' code. Each head
    is a memory of its own; ``updates`` says how often the states move; ``beta`` is $1/\sqrt{d_k}$ unless given.

    Raises:
        ValueError: a size below 1, or ``beta`` not positive.
    """

    def __init__(
        self,
        state: int,
        stored: int,
        hidden: int,
        out: int,
        heads: int = 1,
        beta: float | None = None,
        updates: int = 1,
    ) -> None:
        super().__init__()
        require_at_least(1, state=state, stored=stored, hidden=hidden, out=out, heads=heads, updates=updates)
        self.heads, self.updates, self.beta = heads, updates, hidden**-0.5 if beta is None else beta
        require_positive(beta=self.beta)
        self.norm_R, self.norm_Y = nn.LayerNorm(state), nn.LayerNorm(stored)
        self.W_Q = nn.Linear(state, heads * hidden, bias=False)
        self.W_K = nn.Linear(stored, heads * hidden, bias=False)
        self.W_V = nn.Linear(heads * hidden, out, bias=False)

    def associate(
        self, R: Float[Tensor, "b s state"], Y: Float[Tensor, "b n stored"]
    ) -> tuple[Float[Tensor, "b s out"], Float[Tensor, "b heads s n"]]:
        """The retrieved patterns, and the softmax weights that retrieved them."""
        Q = rearrange(self.W_Q(self.norm_R(R)), "b s (h k) -> b h s k", h=self.heads)
        K = rearrange(self.W_K(self.norm_Y(Y)), "b n (h k) -> b h n k", h=self.heads)
        for _ in range(self.updates):
            p = torch.softmax(self.beta * Q @ K.mT, dim=-1)  # (b, h, s, n)
            Q = p @ K
        return self.W_V(rearrange(Q, "b h s k -> b s (h k)")), p

    def forward(self, R: Float[Tensor, "b s state"], Y: Float[Tensor, "b n stored"]) -> Float[Tensor, "b s out"]:
        """What the states R retrieve from Y."""
        return self.associate(R, Y)[0]


class HopfieldPooling(nn.Module):
    """A set in, one vector out: the set is what is stored, the state that queries it is learned."""

    def __init__(self, dim: int, hidden: int, out: int, heads: int = 1, beta: float | None = None) -> None:
        super().__init__()
        self.hopfield = Hopfield(dim, dim, hidden, out, heads, beta)
        self.query = nn.Parameter(torch.randn(1, 1, dim))

    def forward(self, Y: Float[Tensor, "b n dim"]) -> Float[Tensor, "b out"]:
        """What the learned query retrieves from each set."""
        return self.hopfield(self.query.expand(len(Y), -1, -1), Y)[:, 0]


class HopfieldLayer(nn.Module):
    """A vector in, a vector out: the input is the state, what is stored is learned (or set to the training data)."""

    def __init__(
        self, dim: int, memories: int, hidden: int, out: int, heads: int = 1, beta: float | None = None
    ) -> None:
        super().__init__()
        self.hopfield = Hopfield(dim, dim, hidden, out, heads, beta)
        self.memory = nn.Parameter(torch.randn(1, memories, dim))

    def forward(self, R: Float[Tensor, "b dim"]) -> Float[Tensor, "b out"]:
        """What each input retrieves from the learned memory."""
        return self.hopfield(R[None], self.memory)[0]


class GatedAttentionPooling(nn.Module):
    r"""Ilse et al.: $\sum_k a_k h_k$, $a = \mathrm{softmax}_k\,w^\top(\tanh V h_k \odot \mathrm{sigm}\,U h_k)$."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.V, self.U, self.w = nn.Linear(dim, hidden), nn.Linear(dim, hidden), nn.Linear(hidden, 1, bias=False)

    def forward(self, h: Float[Tensor, "b n dim"]) -> Float[Tensor, "b dim"]:
        """The weighted mean of each set."""
        return (torch.softmax(self.w(torch.tanh(self.V(h)) * torch.sigmoid(self.U(h))), dim=1) * h).sum(1)


class ProjectedMaxPooling(nn.Module):
    r"""A rival with Hopfield pooling's head: $\max_k(W_K\,\mathrm{norm}(h_k))\,W_V$; only the retrieval is replaced."""

    def __init__(self, dim: int, hidden: int, out: int) -> None:
        super().__init__()
        require_at_least(1, dim=dim, hidden=hidden, out=out)
        self.norm = nn.LayerNorm(dim)
        self.W_K, self.W_V = nn.Linear(dim, hidden, bias=False), nn.Linear(hidden, out, bias=False)

    def forward(self, h: Float[Tensor, "b n dim"]) -> Float[Tensor, "b out"]:
        """The largest value of every projected feature in each set, projected once more."""
        return self.W_V(self.W_K(self.norm(h)).amax(1))


def _check(X: Tensor, xi: Tensor, beta: float) -> None:
    require_nonempty(X=X)
    require_finite(X=X, xi=xi)
    require_positive(beta=beta)
