r"""Dual encoders for extreme multi-label classification: labels that are read, not stored.

A classifier keeps a weight vector for every label, so that a million labels cost a million vectors. A dual encoder puts
the label's *text* through the network that reads the query, and its size does not depend on the number of labels. What
stood in the way, says the paper, was the loss: InfoNCE makes the right labels of one query compete with each other.

Gupta, Khatri, Rawat, Bhojanapalli, Jain and Dhillon (2023), https://arxiv.org/abs/2310.10636.

Everywhere, ``scores`` are $s_l = \langle f(q), f(l)\rangle / T$ over the labels on the last axis, ``positives`` marks
the right ones, and a loss gives one number a query. A score of $-\infty$ takes a label out of the competition.
"""

import keyword
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from paperlab.checks import (
    require_at_least,
    require_between,
    require_finite,
    require_nonempty,
    require_positive,
)
from paperlab.nn import StackedLinear

Scores, Marks = Float[Tensor, "*batch labels"], Bool[Tensor, "*batch labels"]


class _Right:
    """Where the positives of a batch stand: their places in the flattened scores, their queries, and $|P|$."""

    def __init__(self, positives: Marks) -> None:
        self.place = positives.reshape(-1).nonzero()[:, 0]
        self.query = self.place.div(positives.shape[-1], rounding_mode="floor")
        self.shape = positives.shape[:-1]
        self.count = self.query.bincount(minlength=self.shape.numel())
        require_at_least(1, **{"number of positives of every query": self.count})

    def of(self, values: Scores) -> Float[Tensor, " marks"]:
        """The values at the positives; an index is cheaper to differentiate than a mask."""
        return values.reshape(-1).index_select(0, self.place)

    def mean(self, values: Float[Tensor, " marks"]) -> Float[Tensor, "*batch"]:
        """The mean of ``values`` over each query's positives."""
        total = values.new_zeros(len(self.count)).index_add(0, self.query, values)
        return (total / self.count).view(self.shape)


def infonce(scores: Scores, positives: Marks, *, summed: bool = False) -> Float[Tensor, "*batch"]:
    r"""InfoNCE, a softmax over all labels for each positive: $-\frac1{|P|}\sum_{l \in P}\log p_l$; ``summed`` without
    the $1/|P|$.

    Its gradient in the score of a positive is $p_l - 1/|P|$ (summed: $|P|\,p_l - 1$): above $1/|P|$ it pushes *down*.

    Raises:
        ValueError: a query without a positive.
    """
    right = _Right(positives)
    loss = scores.logsumexp(-1) - right.mean(right.of(scores))
    return loss * right.count.view(right.shape) if summed else loss


def decoupled(scores: Scores, positives: Marks, *, summed: bool = False) -> Float[Tensor, "*batch"]:
    r"""DecoupledSoftmax: every positive against the negatives alone,
    $-\frac1{|P|}\sum_{l \in P}\log\frac{e^{s_l}}{e^{s_l} + \sum_{l' \notin P} e^{s_{l'}}}$.

    With one positive it is InfoNCE, and cross-entropy. ``summed`` without the $1/|P|$.

    Raises:
        ValueError: a query without a positive.
    """
    right = _Right(positives)
    against = scores.masked_fill(positives, -torch.inf).logsumexp(-1).reshape(-1)
    loss = right.mean(F.softplus(against.index_select(0, right.query) - right.of(scores)))
    return loss * right.count.view(right.shape) if summed else loss


def one_sided(scores: Scores, positives: Marks, *, balanced: bool = False) -> Float[Tensor, "*batch"]:
    r"""The ablation: averaged InfoNCE with one change, no positive is ever pushed down.

    A positive's gradient is $\min(p_l - 1/|P|, 0)$, a negative's $p_j$ as before; ``balanced`` scales the latter so
    that the gradient sums to 0 over the labels again, as it does for InfoNCE and for the decoupled softmax. (Both of
    these push the negatives in proportion to $p_j$: all that tells them apart is the gradient on the positives.) No
    loss has this gradient; what is returned has it, and no meaning as a value.

    Raises:
        ValueError: a query without a positive.
    """
    p, count = scores.detach().softmax(-1), positives.sum(-1, keepdim=True)
    require_at_least(1, **{"number of positives of every query": count})
    pull = (p - 1 / count).clamp(max=0) * positives
    push = p.masked_fill(positives, 0)
    if balanced:
        push = push * (-pull.sum(-1, keepdim=True) / push.sum(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny))
    return ((pull + push) * scores).sum(-1)


class _Threshold(torch.autograd.Function):
    r"""$t(s)$ with $\sum_l \sigma(s_l + t) = k$; backward by the implicit function theorem,
    $\partial t / \partial s = -v / \mathbf 1^\top v$ with $v = \pi(1 - \pi)$.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, s: Tensor, k: float, steps: int) -> Tensor:
        level = float(np.log(k / (s.shape[-1] - k)))  # if all scores were equal, t would be this minus the score
        low, high = level - s.amax(-1, keepdim=True), level - s.amin(-1, keepdim=True)
        edge = s.topk(int(k) + 1, -1).values[..., -2:].mean(-1, keepdim=True)  # between the k-th best and the next
        t = torch.maximum(low, torch.minimum(-edge, high))
        for _ in range(steps):
            pi = torch.sigmoid(s + t)
            total = pi.sum(-1, keepdim=True)
            found = (total - k).abs() <= 64 * torch.finfo(s.dtype).eps * k
            if found.all():
                break
            low, high = torch.where(total < k, t, low), torch.where(total < k, high, t)
            slope = (total - (pi * pi).sum(-1, keepdim=True)) / total
            newton = t + (np.log(k) - total.log()) / slope  # on the logarithm, which is nearly a line
            inside = (newton > low) & (newton < high)
            t = torch.where(found, t, torch.where(inside, newton, (low + high) / 2))  # outside the bracket, bisection
        ctx.save_for_backward(torch.sigmoid(s + t))
        return t

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, g: Tensor) -> tuple[Tensor, None, None]:
        (pi,) = ctx.saved_tensors
        v = pi * (1 - pi)
        return -g * v / v.sum(-1, keepdim=True), None, None


def soft_top_k(scores: Scores, k: float, alpha: float = 1.0, steps: int = 60) -> Scores:
    r"""The logits of a soft choice of k labels: $\alpha(s_l + t)$, with $t$ such that $\sum_l \pi_l = k$ for
    $\pi = \sigma(\alpha(s + t))$.

    $\partial\pi/\partial s = \mathrm{diag}(v) - v v^\top / \mathbf 1^\top v$ with $v = \alpha\pi(1-\pi)$. For
    $\alpha \to \infty$, $\pi$ marks the k largest scores.

    Raises:
        ValueError: k is not between 0 and the number of labels, alpha is not positive, or a score is not finite.
    """
    require_positive(k=k, alpha=alpha)
    require_finite(scores=scores)
    if k >= scores.shape[-1]:
        raise ValueError(f"k must be below the number of labels, {scores.shape[-1]}, got {k}")
    scaled = alpha * scores
    return scaled + _Threshold.apply(scaled, float(k), steps)


def soft_top_k_loss(scores: Scores, positives: Marks, k: float, alpha: float = 1.0) -> Float[Tensor, "*batch"]:
    r"""SoftTop-k: $-\frac1{|P|}\sum_{l \in P}\log\pi_l$. A positive needs a place among k, not the first one.

    Raises:
        ValueError: a query without a positive, or as in `soft_top_k`.
    """
    right = _Right(positives)
    return right.mean(F.softplus(-right.of(soft_top_k(scores, k, alpha))))


def binary(scores: Scores, positives: Marks) -> Float[Tensor, "*batch"]:
    """One-versus-all: binary cross-entropy of every label for itself, summed over the labels."""
    return F.softplus(scores).sum(-1) - torch.where(positives, scores, 0).sum(-1)


def sampled(scores: Scores, positives: Marks, pool: Bool[Tensor, "... labels"]) -> Scores:
    """Scores with only the labels of ``pool`` as negatives; every positive stays, in the pool or not."""
    return scores.masked_fill(~(pool | positives), -torch.inf)


class DualEncoder(nn.Module):
    r"""Copies of a perceptron $f$ with outputs of length 1, scoring $s_l = \langle f(q), f(l)\rangle / T + b$.

    With ``labels`` it becomes the rival: copies of a *head*, whose label vectors are parameters and not $f$ of a text
    (``cosine=False``: and no vector is normalised). The scalar $b$ matters to `binary` alone; the other losses ignore
    it.

    Raises:
        ValueError: a size below 1, or a temperature that is not positive.
    """

    def __init__(self, copies: int, features: int, hidden: int, dim: int, *, temperature: float | Sequence[float],
                 labels: int = 0, cosine: bool = True, bias: float = 0.0,
                 generator: torch.Generator | None = None) -> None:  # fmt: skip
        super().__init__()
        require_positive(temperature=temperature)
        self.first = StackedLinear(copies, features, hidden, generator=generator)
        self.second = StackedLinear(copies, hidden, dim, generator=generator)
        self.bias = nn.Parameter(torch.full((copies, 1, labels or 1), bias))
        self.table = nn.Parameter(torch.randn(copies, labels, dim, generator=generator) / dim**0.5) if labels else None
        self.cosine = cosine
        self.register_buffer("temperature", torch.as_tensor(temperature, dtype=torch.float32).view(-1, 1, 1))

    def _finish(self, hidden: Tensor) -> Tensor:
        out = self.second(F.relu(hidden))
        return F.normalize(out, dim=-1) if self.cosine else out

    def queries(self, x: Float[Tensor, "copies batch features"]) -> Float[Tensor, "copies batch dim"]:
        """$f$ of the queries, a batch for each copy."""
        return self._finish(self.first(x))

    def labels(self, x: Float[Tensor, "labels features"] | None) -> Float[Tensor, "copies labels dim"]:
        """$f$ of the labels' texts, which all copies share; a head has no use for them."""
        if self.table is not None:
            return F.normalize(self.table, dim=-1) if self.cosine else self.table
        return self._finish(self.first(x.expand(len(self.temperature), -1, -1)))

    def score(self, q: Tensor, e: Tensor) -> Float[Tensor, "copies batch labels"]:
        """$s$ from the two sets of embeddings."""
        return torch.baddbmm(self.bias, q / self.temperature, e.mT)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Float[Tensor, "copies batch labels"]:
        """Scores of every query against every label."""
        return self.score(self.queries(x), self.labels(labels))


def cached_backward(
    model: DualEncoder,
    x: Float[Tensor, "copies batch features"],
    texts: Float[Tensor, "labels features"],
    loss: Callable[[Tensor], Tensor],
    chunk: int,
) -> Tensor:
    """Gradient caching: the gradients of ``loss(scores)`` with the activations of only ``chunk`` labels alive at once.

    The labels are encoded without a graph; the loss gives the gradient at their embeddings; then each chunk is encoded
    again, with a graph, and that gradient is sent through it. The same sum in another order: exact, for one more pass.

    Raises:
        ValueError: ``chunk`` < 1.
    """
    require_at_least(1, chunk=chunk)
    parts = texts.split(chunk)
    with torch.no_grad():
        e = torch.cat([model.labels(part) for part in parts], 1)
    value = loss(model.score(model.queries(x), e.requires_grad_()))
    value.backward()
    for part, g in zip(parts, e.grad.split(chunk, 1), strict=True):
        model.labels(part).backward(g)
    return value.detach()


_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[0-9]+")


def trigrams(texts: Iterable[str], buckets: int) -> Float[np.ndarray, "texts buckets"]:
    """Counts of character trigrams, hashed into ``buckets``: square roots, scaled to length 1.

    A text is lower-cased, cut into words (at underscores and capitals too) and the words are joined by blanks.

    Raises:
        ValueError: fewer than 1 bucket.
    """
    require_at_least(1, buckets=buckets)
    lines = [f" {' '.join(_WORD.findall(text))} ".lower().encode() for text in texts]
    row = np.repeat(np.arange(len(lines)), [len(line) for line in lines])
    letters = np.frombuffer(b"".join(lines), dtype=np.uint8).astype(np.int64)
    whole = row[:-2] == row[2:]  # a trigram does not reach into the next text
    code = ((letters[:-2] << 16) + (letters[1:-1] << 8) + letters[2:])[whole]
    grams, where = np.unique(code, return_inverse=True)
    bucket = np.array([zlib.crc32(int(gram).to_bytes(3, "big")) % buckets for gram in grams], dtype=np.int64)
    found = np.bincount(row[:-2][whole] * buckets + bucket[where], minlength=len(lines) * buckets)
    x = np.sqrt(found.astype(np.float32)).reshape(len(lines), buckets)
    x /= np.maximum(np.sqrt(np.einsum("tb,tb->t", x, x)), 1e-9)[:, None]
    return x


def semantic(counts: Float[Tensor, "texts buckets"], dim: int, seed: int) -> Float[Tensor, "texts dim"]:
    r"""The counts weighted by $\log(N / n_g)$ (rare trigrams say more) on the first ``dim`` singular vectors, length 1.

    Raises:
        ValueError: ``dim`` below 1, or more than there are texts or buckets.
    """
    require_between(1, min(counts.shape), dim=dim)
    weight = (len(counts) / (1 + (counts > 0).sum(0))).log().clamp(min=0)
    x = F.normalize(counts * weight, dim=-1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        basis = torch.svd_lowrank(x, q=min(dim + 16, *x.shape), niter=1)[2]
    return F.normalize(x @ basis[:, :dim], dim=-1)


_FUNCTION = re.compile(
    r"""^(?P<pad>[ ]*)(?:async[ ]+)?def[ ]+(?P<name>\w+)\([^)]*\)[^\n:]*:[^\n]*\n  # one signature, no brackets within
        \s*[rR]?(?P<quote>\"{3}|'{3})(?P<doc>.*?)(?P=quote)
        (?P<body>[^\n]*\n(?:(?P=pad)[ ]+[^\n]*\n|[ ]*\n)*)""",
    re.MULTILINE | re.DOTALL | re.VERBOSE,
)
_CALL = re.compile(r"(?<!def )(?<!class )\b([A-Za-z_]\w*)\(")
_KEYWORDS = frozenset(keyword.kwlist)


def called_names(
    sources: Iterable[str], labels: int
) -> tuple[list[str], list[str], Bool[np.ndarray, "queries labels"]]:
    """A multi-label data set out of source code: which names does a function call?

    A query is the name of a documented function with the first 300 characters of its docstring; the labels are the
    names that the most functions call, the most frequent first; the marks say which function calls which. Read with
    regular expressions, a tenth of the time of a parser: a call within a string is taken for one. Functions that call
    no label are left out, and so is every repetition of a query.

    Raises:
        ValueError: ``labels`` < 1, or no function calls anything.
    """
    require_at_least(1, labels=labels)
    found: dict[str, set[str]] = {}
    for source in sources:
        for match in _FUNCTION.finditer(source):
            calls = set(_CALL.findall(re.sub(r"#[^\n]*", "", match["body"]))) - _KEYWORDS
            found.setdefault(f"{match['name']} {' '.join(match['doc'].split())[:300]}", calls)
    counts = Counter(name for calls in found.values() for name in sorted(calls))
    require_nonempty(**{"calls in sources": counts})
    column = {name: j for j, (name, _) in enumerate(sorted(counts.items(), key=lambda c: (-c[1], c[0]))[:labels])}
    kept = {query: [column[name] for name in calls if name in column] for query, calls in found.items()}
    kept = {query: calls for query, calls in kept.items() if calls}
    marks = np.zeros((len(kept), len(column)), dtype=bool)
    for row, calls in zip(marks, kept.values(), strict=True):
        row[calls] = True
    return list(kept), list(column), marks


def propensities(frequency: Float[Tensor, " labels"], queries: int, a: float = 0.55, b: float = 1.5) -> Tensor:
    r"""How likely a right label is to be marked, by its frequency $n_l$ in training (Jain et al. 2016):
    $\frac1{1 + C e^{-a \log(n_l + b)}}$ with $C = (\log N - 1)(b + 1)^a$ for $N$ queries.
    """
    return 1 / (1 + (np.log(queries) - 1) * (b + 1) ** a * (frequency + b) ** -a)


def metrics(scores: Scores, positives: Marks, ks: Sequence[int] = (1, 5), propensity: Tensor | None = None
            ) -> dict[str, Float[Tensor, "*batch"]]:  # fmt: skip
    r"""P@k, nDCG@k and PSP@k of every query: ``{"P@1": …}``.

    P@k is the share of the k best that is right; nDCG@k weighs place j by $1/\log_2(j+1)$, relative to the best order;
    PSP@k weighs every right one by the inverse of its propensity, relative to the best choice of k.

    Raises:
        ValueError: a k below 1 or above the number of labels.
    """
    require_between(1, scores.shape[-1], ks=ks)
    order = scores.topk(max(ks)).indices
    right = positives.gather(-1, order).to(scores)
    discount = 1 / torch.arange(2, max(ks) + 2, dtype=scores.dtype, device=scores.device).log2()
    ideal = (torch.arange(max(ks), device=scores.device) < positives.sum(-1, keepdim=True)) * discount
    found = {}
    if propensity is not None:
        gain, most = right / propensity[order], (positives / propensity).topk(max(ks)).values
    for k in ks:
        found[f"P@{k}"] = right[..., :k].mean(-1)
        found[f"nDCG@{k}"] = (right * discount)[..., :k].sum(-1) / ideal[..., :k].sum(-1)
        if propensity is not None:
            found[f"PSP@{k}"] = gain[..., :k].sum(-1) / most[..., :k].sum(-1)
    return found
