"""The task of the denoiser that reads: paint scenes of one or two shapes as their caption says. And what it can do, as
seen by a classifier of rendered scenes that has never seen a painted one.
"""

import base64
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from paperlab.checks import require_at_least, require_between
from paperlab.data.held_out import HELD_OUT
from paperlab.data.scenes import COLOURS, SHAPES, Scenes, captions, draw_scenes, render
from paperlab.devices import generator, seed_everything
from paperlab.nn.denoiser import Denoiser, guided
from paperlab.nn.diffusion import diffuse, sample, velocity
from paperlab.nn.resnet import ResNet
from paperlab.training import fit
from paperlab.zoo.language import VOCAB, sentences, tokenizer
from paperlab.zoo.scores import mean, share

BATCH, SIZE = 64, 16
SCALE = 1.4  # of the objects: at 16 pixels those of scale 1 are hard to tell apart, and two of 1.5 may find no room
UNREAD = 0.1  # share of the pictures that are shown without their caption
NOISE = 2**40  # the noise has seeds of its own: with the scenes' seed it would tell what is in the scene
PAIRS = len(SHAPES) * len(COLOURS)
FLOOR = 0.1  # what is there has 1 of the reader's softmax, or 1/2 where there are two, but for its doubts
SEEDS = 4  # pictures of each of the one-object captions, at each setting
CONTRAST = 0.15  # by how much a pixel must differ from the background to be part of an object
ASKED = (
    "a red circle.",
    "a blue cross.",
    "a big yellow triangle.",
    "a white ring at the top.",
    "a green square and a pink bar.",
    "a purple ring left of an orange square.",
)


def painter(**changes: int) -> Denoiser:
    """An untrained `pocket-diffusion`, or a sibling that differs by ``changes`` of its sizes."""
    model = Denoiser(VOCAB, **({"pad": tokenizer().pad} | changes))
    model.tokenizer = tokenizer()
    return model


class PaintingTask:
    """Fresh scenes at every step, one picture in ten without its caption; mean square error of the velocity.

    The times of a batch are evenly spaced from a random one on: each is uniform, and the loss varies less.
    """

    seen_per_step = BATCH

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def loss(self, model: nn.Module, step: int) -> Tensor:
        """The loss of the step's pictures."""
        scenes = draw_scenes(BATCH, seed=step, objects=(1, 2), scale=SCALE)
        pictures = (2 * render(scenes, SIZE) - 1).to(self.device)
        g = generator(NOISE + step)
        told = (torch.rand(BATCH, generator=g) >= UNREAD).tolist()
        texts = [e.answer if kept else "" for e, kept in zip(captions(scenes, seed=step), told, strict=True)]
        times = ((torch.arange(BATCH) + torch.rand((), generator=g)) / BATCH).to(self.device)
        noise = torch.randn(pictures.shape, generator=g).to(self.device)
        found = model(diffuse(pictures, noise, times), times, sentences(texts).to(self.device))
        return F.mse_loss(found.float(), velocity(pictures, noise, times))


def paint(
    model: Denoiser,
    texts: Sequence[str],
    *,
    seed: int,
    guidance: float = 3.0,
    steps: int = 25,
    eta: float = 0.0,
    against: str = "",
    batch: int = 64,
) -> Float[Tensor, "n 3 16 16"]:
    """A picture for each caption, between 0 and 1.

    Args:
        model: the denoiser.
        texts: the captions.
        seed: of the noise; the k-th caption begins with the same noise, whatever the captions and the settings.
        guidance: scale of `paperlab.nn.denoiser.guided`.
        steps: of the sampler.
        eta: 0 for DDIM, 1 for the ancestral sampler.
        against: what the guidance leads away from; nothing by default.
        batch: how many are painted together.

    Raises:
        ValueError: no text, a guidance that is not finite, ``steps`` or ``batch`` below 1, ``eta`` outside 0 to 1.
    """
    require_at_least(1, batch=batch)
    device, g = next(model.parameters()).device, generator(seed)
    asked, rival = sentences(texts).to(device), sentences([against]).to(device)
    noise = torch.randn(len(texts), 3, SIZE, SIZE, generator=g).to(device)
    parts = [
        sample(guided(model, some, rival, guidance), x, steps=steps, eta=eta, clip=1.0, generator=g)
        for some, x in zip(asked.split(batch), noise.split(batch), strict=True)
    ]
    return (torch.cat(parts) + 1) / 2


def pairs(scenes: Scenes) -> Bool[Tensor, "n 48"]:
    """Which pairs of shape and colour stand in each scene; the number of a pair is ``8 shape + colour``."""
    number = torch.where(scenes.present, scenes.shape * len(COLOURS) + scenes.colour, PAIRS)
    return torch.zeros(len(scenes), PAIRS + 1, dtype=torch.bool).scatter_(1, number, True)[:, :PAIRS]


def train_reader(steps: int = 700) -> ResNet:
    """A classifier of rendered scenes of one or two objects, some of them noisy: its softmax is shared evenly by what
    is there.
    """
    seed_everything(0)
    net = ResNet(PAIRS, depth=1).train()

    def loss(step: int) -> Tensor:
        scenes = draw_scenes(128, seed=step, objects=(1, 2), scale=SCALE)
        pictures = render(scenes, SIZE)
        noise = 0.1 * torch.rand(len(scenes), 1, 1, 1) * torch.randn_like(pictures)
        there = pairs(scenes).float()
        return F.cross_entropy(net(pictures + noise), there / there.sum(1, keepdim=True))

    fit(net.parameters(), loss, steps=steps, lr=1.2e-2, weight_decay=1e-2, schedule="cosine")
    return net.eval()


@torch.no_grad()
def shown(reader: nn.Module, pictures: Float[Tensor, "n 3 16 16"], objects: int) -> Bool[Tensor, "n 48"]:
    """The likeliest pairs of each picture, at most as many as ``objects``: those that have a `FLOOR` of the softmax.

    Raises:
        ValueError: ``objects`` outside 1 to 48.
    """
    require_between(1, PAIRS, objects=objects)
    share = reader(pictures).softmax(1)
    likeliest = torch.zeros_like(share, dtype=torch.bool).scatter_(1, share.topk(objects).indices, True)
    return likeliest & (share > FLOOR)


def middles(pictures: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 2"]:
    """The middle (x, y) of what is not background, in picture sides; the background is the median colour.

    Where all is background, that is the middle of the picture.
    """
    _, _, h, w = pictures.shape
    ground = pictures.flatten(2).median(2).values[..., None, None]
    object_ = ((pictures - ground).abs().amax(1) > CONTRAST).to(pictures.dtype)
    object_[object_.sum((1, 2)) == 0] = 1
    x, y = ((torch.arange(n).to(pictures) + 0.5) / n for n in (w, h))
    total = object_.sum((1, 2))
    return torch.stack([(object_.sum(1) * x).sum(1) / total, (object_.sum(2) * y).sum(1) / total], dim=1)


def spread(pictures: Float[Tensor, "groups k 3 h w"]) -> Float[Tensor, " groups"]:
    """How far the objects' middles lie apart within each group: root of the mean variance of x and y.

    Raises:
        ValueError: groups of fewer than two pictures.
    """
    require_at_least(2, k=pictures.shape[1])
    return middles(pictures.flatten(0, 1)).unflatten(0, pictures.shape[:2]).var(1).mean(-1).sqrt()


def portrait(model: Denoiser) -> dict:
    """What a card keeps: for each of the captions `ASKED`, one picture without guidance and one with guidance 3, from
    the same noise; a picture is its pixels' bytes, row by row, in base64.
    """
    pictures = []
    for guidance in (1.0, 3.0):
        pixels = (255 * paint(model, ASKED, seed=HELD_OUT, guidance=guidance)).round().byte().movedim(1, -1).cpu()
        pictures += [[caption, guidance, base64.b64encode(each.numpy().tobytes()).decode()]
                     for caption, each in zip(ASKED, pixels, strict=True)]  # fmt: skip
    return {"pictures": pictures}


def named(pair: int) -> str:
    """The caption of one object: ``a red circle.``"""
    shape, colour = SHAPES[pair // len(COLOURS)], COLOURS[pair % len(COLOURS)]
    return f"{'an' if colour == 'orange' else 'a'} {colour} {shape}."


def scores(model: Denoiser, _build: Callable[[], nn.Module]) -> dict[str, dict]:
    """Is what was asked for in the picture, with and without guidance and in fewer steps; how diverse pictures are."""
    reader = train_reader()
    n = PAIRS * SEEDS
    rendered = {k: draw_scenes(2000, seed=HELD_OUT, objects=(k, k), scale=SCALE) for k in (1, 2)}
    found = {}
    for k, scenes in rendered.items():
        right = (shown(reader, render(scenes, SIZE), k) == pairs(scenes)).all(1)
        found[f"reader on rendered scenes, {k} object{'s' * (k > 1)}"] = share(right.tolist())
    texts = [named(pair) for pair in range(PAIRS) for _ in range(SEEDS)]
    asked = torch.eye(PAIRS, dtype=torch.bool).repeat_interleave(SEEDS, 0)
    real = render(rendered[1], SIZE).unflatten(0, (-1, SEEDS))
    for guidance, steps, eta in ((3.0, 25, 0.0), (3.0, 10, 0.0), (3.0, 50, 0.0), (1.0, 25, 0.0), (3.0, 25, 1.0)):
        how = f"guidance {guidance:g}, {steps} steps{' of DDPM' if eta else ''}"
        pictures = paint(model, texts, seed=HELD_OUT, guidance=guidance, steps=steps, eta=eta)
        right = (shown(reader, pictures, 1) == asked).all(1)
        found[f"1 object, {how}"] = share(right.tolist(), 0.8 if (guidance, steps, eta) == (3.0, 25, 0.0) else None)
        if (steps, eta) == (25, 0.0):
            apart = spread(pictures.unflatten(0, (PAIRS, SEEDS))) / spread(real).mean()
            found[f"spread of places over that of real scenes, guidance {guidance:g}"] = mean(apart.tolist())
    two = rendered[2][:n]
    texts = [example.answer for example in captions(two, seed=HELD_OUT, templates=["list"])]
    for guidance in (3.0, 1.0):
        right = shown(reader, paint(model, texts, seed=HELD_OUT, guidance=guidance), 2) & pairs(two)
        found[f"2 objects, both, guidance {guidance:g}"] = share((right.sum(1) == 2).tolist())
        found[f"2 objects, at least one, guidance {guidance:g}"] = share((right.sum(1) >= 1).tolist())
    return found
