"""A small network that several ranks train, each on rows of its own."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

ROWS = 6  # of a rank in a step: all ranks together have fewer than R steps on


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(3, 6, 2), nn.Tanh(), nn.Flatten(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))


def batches(count: int, rank: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [rank + torch.randn(ROWS, 3, 2, generator=generator) for _ in range(count)]


def train(model: nn.Module, inputs: list[Tensor], lr: float = 0.05) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    for x in inputs:
        optimizer.zero_grad()
        (model(x) - 0.3).square().mean().backward()
        optimizer.step()


def assert_equal_on_all_ranks(model: nn.Module) -> None:
    for key, value in model.state_dict().items():
        first = value.clone()
        dist.broadcast(first, 0)
        assert torch.equal(value, first), key
