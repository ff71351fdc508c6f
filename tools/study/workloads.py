"""What is trained in a study: models small enough for a CPU, on data that need no network."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pydoc_data.topics import topics
from typing import Protocol

import torch
from torch import Tensor, nn

from tools.train.data import Batch, Split
from tools.train.models import Block, VisionTransformer, build_model
from tools.train.settings import Settings, parse_settings
from tools.train.sources import check_fashion_mnist, load_data

CONTEXT = 64  # characters
SHAPE, CLASSES = (1, 28, 28), 10  # of Fashion-MNIST


class Source(Protocol):
    """Data of a workload."""

    def training_batches(self, batch_size: int, seed: int, device: torch.device) -> Iterator[Batch]:
        """Yield batches for ever."""

    def batches(self, split: Split, batch_size: int, device: torch.device) -> Iterator[Batch]:
        """Yield a whole split once."""


@dataclass(frozen=True)
class Workload:
    """A model, data and a budget of steps.

    Attributes:
        build: returns a new model, with weights from torch's random generator.
        data: what it is trained on.
        steps: the budget.
        batch_size: examples in a step.
    """

    build: Callable[[], nn.Module]
    data: "Dataset"
    steps: int
    batch_size: int = 64


@dataclass(frozen=True)
class Dataset:
    """Where data come from: `load` returns them, split by a seed; `check` raises UsageError where they are others."""

    load: Callable[[int], Source]
    check: Callable[[], None] = lambda: None


class Text:
    """The help texts of Python, character by character: two tenths are held out, for validation and test."""

    def __init__(self) -> None:
        text = "".join(topics[name] for name in sorted(topics))
        self.characters = sorted(set(text))
        numbers = {character: i for i, character in enumerate(self.characters)}
        codes = torch.tensor([numbers[character] for character in text])
        windows = codes[: len(codes) // (CONTEXT + 1) * (CONTEXT + 1)].reshape(-1, CONTEXT + 1)
        tenth = len(windows) // 10
        train, validation, test = windows.split([len(windows) - 2 * tenth, tenth, tenth])
        self.splits = {"train": train, "validation": validation, "test": test}

    def training_batches(self, batch_size: int, seed: int, device: torch.device) -> Iterator[Batch]:
        """Yield windows of text from anywhere in the training part, and the same windows one character later."""
        text, generator = self.splits["train"].flatten(), torch.Generator().manual_seed(seed)
        while True:
            starts = torch.randint(len(text) - CONTEXT, (batch_size,), generator=generator)
            yield _pair(text[starts[:, None] + torch.arange(CONTEXT + 1)].to(device))

    def batches(self, split: Split, batch_size: int, device: torch.device) -> Iterator[Batch]:
        """Yield the windows of a split once."""
        yield from (_pair(windows.to(device)) for windows in self.splits[split].split(batch_size))


def _pair(windows: Tensor) -> Batch:
    return windows[:, :-1], windows[:, 1:]


class CharacterModel(nn.Module):
    """A causal transformer over characters: `[N, T]` to logits `[N, characters, T]`."""

    def __init__(self, characters: int, dim: int = 96, heads: int = 4, depth: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(characters, dim)
        self.position = nn.Parameter(0.02 * torch.randn(CONTEXT, dim))
        self.blocks = nn.Sequential(*(Block(dim, heads, causal=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, characters)

    def forward(self, codes: Tensor) -> Tensor:
        """Return logits of the next character at each position."""
        logits: Tensor = self.head(self.norm(self.blocks(self.embed(codes) + self.position)))
        return logits.transpose(1, 2)


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


def wide_mlp() -> nn.Module:
    """Return three hidden layers of 512 units."""
    sizes = (784, 512, 512, 512)
    hidden = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(512, CLASSES))


def _fashion(seed: int) -> Source:
    return load_data(_fashion_settings(seed))


def _check_fashion() -> None:
    check_fashion_mnist(_fashion_settings(0))


def _fashion_settings(seed: int) -> Settings:
    return parse_settings(["--data", "fashion-mnist", "--seed", str(seed)])


def _digits(seed: int) -> Source:
    return load_data(parse_settings(["--data", "digits", "--seed", str(seed)]))


def _text(seed: int) -> Source:
    return Text()


def _character_model() -> nn.Module:
    return CharacterModel(len(Text().characters))


DIGITS, TEXT, FASHION = Dataset(_digits), Dataset(_text), Dataset(_fashion, _check_fashion)
WORKLOADS: Mapping[str, Workload] = {
    "digits": Workload(partial(build_model, "mlp", (1, 8, 8), CLASSES, 2), DIGITS, 80),
    "cnn": Workload(partial(build_model, "cnn", SHAPE, CLASSES, 2), FASHION, 400),
    "cnn-bn": Workload(partial(build_model, "cnn", SHAPE, CLASSES, 2, batch_norm=True), FASHION, 400),
    "mlp": Workload(wide_mlp, FASHION, 600),
    "vit": Workload(partial(VisionTransformer, SHAPE, CLASSES, patch=7), FASHION, 400),
    "resnet": Workload(narrow_resnet, FASHION, 400),
    "text": Workload(_character_model, TEXT, 400, batch_size=32),
}
