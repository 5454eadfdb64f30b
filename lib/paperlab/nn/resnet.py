"""A residual network for small pictures: three stages, each half as fine and twice as wide as the one before."""

from jaxtyping import Float
from torch import Tensor, nn

from paperlab.checks import require_at_least


class ResidualBlock(nn.Module):
    """Two 3 × 3 convolutions whose result is added to their input (He et al., 2015, arXiv:1512.03385, figure 2).

    Where the block changes size or width, the input passes a 1 × 1 convolution on its way to the sum.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        require_at_least(1, inputs=inputs, outputs=outputs, stride=stride)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        )

    def forward(self, x: Float[Tensor, "batch in h w"]) -> Float[Tensor, "batch out h2 w2"]:
        """The rectified sum of the shortcut and the two convolutions."""
        y = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        return (self.shortcut(x) + y).relu()


class ResNet(nn.Module):
    """``depth`` residual blocks in each of three stages of ``width``, 2 and 4 times ``width`` channels.

    From 16 × 16 pixels the stages are 16, 8 and 4 pixels wide; other sizes divisible by 4 work as well.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, classes: int, *, width: int = 16, depth: int = 2, channels: int = 3) -> None:
        super().__init__()
        require_at_least(1, classes=classes, width=width, depth=depth, channels=channels)
        self.stem = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        sizes = [width, width, 2 * width, 4 * width]
        self.stages = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(a if k == 0 else b, b, stride if k == 0 else 1) for k in range(depth)))
            for a, b, stride in zip(sizes, sizes[1:], (1, 2, 2), strict=False)
        )
        self.head = nn.Linear(4 * width, classes)

    def maps(self, x: Float[Tensor, "batch channels h w"]) -> list[Tensor]:
        """The feature maps after each stage, from fine to coarse; the last is (batch, 4 width, h / 4, w / 4)."""
        x, found = self.stem(x), []
        for stage in self.stages:
            x = stage(x)
            found.append(x)
        return found

    def features(self, x: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch features"]:
        """The last map, averaged over its places: what the head sees."""
        return self.maps(x)[-1].mean((2, 3))

    def forward(self, x: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch classes"]:
        """Class scores."""
        return self.head(self.features(x))
