r"""CNN-SVM: one convolutional trunk, and on top of it either a softmax or a support vector machine, trained end to end.

A support vector machine stops pushing once an example is right by a margin; softmax never does. Which of them should
sit on top of a network can be asked fairly only of twins: same first weights, same batches, same dropout, another loss.

Agarap, "An Architecture Combining Convolutional Neural Network (CNN) and Support Vector Machine (SVM) for Image
Classification" (2017), https://arxiv.org/abs/1712.03541.
"""

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from itertools import groupby
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from paperlab.checks import (
    require_at_least,
    require_between,
    require_finite,
    require_labels,
    require_nonnegative,
    require_one_of,
    require_positive,
)
from paperlab.devices import generator
from paperlab.nn.stacked import StackedLinear
from paperlab.training import eager, fit


def _check(scores: Tensor, labels: Tensor) -> None:
    require_finite(scores=scores)
    require_labels(scores, labels)


def margins(scores: Float[Tensor, "*batch classes"], labels: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch classes"]:
    r"""$t_k s_k$, where $t_k$ is $+1$ for the true class and $-1$ for all others: positive where class $k$ is right.

    Raises:
        ValueError: scores that are not finite, or a label outside the classes.
    """
    _check(scores, labels)
    return scores * (2 * F.one_hot(labels, scores.shape[-1]) - 1)


def l2_svm(scores: Float[Tensor, "*batch classes"], labels: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    r"""One-vs-rest with the squared hinge, $\sum_k \max(0, 1 - t_k s_k)^2$: the paper's CNN-SVM.

    Its slope in $s_k$, $-2 t_k \max(0, 1 - t_k s_k)$, is continuous, and exactly 0 beyond the margin.
    """
    return (1 - margins(scores, labels)).clamp(min=0).square().sum(-1)


def l1_svm(scores: Float[Tensor, "*batch classes"], labels: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    r"""One-vs-rest with the plain hinge, $\sum_k \max(0, 1 - t_k s_k)$: a slope of 1 up to the margin, then 0."""
    return (1 - margins(scores, labels)).clamp(min=0).sum(-1)


def crammer_singer(scores: Float[Tensor, "*batch classes"], labels: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    r"""One hinge for all classes together, $\max(0, 1 - (s_y - \max_{k \ne y} s_k))$: only differences count."""
    _check(scores, labels)
    own = labels[..., None]
    rival = scores.scatter(-1, own, -torch.inf).amax(-1)
    return (1 - (scores.gather(-1, own)[..., 0] - rival)).clamp(min=0)


def softmax(scores: Float[Tensor, "*batch classes"], labels: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    r"""Cross-entropy, $\log\sum_k e^{s_k} - s_y$: the paper's CNN-Softmax. Its slope is never 0."""
    _check(scores, labels)
    return scores.logsumexp(-1) - scores.gather(-1, labels[..., None])[..., 0]


HEADS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "softmax": softmax,
    "L2-SVM": l2_svm,
    "L1-SVM": l1_svm,
    "Crammer-Singer": crammer_singer,
}


def objective(
    head: str,
    scores: Float[Tensor, "*copies batch classes"],
    labels: Int[Tensor, "*copies batch"],
    weight: Float[Tensor, "*copies features classes"],
    c: float | Float[Tensor, "*copies"],
    *,
    means: bool = False,
) -> Float[Tensor, "*copies"]:
    r"""What training minimises: a penalty on the weights of the head alone, and $C$ times the loss of its examples.

    The formula of the paper is $\frac12 \|W\|_F^2 + C \sum_i \ell_i$. The released code takes ``means`` instead,
    $\mathrm{mean}(W^2) + C\, \mathrm{mean}_{i,k}$ of the terms of $\ell_i = \sum_k \ell_{ik}$.

    Raises:
        ValueError: an unknown head, ``c`` not positive, or no examples.
    """
    require_one_of(HEADS, head=head)
    require_positive(c=c)
    require_at_least(1, **{"number of scores": scores.shape[-2]})
    loss, squares = HEADS[head](scores, labels), weight.square()
    if means:
        return squares.mean((-1, -2)) + c * loss.mean(-1) / scores.shape[-1]
    return squares.sum((-1, -2)) / 2 + c * loss.sum(-1)


def c_of_means(c: float, *, examples: int, features: int) -> float:
    r"""The $C$ with which the released means have the same minimum as the formula has with ``c``: $2nC/d$.

    The two differ by the factor $\frac{2}{dK}$ for $n$ examples, $d$ features and $K$ classes, and by nothing else.

    Raises:
        ValueError: an argument that is not positive.
    """
    require_positive(c=c, examples=examples, features=features)
    return 2 * examples * c / features


def by_signs(scores: Float[Tensor, "*batch classes"]) -> Int[Tensor, "*batch"]:
    r"""The released code's prediction, $\arg\max_k \mathrm{sign}(s_k)$: of several equal signs the lowest class wins.

    Where no score is positive, that is class 0 (unless a score is exactly 0).
    """
    classes = torch.arange(scores.shape[-1], 0, -1, device=scores.device)
    return (scores.sign().long() * (scores.shape[-1] + 1) + classes).argmax(-1)


def push(head: str, scores: Float[Tensor, "*batch classes"], labels: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    r"""How hard an example still pushes: the length of its loss's gradient in the scores. 0 means: it has had enough.

    Raises:
        ValueError: an unknown head.
    """
    require_one_of(HEADS, head=head)
    with torch.enable_grad():
        at = scores.detach().requires_grad_()
        (slope,) = torch.autograd.grad(HEADS[head](at, labels).sum(), at)
    return slope.norm(dim=-1)


class StackedConv(nn.Module):
    """``copies`` independent convolutions of stride 1 that keep the image's size, as one grouped convolution.

    Copies and channels share one axis, (batch, copies * channels, height, width). Weights are drawn as
    `torch.nn.Conv2d` draws them.

    Raises:
        ValueError: a size below 1, or a kernel of even size.
    """

    def __init__(self, copies: int, inputs: int, outputs: int, kernel: int, generator: torch.Generator) -> None:
        super().__init__()
        require_at_least(1, copies=copies, inputs=inputs, outputs=outputs, kernel=kernel)
        if kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, got {kernel}")
        bound = 1 / math.sqrt(inputs * kernel**2)
        shape = (copies, outputs, inputs, kernel, kernel)
        self.weight = nn.Parameter(torch.empty(shape).uniform_(-bound, bound, generator=generator))
        self.bias = nn.Parameter(torch.empty(shape[:2]).uniform_(-bound, bound, generator=generator))

    def forward(self, x: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch more_channels h w"]:
        """Convolve the channels of copy c with its own kernels."""
        groups, padding = len(self.weight), self.weight.shape[-1] // 2
        return F.conv2d(x, self.weight.flatten(0, 1), self.bias.flatten(), padding=padding, groups=groups)


class Twins(nn.Module):
    r"""``copies`` of the paper's network; copy $c$ begins with the weights of seed $c$ mod ``seeds``.

    Convolution, ReLU, 2 x 2 max-pool, twice; a fully connected layer with ReLU gives the features $\phi$, dropout thins
    them, and the head scores $s = W^\top \phi + b$. The paper has channels 32 and 64, kernel 5 and 1,024 features for
    images of side 28.

    Raises:
        ValueError: a size below 1, a number of copies that ``seeds`` does not divide, or a side that 4 does not.
    """

    def __init__(
        self,
        copies: int,
        seeds: int,
        *,
        generator: torch.Generator,
        side: int = 8,
        channels: tuple[int, int] = (8, 16),
        kernel: int = 3,
        features: int = 128,
        classes: int = 10,
    ) -> None:
        super().__init__()
        require_at_least(1, copies=copies, seeds=seeds, side=side)
        if copies % seeds or side % 4:
            raise ValueError(
                f"seeds must divide copies, and 4 the side; got {copies} copies, {seeds} seeds, side {side}"
            )
        first, second = channels
        self.conv1 = StackedConv(seeds, 1, first, kernel, generator)
        self.conv2 = StackedConv(seeds, first, second, kernel, generator)
        self.dense = StackedLinear(seeds, second * (side // 4) ** 2, features, generator=generator)
        self.head = StackedLinear(seeds, features, classes, generator=generator)
        with torch.no_grad():
            for layer in (self.conv1, self.conv2, self.dense):
                layer.weight.mul_(math.sqrt(6))  # He's scale: with ReLU the signal keeps its size from layer to layer
                layer.bias.fill_(0.1)
            for w in self.parameters():
                w.data = w.repeat(copies // seeds, *[1] * (w.ndim - 1))

    def features(self, images: Float[Tensor, "sets batch side side"]) -> Float[Tensor, "copies batch features"]:
        r"""$\phi(x)$, copy $c$ looking at set $c$ mod the number of sets. ReLU commutes with the pool before it."""
        sets, copies, kernel = len(images), len(self.head.weight), self.conv1.weight.shape[-1]
        # The first convolution is a matrix product, since all copies that look at a set share its patches.
        patches = F.pad(images, [kernel // 2] * 4).unfold(2, kernel, 1).unfold(3, kernel, 1)
        weight = rearrange(self.conv1.weight, "(k s) o 1 u v -> s (u v) (k o)", s=sets)
        bias = rearrange(self.conv1.bias, "(k s) o -> s 1 (k o) 1 1", s=sets)
        x = rearrange(patches, "s b h w u v -> s (b h w) (u v)") @ weight
        # Max-pooling is many times quicker where channels lie innermost in memory, as they do now.
        x = F.max_pool2d(rearrange(x, "s (b h w) c -> (s b) c h w", h=images.shape[2], w=images.shape[3]), 2)
        x = F.relu(x.unflatten(0, (sets, -1)) + bias, inplace=True)  # a bias commutes with the pool as well
        x = self.conv2(rearrange(x, "s b (k o) h w -> b (k s o) h w", k=copies // sets))
        x = F.relu(F.max_pool2d(x.contiguous(memory_format=torch.channels_last), 2), inplace=True)
        return F.relu(self.dense(rearrange(x, "b (c o) h w -> c b (o h w)", c=copies)), inplace=True)

    def only(self, copies: Int[Tensor, " some"]) -> "Twins":
        """These copies alone, as a network of their own."""
        some = deepcopy(self)
        for w in some.parameters():
            w.data = w.data[copies.to(w.device)]
        return some

    def forward(
        self, images: Float[Tensor, "sets batch side side"], kept: Float[Tensor, "seeds batch features"] | None = None
    ) -> Float[Tensor, "copies batch classes"]:
        """Scores of every copy; ``kept`` multiplies the features, and all copies of a seed share it."""
        phi = self.features(images)
        if kept is not None:
            phi = (phi.unflatten(0, (-1, len(kept))) * kept).flatten(0, 1)
        return self.head(phi)


def train(
    images: Float[Tensor, "sets n side side"],
    labels: Int[Tensor, "sets n"],
    heads: Sequence[str],
    c: Float[np.ndarray, "heads sets"],
    *,
    rate: float,
    seeds: int,
    steps: int,
    seed: int,
    batch: int = 32,
    dropout: float = 0.5,
    **sizes: Any,
) -> Twins:
    """Train trunk and head together, one network for each head and each set of images, all side by side with Adam.

    Copy ``head * sets + set`` has its own ``c``. Sets whose index agrees modulo ``seeds`` share first weights,
    batches and dropout, and so do all heads on a set. The objective is the released one, of means.

    Raises:
        ValueError: ``seeds`` does not divide the number of sets, or as in `Twins`, `objective` and `fit`.
    """
    require_between(0, 0.99, dropout=dropout)
    draws = generator(seed, images.device)
    net = Twins(len(heads) * len(images), seeds, generator=generator(seed), side=images.shape[-1], **sizes).to(images)
    each_c = torch.as_tensor(c).flatten().to(images)
    rows = torch.arange(len(images), device=images.device)[:, None]
    runs, begin = [], 0
    for name, same in groupby(heads):  # neighbours with the same loss go through it together
        end = begin + len(images) * len(list(same))
        runs.append((name, slice(begin, end)))
        begin = end

    def loss(step: int) -> Tensor:
        i = torch.randint(images.shape[1], (seeds, batch), generator=draws, device=images.device)
        shape = (seeds, batch, net.head.weight.shape[1])
        kept = (torch.rand(shape, generator=draws, device=images.device) >= dropout) / (1 - dropout)
        i = i.repeat(len(images) // seeds, 1)
        scores, y = net(images[rows, i], kept.to(images)), labels[rows, i].repeat(len(heads), 1)
        parts = [objective(h, scores[p], y[p], net.head.weight[p], each_c[p], means=True).sum() for h, p in runs]
        return torch.stack(parts).sum()

    fit(net.parameters(), loss, steps=steps, lr=rate, optimizer="adam", schedule="cosine")
    return net.requires_grad_(False)


def refit(
    head: str,
    features: Float[Tensor, "copies n features"],
    labels: Int[Tensor, "copies n"],
    c: float | Float[Tensor, " copies"],
    *,
    classes: int = 10,
    means: bool = False,
    bias: bool = True,
    steps: int = 100,
) -> StackedLinear:
    """A new head on frozen features: the minimum of `objective`, which is convex in the head, by L-BFGS.

    Raises:
        ValueError: features that are not finite, or as in `objective`.
    """
    require_finite(features=features)
    new = StackedLinear(len(features), features.shape[-1], classes).to(features)
    nn.init.zeros_(new.weight)
    nn.init.zeros_(new.bias).requires_grad_(bias)
    learned = [p for p in new.parameters() if p.requires_grad]
    search = eager(torch.optim.LBFGS)(learned, max_iter=steps, tolerance_grad=1e-9, tolerance_change=0, history_size=20,
                               line_search_fn="strong_wolfe")  # fmt: skip

    def closure() -> Tensor:
        search.zero_grad()
        value = (objective(head, new(features), labels, new.weight, c, means=means) / c).sum()  # all of one size
        value.backward()
        return value

    search.step(closure)
    return new.requires_grad_(False)


def spoil(
    images: Float[Tensor, "*batch h w"], generator: torch.Generator, *, noise: float = 0.3, block: int = 3
) -> Float[Tensor, "*batch h w"]:
    """Images with normal noise of deviation ``noise``, clipped to [0, 1], and one black square of side ``block`` each.

    Raises:
        ValueError: ``noise`` is negative, or ``block`` does not fit.
    """
    require_nonnegative(noise=noise)
    require_between(0, min(images.shape[-2:]), block=block)
    *batch, h, w = images.shape
    draw = {"generator": generator, "device": generator.device}
    loud = (images + noise * torch.randn(images.shape, dtype=images.dtype, **draw)).clamp(0, 1)
    top = torch.randint(h - block + 1, (*batch, 1, 1), **draw)
    left = torch.randint(w - block + 1, (*batch, 1, 1), **draw)
    row, col = torch.arange(h, device=top.device)[:, None], torch.arange(w, device=top.device)
    hidden = (row >= top) & (row < top + block) & (col >= left) & (col < left + block)
    return loud.masked_fill(hidden, 0)
