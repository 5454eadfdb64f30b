r"""Four ways to train the same perceptron: backpropagation, and three that never send an error through two layers.

All share `LayerStack` (widths, number of layers, a linear read-out) and the interface ``loss(x, y, g)`` and
``predict(x, g)``, so that a comparison compares the learning rule and nothing else. S independent runs lie side by side
on the leading axis; each has its own data in `train` and its own number in `accuracy`.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from paperlab.checks import require_at_least, require_positive
from paperlab.nn.stacked import StackedLinear
from paperlab.training import fit


def cross_entropy(logits: Float[Tensor, "S b C"], y: Int[Tensor, "S b"]) -> Float[Tensor, ""]:
    """Mean over the batch, sum over the runs, which do not interact."""
    return F.cross_entropy(logits.transpose(1, 2), y, reduction="none").mean(1).sum()


def train(
    model: nn.Module,
    images: Float[Tensor, "S n p"],
    labels: Int[Tensor, "S n"],
    g: torch.Generator,
    *,
    steps: int,
    lr: float | Sequence[float],
    batch: int = 32,
) -> list[float]:
    """AdamW with a cosine rate on random batches, every run on its own images; the loss of each step.

    ``lr`` may hold one rate a run (`paperlab.training.fit`). The leading axis of every parameter must be a multiple of
    S, copy k * S + s belonging to run s.

    Raises:
        ValueError: no image in a batch, not one rate a run, or as in `paperlab.training.fit`.
        FloatingPointError: the loss is no longer finite, with the step at which that happened.
    """
    require_at_least(1, batch=batch)
    if isinstance(lr, Sequence) and len(lr) != len(images):
        raise ValueError(f"lr must hold one rate for each of the {len(images)} runs, got {len(lr)}")
    runs = torch.arange(len(images), device=images.device)[:, None]

    def loss(step: int) -> Tensor:
        pick = torch.randint(images.shape[1], (len(images), batch), generator=g, device=images.device)
        return model.loss(images[runs, pick], labels[runs, pick], g)

    return fit(model.parameters(), loss, steps=steps, lr=lr, weight_decay=1e-3, schedule="cosine")


@torch.no_grad()
def accuracy(
    model: nn.Module, images: Float[Tensor, "S n p"], labels: Int[Tensor, "S n"], g: torch.Generator
) -> list[float]:
    """Share of right answers in each of the S runs."""
    return (model.predict(images, g).argmax(-1) == labels).double().mean(1).tolist()


class _Tanh(torch.autograd.Function):
    """The hyperbolic tangent by way of the sigmoid; keeps its result, which is all that its slope needs."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        y = (2 * x).sigmoid_().mul_(2).sub_(1)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, slope: Tensor) -> Tensor:
        return torch.ops.aten.tanh_backward(slope, *ctx.saved_tensors)


def tanh(x: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    r"""$\tanh x = 2\,\mathrm{sigmoid}(2x) - 1$, several times faster than the CPU kernel for tanh."""
    return _Tanh.apply(x)


def distance(a: Float[Tensor, "S b p"], b: Float[Tensor, "S b p"]) -> Float[Tensor, ""]:
    """Squared distance, mean over the batch, sum over the runs."""
    return F.mse_loss(a, b, reduction="sum") / a.shape[1]


class LayerStack(nn.Module):
    """``depth`` rectified layers of ``width`` units, each with a linear read-out; trained by backpropagation.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, S: int, inputs: int, width: int, depth: int, classes: int) -> None:
        super().__init__()
        require_at_least(1, S=S, inputs=inputs, width=width, depth=depth, classes=classes)
        self.classes = classes
        self.layers = nn.ModuleList(StackedLinear(S, inputs if k == 0 else width, width) for k in range(depth))
        self.heads = nn.ModuleList(StackedLinear(S, width, classes) for _ in range(depth))

    def loss(self, x: Float[Tensor, "S b p"], y: Int[Tensor, "S b"], g: torch.Generator) -> Float[Tensor, ""]:
        """Cross-entropy of the last read-out; gradients pass through every layer."""
        return cross_entropy(self.predict(x, g), y)

    def predict(self, x: Float[Tensor, "S b p"], g: torch.Generator) -> Float[Tensor, "S b C"]:
        """Class scores of the last read-out."""
        for layer in self.layers:
            x = layer(x).relu()
        return self.heads[-1](x)


class LocalClassifiers(LayerStack):
    """Every layer is trained by a classifier of its own; the next layer sees its output, but sends nothing back."""

    def loss(self, x: Float[Tensor, "S b p"], y: Int[Tensor, "S b"], g: torch.Generator) -> Float[Tensor, ""]:
        """Sum of the layers' own cross-entropies."""
        total = x.new_zeros(())
        for layer, head in zip(self.layers, self.heads, strict=True):
            x = layer(x.detach()).relu()
            total = total + cross_entropy(head(x), y)
        return total


class ForwardForward(LayerStack):
    r"""Forward-forward (Hinton, 2022, arXiv:2212.13345): each layer tells true pairs of image, label from false.

    The label enters as C further inputs. Goodness is the mean square of a layer's activity; it should exceed
    ``threshold`` for true pairs (a low one is learned in fewer steps). Only the direction of the activity is passed on:
    the next layer cannot read the goodness off its length.

    Raises:
        ValueError: ``threshold`` is not positive.
    """

    def __init__(self, S: int, inputs: int, width: int, depth: int, classes: int, *, threshold: float = 1.0) -> None:
        super().__init__(S, inputs + classes, width, depth, classes)
        require_positive(threshold=threshold)
        self.threshold = threshold

    def goodness(self, x: Float[Tensor, "S b p"], y: Int[Tensor, "S b"]) -> Float[Tensor, "depth S b"]:
        """Every layer's goodness for images that carry the labels ``y``."""
        h, found = torch.cat([x, F.one_hot(y, self.classes).to(x)], dim=-1), []
        for layer in self.layers:
            h = layer(F.normalize(h.detach(), dim=-1) * h.shape[-1] ** 0.5).relu()
            found.append(h.square().mean(-1))
        return torch.stack(found)

    def loss(self, x: Float[Tensor, "S b p"], y: Int[Tensor, "S b"], g: torch.Generator) -> Float[Tensor, ""]:
        r"""$\sum_l \log(1+e^{\theta - G_l(x,y)}) + \log(1+e^{G_l(x,y') - \theta})$ with a random false label $y'$."""
        false = (y + torch.randint(1, self.classes, y.shape, generator=g, device=y.device)) % self.classes
        good, bad = self.goodness(x.repeat(1, 2, 1), torch.cat([y, false], dim=1)).chunk(2, dim=-1)
        return (F.softplus(self.threshold - good) + F.softplus(bad - self.threshold)).mean(-1).sum()

    def predict(self, x: Float[Tensor, "S b p"], g: torch.Generator) -> Float[Tensor, "S b C"]:
        """The total goodness of each label, tried in turn; without the first layer where there are more."""
        skip = 1 if len(self.layers) > 1 else 0
        tried = [torch.full(x.shape[:2], c, device=x.device) for c in range(self.classes)]
        return torch.stack([self.goodness(x, y)[skip:].sum(0) for y in tried], dim=-1)


class TargetPropagation(LayerStack):
    r"""Difference target propagation (Lee et al., 2015, arXiv:1412.7525): targets travel down through learned inverses.

    The last layer's target is one step of size ``reach`` down its own classifier's loss. Below,
    $\hat h_{l-1} = h_{l-1} - g_l(h_l) + g_l(\hat h_l)$, and each layer moves its output to its target.

    Raises:
        ValueError: ``reach`` or ``jitter`` is not positive.
    """

    def __init__(
        self, S: int, inputs: int, width: int, depth: int, classes: int, *, reach: float = 0.5, jitter: float = 0.1
    ) -> None:
        super().__init__(S, inputs, width, depth, classes)
        require_positive(reach=reach, jitter=jitter)
        self.reach, self.jitter = reach, jitter
        self.inverses = nn.ModuleList(StackedLinear(S, width, width) for _ in range(depth - 1))  # of layers 2, 3, …

    def loss(self, x: Float[Tensor, "S b p"], y: Int[Tensor, "S b"], g: torch.Generator) -> Float[Tensor, ""]:
        """The read-out's cross-entropy, each layer's distance to its target, each inverse's error on jittered input."""
        outputs, h = [], x
        for layer in self.layers:
            h = tanh(layer(h.detach()))
            outputs.append(h)
        top = h.detach().requires_grad_()
        total = cross_entropy(self.heads[-1](top), y)
        (slope,) = torch.autograd.grad(total, top, retain_graph=True)
        target = top.detach() - self.reach * x.shape[1] * slope  # the slope of each image's own loss
        for k in reversed(range(len(outputs))):
            total = total + distance(outputs[k], target)
            if k > 0:
                inverse, below = self.inverses[k - 1], outputs[k - 1].detach()
                noisy = below + self.jitter * torch.randn(below.shape, generator=g, device=x.device, dtype=x.dtype)
                with torch.no_grad():
                    above = tanh(self.layers[k](noisy))
                    here, there = tanh(inverse(torch.cat([outputs[k], target], dim=1))).chunk(2, dim=1)
                    target = below - here + there
                total = total + distance(tanh(inverse(above)), noisy)
        return total

    def predict(self, x: Float[Tensor, "S b p"], g: torch.Generator) -> Float[Tensor, "S b C"]:
        """Class scores of the last read-out."""
        for layer in self.layers:
            x = tanh(layer(x))
        return self.heads[-1](x)
