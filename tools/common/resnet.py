"""A narrow residual network for grey images."""

from torch import Tensor, nn

CLASSES = 10  # of the digits and of Fashion-MNIST


class Residual(nn.Module):
    """A basic block of a residual network, with BatchNorm."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Conv2d(before, width, 1, stride, bias=False) if (before, 1) != (width, stride) else None

    def forward(self, x: Tensor) -> Tensor:
        """Return what the block makes of `x`."""
        out = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        return (out + (x if self.shortcut is None else self.shortcut(x))).relu()


def narrow_resnet() -> nn.Module:
    """Return a residual network with the depth of ResNet-18 and a quarter of its width, for grey 28 x 28 images."""
    widths = (16, 16, 32, 32, 64, 64, 128, 128)
    strides = (1, 1, 2, 1, 2, 1, 2, 1)
    blocks = [Residual(b, w, s) for b, w, s in zip((16, *widths), widths, strides, strict=False)]
    stem = [nn.Conv2d(1, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, CLASSES))
