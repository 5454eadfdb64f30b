r"""Utility-probability duality: a network's outputs read as an ordering of choices, and as chances; decoding by either.

A softmax network scores every possible output. If its scores are only an order of preference, rules that use the order
(the best, a beam) should work and rules that need true chances (sampling, minimum Bayes risk) should fail, until the
utilities are converted into better chances. Here are both kinds of rule, and two conversions.

Huang and Yuan, "Utility-Probability Duality of Neural Networks" (2023), https://arxiv.org/abs/2305.14859. The paper's
own conversion equation is not ours to quote: `fit_beta` and `fit_ranks`/`fit_curve` are reconstructions.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import isotonic_regression
from torch import Tensor

from paperlab.checks import require_at_least, require_between, require_finite, require_positive, require_same_length
from paperlab.nn.transformer import KVCache, Transformer

Conversion = Callable[[Float[Tensor, "rows choices"], Int[Tensor, " rows"]], Float[Tensor, "rows choices"]]


def boltzmann(utilities: Float[Tensor, "*batch choices"], beta: float = 1.0) -> Float[Tensor, "*batch choices"]:
    r"""The Boltzmann choice, $\tilde p(y) \propto e^{\beta u(y)}$: temperature scaling with $T = 1/\beta$.

    As $\beta \to \infty$ it is the best choice, as $\beta \to 0$ any; the order never changes.

    Raises:
        ValueError: ``beta`` is not positive, or ``utilities`` are not finite.
    """
    require_positive(beta=beta)
    require_finite(utilities=utilities)
    return (beta * utilities).softmax(-1)


def preference_gap(
    utilities: Float[Tensor, "*batch choices"],
    revealed: Int[Tensor, "*batch"],
    chosen: Int[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    r"""$u(y^*) - E_y\, u(y)$: the utility of the revealed choice above that of the network's own, whose gradient is

    $\nabla \log p(y^*) = \nabla u(y^*) - E_{y \sim \mathrm{softmax}(u)} \nabla u(y)$, the step of maximum likelihood.

    The chances of the own choice are held fixed; ``chosen``, drawn from them, stands in for the expectation.

    Raises:
        ValueError: ``utilities`` are not finite.
    """
    require_finite(utilities=utilities)
    own = (boltzmann(utilities).detach() * utilities).sum(-1) if chosen is None else _of(utilities, chosen)
    return _of(utilities, revealed) - own


def _of(values: Tensor, choice: Tensor) -> Tensor:
    return values.gather(-1, choice[..., None])[..., 0]


def fit_beta(
    utilities: Float[Tensor, "cases choices"], revealed: Int[Tensor, " cases"], low: float = 0.05, high: float = 20.0
) -> float:
    r"""The $\beta$ with the greatest likelihood: revealed utility meets expected, $\sum u(y^*) = \sum E_\beta u$.

    Newton's method in one variable (the log-likelihood is concave), within ``low`` to ``high``: revealed choices that
    are all the best ones would ask for infinity.

    Raises:
        ValueError: lengths differ, ``utilities`` are not finite, or ``low`` is not positive.
    """
    require_same_length(utilities=utilities, revealed=revealed)
    require_finite(utilities=utilities)
    require_positive(low=low)
    u = utilities - utilities.amax(-1, keepdim=True)
    wanted, beta = _of(u, revealed).double().mean().item(), 1.0
    for _ in range(50):
        p = (beta * u).softmax(-1)
        weighted = p.mul_(u)
        mean = weighted.sum(-1)
        spread = (torch.linalg.vecdot(weighted, u) - mean**2).double().mean().item()
        step = (wanted - mean.double().mean().item()) / max(spread, 1e-12)
        beta, before = min(max(beta + step, beta / 2, low), beta * 2, high), beta
        if abs(beta - before) < 1e-3 * beta:  # Newton's next error is about the square of that
            break
    return beta


def fit_ranks(utilities: Float[Tensor, "cases choices"], revealed: Int[Tensor, " cases"]) -> Float[Tensor, " choices"]:
    """Chances that only the order knows: how often the revealed choice is the best, the second best, …, never rising.

    The monotone maximum of the likelihood is the isotonic regression of the counts; one more choice, spread evenly over
    the ranks, keeps every chance above 0.

    Raises:
        ValueError: lengths differ, or ``utilities`` are not finite.
    """
    require_same_length(utilities=utilities, revealed=revealed)
    require_finite(utilities=utilities)
    choices = utilities.shape[-1]
    counts = ranks(utilities, revealed).bincount(minlength=choices).double() + 1 / choices
    shares = isotonic_regression(counts.cpu().numpy(), increasing=False).x
    return torch.from_numpy(shares / shares.sum()).to(utilities)


def ranks(utilities: Float[Tensor, "*batch choices"], choice: Int[Tensor, "*batch"]) -> Int[Tensor, "*batch"]:
    """How many choices have a greater utility than this one: 0 is the best."""
    return (utilities > utilities.gather(-1, choice[..., None])).sum(-1)


def fit_curve(utilities: Float[Tensor, "cases choices"], revealed: Int[Tensor, " cases"], bins: int = 60) -> Conversion:
    r"""$\tilde p \propto g(u)$ with $g$ never falling: the share of revealed choices at each height of $\log p$.

    Heights are counted in ``bins`` from $\log p = -15$ to 0; $g$ is the isotonic regression of the shares, weighted by
    how many choices stand there. One more choice, drawn from the network, keeps every share above 0.

    Raises:
        ValueError: lengths differ, ``utilities`` are not finite, or fewer than 2 bins.
    """
    require_same_length(utilities=utilities, revealed=revealed)
    require_finite(utilities=utilities)
    require_at_least(2, bins=bins)

    def heights(log_p: Tensor) -> Tensor:
        return ((log_p + 15) * (bins / 15)).long().clamp(0, bins - 1)

    log_p = utilities.log_softmax(-1)
    where, p = heights(log_p).flatten(), log_p.exp().flatten() / len(revealed)
    hits = heights(_of(log_p, revealed)).bincount(minlength=bins).to(p).index_add(0, where, p)
    total = where.bincount(minlength=bins).clamp(min=1)
    shares = isotonic_regression((hits / total).double().cpu().numpy(), weights=total.double().cpu().numpy()).x
    g = torch.from_numpy(shares).to(utilities).clamp(min=1e-12)

    def convert(rows: Tensor, _owners: Tensor | None = None) -> Tensor:
        weight = g.to(rows)[heights(rows.log_softmax(-1))]
        return weight / weight.sum(-1, keepdim=True)

    return convert


def calibration_error(confidence: Float[Tensor, " cases"], right: Bool[Tensor, " cases"], bins: int = 10) -> float:
    """Expected calibration error: the gap between confidence and accuracy, bin by bin, weighted by the cases there.

    Raises:
        ValueError: lengths differ, or a confidence outside 0 to 1.
    """
    require_same_length(confidence=confidence, right=right)
    require_between(0, 1, confidence=confidence)
    where = (confidence * bins).long().clamp(max=bins - 1)
    gap = (confidence - right.to(confidence)).double()
    return (torch.zeros(bins).to(gap).index_add(0, where, gap).abs().sum() / len(gap)).item()


class TokenTree:
    """Continuations of a batch of prompts as one tree of tokens a prompt: what is asked twice is computed once.

    ``logits`` (prompts, nodes, vocab) belong to the newest level; at first it is the prompt's last token alone.
    """

    def __init__(
        self, model: Transformer, prompts: Int[Tensor, "prompts tokens"], padding: Bool[Tensor, "prompts tokens"] | None
    ) -> None:
        self.model, self.cache, self.depth = model, KVCache(), 0
        self.states = model.states(prompts, cache=self.cache, padding=padding)
        self.logits = model.unembed(self.states[:, -1:])
        self.above = torch.zeros(len(prompts), 1, 0, dtype=torch.bool, device=prompts.device)

    def fork(self) -> "TokenTree":
        """A tree that grows by itself from here; the prompts' keys and values are shared, not copied."""
        twin = object.__new__(TokenTree)
        twin.__dict__ = dict(self.__dict__)
        twin.cache = KVCache()
        twin.cache.keys, twin.cache.values = dict(self.cache.keys), dict(self.cache.values)
        twin.cache.padding = self.cache.padding
        return twin

    def keep(self, rows: Int[Tensor, " kept"]) -> None:
        """Forget all prompts but these."""
        for store in (self.cache.keys, self.cache.values):
            for layer in store:
                store[layer] = store[layer][rows]
        if self.cache.padding is not None:
            self.cache.padding = self.cache.padding[rows]
        self.logits, self.above = self.logits[rows], self.above[rows]

    def grow(self, parents: Int[Tensor, "prompts nodes"], tokens: Int[Tensor, "prompts nodes"]) -> None:
        """One level more: token ``tokens[i, j]`` below node ``parents[i, j]``; each sees its own ancestors only."""
        count, width = tokens.shape
        old = self.above.gather(1, parents[..., None].expand(-1, -1, self.above.shape[-1]))
        own = torch.eye(width, dtype=torch.bool, device=tokens.device).expand(count, -1, -1)
        self.above = torch.cat([old, own], -1)
        past = len(self.cache) + width - self.above.shape[-1]
        bias = torch.zeros(count, 1, width, past + self.above.shape[-1], device=tokens.device)
        bias[..., past:].masked_fill_(~self.above[:, None], -torch.inf)
        place = torch.full((1, width), past + self.depth, device=tokens.device)
        self.depth += 1
        states = self.model.states(tokens, cache=self.cache, attention_bias=bias, positions=place)
        self.logits = self.model.unembed(states)


def sample(
    tree: TokenTree,
    conversions: Sequence[Conversion],
    uniforms: Float[Tensor, "prompts samples steps"],
    ends: Bool[Tensor, " vocab"],
    lengths: Int[Tensor, " prompts"],
) -> Int[Tensor, "conversions prompts samples steps"]:
    """Ancestral samples under each conversion, by inverting the same ``uniforms``; -1 after an end or the length.

    A conversion turns rows of utilities, and the prompt that each belongs to, into chances.

    Raises:
        ValueError: no conversion, or ``uniforms`` outside 0 to 1.
    """
    require_at_least(1, conversions=len(conversions))
    require_between(0, 1, uniforms=uniforms)
    tree, (count, n, steps), vocab = tree.fork(), uniforms.shape, len(ends)
    node = torch.zeros(len(conversions), count, n, dtype=torch.long, device=uniforms.device)
    out, live = node.new_full((*node.shape, steps), -1), torch.ones_like(node, dtype=torch.bool)
    first = torch.arange(count, device=uniforms.device)[:, None]
    for t in range(steps):
        width = tree.logits.shape[1]
        flat, place, token = tree.logits.flatten(0, 1), first * width + node, torch.zeros_like(node)
        for c, convert in enumerate(conversions):
            rows, back = place[c][live[c]].unique(return_inverse=True)
            cdf = convert(flat[rows], rows // width).cumsum(-1)
            height = uniforms[..., t][live[c]][:, None].to(cdf) * cdf[back, -1:]
            token[c][live[c]] = (cdf[back] <= height).sum(-1).clamp(max=vocab - 1)
        out[..., t] = token.where(live, -1)
        live = live & ~ends[token] & (t + 1 < lengths[:, None])
        if t + 1 == steps or not live.any():
            break
        kept, back = (place * vocab + token)[live].unique(return_inverse=True)  # sorted: prompt by prompt
        owner = kept // (vocab * width)
        each = owner.bincount(minlength=count)
        column = torch.arange(len(kept), device=kept.device) - (each.cumsum(0) - each)[owner]
        parents = torch.zeros(count, int(each.max()), dtype=torch.long, device=kept.device)
        tokens = torch.zeros_like(parents)
        parents[owner, column], tokens[owner, column] = kept // vocab % width, kept % vocab
        node[live] = column[back]
        tree.grow(parents, tokens)
    return out


def beam(
    tree: TokenTree, width: int, ends: Bool[Tensor, " vocab"], lengths: Int[Tensor, " prompts"]
) -> tuple[Int[Tensor, "prompts steps"], Float[Tensor, " prompts"]]:
    r"""The output with the greatest $\log p$ that a beam of ``width`` finds, and that score; greedy for width 1.

    Scores only fall: an open output that lies below a finished one can no longer win, and is dropped, and so is a
    prompt that has no other. -1 stands after an end or the length.

    Raises:
        ValueError: ``width`` or a length is below 1.
    """
    require_at_least(1, width=width, lengths=lengths)
    tree, count, steps, vocab = tree.fork(), len(lengths), int(lengths.max()), len(ends)
    score, best = (torch.full((count, 1), x, device=ends.device) for x in (0.0, -torch.inf))
    story = torch.full((count, 1, steps), -1, device=ends.device)
    output, row = story[:, 0].clone(), torch.arange(count, device=ends.device)  # row: the prompts that are left
    for t in range(steps):
        total = (score[..., None] + tree.logits.log_softmax(-1)).flatten(1)
        value, index = total.topk(min(width * (1 + int(ends.sum())), total.shape[1]))
        token, parent = index % vocab, index // vocab
        story = story.gather(1, parent[..., None].expand(-1, -1, steps))
        story[..., t] = token
        closed = ends[token] | (t + 1 >= lengths[row])[:, None]
        top, at = value[:, :width].masked_fill(~closed[:, :width], -torch.inf).max(1, keepdim=True)
        finished = story.gather(1, at[..., None].expand(-1, -1, steps))[:, 0]
        output[row] = torch.where(top > best[row], finished, output[row])
        best[row] = torch.maximum(top, best[row])
        score, order = value.masked_fill(closed, -torch.inf).topk(min(width, value.shape[1]))
        alive = (score > best[row]).sum(1)
        left = alive.nonzero()[:, 0]
        if len(left) == 0:
            break
        score, order = (kept[left, : int(alive.max())] for kept in (score, order))
        story = story[left].gather(1, order[..., None].expand(-1, -1, steps))
        tree.keep(left)
        row = row[left]
        tree.grow(parent[left].gather(1, order), token[left].gather(1, order))
    return output, best[:, 0]


def token_f1(a: Int[Tensor, "*#batch m"], b: Int[Tensor, "*#batch n"]) -> Float[Tensor, "*batch"]:
    """Harmonic mean of precision and recall of the tokens as bags; negative ids are padding, empty outputs agree."""
    earlier = (a[..., :, None] == a[..., None, :]).tril(-1).sum(-1)  # how often the token has come before
    there = (a[..., :, None] == b[..., None, :]).sum(-1)
    overlap = ((earlier < there) & (a >= 0)).sum(-1)
    size = (a >= 0).sum(-1) + (b >= 0).sum(-1)
    return torch.where(size > 0, 2 * overlap / size.clamp(min=1), 1.0)


def minimum_bayes_risk(agreement: Float[Tensor, "*batch candidates samples"]) -> Int[Tensor, "*batch"]:
    """Which candidate agrees best, on average, with the samples: the first of the best."""
    return agreement.mean(-1).argmax(-1)
