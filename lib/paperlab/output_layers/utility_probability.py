r"""Utility-probability duality: a network's outputs read as an ordering of choices, and as chances; decoding by either.

A softmax network scores every possible output. If its scores are only an order of preference, rules that use the order
(the best, a beam) should work and rules that need true chances (sampling, minimum Bayes risk) should fail, until the
utilities are converted into better chances. Here are both kinds of rule, and two conversions.

Huang and Yuan, "Utility-Probability Duality of Neural Networks" (2023), https://arxiv.org/abs/2305.14859. The paper's
own conversion equation is not ours to quote: `fit_beta` and `fit_ranks`/`fit_curve` are reconstructions.
"""

from collections.abc import Callable, Sequence
from copy import copy

import torch
from jaxtyping import Bool, Float, Int, Shaped
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


def place(owner: Int[Tensor, " rows"]) -> Int[Tensor, " rows"]:
    """How many rows of the same owner stand before each; all rows of an owner stand together, in ascending order."""
    return torch.arange(len(owner), device=owner.device) - torch.searchsorted(owner, owner)


def spread(
    rows: Shaped[Tensor, "rows *rest"], owner: Int[Tensor, " rows"], owners: int, empty: float = 0
) -> Shaped[Tensor, "owners most *rest"]:
    """The rows of every owner side by side; ``empty`` where one has fewer than another."""
    column = place(owner)
    wide = rows.new_full((owners, int(column.max()) + 1, *rows.shape[1:]), empty)
    wide[owner, column] = rows
    return wide


class TokenTree:
    """Continuations of a batch of prompts as one tree of tokens a prompt: what is asked twice is computed once.

    The nodes of the newest level stand in one row, prompt by prompt: ``owner`` is the prompt of each, ``logits``
    (nodes, vocab) its utilities of the next token. At first these are the last tokens of the prompts, whose final
    ``states`` are (prompts, tokens, width).
    """

    def __init__(
        self, model: Transformer, prompts: Int[Tensor, "prompts tokens"], padding: Bool[Tensor, "prompts tokens"] | None
    ) -> None:
        self.model, self.cache = model, KVCache()
        self.states = model.states(prompts, cache=self.cache, padding=padding)
        self.logits = model.unembed(self.states[:, -1])
        self.owner = torch.arange(len(prompts), device=prompts.device)
        self.ancestors = self.owner.new_zeros(len(prompts), 0)
        self.keys, self.values = ([self.states.new_zeros(0, model.config.width)] * model.config.layers for _ in "kv")

    def fork(self) -> "TokenTree":
        """A tree that grows by itself from here; all that has been computed is shared, not copied."""
        twin = copy(self)
        twin.keys, twin.values = list(self.keys), list(self.values)
        return twin

    def grow(self, parents: Int[Tensor, " nodes"], tokens: Int[Tensor, " nodes"]) -> None:
        """One level more: token ``tokens[i]`` below node ``parents[i]``, prompt by prompt."""
        turns = self.model.rotary.turns(1, len(self.cache) + self.ancestors.shape[1], None)
        new = len(self.keys[0]) + torch.arange(len(tokens), device=tokens.device)
        self.owner, self.ancestors = self.owner[parents], torch.cat([self.ancestors[parents], new[:, None]], 1)
        x = self.model.embedding(tokens)[:, None]  # a batch of single tokens
        for layer, block in enumerate(self.model.blocks):
            normed, attn = block.norm_attn(x), block.attn
            q, k, v = (W(normed).view(len(x), attn.head_count, 1, -1) for W in (attn.W_q, attn.W_k, attn.W_v))
            q, k = self.model.rotary(q, turns), self.model.rotary(k, turns)
            x = x + attn.W_o(self._attended(layer, q[:, :, 0], k[:, :, 0], v[:, :, 0]).flatten(1)[:, None])
            x = x + block.mlp(block.norm_mlp(x), None)
        self.logits = self.model.unembed(self.model.norm_final(x[:, 0]))

    def _attended(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Float[Tensor, "nodes heads head_dim"]:
        """Every node looks at its prompt, whose keys and values exist once, and at its own ancestors and itself."""

        def of_ancestors(store: list[Tensor], new: Tensor) -> Float[Tensor, "nodes levels heads head_dim"]:
            store[layer] = torch.cat([store[layer], new.flatten(1)])
            return store[layer].index_select(0, self.ancestors.flatten()).view(*self.ancestors.shape, *new.shape[1:])

        def with_prompt(rows: Tensor, prompt: Float[Tensor, "prompts heads a b"]) -> Float[Tensor, "nodes heads b"]:
            return (spread(rows, owner, len(here)).transpose(1, 2) @ prompt[here])[owner, :, place(owner)]

        here, owner = self.owner.unique_consecutive(return_inverse=True)  # some prompts may have ended
        far = with_prompt(q, self.cache.keys[layer].mT)
        if self.cache.padding is not None:
            far = far.masked_fill(self.cache.padding[self.owner, None], -torch.inf)
        near = torch.linalg.vecdot(of_ancestors(self.keys, k), q[:, None]).mT
        pattern = (torch.cat([far, near], -1) / q.shape[-1] ** 0.5).softmax(-1)
        far, near = pattern.tensor_split([far.shape[-1]], -1)
        close = (near.mT[..., None] * of_ancestors(self.values, v)).sum(1)
        return close + with_prompt(far, self.cache.values[layer])


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
    node = tree.owner[:, None].expand(len(conversions), count, n).clone()  # where each sample stands in the tree
    out, live = node.new_full((*node.shape, steps), -1), torch.ones_like(node, dtype=torch.bool)
    for t in range(steps):
        token = torch.zeros_like(node)
        for c, convert in enumerate(conversions):
            rows, back = node[c][live[c]].unique(return_inverse=True)
            cdf = convert(tree.logits[rows], tree.owner[rows]).cumsum(-1)
            height = uniforms[..., t][live[c]].to(cdf) * cdf[back, -1]
            token[c][live[c]] = torch.searchsorted(cdf[back], height[:, None], right=True)[:, 0].clamp(max=vocab - 1)
        out[..., t] = token.where(live, -1)
        live = live & ~ends[token] & (t + 1 < lengths[:, None])
        if t + 1 == steps or not live.any():
            break
        kept, node[live] = (node * vocab + token)[live].unique(return_inverse=True)  # sorted: prompt by prompt
        tree.grow(kept // vocab, kept % vocab)
    return out


def beams(
    tree: TokenTree, widths: Sequence[int], ends: Bool[Tensor, " vocab"], lengths: Int[Tensor, " prompts"]
) -> tuple[Int[Tensor, "widths prompts steps"], Float[Tensor, "widths prompts"]]:
    r"""The output with the greatest $\log p$ that a beam of each width finds, and that score; greedy for width 1.

    Scores only fall: an open output that lies below a finished one can no longer win, and is dropped. All widths search
    in one tree. -1 stands after an end or the length.

    Raises:
        ValueError: a width or a length is below 1.
    """
    require_at_least(1, widths=torch.tensor(widths), lengths=lengths)
    tree, count, steps, vocab = tree.fork(), len(lengths), int(lengths.max()), len(ends)
    width = torch.tensor(widths, device=ends.device).repeat_interleave(count)[:, None]  # one row a search
    limit, most = lengths.repeat(len(widths))[:, None], max(widths) * (1 + int(ends.sum()))
    search, rank = torch.arange(len(width), device=ends.device), torch.arange(most, device=ends.device)
    best, score = tree.logits.new_full(search.shape, -torch.inf), tree.logits.new_zeros(search.shape)
    output = search.new_full((len(search), steps), -1)
    node, story = search % count, output.clone()  # of each open output, like its ``search`` and ``score``
    for t in range(steps):
        log_p, choice = tree.logits.log_softmax(-1).topk(min(most, vocab))
        wide = spread(score[:, None] + log_p[node], search, len(width), -torch.inf).flatten(1)
        value, index = wide.topk(min(most, wide.shape[1]))
        token = spread(choice[node], search, len(width)).flatten(1).gather(1, index)
        parent = spread(torch.arange(len(node), device=ends.device), search, len(width))
        parent = parent.gather(1, index // choice.shape[1])
        closed = ends[token] | (t + 1 >= limit)
        top, at = value.masked_fill(~closed | (rank[: value.shape[1]] >= width), -torch.inf).max(1)
        won = (top > best).nonzero()[:, 0]
        best[won], output[won] = top[won], story[parent[won, at[won]]]
        output[won, t] = token[won, at[won]]
        score, order = value.masked_fill(closed, -torch.inf).topk(min(max(widths), value.shape[1]))
        alive = (score > best[:, None]) & (rank[: score.shape[1]] < width)
        if not alive.any():
            break
        parent, token, score = parent.gather(1, order)[alive], token.gather(1, order)[alive], score[alive]
        search, story = search[parent], story[parent]
        story[:, t] = token
        kept, node = (node[parent] * vocab + token).unique(return_inverse=True)  # sorted: prompt by prompt
        tree.grow(kept // vocab, kept % vocab)
    return output.view(len(widths), count, -1), best.view(len(widths), -1)


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
