"""What an optimizer owns is looked up once, and again after each change of its parameters or of the models' weights."""

import sys
from collections.abc import Iterable
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import decorr_fx
from decorr_fx import Power
from decorr_fx.runtime.step import owned
from decorr_fx.runtime.step.owned import owned_by, writes_from_copies


def two_layers() -> nn.Module:
    return decorr_fx.transform(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), Power(update_every=1))


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[int]:
    """Take a step; return how many the R of each layer has taken."""
    model.zero_grad()
    model(torch.randn(9, 5)).square().sum().backward()
    optimizer.step()
    return [s.steps for s in decorr_fx.stats(model)]


def names_of(optimizer: torch.optim.Optimizer) -> list[str]:
    return [site.spec.fqn for site in owned_by(optimizer).sites()]


def test_only_what_the_optimizer_owns() -> None:
    model = two_layers()
    optimizer = torch.optim.SGD([{"params": [model[2].weight]}, {"params": [model[0].bias]}], lr=0.1)
    assert names_of(optimizer) == ["2"]
    assert names_of(torch.optim.SGD(nn.Linear(3, 3).parameters(), lr=0.1)) == []


def test_it_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = two_layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step(model, optimizer)
    look_up, looked = owned._look_up, []
    monkeypatch.setattr(owned, "_look_up", lambda *args: looked.append(1) or look_up(*args))
    for _ in range(5):
        step(model, optimizer)
    assert not looked
    other = two_layers()  # after which any optimizer may own more than before
    step(model, optimizer)
    step(model, optimizer)
    assert len(looked) == 1 and names_of(optimizer) == ["0", "2"] and other is not model


def test_a_group_is_added() -> None:
    model = two_layers()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    assert step(model, optimizer) == [1, 0]
    optimizer.add_param_group({"params": model[2].parameters()})
    assert step(model, optimizer) == [2, 1]


def test_a_group_is_emptied_and_parameters_are_exchanged() -> None:
    model = two_layers()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    step(model, optimizer)
    optimizer.param_groups[0]["params"] = [*model[2].parameters()]
    assert step(model, optimizer) == [1, 1]
    optimizer.param_groups.clear()
    assert names_of(optimizer) == []


def test_weights_are_assigned_and_an_optimizer_is_made_of_them() -> None:
    model = two_layers()
    old = torch.optim.SGD(model.parameters(), lr=0.1)
    step(model, old)
    weights = {key: value.clone() for key, value in decorr_fx.fold(model).state_dict().items()}
    model.load_state_dict(weights, assign=True)
    assert names_of(old) == []
    assert step(model, torch.optim.SGD(model.parameters(), lr=0.1)) == [2, 2]


@pytest.mark.parametrize("forwards", [0, 1])
def test_a_weight_is_replaced_by_hand(forwards: int) -> None:
    model = two_layers()
    old = torch.optim.SGD(model.parameters(), lr=0.1)
    step(model, old)
    model[0].weight = nn.Parameter(torch.randn(4, 5))
    for _ in range(forwards):
        model(torch.randn(9, 5))
    new = torch.optim.SGD(model.parameters(), lr=0.1)
    assert step(model, new) == [2, 2]
    assert names_of(new) == ["0", "2"] and names_of(old) == ["2"]


def test_a_step_of_an_optimizer_leaves_gradients_of_a_weight_that_it_does_not_own_any_more() -> None:
    model = two_layers()
    old = torch.optim.SGD(model.parameters(), lr=0.1)
    step(model, old)
    with decorr_fx.paused(model):
        model[0].weight = nn.Parameter(torch.randn(4, 5))
        model.zero_grad()
        model(torch.randn(9, 5)).square().sum().backward()
        gradient, weight = model[0].weight.grad.clone(), model[0].weight.detach().clone()
        old.step()
    assert torch.equal(model[0].weight.grad, gradient) and torch.equal(model[0].weight, weight)


def test_a_cast_keeps_what_is_owned() -> None:
    model = two_layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step(model, optimizer)
    model.to(torch.bfloat16).to(torch.float32)
    assert names_of(optimizer) == ["0", "2"]
    assert step(model, optimizer) == [2, 2]


def calls_of(optimizer: torch.optim.Optimizer) -> int:
    """Count the calls of Python functions in a step."""
    calls = 0

    def count(frame: FrameType, event: str, arg: Any) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    optimizer.step()
    sys.setprofile(None)
    return calls


def test_an_optimizer_of_another_model_costs_the_same_beside_thousands_of_sites() -> None:
    plain = nn.Linear(8, 8)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    plain(torch.randn(2, 8)).sum().backward()
    one = two_layers()
    for _ in range(2):
        optimizer.step()
    before = calls_of(optimizer)
    models = [decorr_fx.transform(nn.Sequential(*[nn.Linear(8, 8) for _ in range(20)])) for _ in range(20)]
    first, second = calls_of(optimizer), calls_of(optimizer)
    assert second == before and one is not models[0]
    assert calls_of(torch.optim.SGD(plain.parameters(), lr=0.1)) < first + 200  # a look-up is of its own parameters


class Copying(torch.optim.Optimizer):
    """An optimizer that writes parameters from float32 copies, or keeps copies that are something else."""

    def __init__(self, parameters: Iterable[Tensor], copies: bool) -> None:
        super().__init__(parameters, {})
        self.copies = copies

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for p in self.param_groups[0]["params"]:
            copy = self.state[p].setdefault("copy", p.detach().float().clone())
            copy -= 0.01 * p.grad
            p.copy_(copy if self.copies else copy + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("copies", [False, True])
def test_an_optimizer_that_writes_from_copies_is_found(copies: bool, dtype: torch.dtype) -> None:
    parameter = nn.Parameter(torch.randn(4, 3, dtype=dtype))
    optimizer = Copying([parameter], copies)
    assert not writes_from_copies(optimizer, [])  # nothing was stepped yet
    parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    assert writes_from_copies(optimizer, [parameter]) == copies
    parameter.data.add_(1)
    assert writes_from_copies(optimizer, [parameter]) == copies  # looked for once


@pytest.mark.parametrize("x", [torch.randn(5, 3), torch.zeros(5, 3)], ids=["drawn", "zeros"])
def test_adam_has_no_copies(x: Tensor) -> None:
    """Nor where all of the weight and all of its momentum are zero."""
    layer = nn.Linear(3, 4, bias=False)
    nn.init.zeros_(layer.weight)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(x).sum().backward()
    optimizer.step()
    assert not writes_from_copies(optimizer, [*layer.parameters()])
