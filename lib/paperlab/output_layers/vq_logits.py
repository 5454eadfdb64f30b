r"""VQ-Logits: tokens in groups, one output vector a group, and what the groups cost.

The last layer of a language model holds a vector for each of V tokens and compares the state with all of them. Keep
only K vectors, let a map say which one a token reads, and the layer shrinks by V/K, but two tokens that share a vector
get the same logit in every context, whatever the model has understood.

Shao, Huang, Jiayi Wu, Cheng, ZhiYu Wu, Shan and Zheng (2025), https://arxiv.org/abs/2505.10202. The leading axis is
the copy: a seed, a map, a learning rate. Biases sit in the rows: the last coordinate of every state is 1 (`whitened`).
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from paperlab.checks import (
    require_at_least,
    require_between,
    require_finite,
    require_nonempty,
    require_nonnegative,
    require_one_of,
    require_positive,
    require_same_length,
)
from paperlab.training import fit


def spread(
    rows: Float[Tensor, "vocab d"],
    codes: int,
    *,
    generator: torch.Generator,
    weights: Float[Tensor, " vocab"] | None = None,
) -> Int[Tensor, " codes"]:
    """Tokens far apart from each other, drawn as k-means++ draws them: by the squared distance from those before.

    From 16 on an eighth more is drawn in each round and not one token alone, which is as good and much quicker. The
    first K of the tokens are a start for K clusters, so that one call serves a whole sweep.

    Raises:
        ValueError: more codes than rows, fewer than one, rows that are not finite, or weights that are not positive.
    """
    require_between(1, len(rows), codes=codes)
    require_finite(rows=rows)
    weights = rows.new_ones(len(rows)) if weights is None else weights
    require_positive(weights=weights)
    picks = torch.multinomial(weights, 1, generator=generator)
    lengths, nearest, new = rows.square().sum(1), torch.full_like(weights, math.inf), picks
    while len(picks) < codes:
        apart = (lengths[:, None] + lengths[new] - 2 * rows @ rows[new].mT).amin(1).clamp_min_(0)
        nearest = torch.minimum(nearest, apart).index_fill_(0, new, 0)
        chances = weights * nearest
        if not chances.any():  # every row that is left is a copy of one that was drawn
            chances = weights.index_fill(0, picks, 0)
        most = min(max(1, len(picks) // 8), codes - len(picks), int(chances.count_nonzero()))
        new = torch.multinomial(chances, most, generator=generator)
        picks = torch.cat([picks, new])
    return picks


def kmeans(
    rows: Float[Tensor, "vocab d"],
    picks: Int[Tensor, " codes"],
    *,
    weights: Float[Tensor, " vocab"] | None = None,
    iterations: int = 10,
    tolerance: float = 0.0,
) -> Int[Tensor, " vocab"]:
    r"""The paper's default map: $\min_{c, C} \sum_v p_v \|w_v - C_{c(v)}\|^2$ by Lloyd's iteration from ``picks``.

    Stops when the sum falls no more, or by less than ``tolerance``, a share of itself, or after ``iterations``.
    A cluster that has lost its last row takes the one that is farthest from its mean. ``weights`` are the $p_v$; the
    default is 1 for every token.

    Raises:
        ValueError: fewer than one iteration, a negative tolerance, picks outside the rows, rows that are not finite, or
            weights that are not positive.
    """
    require_nonempty(picks=picks)
    weights = rows.new_ones(len(rows)) if weights is None else weights
    require_positive(weights=weights)
    require_between(0, len(rows) - 1, picks=picks)
    require_at_least(1, iterations=iterations)
    require_nonnegative(tolerance=tolerance)
    require_finite(rows=rows)
    codes, before, lengths, centres = len(picks), math.inf, rows.square().sum(1), rows[picks]
    for _ in range(iterations):
        distance, found = torch.addmm(centres.square().sum(1), rows, centres.mT, alpha=-2).min(1)
        for k in (found.bincount(minlength=codes) == 0).nonzero().flatten():
            shared = found.bincount(minlength=codes)[found] > 1
            found[torch.where(shared, distance + lengths, -math.inf).argmax()] = k
        code_of, now = found, float(weights @ (distance + lengths))
        if now >= (1 - tolerance) * before:
            break
        before = now
        centres = code_means(rows, code_of[None], codes, weights)[0]
    return code_of


def random_map(vocab: int, codes: int, *, generator: torch.Generator) -> Int[Tensor, " vocab"]:
    """A random map whose clusters differ by one token at most.

    Raises:
        ValueError: more codes than tokens, or fewer than one.
    """
    require_between(1, vocab, codes=codes)
    return (torch.arange(vocab) % codes)[torch.randperm(vocab, generator=generator)]


def frequency_map(counts: Float[Tensor, " vocab"], codes: int, *, equal: str) -> Int[Tensor, " vocab"]:
    """Tokens in the order of their frequency, cut into ``codes`` bins of equally many tokens, or of equal mass.

    With ``equal="mass"`` a token that is frequent enough has a bin of its own, and the rare ones share large bins: a
    bin closes where half of the next token would exceed an equal share of the mass that is left.

    Raises:
        ValueError: another word for ``equal``, more codes than tokens or fewer than one, or counts that are negative.
    """
    require_one_of(("tokens", "mass"), equal=equal)
    require_between(1, len(counts), codes=codes)
    require_nonnegative(counts=counts)
    vocab, order = len(counts), counts.argsort(descending=True, stable=True)
    if equal == "tokens":
        bins = torch.arange(vocab) * codes // vocab
    else:
        bins, now, first, mass, left = torch.empty(vocab, dtype=torch.long), 0, 0, 0.0, float(counts.sum())
        for i, count in enumerate(counts[order].tolist()):
            full = mass + count / 2 > left / (codes - now)
            if i > first and now < codes - 1 and (full or vocab - i < codes - now):
                now, first, mass, left = now + 1, i, 0.0, left - mass
            bins[i], mass = now, mass + count
    return torch.empty_like(order).scatter_(0, order, bins.to(order))


def code_means(
    rows: Float[Tensor, "vocab d"],
    code_of: Int[Tensor, "copies vocab"],
    codes: int,
    weights: Float[Tensor, " vocab"] | None = None,
) -> Float[Tensor, "copies codes d"]:
    """The codebook without any training: the mean of the rows of each cluster; 0 where a cluster is empty.

    Raises:
        ValueError: a code outside 0 to ``codes`` - 1.
    """
    require_between(0, codes - 1, code_of=code_of)
    weights = rows.new_ones(len(rows)) if weights is None else weights
    weighted = torch.cat([rows, torch.ones_like(rows[:, :1])], 1) * weights[:, None]
    sums = _gather(weighted.expand(len(code_of), -1, -1), code_of, codes)
    return sums[..., :-1] / sums[..., -1:].clamp_min(1e-30)


def _loss(
    scores: Float[Tensor, "copies classes batch"],
    wanted: Int[Tensor, "copies batch"] | Float[Tensor, "copies classes batch"],
) -> Float[Tensor, "copies batch"]:
    """Cross-entropy. Classes come before the batch all through the module: a scatter then copies whole rows."""
    return F.cross_entropy(scores, wanted, reduction="none")


def _scatter(
    rows: Float[Tensor, "copies codes n"], code_of: Int[Tensor, "copies vocab"]
) -> Float[Tensor, "copies vocab n"]:
    """From codes to tokens: every token gets the row of its code."""
    return torch.stack([own.index_select(0, c) for own, c in zip(rows, code_of, strict=True)])


def _gather(
    rows: Float[Tensor, "copies vocab n"], code_of: Int[Tensor, "copies vocab"], codes: int
) -> Float[Tensor, "copies codes n"]:
    """From tokens to codes: the sum of the rows that read a code. The transpose of `_scatter`."""
    return torch.stack(
        [own.new_zeros(codes, own.shape[1]).index_add(0, c, own) for own, c in zip(rows, code_of, strict=True)]
    )


class VQLogits(nn.Module):
    r"""K code logits, scattered to V tokens: $\ell = C h$, $z_v = \ell_{c(v)} + b_v + u_v^\top A h$.

    The pure form of the paper has no $b$ and no $u$. Then with cluster sizes $n_k$

    $$P(v) = \frac{e^{\ell_{c(v)}}}{\sum_k n_k e^{\ell_k}}, \qquad
    -\log P(v) = -\log P(c(v)) + \log n_{c(v)},$$

    so that the vocabulary never has to be summed over. Biases $b_v$ put $\log \sum_{u: c(u) = k} e^{b_u}$ in the place
    of $\log n_k$. Two limits: one code for each token is the dense head, one code for all is the low-rank head $UA$.

    Args:
        code_of: the map c.
        codebook: C as training begins.
        token_bias: b as training begins.
        residual: U and A as training begins; the sum over V is back with them.

    Raises:
        ValueError: a code that the codebook does not have, or parts for different numbers of copies.
    """

    def __init__(
        self,
        code_of: Int[Tensor, "copies vocab"],
        codebook: Float[Tensor, "copies codes d"],
        *,
        token_bias: Float[Tensor, "copies vocab"] | None = None,
        residual: tuple[Float[Tensor, "copies vocab rank"], Float[Tensor, "copies rank d"]] | None = None,
    ) -> None:
        super().__init__()
        require_same_length(code_of=code_of, codebook=codebook)
        require_between(0, codebook.shape[1] - 1, code_of=code_of)
        self.register_buffer("code_of", code_of)
        self.register_buffer("sizes", torch.stack([c.bincount(minlength=codebook.shape[1]) for c in code_of]))
        self.codebook = nn.Parameter(codebook.clone())
        self.token_bias = None if token_bias is None else nn.Parameter(token_bias.clone())
        self.U, self.A = (nn.Parameter(part.clone()) for part in residual) if residual else (None, None)

    def _require_pure(self) -> None:
        if self.token_bias is not None or self.U is not None:
            raise ValueError("a head with a token bias or a residual has its own distribution inside a cluster")

    def log_mass(self) -> Float[Tensor, "copies codes"]:
        r"""$\log n_k$, or $\log \sum_{u: c(u) = k} e^{b_u}$; minus infinity where a cluster is empty."""
        if self.token_bias is None:
            return self.sizes.to(self.codebook.dtype).log()
        return torch.zeros_like(self.codebook[..., 0]).scatter_add(1, self.code_of, self.token_bias.exp()).log()

    def code_nll(
        self, states: Float[Tensor, "copies batch d"], tokens: Int[Tensor, "copies batch"]
    ) -> Float[Tensor, "copies batch"]:
        r"""$-\log P(c(v)) = \log \sum_k n_k e^{\ell_k} - \ell_{c(v)} - \log n_{c(v)}$: not yet the loss of a token."""
        return _loss(self.codebook @ states.mT + self.log_mass()[..., None], self.code_of.gather(1, tokens))

    def within_nll(self, tokens: Int[Tensor, "copies batch"]) -> Float[Tensor, "copies batch"]:
        r"""$-\log P(v \mid c(v))$: $\log n_{c(v)}$ in the pure form, in which no state can change it."""
        mass = self.log_mass().gather(1, self.code_of.gather(1, tokens))
        return mass if self.token_bias is None else mass - self.token_bias.gather(1, tokens)

    def nll(
        self, states: Float[Tensor, "copies batch d"], tokens: Int[Tensor, "copies batch"]
    ) -> Float[Tensor, "copies batch"]:
        """The loss of each token over the whole vocabulary, in nats; from K numbers unless there is a residual."""
        if self.U is None:
            return self.code_nll(states, tokens) + self.within_nll(tokens)
        return _loss(self(states).mT, tokens)

    def forward(self, states: Float[Tensor, "copies batch d"]) -> Float[Tensor, "copies batch vocab"]:
        """Logits of all tokens: the scatter."""
        logits = _scatter(self.codebook @ states.mT, self.code_of)
        if self.token_bias is not None:
            logits = logits + self.token_bias[..., None]
        if self.U is not None:
            logits = torch.baddbmm(logits, self.U, self.A @ states.mT)
        return logits.mT

    def distil_loss(
        self, states: Float[Tensor, "copies batch d"], teacher: Float[Tensor, "copies batch vocab"]
    ) -> Float[Tensor, "copies batch"]:
        """Cross-entropy of the codes against a teacher's probabilities, of which only the sums over clusters matter.

        Raises:
            ValueError: a head that is not pure.
        """
        self._require_pure()
        scores = torch.baddbmm(self.log_mass()[..., None], self.codebook, states.mT)
        return _loss(scores, _gather(teacher.mT, self.code_of, self.codebook.shape[1]))

    @torch.no_grad()
    def with_unigram(self, counts: Float[Tensor, " vocab"], smoothing: float) -> "VQLogits":
        r"""The same P(code), with $P(v \mid k)$ in proportion to ``counts`` plus ``smoothing``: class-based softmax.

        At given P(code) this is also the token bias that maximises the likelihood: the two factors share nothing.

        Raises:
            ValueError: counts that are negative, smoothing that is not positive, or a head that is not pure.
        """
        require_nonnegative(counts=counts)
        require_positive(smoothing=smoothing)
        self._require_pure()
        bias = (counts + smoothing).log().expand(self.code_of.shape)
        made = VQLogits(self.code_of, self.codebook, token_bias=bias)
        made.codebook[..., -1] += torch.where(self.sizes > 0, self.log_mass() - made.log_mass(), 0)
        return made

    @torch.no_grad()
    def ties(
        self, states: Float[Tensor, "copies batch d"], tokens: Int[Tensor, "copies batch"]
    ) -> tuple[Float[Tensor, " copies"], Float[Tensor, " copies"]]:
        """How often the largest logit belongs to several tokens; accuracy if one of them is drawn.

        Raises:
            ValueError: a head that is not pure.
        """
        self._require_pure()
        best = (states @ self.codebook.mT).masked_fill(self.sizes[:, None] == 0, -math.inf).argmax(2)
        many = self.sizes.gather(1, best).to(states.dtype)
        hit = (best == self.code_of.gather(1, tokens)).to(states.dtype)
        return (many > 1).to(states.dtype).mean(1), (hit / many).mean(1)


class StraightThrough(nn.Module):
    r"""The map learned too: every token keeps a latent row in training and is read as the code nearest to it.

    $$z_v = h^\top \big(w_v + \mathrm{sg}[C_{c(v)} - w_v]\big), \qquad
    \mathcal L = -\log P + \beta\, \tfrac1V \textstyle\sum_v \|w_v - \mathrm{sg}[C_{c(v)}]\|^2,$$

    with sg the stopped gradient (van den Oord et al., 2017). The codebook is a moving average of the rows that read
    it; a code that nobody reads stays where it is. `map` is what remains after training.

    Raises:
        ValueError: a ``decay`` outside 0 to 1 or a negative ``commitment``.
    """

    def __init__(
        self,
        rows: Float[Tensor, "vocab d"],
        codebook: Float[Tensor, "copies codes d"],
        *,
        commitment: float = 0.25,
        decay: float = 0.9,
    ) -> None:
        super().__init__()
        require_nonnegative(commitment=commitment)
        require_between(0, 1, decay=decay)
        self.commitment, self.decay = commitment, decay
        self.rows = nn.Parameter(rows.expand(len(codebook), -1, -1).clone())
        self.register_buffer("codebook", codebook.clone())
        self.register_buffer("counts", F.one_hot(self.map(), codebook.shape[1]).to(rows.dtype).sum(1))
        self.register_buffer("sums", codebook * self.counts[..., None])

    @torch.no_grad()
    def map(self) -> Int[Tensor, "copies vocab"]:
        """The nearest code of every row."""
        return torch.baddbmm(self.codebook.square().sum(2)[:, None], self.rows, self.codebook.mT, alpha=-2).min(2)[1]

    def nll(
        self, states: Float[Tensor, "copies batch d"], tokens: Int[Tensor, "copies batch"]
    ) -> Float[Tensor, "copies batch"]:
        """The loss of each token; in training with the commitment, and the codebook moves once.

        Only K logits are computed. What the softmax's denominator does to the rows of a code it does to all alike, so
        that their mean may stand in for each of them; the numerator sees the wanted token's own row.
        """
        code_of, codes = self.map(), self.codebook.shape[1]
        counts, sums = _gather(torch.ones_like(self.rows[..., :1]), code_of, codes), _gather(self.rows, code_of, codes)
        read, means = _scatter(self.codebook, code_of), sums / counts.clamp_min(1)
        scores = torch.baddbmm(counts.log(), self.codebook + (means - means.detach()), states.mT)
        every = tokens[..., None].expand_as(states)
        own = self.rows.gather(1, every)
        loss = scores.logsumexp(1) - (states * (own + (read.gather(1, every) - own).detach())).sum(2)
        if not self.training:
            return loss
        with torch.no_grad():
            self.counts.lerp_(counts[..., 0], 1 - self.decay)
            self.sums.lerp_(sums, 1 - self.decay)
            self.codebook = torch.where(
                self.counts[..., None] > 1e-3, self.sums / self.counts[..., None].clamp_min(1e-3), self.codebook
            )
        return loss + self.commitment * (self.rows - read).square().sum(2).mean(1)[:, None]


class AdaptiveSoftmax(nn.Module):
    """The rival with two tiers (Grave et al., 2016): the ``n`` first tokens and a door to the tail, which has rank q.

    Args:
        rank_of: the place of every token when the most frequent is 0.
        head: rows of the first tokens, and last that of the door.
        down: into q dimensions.
        up: rows of the tail, by rank.

    Raises:
        ValueError: a rank outside the vocabulary, or a head and a tail that do not make up the vocabulary.
    """

    def __init__(
        self,
        rank_of: Int[Tensor, " vocab"],
        head: Float[Tensor, "copies first d"],
        down: Float[Tensor, "copies q d"],
        up: Float[Tensor, "copies tail q"],
    ) -> None:
        super().__init__()
        require_between(0, len(rank_of) - 1, rank_of=rank_of)
        if head.shape[1] - 1 + up.shape[1] != len(rank_of):
            raise ValueError(
                f"head and up must have a row for each of {len(rank_of)} tokens, and head one for the door"
            )
        self.register_buffer("rank_of", rank_of)
        self.head, self.down, self.up = (nn.Parameter(part.clone()) for part in (head, down, up))

    def nll(
        self, states: Float[Tensor, "copies batch d"], tokens: Int[Tensor, "copies batch"]
    ) -> Float[Tensor, "copies batch"]:
        """Loss of the door for a tail token, plus its loss behind the door."""
        n, rank = self.head.shape[1] - 1, self.rank_of[tokens]
        first = _loss(self.head @ states.mT, rank.clamp_max(n))
        # Only tokens of the tail have to be sought there, and that is what makes it quick.
        late, at = (rank >= n).byte().topk(int((rank >= n).sum(1).max()))
        inner = (states @ self.down.mT).gather(1, at[..., None].expand(-1, -1, self.down.shape[1]))
        second = _loss(self.up @ inner.mT, (rank.gather(1, at) - n).clamp_min(0))
        return first.scatter_add(1, at, late * second)

    @classmethod
    def from_dense(
        cls,
        rows: Float[Tensor, "vocab d"],
        rank_of: Int[Tensor, " vocab"],
        states: Float[Tensor, "m d"],
        *,
        n: int,
        q: int,
        copies: int,
    ) -> "AdaptiveSoftmax":
        """A warm start: the dense rows of the first tokens, the best tail of rank q, and a door that opens by the
        log-sum-exp of the dense head's tail, fitted to ``states`` by least squares.

        Raises:
            ValueError: ``n`` or ``q`` below 1 or more than there is.
        """
        require_between(1, len(rows) - 1, n=n)
        require_between(1, min(rows.shape[1], len(rows) - n), q=q)
        ranked = torch.empty_like(rows).index_copy_(0, rank_of, rows)
        up, down, _ = low_rank(F.pad(ranked[n:], (0, 1)), q)
        door = torch.linalg.lstsq(states, (states @ ranked[n:].mT).logsumexp(1, keepdim=True)).solution.mT
        return cls(
            rank_of, *(part.expand(copies, *part.shape) for part in (torch.cat([ranked[:n], door]), down[:, :-1], up))
        )


def whitened(
    states: Float[Tensor, "n d"], rows: Float[Tensor, "vocab d"], ridge: float = 1e-3
) -> tuple[Callable[[Tensor], Tensor], Float[Tensor, "vocab d+1"]]:
    r"""New coordinates in which ``states`` are nearly uncorrelated: all logits stay, training needs few steps.

    With mean m and covariance $LL^\top$: $h \mapsto (L^{-1}(h - m), 1)$ and $w \mapsto (L^\top w, w^\top m)$. The
    squared distance of two rows is then the mean square of the difference of their logits. ``ridge``, a share of the
    mean variance, is added to the covariance, because states may have directions in which they do not vary.

    Raises:
        ValueError: fewer than 2 states, a ridge that is not positive, or values that are not finite.
    """
    require_at_least(2, **{"number of states": len(states)})
    require_positive(ridge=ridge)
    require_finite(states=states, rows=rows)
    mean, covariance = states.mean(0), states.T.cov()
    level = ridge * covariance.diagonal().mean()
    factor = torch.linalg.cholesky(covariance + level * torch.eye(len(mean), dtype=mean.dtype, device=mean.device))

    def turn(h: Tensor) -> Tensor:
        inner = torch.linalg.solve_triangular(factor, (h - mean).flatten(0, -2).mT, upper=False).mT
        return F.pad(inner.view_as(h), (0, 1), value=1.0)

    return turn, torch.cat([rows @ factor, (rows @ mean)[:, None]], 1)


def low_rank(
    rows: Float[Tensor, "vocab d"], rank: int
) -> tuple[Float[Tensor, "vocab rank"], Float[Tensor, "rank d"], Float[Tensor, " vocab"]]:
    """U, A and a bias with the best logits of that rank in the mean square, for `whitened` rows.

    Raises:
        ValueError: a rank below 1 or of more than there is.
    """
    require_between(1, rows.shape[1] - 1, rank=rank)
    main = torch.linalg.eigh(rows[:, :-1].mT @ rows[:, :-1])[1][:, -rank:]
    return rows[:, :-1] @ main, F.pad(main.mT, (0, 1)), rows[:, -1]


def train(
    head: nn.Module,
    states: Float[Tensor, "n d"],
    tokens: Int[Tensor, " n"],
    batches: Int[Tensor, "steps copies batch"],
    lr: float | list[float],
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None,
) -> nn.Module:
    """Adam on the mean loss of ``batches``, copy by copy, the rate falling along half a cosine; returns ``head``.

    ``loss(head, states, tokens)``, by default the head's ``nll``, gives one number a copy and row. Several rates are
    for copies that lie side by side, as in `paperlab.training.fit`.

    Raises:
        ValueError: no batches, or as `paperlab.training.fit`.
    """
    require_nonempty(batches=batches)
    loss = loss or (lambda head, h, v: head.nll(h, v))

    def objective(step: int) -> Tensor:
        rows = batches[step]
        return loss(head, states[rows], tokens[rows]).mean(1).sum()

    fit(head.parameters(), objective, steps=len(batches), lr=lr, optimizer="adam", schedule="cosine")
    return head


def least_floor(chances: Float[np.ndarray, " vocab"], most: int) -> Float[np.ndarray, " most"]:
    r"""$\min_c \sum_v p_v \log n_{c(v)}$ over all maps to K codes, for K = 1 to ``most``: no pure head can do better.

    Given the sizes, the likeliest tokens belong into the smallest clusters (rearrangement inequality), so that only
    cuts of the sorted tokens have to be searched, by dynamic programming.

    Raises:
        ValueError: probabilities that are negative or do not sum to 1, or ``most`` outside 1 to the number of tokens.
    """
    require_nonnegative(chances=chances)
    require_between(1, len(chances), most=most)
    if abs(chances.sum() - 1) > 1e-6:
        raise ValueError(f"chances must sum to 1, got {chances.sum()}")
    at = np.append(np.arange(np.count_nonzero(chances) + 1), len(chances))  # no cut between tokens that never come
    mass = np.concatenate([[0], np.sort(chances)[::-1].cumsum()]).astype(np.float32)[at]
    length = np.maximum(at[None] - at[:, None], 1)  # of the last cluster, from the row's place to the column's
    cost = np.where(at[None] > at[:, None], (mass[None] - mass[:, None]) * np.log(length), np.inf).astype(np.float32)
    best, found = cost[0], [cost[0, -1]]
    for _ in range(most - 1):
        best = (best[:, None] + cost).min(0)
        found.append(best[-1])
    return np.minimum.accumulate(found)  # a code may stay empty
