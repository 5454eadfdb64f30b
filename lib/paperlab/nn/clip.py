r"""Pictures and sentences in one space: an image tower and a text tower, trained so that what belongs together is near.

Both towers end in a unit vector. The similarity of picture i and text j is their cosine times a learned factor, and
the loss asks each picture for its text among all texts of the batch, and each text for its picture:

$$\begin{aligned}
\ell_{ij} &= e^{\tau}\,\langle u_i, v_j\rangle, \\
\mathcal L &= -\tfrac12 \operatorname{mean}_i \Big(\log\frac{e^{\ell_{ii}}}{\sum_j e^{\ell_{ij}}}
+ \log\frac{e^{\ell_{ii}}}{\sum_j e^{\ell_{ji}}}\Big).
\end{aligned}$$

Radford et al. (2021), https://arxiv.org/abs/2103.00020, section 2.3 and figure 3.
"""

import math

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from paperlab.checks import require_at_least, require_between, require_nonempty
from paperlab.nn.transformer import Transformer, TransformerConfig
from paperlab.nn.vit import STEM_CHANNELS, ViT, halving_stem

FIRST_SCALE, LARGEST_SCALE = 1 / 0.07, 100.0  # of the cosines, as in the paper


class Clip(nn.Module):
    """The two towers. Hook points: ``image.body.blocks.N…`` and ``text.blocks.N…``.

    The image tower halves the picture by convolutions (`halving_stem`), cuts what they see into patches of 4 × 4 pixels
    and reads these, with a class token before them, as a `ViT`; ``image.body.unembed`` takes final states into the
    shared space. The text tower is causal: only the token that ends a text has seen all of it, and its final state goes
    through ``project``.

    Args:
        vocab: of the texts' tokens.
        end: the token that ends every text; what comes after it does not matter.
        size: side of the pictures in pixels, a multiple of 4.
        dim: of the shared space.
        width: of both towers.
        heads: of both towers.
        image_layers: blocks of the image tower.
        text_layers: blocks of the text tower.
        context: of the text tower; longer texts are read as well.

    Raises:
        ValueError: a size below 1, ``end`` outside the vocabulary, or ``size`` that is no multiple of 4.
    """

    def __init__(
        self,
        vocab: int,
        *,
        end: int,
        size: int = 32,
        dim: int = 64,
        width: int = 96,
        heads: int = 4,
        image_layers: int = 4,
        text_layers: int = 2,
        context: int = 32,
    ) -> None:
        super().__init__()
        require_at_least(1, vocab=vocab, size=size, dim=dim)
        require_between(0, vocab - 1, end=end)
        if size % 4:
            raise ValueError(f"size must be a multiple of 4, got {size}")
        self.end = end
        self.stem = halving_stem()
        self.image = ViT(
            dim, size=size // 2, patch=2, width=width, layers=image_layers, heads=heads, channels=STEM_CHANNELS
        )
        self.text = Transformer(
            TransformerConfig(
                vocab=vocab, layers=text_layers, width=width, heads=heads, context=context, hidden=4 * width
            )
        )
        self.project = nn.Linear(width, dim, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(FIRST_SCALE)))

    def forward(
        self, images: Float[Tensor, "images 3 h w"], tokens: Int[Tensor, "texts tokens"]
    ) -> Float[Tensor, "images texts"]:
        """Similarity logits of every picture with every text.

        Raises:
            ValueError: as `embed_texts`.
        """
        return self.similarity(self.embed_images(images), self.embed_texts(tokens))

    @property
    def scale(self) -> Float[Tensor, ""]:
        """The factor of the cosines, the inverse of the temperature; at most `LARGEST_SCALE`."""
        return self.log_scale.clamp(max=math.log(LARGEST_SCALE)).exp()

    def similarity(
        self, images: Float[Tensor, "*images dim"], texts: Float[Tensor, "texts dim"]
    ) -> Float[Tensor, "*images texts"]:
        """Logits of unit vectors: cosines times `scale`."""
        with torch.autocast(images.device.type, enabled=False):  # 8 bits of a logit of 90 are not enough
            return self.scale * images @ texts.mT

    def image_states(self, images: Float[Tensor, "images 3 h w"]) -> Float[Tensor, "images places width"]:
        """Final normed states of the class token (the first) and of the patches, row by row."""
        return self.image.states(self.stem(images))

    def embed_images(self, images: Float[Tensor, "images 3 h w"]) -> Float[Tensor, "images dim"]:
        """A unit vector a picture, from its class token."""
        return self._unit(self.image(self.stem(images)))

    def embed_patches(self, images: Float[Tensor, "images 3 h w"]) -> Float[Tensor, "images rows columns dim"]:
        """A unit vector a patch, by the map that was learned for the class token: nothing in training asked for it."""
        found = self._unit(self.image.body.unembed(self.image_states(images)[:, 1:]))
        return rearrange(found, "b (h w) d -> b h w d", w=images.shape[-1] // 4)

    def text_states(
        self,
        tokens: Int[Tensor, "texts tokens"] | None = None,
        *,
        embeddings: Float[Tensor, "texts tokens width"] | None = None,
    ) -> Float[Tensor, "texts tokens width"]:
        """Final normed states of all tokens; ``embeddings`` take the place of ``tokens`` where prompts are learned.

        Raises:
            ValueError: as `Transformer.states`.
        """
        return self.text.states(tokens, embeddings=embeddings)

    def embed_texts(
        self,
        tokens: Int[Tensor, "texts tokens"] | None = None,
        *,
        embeddings: Float[Tensor, "texts tokens width"] | None = None,
        ends: Int[Tensor, " texts"] | None = None,
    ) -> Float[Tensor, "texts dim"]:
        """A unit vector a text, from the token that ends it: the first that is ``end``.

        Args:
            tokens: the texts.
            embeddings: in place of ``tokens``, with ``ends``.
            ends: the position of each text's last token, where it is not to be looked for.

        Raises:
            ValueError: a text without an end, ``ends`` missing or outside the text, or as `Transformer.states`.
        """
        states = self.text_states(tokens, embeddings=embeddings)
        if ends is None:
            if tokens is None:
                raise ValueError("ends must be given with embeddings")
            found = tokens == self.end
            if not found.any(1).all():
                raise ValueError(f"tokens must hold the end, {self.end}, in every row")
            ends = found.int().argmax(1)
        require_between(0, states.shape[1] - 1, ends=ends)
        return self._unit(self.project(states[torch.arange(len(states), device=states.device), ends]))

    def _unit(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        return F.normalize(x.to(self.log_scale.dtype), dim=-1)


def contrastive_loss(logits: Float[Tensor, "n n"], ignored: Bool[Tensor, "n n"] | None = None) -> Float[Tensor, ""]:
    """The symmetric loss of the module's formula: pair (i, i) against all (i, j), and against all (j, i).

    ``ignored`` marks pairs that are neither right nor wrong: they are left out of the sums. The diagonal always counts.

    Raises:
        ValueError: no pair, or logits that are not square.
    """
    require_nonempty(logits=logits)
    if logits.shape[0] != logits.shape[1]:
        raise ValueError(f"logits must be square, got shape {tuple(logits.shape)}")
    if ignored is not None:
        own = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
        logits = logits.masked_fill(ignored & ~own, -math.inf)
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.mT, labels)) / 2
