"""A multilayer perceptron for grey images."""

from itertools import pairwise

from torch import nn

from tools.common.resnet import CLASSES

PIXELS = 784  # of an image of 28 x 28


def wide_mlp() -> nn.Module:
    """Return three hidden layers of 512 units."""
    sizes = (PIXELS, 512, 512, 512)
    hidden = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(512, CLASSES))
