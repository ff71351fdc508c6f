"""Families of transformers: a tiny model of each, from a config, with random weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor

from tools.zoo.examples import Example, Library
from tools.zoo.transformers_media import MEDIA
from tools.zoo.transformers_text import TEXT

BATCH = 2
TOKENS = 16
WORDS = 90  # ids that are drawn: less than any of the vocabularies


@dataclass(frozen=True)
class Family:
    """How a family's tiny model is made and called.

    Attributes:
        config: class of the configuration.
        model: class of the model.
        settings: what makes the configuration tiny; a nested pair of class and settings is a configuration in it.
        inputs: names of what the model is called with, and the shape of each where it has one of its own.
    """

    config: str
    model: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, tuple[int, ...] | None] = field(default_factory=lambda: {"input_ids": None})


def library() -> Library:
    """Return the families of transformers."""
    models = {name: partial(_build, Family(*entry)) for name, entry in sorted({**TEXT, **MEDIA}.items())}
    builders: Mapping[str, Callable[[], Example]] = models
    return Library("transformers", builders, {}, ("torch", "transformers"))


def _build(family: Family) -> Example:
    transformers.logging.set_verbosity_error()
    config = _config(family.config, family.settings)
    model = getattr(transformers, family.model)(config)
    return Example(model, {name: _input(name, shape) for name, shape in family.inputs.items()})


def _config(name: str, settings: Mapping[str, Any]) -> Any:
    made = {key: _config(*value) if _is_config(value) else value for key, value in settings.items()}
    return getattr(transformers, name)(**made)


def _is_config(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], dict)


def _input(name: str, shape: tuple[int, ...] | None) -> Tensor:
    """Return an input by its name: ids, masks of ones, or random numbers."""
    size = shape or (BATCH, TOKENS)
    if name.endswith("input_ids") or name == "inputs":
        return torch.randint(3, WORDS, size)  # the first few have a meaning of their own
    if name.endswith("mask"):
        return torch.ones(size, dtype=torch.int64)
    if name in ("bbox", "timesteps", "token_type_ids"):
        return torch.zeros(size, dtype=torch.int64)
    return torch.randn(size)
