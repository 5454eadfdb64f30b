r"""Multi-level activation: nested classes as the steps of one staircase.

A tumour's active part lies in its core, and the core in the whole. A softmax spends one channel on each and may put
them in any order; here a single score per pixel climbs a staircase of sigmoids, and the step that it reaches is the
class. What lies further in has passed every step before it, by construction.

Hu, Li, Zhao, Dong, Menze and Piraud (2018), https://arxiv.org/abs/1810.09488; the losses are those of Piraud,
Sekuboyina and Menze (2018), https://arxiv.org/abs/1804.01910.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from paperlab.checks import require_at_least, require_between, require_finite, require_nonempty, require_positive
from paperlab.devices import generator
from paperlab.training import fit

LEVELS = 4  # background, whole, core, active
Scores = Float[Tensor, "nets batch channels h w"]
Labels = Int[Tensor, "nets batch h w"]
Regions = Bool[Tensor, "nets batch cuts h w"]


# ---- The staircase ----------------------------------------------------------------------------------------------


def thresholds(levels: int = LEVELS, h: float = 0.5) -> Float[Tensor, " cuts"]:
    r"""The steps $t_n = h\,(n - C/2)$ for $n = 1 \dots C-1$: spaced by ``h``, symmetric about 0.

    Raises:
        ValueError: fewer than 2 levels, or ``h`` not positive.
    """
    require_at_least(2, levels=levels)
    require_positive(h=h)
    return h * (torch.arange(1, levels) - levels / 2)


def exceedances(x: Float[Tensor, "*pixels"], cuts: Float[Tensor, "*nets cuts"], k: float = 10.0) -> Tensor:
    r"""$\sigma_n(x) = \sigma(k (x - t_n)) = P(y \ge n)$ for every step, on a new last axis.

    The steps rise, so that the values fall along that axis: containment holds whatever x is. ``cuts`` holds one row of
    steps, or one for each entry of the leading axis of ``x``.

    Raises:
        ValueError: ``k`` not positive, or ``cuts`` not rising.
    """
    require_positive(k=k)
    require_at_least(0, **{"rise of cuts": cuts.diff(dim=-1)})
    cuts = cuts.view(cuts.shape[:-1] + (1,) * (x.ndim - cuts.ndim + 1) + cuts.shape[-1:])
    return torch.sigmoid(k * (x[..., None] - cuts))


def staircase(x: Float[Tensor, "*pixels"], cuts: Float[Tensor, "*nets cuts"], k: float = 10.0) -> Tensor:
    r"""The multi-level activation $a(x) = \sum_n \sigma_n(x)$, between 0 and C - 1; a step function as k grows.

    Raises:
        ValueError: as `exceedances`.
    """
    return exceedances(x, cuts, k).sum(-1)


def level_probabilities(x: Float[Tensor, "*pixels"], cuts: Float[Tensor, "*nets cuts"], k: float = 10.0) -> Tensor:
    r"""$P(y = n) = \sigma_n - \sigma_{n+1}$ with $\sigma_0 = 1$, $\sigma_C = 0$, on a new last axis.

    At most $\tanh(kh/4)$ for a level between two steps that are h apart: an inner level is never certain.

    Raises:
        ValueError: as `exceedances`.
    """
    return -F.pad(F.pad(exceedances(x, cuts, k), (1, 0), value=1.0), (0, 1)).diff(dim=-1)


def modified_cross_entropy(x: Tensor, y: Tensor, cuts: Tensor, k: float = 10.0) -> Float[Tensor, "*pixels"]:
    r"""$-\log P(y)$, pixel by pixel. With the step l below level y and the step u above it,

    $$-\log P(y) = \log(1 + e^{-k(x - l)}) + \log(1 + e^{k(x - u)}) - \log(1 - e^{-k(u - l)}):$$

    two binary cross-entropies and a constant. The difference of two sigmoids itself would round to 0.

    Raises:
        ValueError: a label that is no level, or ``k`` not positive.
    """
    require_positive(k=k)
    require_between(0, cuts.shape[-1], y=y)
    steps = F.pad(F.pad(cuts, (1, 0), value=-torch.inf), (0, 1), value=torch.inf).expand(len(x), -1)
    constant = torch.log1p(-torch.exp(-k * steps.diff(dim=1)))  # of each level
    low, high, constant = (row.gather(1, y.flatten(1)).view(y.shape) for row in (steps[:, :-1], steps[:, 1:], constant))
    return F.softplus(k * (low - x)) + F.softplus(k * (x - high)) - constant


def normalised_cross_entropy(x: Tensor, y: Tensor, cuts: Tensor, k: float = 10.0) -> Float[Tensor, "*pixels"]:
    r"""Cross-entropy of $\mathrm{softmax}_n(-k\,|a(x) - n|)$, pixel by pixel.

    Raises:
        ValueError: a label that is no level, or as `exceedances`.
    """
    require_between(0, cuts.shape[-1], y=y)
    distance = (staircase(x, cuts, k)[..., None] - torch.arange(cuts.shape[-1] + 1).to(x)).abs()
    return -(-k * distance).log_softmax(-1).gather(-1, y[..., None])[..., 0]


def squared_difference(x: Tensor, y: Tensor, cuts: Tensor, k: float = 10.0) -> Float[Tensor, "*pixels"]:
    """$(a(x) - y)^2$, pixel by pixel.

    Raises:
        ValueError: a label that is no level, or as `exceedances`.
    """
    require_between(0, cuts.shape[-1], y=y)
    return (staircase(x, cuts, k) - y) ** 2


# ---- The heads: what reads the last feature map, and with which loss ----------------------------------------------


@dataclass(frozen=True)
class Head:
    """Channels a pixel; from (scores, labels, pixel weights, cuts) the loss of each network; P(y ≥ n); the regions.

    ``h`` and ``learn`` say where the steps start and whether they are learnt, one entry a share of the networks.
    """

    channels: int
    loss: Callable[[Tensor, Tensor, Tensor, Tensor], Float[Tensor, " nets"]]
    exceed: Callable[[Tensor, Tensor], Float[Tensor, "nets batch cuts h w"]]
    regions: Callable[[Tensor, Tensor], Regions]
    h: tuple[float, ...] = (0.5,)
    learn: tuple[bool, ...] = (False,)


def _from_softmax(out: Scores, _: Tensor) -> Tensor:
    """P(y ≥ n) as sums of class probabilities, n = 1 … C - 1."""
    return out.softmax(2).flip(2).cumsum(2).flip(2)[:, :, 1:]


def _softmax_regions(out: Scores, _: Tensor) -> Regions:
    return out.argmax(2, keepdim=True) >= torch.arange(1, out.shape[2], device=out.device).view(-1, 1, 1)


def _cross_entropy(out: Scores, y: Labels, weight: Tensor, _: Tensor) -> Float[Tensor, " nets"]:
    nll = -out.log_softmax(2).gather(2, y[:, :, None])[:, :, 0]
    return (weight * nll).mean((1, 2, 3))


def cumulative(y: Int[Tensor, "nets batch h w"], levels: int = LEVELS) -> Regions:
    """The nested regions y ≥ n, n = 1 … C - 1."""
    return y[:, :, None] >= torch.arange(1, levels, device=y.device).view(-1, 1, 1)


def _soft_dice(out: Scores, y: Labels, _: Tensor, cuts: Tensor) -> Float[Tensor, " nets"]:
    """One minus the mean Dice of the nested regions, with probabilities in the place of the prediction."""
    p, truth = _from_softmax(out, cuts), cumulative(y).to(out)
    return 1 - (2 * (p * truth).sum((1, 3, 4)) / (p + truth).sum((1, 3, 4))).mean(1)


def _three_binary(out: Scores, y: Labels, weight: Tensor, _: Tensor) -> Float[Tensor, " nets"]:
    loss = F.binary_cross_entropy_with_logits(out, cumulative(y).to(out), reduction="none")
    return (weight[:, :, None] * loss).sum(2).mean((1, 2, 3))


def _three_chained(out: Scores, y: Labels, weight: Tensor, _: Tensor) -> Float[Tensor, " nets"]:
    """Score n decides only among the pixels that have passed all scores before it."""
    loss = F.binary_cross_entropy_with_logits(out, cumulative(y).to(out), reduction="none")
    asked = F.pad(cumulative(y)[:, :, :-1], (0, 0, 0, 0, 1, 0), value=True)
    return (weight[:, :, None] * asked * loss).sum(2).mean((1, 2, 3))


def _chain(out: Scores, _: Tensor) -> Tensor:
    """P(y ≥ n) as the product of the first n sigmoids: nested as well, with a score for each step."""
    return out.sigmoid().cumprod(2)


def mla(loss: Callable = modified_cross_entropy, k: float = 10.0, h: float = 0.5, learn: bool = False) -> Head:
    """One channel, read by the staircase; ``learn`` makes the steps parameters of the network.

    Raises:
        ValueError: ``k`` or ``h`` not positive.
    """
    require_positive(k=k, h=h)
    return Head(
        channels=1,
        loss=lambda out, y, weight, cuts: (weight * loss(out[:, :, 0], y, cuts, k)).mean((1, 2, 3)),
        exceed=lambda out, cuts: exceedances(out[:, :, 0], cuts, k).movedim(-1, 2),
        regions=lambda out, cuts: out > cuts[:, None, :, None, None],
        h=(h,),
        learn=(learn,),
    )


def together(*heads: Head) -> Head:
    """Several heads as one: each reads an equal share of the networks, in order, and as many channels as it has.

    Raises:
        ValueError: no head.
    """
    require_nonempty(heads=heads)

    def shared(part: str) -> Callable[..., Tensor]:
        def call(out: Scores, *given: Tensor) -> Tensor:
            pieces = zip(heads, *(tensor.chunk(len(heads)) for tensor in (out, *given)), strict=True)
            return torch.cat([getattr(head, part)(own[:, :, : head.channels], *rest) for head, own, *rest in pieces])

        return call

    steps, learn = sum((head.h for head in heads), ()), sum((head.learn for head in heads), ())
    return Head(max(head.channels for head in heads), shared("loss"), shared("exceed"), shared("regions"), steps, learn)


HEADS = {
    "softmax": Head(LEVELS, _cross_entropy, _from_softmax, _softmax_regions),
    "softmax + Dice": Head(LEVELS, _soft_dice, _from_softmax, _softmax_regions),
    "three sigmoids": Head(LEVELS - 1, _three_binary, lambda out, _: out.sigmoid(), lambda out, _: out > 0),
    "three chained": Head(LEVELS - 1, _three_chained, _chain, lambda out, _: _chain(out, _) > 0.5),
    "MLA": mla(),
    "MLA, normalised": mla(normalised_cross_entropy),
    "MLA, squared": mla(squared_difference),
}


# ---- The network --------------------------------------------------------------------------------------------------


class StackedUNet(nn.Module):
    """Residual U-Nets side by side, one a seed, as convolutions in groups; equal seeds share all but the last layer.

    The context pathway has a residual block at each of two scales, joined by a strided convolution; the localisation
    pathway goes back up and takes the finer map along (skip). Leaky ReLU, instance norm. At its finest the network
    works on 2 × 2 pixels at once: they enter as channels, and leave as channels that are laid out as pixels again.

    Raises:
        ValueError: no seed, or ``channels`` or ``width`` below 1.
    """

    def __init__(self, seeds: Sequence[int], channels: int, *, inputs: int = 2, width: int = 8) -> None:
        super().__init__()
        require_nonempty(seeds=seeds)
        require_at_least(1, channels=channels, width=width)
        a, b = width, 2 * width
        shapes = {"stem": (a, 4 * inputs, 3), "fine1": (a, a, 3), "fine2": (a, a, 3),
                  "down": (b, a, 3), "coarse1": (b, b, 3), "coarse2": (b, b, 3),
                  "join": (b, a + b, 3), "last": (4 * channels, b, 1)}  # fmt: skip
        self.nets, self.w = len(seeds), nn.ParameterDict()
        draws = [generator(seed) for seed in seeds]
        for name, (to, of, side) in shapes.items():
            noise = [torch.randn(to, of, side, side, generator=g) for g in draws]
            self.w[name] = nn.Parameter(torch.stack(noise) * ((1 if name == "last" else 2) / (of * side**2)) ** 0.5)
        self.bias = nn.Parameter(torch.zeros(self.nets, 4 * channels))

    def _conv(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        w = self.w[name]
        return F.conv2d(x, w.flatten(0, 1), padding=w.shape[-1] // 2, stride=stride, groups=self.nets)

    def _act(self, x: Tensor) -> Tensor:
        """Instance norm, a channel a group, and leaky ReLU."""
        return F.leaky_relu(F.group_norm(x, x.shape[1]), 0.01, inplace=True)

    def _block(self, x: Tensor, name: str) -> Tensor:
        return x + self._conv(self._act(self._conv(self._act(x), name + "1")), name + "2")

    def folded(self, x: Float[Tensor, "batch nets_inputs h w"]) -> Float[Tensor, "nets batch channels 4 hw"]:
        """From pixels folded 2 × 2 into channels, the networks one after the other, to scores with the same fold."""
        fine = self._act(self._block(self._conv(x, "stem"), "fine"))
        up = self._act(self._block(self._conv(fine, "down", stride=2), "coarse"))
        for d in (-1, -2):  # every pixel twice, along the rows and along the columns
            up = torch.stack([up, up], d).flatten(d - 1, d)
        both = torch.cat([m.unflatten(1, (self.nets, -1)) for m in (fine, up)], 2).flatten(1, 2)
        top = self._act(self._conv(both, "join")).unflatten(1, (self.nets, -1)).permute(1, 2, 0, 3, 4)
        out = torch.baddbmm(self.bias[..., None], self.w["last"].flatten(2), top.flatten(2))
        return out.view(self.nets, -1, 4, len(x), x.shape[2:].numel()).movedim(3, 1).contiguous()

    def forward(self, x: Float[Tensor, "batch inputs h w"]) -> Scores:
        """All networks' scores for the same images; their sides must be divisible by 4."""
        out = self.folded(F.pixel_unshuffle(x, 2).repeat(1, self.nets, 1, 1))
        return F.pixel_shuffle(out.unflatten(-1, [side // 2 for side in x.shape[2:]]).flatten(2, 3), 2)


@dataclass(frozen=True)
class Trained:
    """Networks with the head that reads them and its steps, one row a network."""

    net: StackedUNet
    head: Head
    cuts: Float[Tensor, "nets cuts"]

    @torch.no_grad()
    def scores(self, images: Float[Tensor, "batch inputs h w"]) -> Scores:
        """Every network's scores for the same images."""
        return self.net(images)[:, :, : self.head.channels]

    def take(self, rows: Sequence[int], head: Head | None = None) -> "Trained":
        """Only the networks of these rows; ``head`` reads them, if they are only one head's."""
        net = copy.deepcopy(self.net)
        net.nets = len(rows)
        for weights in net.parameters():
            weights.data = weights.data[rows]
        return Trained(net, head or self.head, self.cuts[rows])

    def __add__(self, other: "Trained") -> "Trained":
        """These networks and then those, read by the head of these."""
        net = copy.deepcopy(self.net)
        net.nets += other.net.nets
        for weights, more in zip(net.parameters(), other.net.parameters(), strict=True):
            weights.data = torch.cat([weights.data, more.data])
        return Trained(net, self.head, torch.cat([self.cuts, other.cuts]))


def class_weights(labels: Int[Tensor, "nets count h w"], levels: int = LEVELS) -> Float[Tensor, "nets levels"]:
    """One over the root of each class's share of the pixels, so scaled that the mean over the pixels is 1.

    Raises:
        ValueError: a network whose images lack a class.
    """
    share = torch.stack([(labels == n).float().mean((1, 2, 3)) for n in range(levels)], 1)
    require_positive(**{"share of every class in labels": share})
    return share.rsqrt() / share.sqrt().sum(1, keepdim=True)


def train(
    head: Head,
    images: Float[Tensor, "nets count inputs h w"],
    labels: Int[Tensor, "nets count h w"],
    *,
    seeds: Sequence[int],
    rates: Sequence[float],
    steps: int,
    batch: int = 4,
) -> Trained:
    """One network a row, each with its own images, seed and learning rate; equal seeds see equal batches.

    Raises:
        ValueError: unequal numbers of rows, seeds and rates, images that are not finite, or as `paperlab.training.fit`.
    """
    require_finite(images=images)
    if not len(images) == len(labels) == len(seeds) == len(rates):
        raise ValueError(f"seeds and rates must name {len(images)} networks, got {len(seeds)} and {len(rates)}")
    net = StackedUNet(seeds, head.channels, inputs=images.shape[2]).to(images.device)
    weight = class_weights(labels).gather(1, labels.flatten(1))
    # Folded once, not at every step: a loss asks of a pixel only that its score, label and weight stand at one place.
    x, y = F.pixel_unshuffle(images, 2), F.pixel_unshuffle(labels[:, :, None], 2).flatten(3)
    weight = F.pixel_unshuffle(weight.view(labels.shape)[:, :, None], 2).flatten(3)
    picks = [torch.randint(images.shape[1], (steps, batch), generator=generator(seed)) for seed in seeds]
    picks, rows = torch.stack(picks, 1).to(images.device), torch.arange(len(seeds), device=images.device)
    start = torch.stack([thresholds(h=h) for h in head.h]).to(images).repeat_interleave(net.nets // len(head.h), 0)
    learn = torch.tensor(head.learn, device=images.device).repeat_interleave(net.nets // len(head.learn))[:, None]
    raw = torch.cat([start[:, :1], start.diff(dim=1).log()], 1)  # the first step and the logarithms of the rises
    raw.requires_grad_(any(head.learn))

    def cuts() -> Tensor:
        return torch.where(learn, torch.cat([raw[:, :1], raw[:, 1:].exp()], 1).cumsum(1), start)

    def loss(step: int) -> Tensor:
        pick = picks[step]
        out = net.folded(x[rows, pick.T].flatten(1, 2))
        own = rows[:, None], pick
        return head.loss(out, y[own], weight[own], cuts() if raw.requires_grad else start).sum()

    lr = list(rates) if len(set(rates)) > 1 else rates[0]
    fit([*net.parameters(), raw], loss, steps=steps, lr=lr, schedule="cosine")
    return Trained(net, head, cuts().detach())


# ---- The measuring rods -------------------------------------------------------------------------------------------


def dice(regions: Bool[Tensor, "*shape h w"], truth: Bool[Tensor, "*#shape h w"]) -> Float[Tensor, "*shape"]:
    """Twice the shared area over the sum of the areas; 1 where both are empty."""
    shared, total = (regions & truth).sum((-2, -1)), regions.sum((-2, -1)) + truth.sum((-2, -1))
    return torch.where(total > 0, 2 * shared / total.clamp(min=1), 1.0)


def violations(exceed: Float[Tensor, "*batch cuts h w"]) -> Float[Tensor, "*batch"]:
    """The share of the pixels where some P(y ≥ n + 1) is greater than P(y ≥ n)."""
    return (exceed.diff(dim=-3) > 0).any(-3).double().mean((-2, -1))


def jumps(levels: Int[Tensor, "*batch h w"], height: int = LEVELS - 1) -> Float[Tensor, "*batch"]:
    """Of the neighbouring pixels on different levels, the share that is ``height`` levels apart; 0 without any.

    Raises:
        ValueError: ``height`` below 1.
    """
    require_at_least(1, height=height)
    steps = torch.cat([levels.diff(dim=d).abs().flatten(-2) for d in (-2, -1)], -1)
    return (steps >= height).sum(-1) / (steps > 0).sum(-1).clamp(min=1)


# ---- The pictures -------------------------------------------------------------------------------------------------

CONTRAST = ((0.0, 0.0), (1.0, 0.2), (0.6, -0.6), (0.8, 1.0))  # of levels 0 to 3, in modality A and B: in no order


def _smooth(count: int, fields: int, size: int, width: float, draws: torch.Generator) -> Tensor:
    """White noise under a Gaussian filter of ``width`` pixels, periodic, with variance 1."""
    along = torch.fft.fftfreq(size)
    filtered = torch.exp(-2 * (torch.pi * width) ** 2 * (along[:, None] ** 2 + along**2))
    noise = torch.randn(count, fields, size, size, generator=draws)
    field = torch.fft.ifft2(torch.fft.fft2(noise) * filtered).real
    return field / field.std((-2, -1), keepdim=True)


def _top(field: Tensor, allowed: Tensor, area: Tensor) -> Tensor:
    """The ``area`` pixels of each field that are highest among those allowed."""
    ranks = field.masked_fill(~allowed, -torch.inf).flatten(1).argsort(descending=True).argsort()
    return (ranks < area[:, None]).view(field.shape) & allowed


def make_images(
    count: int,
    *,
    seed: int,
    nested: bool = True,
    size: int = 32,
    contrast: Sequence[tuple[float, float]] = CONTRAST,
) -> tuple[Float[Tensor, "count 2 size size"], Int[Tensor, "count size size"]]:
    """Two noisy modalities of an irregular blob in a blob in a blob, and the levels 0 to 3.

    With ``nested=False`` the same areas, with the same contrasts, lie in three places beside one another. ``contrast``
    has the brightness of each level in both modalities. A smooth bias field is added to both, modality B has bright
    specks outside the blobs ("vessels"), and every pixel has noise of its own.

    Raises:
        ValueError: ``count`` below 1, a ``size`` below 16, or a negative seed.
    """
    require_at_least(1, count=count)
    require_at_least(16, size=size)
    g = generator(seed)
    share = torch.rand(count, 3, generator=g) * torch.tensor([0.14, 0.2, 0.2]) + torch.tensor([0.14, 0.4, 0.25])
    areas = (share.cumprod(1) * size**2).round()  # of whole, core, active
    grid = torch.arange(size) - (size - 1) / 2
    middle = size * 0.16 * (2 * torch.rand(count, 2, generator=g) - 1)
    turn = 2 * torch.pi * (torch.rand(count, 1, generator=g) + torch.arange(3) / 3)
    apart = torch.stack([turn.cos(), turn.sin()], -1) * size * (0.0 if nested else 0.27)
    centre = (middle[:, None] if nested else middle[:, None] / 2) + apart  # (count, 3, 2)
    away = (grid[:, None] - centre[..., :1, None]) ** 2 + (grid - centre[..., 1:, None]) ** 2
    field = -away / (2 * (size / 6) ** 2) + 0.5 * _smooth(count, 3, size, 2.5, g)
    y = torch.zeros(count, size, size, dtype=torch.long)
    for n in range(3):
        area = areas[:, n] if nested or n == 2 else areas[:, n] - areas[:, n + 1]
        y[_top(field[:, 0] + (n > 0) * field[:, n] if nested else field[:, n], y == (n if nested else 0), area)] = n + 1
    clean = torch.tensor(contrast)[y].movedim(-1, 1)
    specks = (_smooth(count, 1, size, 0.8, g)[:, 0] > 2.1) & (y == 0)
    clean[:, 1] += 1.2 * specks
    return clean + 0.4 * _smooth(count, 2, size, 8.0, g) + 0.5 * torch.randn(clean.shape, generator=g), y
