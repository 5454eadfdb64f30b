r"""Linear attention as Pavlovian conditioning: keys are bells, values are food, and queries test what was learned.

One matrix absorbs a trial at a time and answers any stimulus afterwards, so two old questions can be put to attention:
how many associations fit before they blur into one another, and does it *learn* as an animal does, or only count?

Qiao (2025), https://arxiv.org/abs/2508.08289. With $m$ pairs of keys $k_j \in \mathbb R^{d_k}$ (conditional stimuli)
and values $v_j \in \mathbb R^{d_v}$ (unconditional ones) the memory is $S = \sum_j v_j\,\phi(k_j)^\top$ and the answer
to a query is $y = S\,\phi(q)$.
"""

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from scipy.special import bdtrc
from torch import Tensor
from torch.nn import functional as F

from paperlab.checks import require_at_least, require_between, require_finite, require_one_of, require_positive
from paperlab.data.sphere import unit_vectors
from paperlab.search import largest

RULES = ("Hebb", "delta", "Oja", "BCM")
FEATURES = {"identity": lambda x: x, "elu + 1": lambda x: F.elu(x) + 1, "ReLU": F.relu}


def features(x: Float[Tensor, "*batch d"], kind: str = "identity") -> Float[Tensor, "*batch d"]:
    r"""$\phi(x) / \|\phi(x)\|$: of length 1, so that what a pair adds to the answer to its own key is its value.

    Raises:
        ValueError: an unknown ``kind``.
    """
    require_one_of(FEATURES, kind=kind)
    return F.normalize(FEATURES[kind](x), dim=-1)


def linear_attention(
    q: Float[Tensor, "*batch t d_k"], k: Float[Tensor, "*batch t d_k"], v: Float[Tensor, "*batch t d_v"]
) -> Float[Tensor, "*batch t d_v"]:
    r"""Causal linear attention, all positions at once: $y_t = \sum_{j \le t} \langle k_j, q_t\rangle\, v_j$.

    Raises:
        ValueError: an input that is not finite.
    """
    require_finite(q=q, k=k, v=v)
    return (q @ k.mT).tril() @ v


def condition(
    k: Float[Tensor, "*batch t d_k"],
    v: Float[Tensor, "*batch t d_v"],
    tests: Float[Tensor, "*batch t p d_k"] | None = None,
    *,
    rule: str = "Hebb",
    rate: float = 1.0,
    tau: float = 10.0,
) -> tuple[Float[Tensor, "*batch d_v d_k"], Float[Tensor, "*batch t p d_v"]]:
    r"""Conditioning, one trial after the other; returns the memory, and its answers to ``tests`` after each trial.

    With rate $\eta$, a trial $(k, v)$ changes the memory $S$, at first 0, by

    - Hebb: $\eta\,v k^\top$;
    - delta (Rescorla and Wagner 1972): $\eta\,(v - Sk)\,k^\top$, which learns from surprise only;
    - Oja: $\eta\,(v k^\top - v v^\top S)$, growth with a decay that the response itself drives;
    - BCM: $\eta\,a (a - \theta)\,k^\top$ with $a = v + Sk$, the response that stimulus and memory drive together, and
      a threshold that slides after it, $\theta \leftarrow \theta + (a^2 - \theta)/\tau$ (elementwise).

    Raises:
        ValueError: an unknown ``rule``, a ``rate`` that is not positive, ``tau`` below 1, inputs that are not finite.
    """
    require_one_of(RULES, rule=rule)
    require_positive(rate=rate)
    require_at_least(1, tau=tau)
    require_finite(k=k, v=v)
    S = torch.zeros(*v.shape[:-2], v.shape[-1], k.shape[-1], dtype=k.dtype, device=k.device)
    theta, answers = torch.zeros_like(v[..., 0, :]), []
    for t in range(k.shape[-2]):
        k_t, v_t = k[..., t, :], v[..., t, :]
        if rule == "Hebb":
            post, gate = v_t, k_t
        elif rule == "delta":
            post, gate = v_t - (S @ k_t[..., None])[..., 0], k_t
        elif rule == "Oja":
            post, gate = v_t, k_t - (v_t[..., None, :] @ S)[..., 0, :]
        else:
            a = v_t + (S @ k_t[..., None])[..., 0]
            post, gate = a * (a - theta), k_t
            theta = theta + (a.square() - theta) / tau
        S = S + rate * post[..., :, None] * gate[..., None, :]
        if tests is not None:
            answers.append(tests[..., t, :, :] @ S.mT)
    shape = (*v.shape[:-1], 0, v.shape[-1])
    return S, torch.stack(answers, dim=-3) if answers else v.new_empty(shape)


def softmax_attention(
    q: Float[Tensor, "*batch n d_k"],
    k: Float[Tensor, "*batch m d_k"],
    v: Float[Tensor, "*batch m d_v"],
    beta: float,
    *,
    empty: bool = False,
) -> Float[Tensor, "*batch n d_v"]:
    r"""The rival: $y = \sum_j p_j v_j$ with $p = \mathrm{softmax}(\beta\,\langle k_j, q\rangle)$ over all stored pairs.

    With ``empty`` one more slot has score 0 and value 0: an animal that has learned nothing answers nothing.

    Raises:
        ValueError: ``beta`` is not positive.
    """
    require_positive(beta=beta)
    if empty:
        k, v = F.pad(k, (0, 0, 1, 0)), F.pad(v, (0, 0, 1, 0))
    return torch.softmax(beta * q @ k.mT, dim=-1) @ v


def delta_sweeps(
    k: Float[Tensor, "*batch m d_k"], v: Float[Tensor, "*batch m d_v"], *, doublings: int = 0, rate: float = 1.0
) -> Float[Tensor, "*batch d_v d_k"]:
    r"""The delta rule after $2^{\text{doublings}}$ sweeps over the list, without a loop over trials.

    With keys and values as rows of $K$ and $V$, the surprises of one sweep that starts from $S$ solve a triangular
    system, $E = M (V - K S^\top)$ with $M = (I/\eta + \mathrm{tril}_{<0}\,K K^\top)^{-1}$, because each depends on the
    earlier ones only; then $S$ becomes $S + E^\top K = S A + B$ with $A = I - (M K)^\top K$, $B = (M V)^\top K$. Two
    sweeps make $S A^2 + (B A + B)$, and so on. For independent keys the limit is least squares of least norm.

    Raises:
        ValueError: ``doublings`` below 0, a ``rate`` that is not positive, or inputs that are not finite.
    """
    require_at_least(0, doublings=doublings)
    require_positive(rate=rate)
    require_finite(k=k, v=v)
    eye = torch.eye(k.shape[-2], dtype=k.dtype, device=k.device)
    solved = torch.linalg.solve_triangular((k @ k.mT).tril(-1) + eye / rate, torch.cat([v, k], dim=-1), upper=False)
    MV, MK = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
    B = MV.mT @ k
    A = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device) - MK.mT @ k
    for _ in range(doublings):
        A, B = A @ A, B @ A + B
    return B


def coherent_keys(m: int, d_k: int, coherence: float, generator: torch.Generator) -> Float[Tensor, "m d_k"]:
    r"""``m`` unit keys of which any two have the inner product ``coherence``, in a random orientation.

    The factor of the wanted Gram matrix $(1-c) I + c\,\mathbf 1\mathbf 1^\top$ is laid onto a random orthonormal frame.

    Raises:
        ValueError: more keys than dimensions, or a coherence outside [0, 1).
    """
    require_between(1, d_k, m=m)
    require_between(0, 1 - 1e-9, coherence=coherence)
    raw = torch.randn(d_k, m, generator=generator, device=generator.device, dtype=torch.float64)
    gram = torch.full((m, m), coherence, dtype=raw.dtype, device=raw.device).fill_diagonal_(1.0)
    return torch.linalg.cholesky(gram) @ torch.linalg.qr(raw).Q.mT


def recalled(
    y: Float[Tensor, "*batch m d_v"], v: Float[Tensor, "*batch m d_v"], criterion: str = "error"
) -> Bool[Tensor, "*batch m"]:
    r"""Which answers count as recalled.

    ``error``: $\|y - v\| \le \frac12$; ``cosine``: the angle that such an error can reach at right angles,
    $\cos \ge 1/\sqrt{1.25}$; ``nearest``: of all stored values, $v$ is the one with the largest product with $y$.

    Raises:
        ValueError: an unknown ``criterion``.
    """
    require_one_of(("error", "cosine", "nearest"), criterion=criterion)
    if criterion == "error":
        return (y - v).norm(dim=-1) <= 0.5 + 1e-9
    if criterion == "cosine":
        return F.cosine_similarity(y, v, dim=-1) >= 1.25**-0.5 - 1e-9
    return (y @ v.mT).argmax(-1) == torch.arange(v.shape[-2], device=v.device)


def capacity(holds: Callable[[int], float], *, share: float = 0.9, most: int = 2**20, rough: float = 0.0) -> int:
    """The largest m for which ``holds(m)``, a share of trials, is at least ``share``.

    It is doubled until that fails and then bisected, to 1 or to ``rough`` times itself, whichever is more.

    Raises:
        ValueError: ``share`` or ``rough`` outside 0 to 1, or ``most`` below 1.
    """
    require_between(0, 1, share=share)
    return largest(lambda m: holds(m) >= share, most=most, rough=rough)


def head_failures(
    networks: int, layers: int, heads: int, m: int, d_k: int, d_v: int, *, shared: float, generator: torch.Generator
) -> Bool[Tensor, "networks layers heads m"]:
    r"""Which heads fail ($\|y - v\| > \frac12$) at which of the ``m`` associations that every head stores.

    Each head has its own values. Of its keys a part is common to the heads of a layer,
    $k = \sqrt{s}\,k_\text{common} + \sqrt{1 - s}\,k_\text{own}$ (scaled to length 1), with $s$ = ``shared``.

    Raises:
        ValueError: ``shared`` outside 0 to 1, or a size below 1.
    """
    require_between(0, 1, shared=shared)
    require_at_least(1, networks=networks, layers=layers, heads=heads, m=m, d_k=d_k, d_v=d_v)
    common = unit_vectors(networks, layers, 1, m, d_k, generator=generator, dtype=torch.float32)
    own = unit_vectors(networks, layers, heads, m, d_k, generator=generator, dtype=torch.float32)
    k = F.normalize(math.sqrt(shared) * common + math.sqrt(1 - shared) * own, dim=-1)
    v = unit_vectors(networks, layers, heads, m, d_v, generator=generator, dtype=torch.float32)
    return ~recalled((k @ k.mT) @ v, v)


def network_failures(
    failed: Bool[Tensor, "networks layers heads m"], layers: int, heads: int
) -> Bool[Tensor, "networks windows m"]:
    """Whether a network of that many layers, each a majority of that many heads, loses an association on the way.

    A layer passes on the clean value if more than half of its heads recall it. Networks are cut from the layers drawn.

    Raises:
        ValueError: more layers or heads than were drawn.
    """
    require_between(1, failed.shape[1], layers=layers)
    require_between(1, failed.shape[2], heads=heads)
    lost = 2 * failed[:, :, :heads].sum(2) >= heads  # (networks, layers, m)
    windows = failed.shape[1] // layers
    return lost[:, : windows * layers].unflatten(1, (windows, layers)).any(2)


def majority_failure(p: float, heads: int) -> float:
    """Probability that at least half of ``heads`` independent heads fail, each with probability ``p``.

    Raises:
        ValueError: ``p`` outside 0 to 1, or no head.
    """
    require_between(0, 1, p=p)
    require_at_least(1, heads=heads)
    return float(bdtrc(math.ceil(heads / 2) - 1, heads, p))


def failure_bound(p: float, heads: int, layers: int) -> float:
    r"""$L\,e^{-2H(1/2 - p)^2}$: Hoeffding's inequality for the heads of a layer, the union bound over layers.

    Raises:
        ValueError: ``p`` outside 0 to ½ (there the majority of many heads fails), or a size below 1.
    """
    require_between(0, 0.5, p=p)
    require_at_least(1, heads=heads, layers=layers)
    return layers * math.exp(-2 * heads * (0.5 - p) ** 2)


def heads_needed(p: float, layers: int, delta: float) -> int:
    r"""The least number of heads for which the bound promises a failure of at most $\delta$.

    $H = \lceil \ln(L/\delta) \,/\, (2 (\frac12 - p)^2) \rceil$.

    Raises:
        ValueError: ``p`` not below ½, ``delta`` not positive, or no layer.
    """
    require_between(0, 0.5 - 1e-9, p=p)
    require_positive(delta=delta)
    require_at_least(1, layers=layers)
    return max(1, math.ceil(math.log(layers / delta) / (2 * (0.5 - p) ** 2)))


def schedule(
    program: Sequence[tuple[str, int]], stimuli: dict[str, Float[Tensor, "*batch d_k"]], *, rest: int = 0
) -> tuple[Float[Tensor, "*batch t d_k"], Float[Tensor, "*batch t 1"]]:
    """Trials of a conditioning experiment: ``[("A+", 20), ("AB+", 20), ("B-", 10)]``.

    Letters name the stimuli that are presented together (their vectors add), + is a trial with the unconditional
    stimulus of strength 1, - one without; "+" alone is food without a stimulus. ``rest`` empty steps follow each trial.

    Raises:
        ValueError: a trial that does not end in + or -, a letter without a stimulus, or a count below 1.
    """
    blank = torch.zeros_like(next(iter(stimuli.values())))
    keys, values = [], []
    for trial, count in program:
        require_at_least(1, **{f"count of {trial!r}": count})
        require_one_of(("+", "-"), **{f"last sign of {trial!r}": trial[-1:]})
        require_one_of(stimuli, **{name: name for name in trial[:-1]})
        key = sum((stimuli[name] for name in trial[:-1]), blank)
        keys += ([key] + [blank] * rest) * count
        values += ([float(trial[-1] == "+")] + [0.0] * rest) * count
    k = torch.stack(keys, dim=-2)
    return k, torch.tensor(values, dtype=k.dtype, device=k.device)[:, None].expand(*k.shape[:-1], 1)
