r"""Sparsey: a memory that chooses a code for every input, with less noise the more familiar the input is.

Store a thing once and find it again: that is episodic memory. Notice, without being told, that two things are alike:
that is semantic memory. Sparsey gets the second out of the first, because an input that resembles a stored one is drawn
towards the stored one's code; and it never searches, because all that was stored lies in one matrix of binary weights.

Rinkus and Leveille (2017), https://arxiv.org/abs/1710.07829. A coding field ("mac") has $Q$ competitive modules of $K$
binary units. A code is one winner a module, here the index $0..K-1$ of each: ``Int[Tensor, "... Q"]``. An input is a
set of $S$ active pixels, here their indices. ``copies`` independent macs lie side by side on the leading axis.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from paperlab.checks import require_at_least, require_between, require_ndim, require_nonnegative, require_positive


@dataclass(frozen=True)
class Noise:
    r"""The constants that turn familiarity into noise; ``floor``, ``chi`` and ``sigma3`` may differ from copy to copy.

    ``floor`` is $G^-$, the familiarity below which an input is treated as wholly new. ``chi`` = 0 is full noise, all
    winners at random; ``greedy`` is no noise at all, the best-supported unit wins. Both are ablations.

    Raises:
        ValueError: ``floor`` outside 0 to 0.999, a negative ``gamma``, ``chi`` or sigma.
    """

    floor: float | Tensor = 0.3
    gamma: float = 2.0
    chi: float | Tensor = 100.0
    sigma1: float = 1.0
    sigma2: float = 30.0
    sigma3: float | Tensor = 0.7
    sigma4: float = 1.0
    greedy: bool = False

    def __post_init__(self) -> None:
        require_between(0, 0.999, floor=self.floor)
        require_nonnegative(gamma=self.gamma, chi=self.chi, sigma1=self.sigma1, sigma2=self.sigma2)
        require_nonnegative(sigma3=self.sigma3, sigma4=self.sigma4)


def familiarity(V: Float[Tensor, "*batch Q K"]) -> Float[Tensor, "*batch"]:
    r"""$G = \frac1Q \sum_q \max_{i \in q} V_i$: how well the best unit of each module is supported, on average."""
    return V.amax(-1).mean(-1)


def expansivity(G: Float[Tensor, "copies *batch"], K: int, noise: Noise) -> Float[Tensor, "copies *batch"]:
    r"""$\eta = 1 + \big[\frac{G - G^-}{1 - G^-}\big]_+^\gamma\, \chi K$: 1 for the unknown, $1 + \chi K$ at $G = 1$."""
    floor = _each(noise.floor, G)
    return 1 + ((G - floor) / (1 - floor)).clamp(min=0) ** noise.gamma * _each(noise.chi, G) * K


def _each(value: float | Tensor, like: Tensor) -> float | Tensor:
    """One value for each copy, shaped so that it meets ``like`` along the leading axis; or the one value for all."""
    return value.view(-1, *[1] * (like.ndim - 1)) if isinstance(value, Tensor) else value


def _power(x: Tensor, exponent: float) -> Tensor:
    """``x ** exponent``, without the work where the exponent is 1."""
    return x if exponent == 1 else x**exponent


def win_probabilities(V: Float[Tensor, "copies *batch Q K"], noise: Noise) -> Float[Tensor, "copies *batch Q K"]:
    r"""$\rho_i = \psi_i / \sum_k \psi_k$ over the units k of i's module, from supports V in 0 to 1.

    $\psi_i = (\eta - 1) / (1 + \sigma_1 e^{-\sigma_2(V_i - \sigma_3)})^{\sigma_4} + 1$.
    $\rho$ is uniform where $G \le G^-$ and nearly all on the best-supported unit where $G = 1$.

    Raises:
        ValueError: a support outside 0 to 1.
    """
    require_between(0, 1, V=V)
    return _win_probabilities(V, noise)


def _win_probabilities(V: Tensor, noise: Noise) -> Tensor:
    """`win_probabilities` of supports that are known to lie in 0 to 1."""
    if noise.greedy:
        best = _best(V).to(V)
        return best / best.sum(-1, keepdim=True)
    eta = expansivity(familiarity(V), V.shape[-1], noise)[..., None, None]
    squash = _power(1 + noise.sigma1 * torch.exp(-noise.sigma2 * (V - _each(noise.sigma3, V))), noise.sigma4)
    psi = (eta - 1) / squash + 1
    return psi / psi.sum(-1, keepdim=True)


def draw(rho: Float[Tensor, "*batch Q K"], g: torch.Generator) -> Int[Tensor, "*batch Q"]:
    """One winner a module, unit i with a probability in proportion to ``rho[..., i]``."""
    ladder = rho.cumsum(-1)
    u = torch.rand(*rho.shape[:-1], 1, generator=g, dtype=rho.dtype, device=rho.device)
    return (ladder[..., :-1] <= u * ladder[..., -1:]).sum(-1)


def hard_max(V: Float[Tensor, "*batch Q K"], g: torch.Generator) -> Int[Tensor, "*batch Q"]:
    """The best-supported unit of each module; ties go to one of the best at random, each with the same chance."""
    return draw(_best(V).to(V), g)


def _best(V: Tensor) -> Tensor:
    """True for the units of each module that no other one beats."""
    most = V.amax(-1, keepdim=True)
    return V.eq(most)


def shared(a: Int[Tensor, "*batch Q"], b: Int[Tensor, "*batch Q"]) -> Int[Tensor, "*batch"]:
    """In how many modules two codes have the same winner."""
    return (a == b).sum(-1)


def overlaps(a: Int[Tensor, "copies n Q"], b: Int[Tensor, "copies m Q"], K: int) -> Float[Tensor, "copies n m"]:
    """`shared` of every code in ``a`` with every code in ``b``."""
    first, second = (F.one_hot(code, K).flatten(2).float() for code in (a, b))
    return first @ second.mT


class Mac:
    r"""``copies`` coding fields with binary weights from pixels to units and from the previous code's units to units.

    The weights start at 0; storing sets some to 1 and nothing ever sets one back. The exponents of the two supports
    in $V_i = u_i^{\lambda_u} h_i^{\lambda_h}$ are ``lambda_u`` and ``lambda_h``; with ``lambda_h`` = 0 a code is chosen
    by the input alone, while what follows what is still learned.

    Raises:
        ValueError: a size below 1, fewer than 2 units a module, or a negative exponent.
    """

    def __init__(
        self,
        copies: int,
        pixels: int,
        Q: int,
        K: int,
        g: torch.Generator,
        noise: Noise | None = None,
        lambda_u: float = 1.0,
        lambda_h: float = 1.0,
    ) -> None:
        require_at_least(1, copies=copies, pixels=pixels, Q=Q)
        require_at_least(2, K=K)
        require_nonnegative(lambda_u=lambda_u, lambda_h=lambda_h)
        self.Q, self.K, self.g, self.noise = Q, K, g, noise or Noise()
        self.lambda_u, self.lambda_h = lambda_u, lambda_h
        self.W = torch.zeros(copies, pixels, Q * K, device=g.device)
        self.H = torch.zeros(0)  # (copies, Q K, Q K), made when the first sequence is stored
        self.copy = torch.arange(copies, device=g.device)[:, None, None]
        self.place = K * torch.arange(Q, device=g.device)

    def units(self, code: Int[Tensor, "copies *items Q"]) -> Int[Tensor, "copies *items Q"]:
        """The winners as numbers among all Q K units of the field."""
        return code + self.place

    def support(
        self, active: Int[Tensor, "copies items S"], previous: Int[Tensor, "copies items Q"] | None = None
    ) -> Float[Tensor, "copies items Q K"]:
        r"""$V_i$ from $u_i = \frac1S \sum_j x_j w_{ji}$ and, where there is a previous code, $h_i$, its share of $Q$.

        Raises:
            ValueError: a pixel that does not exist, or ``active`` is not of shape (copies, items, S).
        """
        require_ndim(3, active=active)
        require_between(0, self.W.shape[1] - 1, active=active)
        V = _power(self._pool(self.W, active), self.lambda_u)
        if previous is not None and self.lambda_h > 0 and self.H.numel():
            V = V * _power(self._pool(self.H, self.units(previous)), self.lambda_h)
        return V

    def _pool(self, weights: Tensor, rows: Tensor) -> Tensor:
        """The mean of the named rows of each copy's weights, without forming them: (copies, items, Q, K)."""
        flat = (rows + weights.shape[1] * self.copy).flatten(0, 1)
        pooled = F.embedding_bag(flat, weights.flatten(0, 1), mode="sum") / rows.shape[-1]
        return pooled.view(*rows.shape[:2], self.Q, self.K)

    def propose(
        self, active: Int[Tensor, "copies items S"], previous: Int[Tensor, "copies items Q"] | None = None
    ) -> Int[Tensor, "copies items Q"]:
        """The codes that the algorithm would give to these inputs now, each alone; nothing is learned."""
        return draw(_win_probabilities(self.support(active, previous), self.noise), self.g)

    def store(
        self, active: Int[Tensor, "copies S"], previous: Int[Tensor, "copies Q"] | None = None
    ) -> Int[Tensor, "copies Q"]:
        """Choose a code for one input a copy and learn it in this single trial; returns the code.

        The weights from the active pixels to the winners, and from the previous code to them, become 1.
        """
        code = self.propose(active[:, None], None if previous is None else previous[:, None])[:, 0]
        copy, won = self.copy, self.units(code)[:, None, :]
        self.W[copy, active[:, :, None], won] = 1
        if previous is not None:
            if not self.H.numel():
                self.H = self.W.new_zeros(len(self.W), self.Q * self.K, self.Q * self.K)
            self.H[copy, self.units(previous)[:, :, None], won] = 1
        return code

    def store_all(self, active: Int[Tensor, "copies items S"]) -> Int[Tensor, "copies items Q"]:
        """Store the items one after the other; returns their codes."""
        return torch.stack([self.store(active[:, t]) for t in range(active.shape[1])], 1)

    def recognise(
        self, active: Int[Tensor, "copies items S"], previous: Int[Tensor, "copies items Q"] | None = None
    ) -> Int[Tensor, "copies items Q"]:
        """The codes that these inputs reactivate: the best-supported unit of each module."""
        V = self.support(active, previous)
        return torch.cat([hard_max(part, self.g) for part in V.split(8)])  # a few copies at a time stay in the cache

    def predict(self, code: Int[Tensor, "copies items Q"]) -> Int[Tensor, "copies items Q"]:
        """The codes that the recurrent weights alone expect next.

        Raises:
            ValueError: no sequence has been stored.
        """
        require_at_least(1, **{"number of recurrent weights": self.H.numel()})
        return hard_max(self._pool(self.H, self.units(code)), self.g)

    def imagine(self, code: Int[Tensor, "copies items Q"]) -> Float[Tensor, "copies items pixels"]:
        """For each pixel, how many of the code's winners it was ever active with: the same weights read backwards."""
        x = torch.zeros(*code.shape[:2], self.Q * self.K, device=code.device).scatter_(-1, self.units(code), 1)
        return x @ self.W.mT


def capacity(
    mac: Mac, active: Int[Tensor, "copies items S"], share: float = 0.95, growth: float = 1.2
) -> Float[Tensor, " copies"]:
    """How many items an empty mac can store, one by one, until a mean ``share`` of their codes comes back no more.

    All that is stored is recognised again whenever the number has grown by the factor ``growth`` (in steps of 2 at
    first); the first fall below ``share`` is found by linear interpolation. A copy that never falls has all the items.

    Raises:
        ValueError: ``share`` outside 0 to 1, or ``growth`` outside 1.01 to 2.
    """
    require_between(0, 1, share=share)
    require_between(1.01, 2, growth=growth)
    copies, items, _ = active.shape
    found = torch.full((copies,), float(items), device=active.device)
    before, last, codes, due = torch.ones_like(found), 0, [], 2
    for n in range(1, items + 1):
        codes.append(mac.store(active[:, n - 1]))
        if n < due and n < items:
            continue
        now = shared(mac.recognise(active[:, :n]), torch.stack(codes, 1)).to(found).mean(1) / mac.Q
        falls = (now < share) & (found == items)
        found[falls] = (last + (n - last) * (before - share) / (before - now))[falls]
        before, last, due = now, n, max(n + 2, int(n * growth))
        if (found < items).all():
            break
    return found


def label_votes(
    codes: Int[Tensor, "copies n Q"],
    labels: Int[Tensor, "copies n"],
    queries: Int[Tensor, "copies m Q"],
    K: int,
    classes: int,
) -> Float[Tensor, "copies m classes"]:
    """Label units with binary weights, learned in one pass: how many of a query's winners were ever on with the class.

    Raises:
        ValueError: a label outside 0 to ``classes`` - 1.
    """
    require_between(0, classes - 1, labels=labels)
    copies, _, Q = codes.shape
    place = torch.arange(Q, device=codes.device) * K
    copy = torch.arange(copies, device=codes.device)[:, None, None]
    L = torch.zeros(copies, Q * K, classes, device=codes.device)
    L[copy, codes + place, labels[..., None]] = 1
    return L[copy, queries + place].sum(2)


def hash_code(active: Int[Tensor, "*items S"], weights: Float[Tensor, "pixels Q K"]) -> Int[Tensor, "*items Q"]:
    """A rival without a memory: the unit with the largest fixed random sum over the active pixels wins."""
    return weights[active].sum(-3).argmax(-1)


def random_inputs(copies: int, items: int, pixels: int, S: int, g: torch.Generator) -> Int[Tensor, "copies items S"]:
    """Sets of ``S`` distinct pixels out of ``pixels``.

    Raises:
        ValueError: ``S`` is not within 1 to ``pixels``.
    """
    require_between(1, pixels, S=S)
    return torch.rand(copies, items, pixels, generator=g, device=g.device).topk(S, -1).indices


def overlapping(
    active: Int[Tensor, "copies items S"], keep: int, pixels: int, g: torch.Generator
) -> Int[Tensor, "copies items S"]:
    """For each input another one that has exactly ``keep`` of its pixels; the others are new.

    Raises:
        ValueError: ``keep`` is not within 0 to S, or there are too few other pixels.
    """
    S = active.shape[-1]
    require_between(0, S, keep=keep)
    require_positive(**{"number of spare pixels, plus 1": pixels - 2 * S + keep + 1})
    order = torch.rand(active.shape, generator=g, device=g.device).argsort(-1)
    rest = torch.rand(*active.shape[:2], pixels, generator=g, device=g.device).scatter_(-1, active, -1)
    return torch.cat([active.gather(-1, order[..., :keep]), rest.topk(S - keep, -1).indices], -1)


def numbers_written(job: Callable[[], object]) -> int:
    """How many numbers all the tensor operations of ``job`` write, counted as they run; a view writes none."""

    class Count(TorchDispatchMode):
        total = 0

        @classmethod
        def _should_skip_dynamo(cls) -> bool:
            return False  # there is nothing to compile here, and True would import the compiler: two seconds

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            alias = [r.alias_info for r in func._schema.returns if r.alias_info]
            if not alias:
                made = [x for x in (out if isinstance(out, tuple | list) else [out]) if isinstance(x, Tensor)]
                self.total += sum(x.numel() for x in made)
            elif alias[0].is_write:  # in place; an assignment by index writes as many numbers as it names places
                named = [i for i in args[1] if i is not None] if "index_put" in func._schema.name else [out]
                self.total += torch.broadcast_tensors(*named)[0].numel()
            return out

    with Count() as count:
        job()
    return count.total
