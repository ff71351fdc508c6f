"""A small network that several ranks train, each on rows of its own."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

ROWS = 6  # of a rank in a step: all ranks together have fewer than R steps on


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(3, 6, 2), nn.Tanh(), nn.Flatten(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))


def batches(count: int, rank: int, rows: int = ROWS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [rank + torch.randn(rows, 3, 2, generator=generator) for _ in range(count)]


def train(model: nn.Module, inputs: Iterable[Tensor], optimizer: torch.optim.Optimizer | None = None) -> None:
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for x in inputs:
        optimizer.zero_grad()
        (model(x) - 0.3).square().mean().backward()
        optimizer.step()


def assert_equal_on_all_ranks(model: nn.Module, group: Any = None) -> None:
    for key, value in model.state_dict().items():
        first = value.clone()
        dist.broadcast(first, group=group, group_src=0)
        assert torch.equal(value, first), key


def assert_same_state(model: nn.Module, other: nn.Module) -> None:
    """Compare all that is saved, bit by bit."""
    for (key, value), expected in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=0, msg=lambda text, key=key: f"{key}: {text}")
