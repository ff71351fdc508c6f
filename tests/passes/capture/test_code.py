"""What the code of a forward names, where tracing it shows a part only."""

from collections.abc import Callable
from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor, nn

from decorr_fx.passes.capture.code import may_multiply, parameters_in_forward


def root_with(forward: Callable[..., object]) -> nn.Module:
    module: Any = type(
        "Root", (nn.Module,), {"forward": forward, "helper": lambda self, x: F.linear(x, self.q.weight)}
    )()
    module.q, module.k = nn.Linear(4, 4), nn.Linear(4, 4)
    return module


EVERY = {"q.weight", "q.bias", "k.weight", "k.bias"}


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (lambda self, x: self.q(x), set()),
        (lambda self, x: x.to(self.q.weight.dtype), set()),
        (lambda self, x: x.view(-1, self.q.weight.shape[0]), set()),
        (lambda self, x: F.linear(x, self.q.weight), {"q.weight"}),
        (lambda self, x: self.helper(x), {"q.weight"}),
        (lambda self, x: [F.linear(x, layer.weight) for layer in (self.q, self.k)], EVERY),
        (lambda self, x: x + self.k.bias, {"k.bias"}),
        (lambda self, x: x + self.q.missing.weight, set()),
    ],
)
def test_the_parameters_whose_values_a_forward_reads(forward: Callable[..., object], expected: set[str]) -> None:
    module = root_with(forward)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    assert {names[id(parameter)] for parameter in parameters_in_forward(module)} == expected


class Parent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x @ x.mT


class Child(Parent):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (root_with(lambda self, x: self.q(x)), False),
        (root_with(lambda self, x: self.helper(x)), True),
        (root_with(lambda self, x: [x @ y for y in x]), True),
        (root_with(lambda self, x: x.matmul(x)), True),
        (Child(), True),
        (nn.Linear(2, 2), False),  # code of torch is not followed
    ],
)
def test_whether_a_forward_may_multiply(module: nn.Module, expected: bool) -> None:
    assert may_multiply(module) == expected
