"""Comparing the outputs of two models."""

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tools.zoo.examples import named_tensors

TOLERANCE = 1e-4  # of outputs, relative to the largest


class Failed(Exception):  # noqa: N818 - not an error of the tool: what a check has found
    """Why a model fails a stage."""


def seed_all(seed: int = 0) -> None:
    """Seed every generator that a forward may draw from."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def largest_error(got: Any, expected: Any) -> float:
    """Return the largest difference of two outputs, each tensor's relative to the largest number in it.

    Raises:
        Failed: they hold other tensors, or tensors of other shapes.
    """
    ours, theirs = named_tensors(got), named_tensors(expected)
    if [name for name, _ in ours] != [name for name, _ in theirs]:
        raise Failed(f"outputs are {[name for name, _ in ours][:5]}, not {[name for name, _ in theirs][:5]}")
    if not ours:
        raise Failed("the outputs hold no tensor to compare")
    return max(_error(name, tensor, other) for (name, tensor), (_, other) in zip(ours, theirs, strict=True))


def require_close(got: Any, expected: Any, what: str, tolerance: float = TOLERANCE) -> float:
    """Return the largest error of the outputs; raise `Failed` where it is above `tolerance`."""
    error = largest_error(got, expected)
    if not error <= tolerance:
        raise Failed(f"{what} differ by {error:.2g} of the largest (allowed: {tolerance:g})")
    return error


def all_finite(tree: Any) -> bool:
    """Tell whether every floating-point output is finite; minus infinity is a mask's, and allowed."""
    return all(
        bool((tensor.isfinite() | tensor.isneginf()).all())
        for _, tensor in named_tensors(tree)
        if tensor.is_floating_point() or tensor.is_complex()
    )


def _error(name: str, got: Tensor, expected: Tensor) -> float:
    if got.shape != expected.shape or got.dtype != expected.dtype:
        raise Failed(f"{name} is {_told(got)}, not {_told(expected)}")
    if not got.numel():
        return 0.0
    if not (expected.is_floating_point() or expected.is_complex()):
        return float((got != expected).any())
    same = (got == expected) | (got.isnan() & expected.isnan())
    difference = (got - expected).abs().masked_fill(same, 0).nan_to_num(nan=torch.inf, posinf=torch.inf)
    largest = expected.abs().masked_fill(~expected.isfinite(), 0).max().clamp(min=1e-12)
    return float(difference.max() / largest)


def _told(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
