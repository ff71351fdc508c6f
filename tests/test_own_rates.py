"""With the learning rate that suits the plain model, unchanged, the transformed one learns no slower."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import decorr_fx

SEEDS = 2
Batches = Iterator[tuple[Tensor, Tensor]]
Problem = Callable[[], tuple[nn.Module, Batches]]


def few_features() -> tuple[nn.Module, Batches]:
    """The first model of README, on labels that can be learned; all examples at each step."""
    x = torch.randn(256, 20) @ torch.randn(20, 20) / 4
    y = (x @ torch.randn(20, 3)).argmax(1)
    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 3)), ((x, y) for _ in iter(int, 1))


def untied_output_layer() -> tuple[nn.Module, Batches]:
    """A language model of a chain with frequent and rare characters."""
    frequencies = 1 / torch.arange(1, 93) ** 1.5
    chain = torch.distributions.Dirichlet(frequencies).sample((92,))
    model = nn.Sequential(nn.Embedding(92, 48), nn.Linear(48, 48), nn.GELU(), nn.LayerNorm(48), nn.Linear(48, 92))
    nn.init.normal_(model[4].weight, 0, 0.02)

    def batches() -> Batches:
        while True:
            x = torch.multinomial(frequencies, 256, replacement=True)
            yield x, torch.multinomial(chain[x], 1)[:, 0]

    return model, batches()


def convolutions() -> tuple[nn.Module, Batches]:
    """Convolutions and BatchNorm, on noisy images whose mean is not zero."""
    centres, y = torch.randn(10, 1, 7, 7), torch.randint(10, (1000,))
    x = F.interpolate(centres[y], scale_factor=2, mode="bilinear") + torch.randn(1000, 1, 14, 14) + 2
    layers = [layer for i, o in ((1, 16), (16, 32))
              for layer in (nn.Conv2d(i, o, 3, 2, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())]  # fmt: skip
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10)]
    rows = iter(lambda: torch.randint(1000, (32,)), None)
    return nn.Sequential(*layers, *head), ((x[i], y[i]) for i in rows)


def last_loss(problem: Problem, make: Callable[..., torch.optim.Optimizer], transformed: bool, seed: int) -> float:
    """Return the mean loss of the last 20 of 120 steps."""
    torch.manual_seed(seed)
    model, batches = problem()
    model = decorr_fx.transform(model) if transformed else model
    torch.manual_seed(seed)
    optimizer, losses = make(model.parameters()), []
    for _, (x, y) in zip(range(120), batches, strict=False):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return sum(losses[-20:]) / 20


CASES: dict[str, tuple[Problem, Callable[..., torch.optim.Optimizer]]] = {
    "few features, Adam": (few_features, lambda p: torch.optim.Adam(p, lr=3e-3)),
    "untied output layer, AdamW": (untied_output_layer, lambda p: torch.optim.AdamW(p, lr=1e-3)),
    "convolutions, SGD": (convolutions, lambda p: torch.optim.SGD(p, lr=0.1)),
    "convolutions, Adam": (convolutions, lambda p: torch.optim.Adam(p, lr=1e-3)),
}


@pytest.mark.parametrize("name", CASES)
def test_no_slower_than_plain_at_the_rate_of_plain(name: str) -> None:
    plain, transformed = (
        sum(last_loss(*CASES[name], transformed, seed) for seed in range(SEEDS)) for transformed in (False, True)
    )
    assert transformed < 0.95 * plain
