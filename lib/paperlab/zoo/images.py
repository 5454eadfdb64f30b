"""The source task of the image classifiers (which of 128 glyphs and textures is this?), and what their features are
worth on real digits, which they have never seen.
"""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from paperlab.data.digits import digits_split
from paperlab.data.glyphs import draw_glyphs
from paperlab.data.held_out import HELD_OUT
from paperlab.devices import seed_everything
from paperlab.training import fit
from paperlab.zoo.scores import mean, share

CLASSES, BATCH, SIZE = 128, 256, 16


class GlyphTask:
    """Fresh images at every step, half of them in colour; cross-entropy with a little label smoothing."""

    seen_per_step = BATCH

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def loss(self, model: nn.Module, step: int) -> Tensor:
        """Mean cross-entropy of the step's images."""
        images, labels = draw_glyphs(BATCH, seed=step, classes=CLASSES, coloured=0.5, size=SIZE, device=self.device)
        return F.cross_entropy(model(images).float(), labels, label_smoothing=0.05)


def as_input(images: Float[Tensor, "n 8 8"]) -> Float[Tensor, "n 3 16 16"]:
    """The digits as the classifiers take pictures: 16 × 16, three equal channels."""
    return F.interpolate(images[:, None], (SIZE, SIZE), mode="bilinear").expand(-1, 3, -1, -1)


def scores(model: nn.Module, build: Callable[[], nn.Module]) -> dict[str, dict]:
    """Accuracy on the source task; a linear probe on the digits, beside the same network trained on them and beside
    raw pixels.
    """
    images, labels = draw_glyphs(4000, seed=HELD_OUT, classes=CLASSES, coloured=0.5, size=SIZE)
    with torch.no_grad():
        right = (model(images).argmax(1) == labels).tolist()
    probe, whole, pixels, few, few_pixels = [], [], [], [], []
    for seed in range(5):
        x, y, x_held, y_held = digits_split(seed)
        seen, held = _features(model, x), _features(model, x_held)
        probe.append(_linear(seen, y, held, y_held))
        pixels.append(_linear(x.flatten(1), y, x_held.flatten(1), y_held))
        whole.append(_trained_on_digits(build, seed, x, y, x_held, y_held))
        for draw in range(4):
            shots = _shots(y, 5, seed=4 * seed + draw)
            few.append(_linear(seen[shots], y[shots], held, y_held))
            few_pixels.append(_linear(x[shots].flatten(1), y[shots], x_held.flatten(1), y_held))
    return {
        "glyphs, accuracy": share(right),
        "digits, linear probe": mean(probe),
        "digits, trained on them": mean(whole),
        "digits, probe - trained": mean(np.subtract(probe, whole), bar=-0.03),
        "digits, probe on pixels": mean(pixels),
        "digits, 5 shots, probe": mean(few),
        "digits, 5 shots, probe - pixels": mean(np.subtract(few, few_pixels), bar=0.0),
    }


@torch.no_grad()
def _features(model: nn.Module, images: Float[Tensor, "n 8 8"]) -> Float[Tensor, "n features"]:
    return model.features(as_input(images))


def _linear(x: Tensor, y: Tensor, x_held: Tensor, y_held: Tensor) -> float:
    """Held-out accuracy of a logistic regression on standardised features."""
    from sklearn.linear_model import LogisticRegression  # here: who only loads a model should not wait for it
    from sklearn.preprocessing import StandardScaler

    scale = StandardScaler().fit(x)
    head = LogisticRegression(C=0.1, max_iter=500).fit(scale.transform(x), y)
    return head.score(scale.transform(x_held), y_held)


def _shots(y: Int[Tensor, " n"], k: int, *, seed: int) -> np.ndarray:
    """Indices of ``k`` examples of each class."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.choice(np.flatnonzero(y == c), k, replace=False) for c in range(10)])


def _trained_on_digits(
    build: Callable[[], nn.Module], seed: int, x: Tensor, y: Tensor, x_held: Tensor, y_held: Tensor
) -> float:
    """Held-out accuracy of the same network, all of it trained on the digits, at the better of two rates."""
    inputs, held = as_input(x), as_input(x_held)
    fresh = np.random.default_rng(seed).permutation(len(x))
    valid, found = fresh[: len(x) // 6], []
    for lr in (1e-3, 4e-3):
        seed_everything(seed)
        net = build().train()
        rows = fresh[len(x) // 6 :]

        def loss(step: int, net: nn.Module = net, rows: np.ndarray = rows) -> Tensor:
            pick = np.random.default_rng((seed, step)).choice(rows, 64)
            return F.cross_entropy(net(inputs[pick]), y[pick])

        fit(net.parameters(), loss, steps=300, lr=lr, schedule="cosine", weight_decay=1e-2)
        net.eval()
        with torch.no_grad():
            found.append(
                [(net(a).argmax(1) == b).float().mean().item() for a, b in ((inputs[valid], y[valid]), (held, y_held))]
            )
    return max(found)[1]
