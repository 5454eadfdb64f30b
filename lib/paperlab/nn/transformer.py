r"""A small transformer that can be looked into: decoder or encoder, dense or with a mixture of experts.

Half of what is known about language models was found by reading, masking or replacing one of their intermediates. Here
every intermediate has a name. Pre-norm blocks without biases, rotary positions, unembedding tied to the embedding:

$$x \leftarrow x + \mathrm{attention}(\mathrm{norm}(x)), \qquad x \leftarrow x + \mathrm{mlp}(\mathrm{norm}(x)).$$

Hook points, in the order in which they fire (``N`` is a block's number, from 0):

==========================  ===============================  =======================================================
name                        shape                            value
==========================  ===============================  =======================================================
``embed``                   batch tokens width               embeddings of the tokens: the input of block 0
``blocks.N.resid_pre``      batch tokens width               residual stream before the block
``blocks.N.attn.q``         batch tokens heads head_dim      queries, before the rotation
``blocks.N.attn.k``         batch tokens heads head_dim      keys, before the rotation; of the new tokens, with a cache
``blocks.N.attn.v``         batch tokens heads head_dim      values; likewise
``blocks.N.attn.scores``    batch heads query key            scaled products plus bias, finite: before the mask
``blocks.N.attn.pattern``   batch heads query key            attention weights; each row sums to 1
``blocks.N.attn.heads``     batch tokens heads head_dim      output of each head, before the output projection
``blocks.N.attn.out``       batch tokens width               what attention adds to the residual stream
``blocks.N.resid_mid``      batch tokens width               ``resid_pre + attn.out``
``blocks.N.mlp.router``     batch tokens experts             the router's logits; expert layers only
``blocks.N.mlp.pre``        batch tokens hidden              before the activation; (batch tokens top_k hidden) in an
                                                             expert layer, slot j belonging to the j-th chosen expert
``blocks.N.mlp.act``        as ``pre``                       after the activation
``blocks.N.mlp.out``        batch tokens width               what the feed-forward layer adds to the residual stream
``blocks.N.resid_post``     batch tokens width               ``resid_mid + mlp.out``
``final``                   batch tokens width               normed residual stream: what `unembed` reads
==========================  ===============================  =======================================================

Where nobody asks for ``scores`` or ``pattern``, attention runs as `torch.nn.functional.scaled_dot_product_attention`,
which cannot be differentiated twice on every device; `torch.nn.attention.sdpa_kernel` chooses one that can.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int, Real
from torch import Tensor, nn
from torch.nn import functional as F

from paperlab.checks import require_at_least, require_between, require_ndim, require_nonempty, require_one_of
from paperlab.nn.hooks import Edit, HookPoint, Names, edited, recorded

ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu}


@dataclass(frozen=True)
class TransformerConfig:
    """The sizes of a `Transformer`.

    Attributes:
        readout: a square matrix between the final state and the tied embedding. Without it the vector of a token as
            input is its vector as output, and a model must first unlearn to predict the token that it has just read.
        hidden: width of the feed-forward layers, of each expert where there are experts.
        causal: False makes a bidirectional encoder.
        rotary: share of each head's dimensions that is rotated, to the nearest even number of dimensions; 0 leaves
            the model without positions.
        experts: if greater than 0, the feed-forward layers of blocks 1, 3, 5, … choose ``top_k`` of that many experts.

    Raises:
        ValueError: a size below 1, an odd head dimension, heads that do not divide the width, another activation.
    """

    vocab: int
    layers: int
    width: int
    heads: int
    context: int
    hidden: int
    activation: str = "gelu"
    causal: bool = True
    rotary: float = 0.5
    experts: int = 0
    top_k: int = 2
    readout: bool = False

    def __post_init__(self) -> None:
        require_at_least(1, vocab=self.vocab, layers=self.layers, width=self.width, heads=self.heads)
        require_at_least(1, context=self.context, hidden=self.hidden)
        if self.width % (2 * self.heads):
            raise ValueError(f"width must be heads times an even number, got {self.width} for {self.heads} heads")
        require_one_of(ACTIVATIONS, activation=self.activation)
        require_between(0, 1, rotary=self.rotary)
        require_at_least(0, experts=self.experts)
        if self.experts:
            require_between(1, self.experts, top_k=self.top_k)

    @property
    def head_dim(self) -> int:
        """Dimensions of one head."""
        return self.width // self.heads


class KVCache:
    """Keys (rotated) and values of the tokens so far, one pair a layer: what spares a decoder their recomputation.

    ``len(cache)`` is the number of tokens in it. One cache belongs to one sequence of calls of one model.
    """

    def __init__(self) -> None:
        self.keys: dict[int, Float[Tensor, "batch heads tokens head_dim"]] = {}
        self.values: dict[int, Float[Tensor, "batch heads tokens head_dim"]] = {}
        self.padding: Bool[Tensor, "batch tokens"] | None = None

    def __len__(self) -> int:
        return self.keys[0].shape[2] if self.keys else 0

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append the new tokens' keys and values of one layer; returns those of all tokens."""
        if layer in self.keys:
            keys = torch.cat([self.keys[layer], keys], dim=2)
            values = torch.cat([self.values[layer], values], dim=2)
        self.keys[layer], self.values[layer] = keys, values
        return keys, values

    def crop(self, length: int) -> None:
        """Forget all but the first ``length`` tokens.

        Raises:
            ValueError: ``length`` is negative or more than there is.
        """
        require_between(0, len(self), length=length)
        for layer in self.keys:
            self.keys[layer] = self.keys[layer][:, :, :length]
            self.values[layer] = self.values[layer][:, :, :length]
        self.padding = None if self.padding is None else self.padding[:, :length]


class Rotary(nn.Module):
    r"""Rotary positions: the pair $(x_i, x_{i+d/2})$ turns by $p\,10000^{-2i/d}$ at position p (Su et al., 2021).

    The product of a rotated query and a rotated key depends on the difference of their positions only. The first
    ``dims`` dimensions of a head are rotated, the others stay.
    """

    def __init__(self, dims: int, context: int) -> None:
        super().__init__()
        self.dims = dims
        for name in ("cos", "sin"):
            self.register_buffer(name, torch.empty(context, dims // 2), persistent=False)
        self._fill(context)

    def _fill(self, length: int) -> None:
        """Tables for ``length`` positions, exact in the buffers' own precision."""
        with torch.inference_mode(False):  # a table first made for inference must serve training as well
            angles = self._angles(torch.arange(length, dtype=torch.float64))
            self.cos, self.sin = angles.cos().to(self.cos), angles.sin().to(self.sin)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._fill(len(self.cos))  # .double() of a single-precision table would not be a double-precision table
        return self

    def _angles(self, positions: Float[Tensor, "... tokens"]) -> Float[Tensor, "... tokens pairs"]:
        steps = torch.arange(self.dims // 2, device=positions.device, dtype=positions.dtype)
        return positions[..., None] * 10000.0 ** (-2 * steps / max(self.dims, 1))

    def turns(
        self, tokens: int, past: int, positions: Real[Tensor, "#batch tokens"] | None
    ) -> tuple[Float[Tensor, "... tokens pairs"], Float[Tensor, "... tokens pairs"]]:
        """Cosines and sines for the next ``tokens`` positions after ``past``, or for explicit ones, whole or not."""
        if positions is not None:
            angles = self._angles(positions.to(torch.promote_types(self.cos.dtype, torch.float32)))[:, None]
            return angles.cos().to(self.cos.dtype), angles.sin().to(self.sin.dtype)  # (batch, 1, tokens, pairs)
        if past + tokens > len(self.cos):
            self._fill(max(past + tokens, 2 * len(self.cos)))
        return self.cos[past : past + tokens], self.sin[past : past + tokens]

    def forward(
        self, x: Float[Tensor, "*batch heads tokens head_dim"], turns: tuple[Tensor, Tensor]
    ) -> Float[Tensor, "*batch heads tokens head_dim"]:
        """Rotate queries or keys by `turns`."""
        if self.dims == 0:
            return x
        cos, sin = turns
        half = self.dims // 2
        a, b, rest = x.split([half, half, x.shape[-1] - self.dims], dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1).to(x.dtype)


@dataclass
class Visible:
    """What a query may see, and how much of every head is kept: the same in all layers."""

    turns: tuple[Tensor, Tensor]
    allowed: Bool[Tensor, "#batch 1 query key"] | None  # None: every key, or with ``causal`` those up to the query
    causal: bool
    bias: Float[Tensor, "... query key"] | None


class Attention(nn.Module):
    r"""Multi-head attention: $\mathrm{softmax}(q k^\top / \sqrt{d} + \text{bias})\, v$ in every head, then ``W_o``."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_count = layer, config.heads
        self.W_q, self.W_k, self.W_v, self.W_o = (nn.Linear(config.width, config.width, bias=False) for _ in range(4))
        self.q, self.k, self.v, self.scores, self.pattern, self.heads, self.out = (HookPoint() for _ in range(7))

    def forward(
        self,
        x: Float[Tensor, "batch tokens width"],
        rotary: Rotary,
        visible: Visible,
        cache: KVCache | None,
        keep_heads: Float[Tensor, " heads"] | None,
        keep: Float[Tensor, ""] | None,
    ) -> Float[Tensor, "batch tokens width"]:
        """What attention adds to the residual stream, from its normed values."""
        q, k, v = (
            rearrange(point(projection(x).unflatten(-1, (self.head_count, -1))), "b t h d -> b h t d")
            for point, projection in ((self.q, self.W_q), (self.k, self.W_k), (self.v, self.W_v))
        )
        q, k = rotary(q, visible.turns), rotary(k, visible.turns)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        look = self.scores.watched or self.pattern.watched
        heads = self.in_the_open(q, k, v, visible) if look else self.fused(q, k, v, visible)
        heads = rearrange(heads, "b h t d -> b t h d")
        if keep_heads is not None:
            heads = heads * keep_heads[:, None].to(heads.dtype)
        out = self.W_o(self.heads(heads).flatten(-2))
        return self.out(out if keep is None else out * keep.to(out.dtype))

    @staticmethod
    def fused(q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> Float[Tensor, "batch heads query head_dim"]:
        """Torch's kernel, which never holds the scores."""
        if visible.bias is None:
            mask = visible.allowed
        else:
            allowed = visible.allowed
            if allowed is None:
                allowed = causal_mask(q.shape[2], k.shape[2], q.device) if visible.causal else None
            bias = visible.bias.to(q.dtype)
            mask = bias if allowed is None else torch.where(allowed, bias, -math.inf)
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=visible.causal and mask is None)

    def in_the_open(
        self, q: Tensor, k: Tensor, v: Tensor, visible: Visible
    ) -> Float[Tensor, "batch heads query head_dim"]:
        """The same, step by step, through the hook points."""
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        scores = self.scores(scores if visible.bias is None else scores + visible.bias)
        allowed = visible.allowed
        if allowed is None and visible.causal:
            allowed = causal_mask(q.shape[2], k.shape[2], q.device)
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -math.inf)
        return self.pattern(scores.softmax(-1)).to(v.dtype) @ v


def causal_mask(queries: int, keys: int, device: torch.device) -> Bool[Tensor, "queries keys"]:
    """True where a query may see a key: the queries are the last of the keys' positions."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


class FeedForward(nn.Module):
    r"""$W_\text{out}\,\phi(W_\text{in} x)$, for every token alone."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.W_in = nn.Linear(config.width, config.hidden, bias=False)
        self.W_out = nn.Linear(config.hidden, config.width, bias=False)
        self.pre, self.act, self.out = (HookPoint() for _ in range(3))

    def forward(
        self, x: Float[Tensor, "batch tokens width"], keep: Float[Tensor, ""] | None
    ) -> Float[Tensor, "batch tokens width"]:
        """What the layer adds to the residual stream, from its normed values."""
        out = self.W_out(self.act(self.activation(self.pre(self.W_in(x)))))
        return self.out(out if keep is None else out * keep.to(out.dtype))


class Experts(nn.Module):
    r"""A mixture: $\sum_{e \in \mathrm{top}_k} g_e\,\mathrm{FFN}_e(x)$, g the softmax over the k largest router logits.

    That is the softmax over all experts, renormalised over the chosen. Tokens are sorted by expert, so that each expert
    computes its own tokens only; none is dropped.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.activation, self.top_k = ACTIVATIONS[config.activation], config.top_k
        self.W_router = nn.Linear(config.width, config.experts, bias=False)
        self.W_in = nn.Parameter(torch.empty(config.experts, config.hidden, config.width))
        self.W_out = nn.Parameter(torch.empty(config.experts, config.width, config.hidden))
        self.router, self.pre, self.act, self.out = (HookPoint() for _ in range(4))

    def forward(
        self, x: Float[Tensor, "batch tokens width"], keep: Float[Tensor, ""] | None
    ) -> Float[Tensor, "batch tokens width"]:
        """What the chosen experts add to the residual stream, weighted; from its normed values."""
        with torch.autocast(x.device.type, enabled=False):  # in half precision, logits tie and routing is arbitrary
            logits = self.router(self.W_router(x.to(self.W_router.weight.dtype)))
        gates, chosen = logits.topk(self.top_k, dim=-1)  # (batch, tokens, top_k)
        order = chosen.flatten().argsort(stable=True)  # slots (token, j), those of expert 0 first
        back = order.argsort()
        counts = chosen.flatten().bincount(minlength=len(self.W_in)).tolist()

        def per_expert(rows: Float[Tensor, "slots in"], weights: Float[Tensor, "experts out in"]) -> Tensor:
            return torch.cat([F.linear(part, W) for part, W in zip(rows.split(counts), weights, strict=True)])

        def shown(point: HookPoint, rows: Float[Tensor, "slots hidden"]) -> Float[Tensor, "slots hidden"]:
            if not point.watched:
                return rows
            return point(rows[back].view(*chosen.shape, -1)).flatten(0, 2)[order]

        rows = x.flatten(0, 1).index_select(0, order // self.top_k)
        hidden = shown(self.act, self.activation(shown(self.pre, per_expert(rows, self.W_in))))
        slots = per_expert(hidden, self.W_out).index_select(0, back).view(*chosen.shape, -1)
        out = (gates.softmax(-1)[..., None].to(slots.dtype) * slots).sum(-2)
        return self.out(out if keep is None else out * keep.to(out.dtype))


def balance_loss(
    router: Float[Tensor, "*batch experts"], top_k: int, keep: Bool[Tensor, "*batch"] | None = None
) -> Float[Tensor, ""]:
    r"""$E \sum_e f_e P_e$: share of slots routed to expert e times its mean probability (Fedus et al., 2021).

    1 where all experts are used alike, up to E / top_k where the same few take all. Only P carries a gradient.
    ``keep`` marks the tokens that count.

    Raises:
        ValueError: ``top_k`` is not between 1 and the number of experts, or no token counts.
    """
    experts = router.shape[-1]
    require_between(1, experts, top_k=top_k)
    logits = router.flatten(0, -2) if keep is None else router[keep]
    require_nonempty(router=logits)
    slots = logits.topk(top_k, dim=-1).indices.flatten()
    share = slots.bincount(minlength=experts).to(logits.dtype) / len(slots)
    return experts * (share * logits.softmax(-1).mean(0)).sum()


class Block(nn.Module):
    """Attention, then the feed-forward layer, each added to the residual stream."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.resid_pre, self.resid_mid, self.resid_post = (HookPoint() for _ in range(3))
        self.norm_attn, self.norm_mlp = (nn.RMSNorm(config.width, eps=1e-6) for _ in range(2))
        self.attn = Attention(config, layer)
        self.mlp = Experts(config) if config.experts and layer % 2 else FeedForward(config)

    def forward(
        self,
        x: Float[Tensor, "batch tokens width"],
        rotary: Rotary,
        visible: Visible,
        cache: KVCache | None,
        keep_heads: Float[Tensor, " heads"] | None,
        keep: Float[Tensor, ""] | None,
    ) -> Float[Tensor, "batch tokens width"]:
        """The residual stream after the block."""
        x = self.resid_pre(x)
        x = self.resid_mid(x + self.attn(self.norm_attn(x), rotary, visible, cache, keep_heads, keep))
        return self.resid_post(x + self.mlp(self.norm_mlp(x), keep))


class Transformer(nn.Module):
    """The model. Weights are drawn from ``generator``: normal(0.02), output projections by 1/sqrt(2 layers) smaller.

    What `states` documents holds for every method that takes ``**inputs``.
    """

    def __init__(self, config: TransformerConfig, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab, config.width)
        self.rotary = Rotary(2 * round(config.rotary * config.head_dim / 2), config.context)
        self.embed = HookPoint()
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm_final = nn.RMSNorm(config.width, eps=1e-6)
        self.final = HookPoint()
        self.W_readout = nn.Linear(config.width, config.width, bias=False) if config.readout else nn.Identity()
        for name, weight in self.named_parameters():
            if weight.ndim > 1:  # all but the norms' gains, which stay 1
                into_the_stream = "W_o" in name  # W_o and W_out
                std = 0.02 / math.sqrt(2 * config.layers) if into_the_stream else 0.02
                nn.init.normal_(weight, std=std, generator=generator)
        if config.readout:  # logits of unit scale, as soon as the readout has grown to it
            nn.init.normal_(self.embedding.weight, std=config.width**-0.5, generator=generator)

    def forward(
        self, tokens: Int[Tensor, "batch tokens"] | None = None, **inputs: Tensor | KVCache | None
    ) -> Float[Tensor, "batch tokens vocab"]:
        """Logits for every token: `unembed` of `states`, which says what may be given.

        Raises:
            ValueError: as `states`.
        """
        return self.unembed(self.states(tokens, **inputs))

    def states(
        self,
        tokens: Int[Tensor, "batch tokens"] | None = None,
        *,
        embeddings: Float[Tensor, "batch tokens width"] | None = None,
        cache: KVCache | None = None,
        attention_bias: Float[Tensor, "... query key"] | None = None,
        head_mask: Float[Tensor, "layers heads"] | None = None,
        layer_mask: Float[Tensor, " layers"] | None = None,
        padding: Bool[Tensor, "batch tokens"] | None = None,
        positions: Real[Tensor, "#batch tokens"] | None = None,
    ) -> Float[Tensor, "batch tokens width"]:
        """The final normed states, which `unembed` turns into logits: of a few positions only, that is cheaper.

        Args:
            tokens: or ``embeddings`` in their place, one of the two.
            cache: the tokens before these; it is extended by these.
            attention_bias: added to the scores of all layers; the keys are those of the cache, then the new ones.
            head_mask: factor on the output of each head, 1 = keep, 0 = as if its rows of ``W_o`` were zero.
            layer_mask: factor on what each block adds to the residual stream, 1 = keep, 0 = skip the block.
            padding: True at tokens that no other token may attend to; on either side. Their own output is arbitrary.
            positions: in place of 0, 1, 2, …; need not be whole, and one row serves the whole batch.

        Raises:
            ValueError: not exactly one of ``tokens`` and ``embeddings``; an empty one; a token outside the vocabulary;
                another argument whose shape does not fit; a cache for a bidirectional model or for another batch.
        """
        x = self._embedded(tokens, embeddings)
        visible = self._visible(x, cache, attention_bias, padding, positions)
        for name, mask, shape in (
            ("head_mask", head_mask, (self.config.layers, self.config.heads)),
            ("layer_mask", layer_mask, (self.config.layers,)),
        ):
            if mask is not None and mask.shape != shape:
                raise ValueError(f"{name} must have shape {shape}, got {tuple(mask.shape)}")
        x = self.embed(x)
        for layer, block in enumerate(self.blocks):
            keep_heads = None if head_mask is None else head_mask[layer]
            keep = None if layer_mask is None else layer_mask[layer]
            x = block(x, self.rotary, visible, cache, keep_heads, keep)
        return self.final(self.norm_final(x))

    def unembed(self, states: Float[Tensor, "... width"]) -> Float[Tensor, "... vocab"]:
        """Logits of final states: products with the embedding."""
        return F.linear(self.W_readout(states), self.embedding.weight)

    def run_with_cache(
        self,
        tokens: Int[Tensor, "batch tokens"] | None = None,
        names: Names = None,
        *,
        edits: Mapping[str, Edit] | None = None,
        **inputs: Tensor | KVCache | None,
    ) -> tuple[Float[Tensor, "batch tokens vocab"], dict[str, Tensor]]:
        """Logits, and the values at the hook points that ``names`` asks for: names, a predicate, or None for all.

        With ``edits`` the values are those after the edit.

        Raises:
            ValueError: a name that is no hook point, or as `forward` and `run_with_edits`.
        """
        with edited(self, edits or {}), recorded(self, names) as seen:
            return self(tokens, **inputs), seen

    def run_with_edits(
        self,
        tokens: Int[Tensor, "batch tokens"] | None = None,
        edits: Mapping[str, Edit] | None = None,
        **inputs: Tensor | KVCache | None,
    ) -> Float[Tensor, "batch tokens vocab"]:
        """Logits when the value at each named hook point is replaced by what its function returns for it.

        Raises:
            ValueError: a name that is no hook point, an edit that changes the shape, or as `forward`.
        """
        with edited(self, edits or {}):
            return self(tokens, **inputs)

    def states_and_balance(
        self, tokens: Int[Tensor, "batch tokens"] | None = None, **inputs: Tensor | KVCache | None
    ) -> tuple[Float[Tensor, "batch tokens width"], Float[Tensor, ""]]:
        """`states`, and the mean `balance_loss` of the expert layers over the tokens that are no padding.

        Raises:
            ValueError: the model has no experts, or as `forward`.
        """
        routers = [f"blocks.{layer}.mlp.router" for layer in range(1, self.config.layers, 2)]
        if not (self.config.experts and routers):
            raise ValueError("experts must be at least 1, in a model of at least 2 layers, for a balance loss")
        with recorded(self, routers) as seen:
            states = self.states(tokens, **inputs)
        padding = inputs.get("padding")
        keep = None if padding is None else ~padding
        losses = [balance_loss(logits, self.config.top_k, keep) for logits in seen.values()]
        return states, torch.stack(losses).mean()

    def _embedded(self, tokens: Tensor | None, embeddings: Tensor | None) -> Float[Tensor, "batch tokens width"]:
        if (tokens is None) == (embeddings is None):
            raise ValueError("exactly one of tokens and embeddings must be given")
        if embeddings is not None:
            require_ndim(3, embeddings=embeddings)
            require_nonempty(embeddings=embeddings)
            if embeddings.shape[-1] != self.config.width:
                raise ValueError(f"embeddings must have width {self.config.width}, got {embeddings.shape[-1]}")
            return embeddings
        require_ndim(2, tokens=tokens)
        require_nonempty(tokens=tokens)
        low, high = torch.stack(tokens.aminmax()).tolist()
        require_between(0, self.config.vocab - 1, tokens=low)
        require_between(0, self.config.vocab - 1, tokens=high)
        return self.embedding(tokens)

    def _visible(
        self,
        x: Float[Tensor, "batch tokens width"],
        cache: KVCache | None,
        bias: Tensor | None,
        padding: Tensor | None,
        positions: Tensor | None,
    ) -> Visible:
        """Masks, bias and rotation, checked against the batch; the cache learns which of its keys are padding."""
        batch, new, _ = x.shape
        past = 0 if cache is None else len(cache)
        if cache is not None and not self.config.causal:
            raise ValueError("cache must be None for a bidirectional model: old tokens would see the new ones")
        if past and len(cache.keys[0]) != batch:
            raise ValueError(f"cache must be of {batch} sequences, got {len(cache.keys[0])}")
        if padding is not None and padding.shape != (batch, new):
            raise ValueError(f"padding must have shape {(batch, new)}, got {tuple(padding.shape)}")
        if positions is not None and (positions.ndim != 2 or positions.shape not in ((batch, new), (1, new))):
            raise ValueError(f"positions must have shape {(batch, new)}, got {tuple(positions.shape)}")
        if bias is not None:
            full = (batch, self.config.heads, new, past + new)
            fits = 2 <= bias.ndim <= 4 and bias.shape[-2:] == full[-2:]
            if not fits or any(a not in (1, b) for a, b in zip(bias.shape[-3::-1], full[1::-1], strict=False)):
                raise ValueError(f"attention_bias must broadcast to {full}, got {tuple(bias.shape)}")
            bias = bias[(None,) * (4 - bias.ndim)]
        if cache is not None and (padding is not None or cache.padding is not None):
            before = cache.padding if cache.padding is not None else x.new_zeros(batch, past, dtype=torch.bool)
            now = padding if padding is not None else x.new_zeros(batch, new, dtype=torch.bool)
            padding = cache.padding = torch.cat([before, now], dim=1)

        # A single new token sees everything; without a past, torch's own causal mask is the fastest.
        causal, allowed = self.config.causal and new > 1, None
        if causal and (past or padding is not None):
            allowed = causal_mask(new, past + new, x.device)[None, None]
        if padding is not None:
            # Padding still sees itself: a row without any key would be 0/0.
            own = torch.eye(new, past + new, dtype=torch.bool, device=x.device).roll(past, dims=1)
            seen = ~padding[:, None, None, :] | own
            allowed = seen if allowed is None else allowed & seen
        return Visible(self.rotary.turns(new, past, positions), allowed, causal, bias)


@torch.no_grad()
def generate(
    model: Transformer,
    tokens: Int[Tensor, "batch tokens"],
    *,
    steps: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    stop: int | None = None,
    padding: Bool[Tensor, "batch tokens"] | None = None,
) -> Int[Tensor, "batch longer"]:
    """The tokens, continued by ``steps`` more, each read off the last position: the likeliest at temperature 0.

    Sampling keeps the smallest set of tokens whose probability reaches ``top_p`` (Holtzman et al., 2019), after the
    temperature. A sequence that has emitted ``stop`` goes on with ``stop``. Prompts of different lengths are padded on
    the left.

    Raises:
        ValueError: a bidirectional model, negative ``steps`` or ``temperature``, ``top_p`` outside (0, 1], a ``stop``
            outside the vocabulary, padding at the last position, or as `Transformer.forward`.
    """
    if not model.config.causal:
        raise ValueError("model must be causal to generate")
    require_at_least(0, steps=steps, temperature=temperature)
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be greater than 0 and at most 1, got {top_p}")
    if stop is not None:
        require_between(0, model.config.vocab - 1, stop=stop)
    if padding is not None and padding[:, -1].any():
        raise ValueError("padding must be on the left of a prompt, got it at the last token")
    cache, new = KVCache(), tokens
    done = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    for step in range(steps):
        states = model.states(new, cache=cache, padding=padding if step == 0 else None)
        chosen = pick(model.unembed(states[:, -1]), temperature, top_p, generator).to(tokens.dtype)
        if stop is not None:
            chosen = torch.where(done, stop, chosen)
            done = done | (chosen == stop)
        new = chosen[:, None]
        tokens = torch.cat([tokens, new], dim=1)
    return tokens


def nucleus(probabilities: Float[Tensor, "rows choices"], top_p: float) -> Float[Tensor, "rows choices"]:
    """Only the likeliest choices that together reach ``top_p``, in proportion; the likeliest is always kept.

    Raises:
        ValueError: ``top_p`` is not within 0 to 1.
    """
    require_between(0, 1, top_p=top_p)
    ranked, order = probabilities.sort(-1, descending=True)
    ranked = ranked.masked_fill(ranked.cumsum(-1) - ranked >= max(top_p, 1e-9), 0)
    kept = torch.zeros_like(ranked).scatter(-1, order, ranked)
    return kept / kept.sum(-1, keepdim=True)


def pick(
    logits: Float[Tensor, "batch vocab"], temperature: float, top_p: float, generator: torch.Generator | None
) -> Int[Tensor, " batch"]:
    """One token a row: the likeliest, or a sample of the nucleus."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits.float() / temperature).softmax(-1)
    if top_p < 1:
        probabilities = nucleus(probabilities, top_p)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]
