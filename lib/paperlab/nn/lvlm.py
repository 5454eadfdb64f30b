"""A small vision-language model: patches of pictures, projected into a decoder's stream, are read like words.

LLaVA joins a picture and a sentence by the least that could work (Liu et al., 2023, arXiv:2304.08485): the image tower
of a model that matches pictures with captions sees, a small projector turns each patch's state into something that
stands where a token's embedding would, and a decoder goes on from there. The decoder's sequence is

    <bos>  patch 0 … patch P−1 of frame 0  patch 0 … of frame 1  …  text,

and `Lvlm.visual` says which positions are pictures, so that they can be watched, weakened, merged or left out.
"""

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from paperlab.checks import require_at_least, require_between, require_ndim, require_nonempty
from paperlab.nn.clip import Clip
from paperlab.nn.transformer import KVCache, Transformer, TransformerConfig, pick
from paperlab.nn.vit import STEM_CHANNELS, ViT, halving_stem


class Lvlm(nn.Module):
    """Patch encoder (``stem`` and ``eye``), two-layer projector, causal `Transformer` (``decoder``).

    All hook points of both are there, under ``eye.body.`` and ``decoder.``. The encoder is the image tower of `Clip`,
    which `adopt` gives it, but for the last blocks: what the class token needs there is no longer about patches. Each
    frame has a learned vector of its own; in the decoder, positions are rotary and count on through pictures and text.

    Args:
        vocab: how many tokens the decoder knows.
        bos: the token that begins each sequence, before the first picture.
        size: the pictures' side in pixels, a multiple of 4; a patch has 4 × 4.
        frames: the most pictures before a text.
        eye_width: the encoder's width.
        eye_layers: the encoder's blocks.
        width: the decoder's width.
        layers: the decoder's blocks.
        heads: of encoder and decoder.
        words: tokens of text for which the rotary tables are made; longer texts make them longer.

    Raises:
        ValueError: a size below 1, a ``size`` that is no multiple of 4, a ``bos`` outside the vocabulary.
    """

    def __init__(
        self,
        vocab: int,
        *,
        bos: int,
        size: int = 32,
        frames: int = 4,
        eye_width: int = 96,
        eye_layers: int = 3,
        width: int = 96,
        layers: int = 4,
        heads: int = 4,
        words: int = 32,
    ) -> None:
        super().__init__()
        require_at_least(1, size=size, frames=frames)
        require_between(0, vocab - 1, bos=bos)
        if size % 4:
            raise ValueError(f"size must be a multiple of 4, got {size}")
        self.bos, self.size, self.frames = bos, size, frames
        self.patches = (size // 4) ** 2
        self.stem = halving_stem()
        self.eye = ViT(
            1,  # no classes: only its states are read
            size=size // 2,
            patch=2,
            width=eye_width,
            layers=eye_layers,
            heads=heads,
            channels=STEM_CHANNELS,
        )
        self.projector = nn.Sequential(nn.Linear(eye_width, width), nn.GELU(), nn.Linear(width, width))
        self.moments = nn.Parameter(0.02 * torch.randn(frames, width))
        self.decoder = Transformer(
            TransformerConfig(
                vocab=vocab,
                layers=layers,
                width=width,
                heads=heads,
                context=1 + frames * self.patches + words,
                hidden=4 * width,
                readout=True,
            )
        )

    def adopt(self, clip: Clip) -> None:
        """Begin with the first blocks of ``clip``'s image tower.

        Raises:
            ValueError: ``clip`` has another width, size or number of heads, or fewer blocks.
        """
        tower = clip.image.body.config
        mine = self.eye.body.config
        for name in ("width", "context", "heads"):
            if getattr(tower, name) != getattr(mine, name):
                raise ValueError(
                    f"clip must have an image tower of {name} {getattr(mine, name)}, got {getattr(tower, name)}"
                )
        require_at_least(mine.layers, clip=tower.layers)
        self.stem.load_state_dict(clip.stem.state_dict())
        theirs = clip.image.state_dict()
        classes = "body.embedding.weight"  # their shared space: not ours
        self.eye.load_state_dict({key: theirs[key] for key in self.eye.state_dict() if key != classes}, strict=False)

    def visual(self, frames: int = 1) -> slice:
        """The positions of the visual tokens of ``frames`` pictures in the decoder's sequence; text follows.

        Raises:
            ValueError: fewer than one picture, or more than the model takes.
        """
        require_between(1, self.frames, frames=frames)
        return slice(1, 1 + frames * self.patches)

    def encode(self, pictures: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch patches eye_width"]:
        """The encoder's final states of each picture's patches, row by row; that of its class token is dropped."""
        return self.eye.states(self.stem(pictures))[:, 1:]

    def tokens(self, pictures: Float[Tensor, "*batch_frames 3 h w"]) -> Float[Tensor, "batch visual_tokens width"]:
        """The visual tokens: all frames' patches, projected, each with its frame's vector.

        Raises:
            ValueError: pictures without an axis for frames or of another size, no picture, or too many frames.
        """
        require_ndim(5, pictures=pictures)
        require_nonempty(pictures=pictures)
        require_between(1, self.frames, pictures=pictures.shape[1])
        if pictures.shape[-2:] != (self.size, self.size):
            raise ValueError(f"pictures must be {self.size} pixels wide and high, got {tuple(pictures.shape[-2:])}")
        states = rearrange(self.encode(pictures.flatten(0, 1)), "(b f) t d -> b f t d", f=pictures.shape[1])
        return (self.projector(states) + self.moments[: pictures.shape[1], None]).flatten(1, 2)

    def prefix(self, pictures: Float[Tensor, "batch frames 3 h w"]) -> Float[Tensor, "batch positions width"]:
        """What stands before the text: the embeddings of <bos> and of the visual tokens (see `visual`)."""
        first = self.decoder.embedding.weight[self.bos].expand(len(pictures), 1, -1)
        return torch.cat([first, self.tokens(pictures)], dim=1)

    def joint(
        self, pictures: Float[Tensor, "batch frames 3 h w"], text: Int[Tensor, "batch text"]
    ) -> Float[Tensor, "batch positions width"]:
        """The whole sequence as embeddings: the input of ``decoder.states(embeddings=…)`` and its relatives."""
        return torch.cat([self.prefix(pictures), self.decoder.embedding(text)], dim=1)

    def forward(
        self, pictures: Float[Tensor, "batch frames 3 h w"], text: Int[Tensor, "batch text"]
    ) -> Float[Tensor, "batch text vocab"]:
        """Logits for what follows each token of the text."""
        return self.decoder.unembed(self.read(self.look(pictures), text))

    def look(self, pictures: Float[Tensor, "batch frames 3 h w"]) -> KVCache:
        """The decoder's keys and values of <bos> and the pictures: computed once, read by any number of texts."""
        seen = KVCache()
        self.decoder.states(embeddings=self.prefix(pictures), cache=seen)
        return seen

    def read(
        self, seen: KVCache, text: Int[Tensor, "texts text"], of: Int[Tensor, " rows"] | None = None
    ) -> Float[Tensor, "texts text width"]:
        """The decoder's final states of texts about what `look` saw, which stays as it is.

        ``of`` is the row of ``seen`` that each text is about; without it, text i is about row i. Texts that are shorter
        than others are padded on the right by anything: no token sees what comes after it.

        Raises:
            ValueError: ``of`` of another length or with a row that is not there, or as `Transformer.states`.
        """
        return self.decoder.states(text, cache=_rows(seen, of, len(text)))

    @torch.no_grad()
    def generate(
        self,
        pictures: Float[Tensor, "batch frames 3 h w"],
        prompt: Int[Tensor, "batch text"],
        *,
        steps: int,
        stop: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, "batch new"]:
        """What follows the prompts, without them: up to ``steps`` tokens, the likeliest at temperature 0.

        Otherwise as `paperlab.nn.transformer.generate`; ends early when every row has emitted ``stop``.

        Raises:
            ValueError: ``steps`` below 1, a negative ``temperature``, ``top_p`` outside (0, 1], a ``stop`` outside the
                vocabulary, or as `tokens` and `Transformer.states`.
        """
        require_at_least(1, steps=steps)
        require_at_least(0, temperature=temperature)
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p must be greater than 0 and at most 1, got {top_p}")
        require_between(0, self.decoder.config.vocab - 1, stop=stop)
        cache, new, found = self.look(pictures), prompt, []
        done = torch.zeros(len(prompt), dtype=torch.bool, device=prompt.device)
        for _ in range(steps):
            logits = self.decoder.unembed(self.decoder.states(new, cache=cache)[:, -1])
            chosen = torch.where(done, stop, pick(logits, temperature, top_p, generator))
            found.append(chosen)
            done = done | (chosen == stop)
            if done.all():
                break
            new = chosen[:, None]
        return torch.stack(found, dim=1)


def _rows(seen: KVCache, of: Int[Tensor, " rows"] | None, texts: int) -> KVCache:
    """A cache of its own for each text; the tensors of ``seen`` are never written to."""
    own = KVCache()
    if of is None:
        own.keys, own.values = dict(seen.keys), dict(seen.values)
        return own
    if of.shape != (texts,):
        raise ValueError(f"of must have shape {(texts,)}, got {tuple(of.shape)}")
    require_between(0, len(seen.keys[0]) - 1, of=of)
    for layer in seen.keys:
        own.keys[layer] = seen.keys[layer].index_select(0, of)
        own.values[layer] = seen.values[layer].index_select(0, of)
    return own
