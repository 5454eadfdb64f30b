r"""A denoiser that reads: from a noisy picture, its time and a caption to the velocity that leads to the clean picture.

A patch transformer (Peebles and Xie, 2022, arXiv:2212.09748) with cross-attention over the words (Rombach et al., 2021,
arXiv:2112.10752). The caption reaches the picture by cross-attention alone, so that whoever edits those maps decides
which word acts where. In each block, with $\tilde x = \mathrm{norm}(x)(1 + s) + b$, and s, b and the gate g given by
the time,

$$\begin{aligned}
x &\leftarrow x + (1 + g)\,\mathrm{attention}(\tilde x), \\
x &\leftarrow x + \mathrm{cross}(\mathrm{norm}(x), \text{words}), \\
x &\leftarrow x + (1 + g')\,\mathrm{mlp}(\tilde x').
\end{aligned}$$

The words' states come from the ``reader``, a small bidirectional `Transformer`. Hook points, in the order in which they
fire (``N`` is a block's number, from 0; a query is a patch, row by row):

===========================  =====================  ================================================================
name                         shape                  value
===========================  =====================  ================================================================
``reader.…``                 batch words width      as in `paperlab.nn.transformer`, whenever captions are read;
                                                    ``reader.final`` is what `Denoiser.read` returns
``embed``                    batch patches width    embedded patches with their places: the input of block 0
``blocks.N.resid_pre``       batch patches width    residual stream before the block
``blocks.N.attn.…``          as in `transformer`    self-attention among the patches; ``out`` is before the gate
``blocks.N.resid_mid``       batch patches width    residual stream before the cross-attention
``blocks.N.cross.q``         batch patches heads d  queries, of the patches
``blocks.N.cross.k``         batch words heads d    keys, of the words
``blocks.N.cross.v``         batch words heads d    values, of the words
``blocks.N.cross.scores``    batch heads patches    scaled products, before padding is masked; the last axis is the
                             words                  words
``blocks.N.cross.pattern``   as ``scores``          how much each patch attends to each word; each row sums to 1
``blocks.N.cross.heads``     batch patches heads d  output of each head, before the output projection
``blocks.N.cross.out``       batch patches width    what the words add to the residual stream
``blocks.N.resid_words``     batch patches width    residual stream after the cross-attention
``blocks.N.mlp.…``           batch patches hidden   as in `transformer`; ``out`` (width) is before the gate
``blocks.N.resid_post``      batch patches width    residual stream after the block
``final``                    batch patches width    what the velocities of the pixels are read from
===========================  =====================  ================================================================
"""

import math
from collections.abc import Callable

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from paperlab.checks import require_at_least, require_finite
from paperlab.nn.hooks import HookPoint
from paperlab.nn.transformer import Attention, FeedForward, Rotary, Transformer, TransformerConfig, Visible

FREQUENCIES = 32  # of the time's sines and cosines
WORDS = 32  # of a caption, for which positions are tabled; longer ones extend the table


def time_features(t: Float[Tensor, " batch"]) -> Float[Tensor, "batch features"]:
    """Cosines and sines of the time at frequencies from 100 down to 0.1, evenly spaced in the logarithm."""
    rates = 100 * 1000.0 ** (-torch.arange(FREQUENCIES, device=t.device, dtype=t.dtype) / (FREQUENCIES - 1))
    angles = t[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class CrossAttention(Attention):
    """Queries from the patches; keys and values from the words."""

    def forward(
        self,
        x: Float[Tensor, "batch patches width"],
        words: Float[Tensor, "batch words width"],
        visible: Visible,
    ) -> Float[Tensor, "batch patches width"]:
        """What the words add to the residual stream, from its normed values."""
        q, k, v = (
            rearrange(point(projection(y).unflatten(-1, (self.head_count, -1))), "b t h d -> b h t d")
            for point, projection, y in ((self.q, self.W_q, x), (self.k, self.W_k, words), (self.v, self.W_v, words))
        )
        look = self.scores.watched or self.pattern.watched
        heads = self.in_the_open(q, k, v, visible) if look else self.fused(q, k, v, visible)
        return self.out(self.W_o(self.heads(rearrange(heads, "b h t d -> b t h d")).flatten(-2)))


class DenoiserBlock(nn.Module):
    """Self-attention, cross-attention to the words, feed-forward; the first and the last are steered by the time.

    What the time says is one vector for all blocks, to which each adds its own ``table``: scale, shift and gate twice
    (Chen et al., 2023, arXiv:2310.00426, section 2.3).
    """

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.resid_pre, self.resid_mid, self.resid_words, self.resid_post = (HookPoint() for _ in range(4))
        self.norm_attn, self.norm_cross, self.norm_mlp = (nn.RMSNorm(config.width, eps=1e-6) for _ in range(3))
        self.attn, self.cross, self.mlp = Attention(config, layer), CrossAttention(config, layer), FeedForward(config)
        self.table = nn.Parameter(torch.zeros(6, config.width))

    def forward(
        self,
        x: Float[Tensor, "batch patches width"],
        said: Float[Tensor, "batch 6 width"],
        words: Float[Tensor, "batch words width"],
        rotary: Rotary,
        patches: Visible,
        read: Visible,
    ) -> Float[Tensor, "batch patches width"]:
        """The residual stream after the block; ``said`` is what the time says."""
        scale, shift, gate, scale_mlp, shift_mlp, gate_mlp = (said + self.table)[:, :, None].unbind(1)
        x = self.resid_pre(x)
        steered = self.norm_attn(x) * (1 + scale) + shift
        x = self.resid_mid(x + (1 + gate) * self.attn(steered, rotary, patches, None, None, None))
        x = self.resid_words(x + self.cross(self.norm_cross(x), words, read))
        return self.resid_post(x + (1 + gate_mlp) * self.mlp(self.norm_mlp(x) * (1 + scale_mlp) + shift_mlp, None))


class Denoiser(nn.Module):
    """The network: velocities $v = \\alpha_t \\epsilon - \\sigma_t x_0$ of pixels (see `paperlab.nn.diffusion`).

    Captions are token ids, padded with ``pad`` on the right. The empty caption is the one that begins and ends with
    its first token; training on it now and then makes it the null caption of classifier-free guidance.

    Raises:
        ValueError: a size below 1, a ``patch`` that does not divide ``size``, or what `TransformerConfig` refuses.
    """

    def __init__(
        self,
        vocab: int,
        *,
        size: int = 16,
        patch: int = 2,
        width: int = 96,
        layers: int = 4,
        heads: int = 4,
        channels: int = 3,
        reader_layers: int = 2,
        pad: int = 0,
    ) -> None:
        super().__init__()
        require_at_least(1, size=size, patch=patch, channels=channels)
        if size % patch:
            raise ValueError(f"patch must divide size, got {patch} and {size}")
        self.size, self.patch, self.channels, self.pad = size, patch, channels, pad
        count = (size // patch) ** 2
        shared = {"width": width, "heads": heads, "hidden": 4 * width, "causal": False}
        config = TransformerConfig(vocab=1, layers=layers, context=count, rotary=0.0, **shared)
        self.reader = Transformer(TransformerConfig(vocab=vocab, layers=reader_layers, context=WORDS, **shared))
        self.patches = nn.Linear(channels * patch**2, width)
        self.places = nn.Parameter(0.02 * torch.randn(count, width))
        self.clock = nn.Linear(2 * FREQUENCIES, width)
        self.steer = nn.Linear(width, 6 * width)
        self.rotary = Rotary(0, count)
        self.embed, self.final = HookPoint(), HookPoint()
        self.blocks = nn.ModuleList(DenoiserBlock(config, layer) for layer in range(layers))
        self.norm_final = nn.RMSNorm(width, eps=1e-6)
        self.pixels = nn.Linear(width, channels * patch**2)
        for name, weight in self.blocks.named_parameters():
            if name.endswith(".weight") and weight.ndim == 2:
                nn.init.normal_(weight, std=0.02 / math.sqrt(3 * layers) if "W_o" in name else 0.02)
        for layer in (self.steer, self.pixels):  # at first every time is steered alike, and the velocity is 0
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def read(self, captions: Int[Tensor, "batch words"]) -> Float[Tensor, "batch words width"]:
        """The words' states, which the patches attend to; those of padding are arbitrary.

        Raises:
            ValueError: no caption, a token outside the vocabulary, or a caption that is nothing but padding.
        """
        padding = captions == self.pad
        if padding.all(-1).any():
            raise ValueError("captions must each have a token that is no padding")
        return self.reader.states(captions, padding=padding)

    def forward(
        self,
        x: Float[Tensor, "batch channels size size"],
        t: Float[Tensor, " batch"],
        captions: Int[Tensor, "batch words"],
        *,
        words: Float[Tensor, "batch words width"] | None = None,
    ) -> Float[Tensor, "batch channels size size"]:
        """The velocity at noisy pictures ``x`` of times ``t``.

        ``words`` are the states of the captions where `read` was called before: once for many times, or to change them.

        Raises:
            ValueError: pictures of another size, times that are not finite, ``words`` of another shape, or as `read`.
        """
        if x.shape[1:] != (self.channels, self.size, self.size):
            raise ValueError(f"x must be pictures of shape {(self.channels, self.size, self.size)}, "
                             f"got {tuple(x.shape[1:])}")  # fmt: skip
        require_finite(t=t)
        words = self.read(captions) if words is None else words
        if words.shape != (*captions.shape, self.places.shape[1]):
            raise ValueError(f"words must be states of captions of shape {tuple(captions.shape)}, "
                             f"got {tuple(words.shape)}")  # fmt: skip
        said = self.steer(F.silu(self.clock(time_features(t)))).unflatten(-1, (6, -1))
        turns = self.rotary.turns(len(self.places), 0, None)
        patches = Visible(turns, None, causal=False, bias=None)
        read = Visible(turns, (captions != self.pad)[:, None, None], causal=False, bias=None)
        tokens = rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=self.patch, q=self.patch)
        y = self.embed(self.patches(tokens) + self.places)
        for block in self.blocks:
            y = block(y, said, words, self.rotary, patches, read)
        y = self.pixels(self.final(self.norm_final(y)))
        return rearrange(y, "b (h w) (c p q) -> b c (h p) (w q)", h=self.size // self.patch, p=self.patch, q=self.patch)


def guided(
    model: Denoiser,
    captions: Int[Tensor, "batch words"],
    against: Int[Tensor, "#batch rivals"],
    scale: float,
) -> Callable[[Tensor, Tensor], Tensor]:
    r"""The velocity field $v(x, t) = v_\varnothing + w\,(v_c - v_\varnothing)$ of a caption against another one.

    Classifier-free guidance (Ho and Salimans, 2022, arXiv:2207.12598, equation 6 with its w + 1 as our ``scale``):
    ``against`` is the null caption, or what is not wanted. At scale 1 that is the caption's own velocity, in one pass;
    otherwise both go in one batch, those of the captions first. The words are read once.

    Raises:
        ValueError: a scale that is not finite, or as `Denoiser.read`.
    """
    require_finite(scale=scale)
    if scale == 1:
        words = model.read(captions)
        return lambda x, t: model(x, t, captions, words=words)
    longest = max(captions.shape[1], against.shape[1])
    both = torch.cat([F.pad(ids.expand(len(captions), -1), (0, longest - ids.shape[1]), value=model.pad)
                      for ids in (captions, against)])  # fmt: skip
    words = model.read(both)

    def field(x: Tensor, t: Tensor) -> Tensor:
        asked, rival = model(x.repeat(2, 1, 1, 1), t.repeat(2), both, words=words).chunk(2)
        return torch.lerp(rival, asked, scale)

    return field
