r"""Small sequence models whose token mixer is an argument, many copies side by side.

Attention, its relatives and state spaces differ in one place: how a token learns about the others. Here everything
else is fixed, so that two operators can be compared with the same blocks, the same numbers of parameters and the same
first weights. A mixer is a module from (copies, batch, tokens, width) to the same shape:

$$x \leftarrow x + \mathrm{mixer}(\mathrm{norm}(x)), \qquad x \leftarrow x + \mathrm{mlp}(\mathrm{norm}(x)).$$

Copies are seeds, settings or both; each has weights of its own (`StackedLinear`), and none sees another. Norms have no
gains: what they would add, the next layer's weights can do.
"""

import math
from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from paperlab.checks import require_at_least, require_between, require_nonempty, require_one_of
from paperlab.nn.stacked import StackedLinear, stacked_mlp
from paperlab.nn.transformer import Rotary, causal_mask

Scores = Float[Tensor, "*batch query key"]
Allowed = Bool[Tensor, "query key"]
Normaliser = Callable[[Scores, Allowed | None], Scores]
Heads = Float[Tensor, "*batch heads tokens head_dim"]
States = Float[Tensor, "copies batch tokens width"]


def softmax_rows(scores: Scores, allowed: Allowed | None = None) -> Scores:
    """Weights of attention as usual: each row's softmax over the keys that the query may see."""
    return (scores if allowed is None else scores.masked_fill(~allowed, -math.inf)).softmax(-1)


def l1_rows(weights: Scores, allowed: Allowed | None = None) -> Scores:
    """Nonnegative ``weights``, 0 where a query may not see a key, divided by their sum over each row.

    A row without any weight becomes 0, and so does one whose sum is so small that the division's gradient would
    overflow (below about 1e-29 in single precision).
    """
    if allowed is not None:
        weights = weights * allowed
    total = weights.sum(-1, keepdim=True)
    return weights / total.masked_fill(total < torch.finfo(total.dtype).tiny ** 0.75, math.inf)


def attention(
    q: Heads, k: Heads, v: Heads, normaliser: Normaliser = softmax_rows, *, causal: bool, scale: float | None = None
) -> Heads:
    r"""$N(s\, q k^\top)\, v$: scores, normaliser and mask in the open; ``scale`` is $1/\sqrt{d}$ unless given.

    The normaliser gets the scaled scores and which keys each query may see (None: all), and has to give hidden keys
    weight 0. With `softmax_rows` this is `torch.nn.functional.scaled_dot_product_attention`, slower and readable.
    """
    scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.mT  # fewer numbers to scale than scores
    return normaliser(scores, causal_mask(q.shape[-2], k.shape[-2], q.device) if causal else None) @ v


def fused_attention(q: Heads, k: Heads, v: Heads, *, causal: bool) -> Heads:
    """`attention` with the softmax by torch's own kernel, which never holds the scores."""
    flat = (x.reshape(-1, *x.shape[-3:]) for x in (q, k, v))  # the kernel knows one axis before the heads
    return F.scaled_dot_product_attention(*flat, is_causal=causal).view(*q.shape[:-1], v.shape[-1])


class MultiHead(nn.Module):
    """A mixer of heads: queries, keys and values by three projections, ``attend`` on them, one projection back.

    ``attend(q, k, v)`` maps three tensors (copies, batch, heads, tokens, head_dim) to one; where it is a module, what
    it learns is learned with the rest. The first ``rotary`` of a head's dimensions, an even number, are rotated by
    position in queries and keys; with 0 the layer does not know positions.

    Raises:
        ValueError: heads that do not divide the width; ``rotary`` odd, negative or more than a head's dimensions.
    """

    def __init__(
        self,
        copies: int,
        width: int,
        heads: int,
        attend: Callable[[Heads, Heads, Heads], Heads],
        *,
        rotary: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        require_at_least(1, heads=heads)
        if width % heads:
            raise ValueError(f"heads must divide width, got {heads} and {width}")
        require_between(0, width // heads, rotary=rotary)
        if rotary % 2:
            raise ValueError(f"rotary must be an even number of dimensions, got {rotary}")
        self.heads, self.attend = heads, attend
        self.W_q, self.W_k, self.W_v, self.W_o = (
            StackedLinear(copies, width, width, generator=generator) for _ in range(4)
        )
        self.rotary = Rotary(rotary, 64)

    def forward(self, x: States) -> States:
        """What the heads add to the residual stream."""
        q, k, v = (rearrange(W(x), "c b t (h d) -> c b h t d", h=self.heads) for W in (self.W_q, self.W_k, self.W_v))
        turns = self.rotary.turns(x.shape[-2], 0, None)
        heads = self.attend(self.rotary(q, turns), self.rotary(k, turns), v)
        return self.W_o(rearrange(heads, "c b h t d -> c b t (h d)"))


class Blocks(nn.Module):
    """A block for each of ``mixers``: the mixer, then a perceptron with ``hidden`` units, each added to the stream."""

    def __init__(
        self,
        copies: int,
        width: int,
        hidden: int,
        mixers: Sequence[nn.Module],
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        require_nonempty(mixers=mixers)
        self.mixers = nn.ModuleList(mixers)
        self.mlps = nn.ModuleList(
            stacked_mlp(copies, width, hidden, width, activation=nn.GELU, generator=generator) for _ in mixers
        )

    def forward(self, x: States) -> States:
        """The residual stream behind the last block, normed."""
        for mixer, mlp in zip(self.mixers, self.mlps, strict=True):
            x = x + mixer(norm(x))
            x = x + mlp(norm(x))
        return norm(x)


def norm(x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
    """Layer norm without gain and shift."""
    return F.layer_norm(x, x.shape[-1:])


class LanguageModel(nn.Module):
    """A vector for each token, `Blocks`, one linear map to the logits of the next token."""

    def __init__(
        self, copies: int, vocab: int, width: int, blocks: nn.Module, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        require_at_least(1, copies=copies, vocab=vocab, width=width)
        self.embedding = nn.Parameter(torch.empty(copies, vocab, width).normal_(generator=generator))
        self.blocks = blocks
        self.W_u = StackedLinear(copies, width, vocab, generator=generator)

    def forward(self, tokens: Int[Tensor, "#copies batch tokens"]) -> Float[Tensor, "copies batch tokens vocab"]:
        """Logits; copy c reads ``tokens[c]``, or all read the same."""
        return self.W_u(self.blocks(embed(tokens, self.embedding)))

    def losses(
        self, tokens: Int[Tensor, "#copies batch tokens"], reduction: str = "mean"
    ) -> Float[Tensor, " copies"] | Float[Tensor, "copies batch predicted"]:
        """Cross-entropy of every token but the first, in nats: its mean for each copy, or with "none" one by one.

        Raises:
            ValueError: another ``reduction``, or sequences of one token.
        """
        require_one_of(("mean", "none"), reduction=reduction)
        require_at_least(2, **{"length of tokens": tokens.shape[-1]})
        logits = self(tokens[..., :-1])
        target = tokens[..., 1:].expand(logits.shape[:-1])
        losses = F.cross_entropy(logits.flatten(0, -2), target.flatten(), reduction="none").view(target.shape)
        return losses.mean((1, 2)) if reduction == "mean" else losses


def decoder(
    copies: int,
    vocab: int,
    attends: Sequence[Callable[[Heads, Heads, Heads], Heads]],
    *,
    width: int = 48,
    heads: int = 3,
    hidden: int = 96,
    rotary: int = 8,
    generator: torch.Generator | None = None,
) -> LanguageModel:
    """A `LanguageModel` with one block of `MultiHead` for each of ``attends``.

    The sizes fit a comparison of attentions on 64 characters of text: 150 steps of 4 copies take some seconds. The same
    ``generator`` gives the same first weights, whatever the attention.
    """
    mixers = [MultiHead(copies, width, heads, attend, rotary=rotary, generator=generator) for attend in attends]
    blocks = Blocks(copies, width, hidden, mixers, generator=generator)
    return LanguageModel(copies, vocab, width, blocks, generator=generator)


def embed(
    tokens: Int[Tensor, "#copies batch tokens"], table: Float[Tensor, "copies vocab width"]
) -> Float[Tensor, "copies batch tokens width"]:
    """Row ``tokens[c]`` of ``table[c]``, by one lookup."""
    copies, vocab, _ = table.shape
    first = vocab * torch.arange(copies, device=tokens.device)
    return F.embedding(tokens + first[:, None, None], table.flatten(0, 1))


class PatchClassifier(nn.Module):
    """A vector for each patch of a picture and for its place, `Blocks`, the mean over patches, one linear map.

    The places begin about as large as the patches' vectors: with much smaller ones a small model takes hundreds of
    steps to notice that a picture has an order.
    """

    def __init__(
        self,
        copies: int,
        patches: int,
        features: int,
        classes: int,
        width: int,
        blocks: nn.Module,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        require_at_least(1, patches=patches, classes=classes)
        self.embed = StackedLinear(copies, features, width, generator=generator)
        self.places = nn.Parameter(torch.empty(copies, 1, patches, width).normal_(std=0.5, generator=generator))
        self.blocks = blocks
        self.head = StackedLinear(copies, width, classes, generator=generator)

    def forward(
        self, patches: Float[Tensor, "#copies batch patches features"]
    ) -> Float[Tensor, "copies batch classes"]:
        """Class scores; copy c reads ``patches[c]``, or all read the same."""
        patches = patches.expand(len(self.places), -1, -1, -1)
        return self.head(self.blocks(self.embed(patches) + self.places).mean(-2))
