"""What is pruned: networks of the styles of VGG and of ResNet-18, for grey images of 28 x 28."""

from collections.abc import Callable, Mapping

from torch import nn

from tools.common.resnet import CLASSES, narrow_resnet


def vgg() -> nn.Module:
    """Return seven 3x3 convolutions with BatchNorm, four poolings, and two linears on what is flattened."""
    layers: list[nn.Module] = []
    before = 1
    for widths in ((32,), (64, 64), (128, 128), (128, 128)):
        for width in widths:
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            before = width
        layers.append(nn.MaxPool2d(2, ceil_mode=True))
    head = [nn.Flatten(), nn.Linear(4 * before, 256), nn.ReLU(), nn.Linear(256, CLASSES)]
    return nn.Sequential(*layers, *head)


NETS: Mapping[str, Callable[[], nn.Module]] = {"vgg": vgg, "resnet": narrow_resnet}
