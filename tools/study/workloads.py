"""What is trained in a study: models small enough for a CPU, on data that need no network."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import nn

from tools.common.mlp import wide_mlp
from tools.common.resnet import CLASSES, narrow_resnet
from tools.study.text import CharacterModel, Text
from tools.train.data import Batch, Split
from tools.train.models import VisionTransformer, build_model
from tools.train.settings import Settings, parse_settings
from tools.train.sources import check_fashion_mnist, load_data

SHAPE = (1, 28, 28)  # of Fashion-MNIST


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
