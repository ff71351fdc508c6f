"""The tool's own small models, and torchvision's by name."""

from collections.abc import Callable
from copy import deepcopy
from difflib import get_close_matches
from math import gcd, prod
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from tools.common.errors import UsageError, first_line
from tools.common.ranks import ranks

Shape = tuple[int, int, int]

WITH_BATCH_NORM = ("cnn", "mlp")


def build_model(name: str, shape: Shape, classes: int, batch_size: int, batch_norm: bool = False) -> nn.Module:
    """Return a new model for images of `shape` (channels, height, width), checked by one forward in training.

    Raises:
        UsageError: there is no such model, or it does not take images of this shape.
    """
    if batch_norm and name not in WITH_BATCH_NORM:
        raise UsageError(f"--batch-norm is for {' and '.join(WITH_BATCH_NORM)}, not for {name}")
    if name not in OWN and name not in torchvision_names():
        raise UsageError(f"there is no model {name!r}; {_suggestion(name)}")
    try:
        model = _make(name, shape, classes, batch_norm)
        output = _try(model, shape, min(batch_size, 2))
    except (RuntimeError, AssertionError, ValueError, IndexError, ZeroDivisionError) as error:
        images = f"{batch_size} images of {'x'.join(map(str, shape))}"
        advice = "try another --size or --batch-size"
        raise UsageError(f"{name} does not train on {images}: {first_line(error)}; {advice}") from None
    if ranks() > 1 and not isinstance(output, Tensor):
        raise UsageError(
            f"{name} has auxiliary outputs, which several ranks cannot leave alone: use one, or another --model"
        )
    return model


def is_own(name: str) -> bool:
    """Return whether the model is the tool's own; torchvision's see 3 channels."""
    return name in OWN


def torchvision_names() -> list[str]:
    """Return the names of torchvision's classifiers."""
    names: list[str] = torchvision.models.list_models(module=torchvision.models)
    return names


def logits_of(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Return the logits; models with auxiliary heads give them first, in training."""
    return output if isinstance(output, Tensor) else output[0]


def cnn(shape: Shape, classes: int, batch_norm: bool) -> nn.Module:
    """Four 3x3 convolutions, two of them of stride 2, the mean over space, and a linear: 66,000 parameters."""
    model = nn.Sequential()
    before = shape[0]
    for i, width in enumerate((32, 32, 64, 64), start=1):
        model.add_module(f"conv{i}", nn.Conv2d(before, width, 3, stride=2 - i % 2, padding=1))
        model.add_module(f"norm{i}", nn.BatchNorm2d(width) if batch_norm else nn.Identity())
        model.add_module(f"relu{i}", nn.ReLU())
        before = width
    model.add_module("pool", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    model.add_module("head", nn.Linear(before, classes))
    return model


def mlp(shape: Shape, classes: int, batch_norm: bool) -> nn.Module:
    """Three hidden layers of 256 units."""
    model = nn.Sequential()
    model.add_module("flatten", nn.Flatten())
    before = prod(shape)
    for i in (1, 2, 3):
        model.add_module(f"hidden{i}", nn.Linear(before, 256))
        model.add_module(f"norm{i}", nn.BatchNorm1d(256) if batch_norm else nn.Identity())
        model.add_module(f"relu{i}", nn.ReLU())
        before = 256
    model.add_module("head", nn.Linear(before, classes))
    return model


class Attention(nn.Module):
    """Self-attention over tokens `[batch, tokens, dim]`, made of four plain linears."""

    def __init__(self, dim: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens that have looked at each other."""
        q, k, v = (self._split(linear(x)) for linear in (self.q, self.k, self.v))
        mixed: Tensor = self.out(
            F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2)
        )
        return mixed

    def _split(self, x: Tensor) -> Tensor:
        return torch.unflatten(x, -1, (self.heads, -1)).transpose(1, 2)


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, dim: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim, heads, causal)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens after attention and the feed-forward layers."""
        attended: Tensor = x + self.attention(self.norm1(x))
        fed: Tensor = self.down(F.gelu(self.up(self.norm2(attended))))
        return attended + fed


class VisionTransformer(nn.Module):
    """Square patches of so many pixels a side, learned positions, three blocks, the mean over tokens and a linear."""

    def __init__(self, shape: Shape, classes: int, patch: int, dim: int = 64, heads: int = 4, depth: int = 3) -> None:
        super().__init__()
        channels, height, width = shape
        self.embed = nn.Conv2d(channels, dim, patch, stride=patch)
        self.position = nn.Parameter(0.02 * torch.randn(height // patch * (width // patch), dim))
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits `[batch, classes]`."""
        tokens = self.embed(images).flatten(2).transpose(1, 2) + self.position
        logits: Tensor = self.head(self.norm(self.blocks(tokens)).mean(1))
        return logits


def patch_size(height: int, width: int) -> int:
    """Return the side of a patch, which divides the image: about a seventh of it; 8 gives 2, 28 and 32 give 4."""
    common = gcd(height, width)
    most = max(2, common // 7)
    return max(side for side in range(1, most + 1) if common % side == 0)


def vit(shape: Shape, classes: int, batch_norm: bool) -> nn.Module:
    """A small vision transformer; it has LayerNorm, so that `batch_norm` does not concern it."""
    return VisionTransformer(shape, classes, patch_size(*shape[1:]))


OWN: dict[str, Callable[[Shape, int, bool], nn.Module]] = {"cnn": cnn, "mlp": mlp, "vit": vit}


def _make(name: str, shape: Shape, classes: int, batch_norm: bool) -> nn.Module:
    if name in OWN:
        return OWN[name](shape, classes, batch_norm)
    model: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=classes)
    return model


def _try(model: nn.Module, shape: Shape, batch: int) -> Any:
    with torch.no_grad():
        return deepcopy(model).train()(torch.zeros(batch, *shape))  # a copy: BatchNorm must not remember this


def _suggestion(name: str) -> str:
    close = get_close_matches(name, [*OWN, *torchvision_names()], cutoff=0.5)
    own = f"use {', '.join(OWN)} or the name of a torchvision classifier"
    return f"did you mean {' or '.join(close)}?" if close else own
