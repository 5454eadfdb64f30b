"""A vision transformer for small pictures: patches as tokens, read by the same blocks as a sentence."""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from paperlab.checks import require_at_least
from paperlab.nn.transformer import Transformer, TransformerConfig

STEM_CHANNELS = 48


def halving_stem(channels: int = 3) -> nn.Sequential:
    """Two convolutions to `STEM_CHANNELS` that halve the picture: patches of what they see teach a transformer sooner
    than patches of pixels (Xiao et al., 2021, arXiv:2106.14881).
    """
    wide = STEM_CHANNELS
    return nn.Sequential(
        nn.Conv2d(channels, wide // 2, 3, padding=1), nn.GELU(), nn.Conv2d(wide // 2, wide, 3, stride=2, padding=1),
        nn.GELU(),
    )  # fmt: skip


class ViT(nn.Module):
    """A bidirectional `Transformer` over patches of ``patch`` × ``patch`` pixels and one class token before them
    (Dosovitskiy et al., 2020, arXiv:2010.11929); positions are learned.

    All hook points of the blocks are there under ``body.``. The classes take the place of a vocabulary: class scores
    are the products of the class token's final state with one vector a class.

    Raises:
        ValueError: a size below 1, or a ``patch`` that does not divide ``size``.
    """

    def __init__(
        self,
        classes: int,
        *,
        size: int = 16,
        patch: int = 4,
        width: int = 96,
        layers: int = 6,
        heads: int = 4,
        channels: int = 3,
    ) -> None:
        super().__init__()
        require_at_least(1, size=size, patch=patch, channels=channels)
        if size % patch:
            raise ValueError(f"patch must divide size, got {patch} and {size}")
        self.patch, count = patch, (size // patch) ** 2
        self.embed = nn.Linear(channels * patch**2, width)
        self.first = nn.Parameter(0.02 * torch.randn(width))
        self.places = nn.Parameter(0.02 * torch.randn(count + 1, width))
        self.body = Transformer(
            TransformerConfig(
                vocab=classes,
                layers=layers,
                width=width,
                heads=heads,
                context=count + 1,
                hidden=4 * width,
                causal=False,
                rotary=0.0,
            )
        )

    def tokens(self, x: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch tokens width"]:
        """The class token and the embedded patches, row by row, with their places added."""
        patches = rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=self.patch, q=self.patch)
        first = self.first.expand(len(x), 1, -1)
        return torch.cat([first, self.embed(patches)], dim=1) + self.places

    def states(self, x: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch tokens width"]:
        """The final normed states of the class token (the first) and of the patches."""
        return self.body.states(embeddings=self.tokens(x))

    def features(self, x: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch width"]:
        """The class token's final state: what the class scores are read from."""
        return self.states(x)[:, 0]

    def forward(self, x: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch classes"]:
        """Class scores."""
        return self.body.unembed(self.features(x))
