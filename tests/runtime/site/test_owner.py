"""Weights that no optimizer has: one warning, and none where there is an optimizer that has not stepped yet."""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

import decorr_fx
from decorr_fx.runtime.site.owner import PATIENCE


def network() -> nn.Module:
    return decorr_fx.transform(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)))


def backward(model: nn.Module, batches: int, zero: bool = True) -> None:
    for _ in range(batches):
        if zero:
            model.zero_grad()
        model(torch.randn(9, 5)).square().mean().backward()


def step_by_hand(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.1 * p.grad


def test_a_loop_without_an_optimizer_is_said_once() -> None:
    model = network()
    backward(model, PATIENCE - 1)
    with pytest.warns(UserWarning, match=rf"layer '0': after {PATIENCE} backward passes .*decorr_fx.stepping") as said:
        backward(model, 3 * PATIENCE)
    assert len(said) == 1


def test_an_optimizer_of_another_copy_is_none() -> None:
    model = network()
    other = torch.optim.SGD(copy.deepcopy(model).parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="layer '0': after"):
        backward(model, PATIENCE)
    assert other.param_groups


def test_the_whole_training_by_hand_runs_with_one_warning() -> None:
    model = network()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(100):
            backward(model, 1)
            step_by_hand(model)
    assert len(said) == 1
    assert decorr_fx.stats(model).scalars()["decorr/steps"] == 0


def test_stepping_by_hand_is_a_step() -> None:
    model = network()
    for _ in range(3 * PATIENCE):
        backward(model, 1)
        with decorr_fx.stepping(model):
            step_by_hand(model)


def test_gradient_accumulation_is_no_reason() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        backward(model, 64, zero=False)
        optimizer.step()


def test_an_optimizer_that_has_not_stepped_yet_is_found() -> None:
    """The generator of a GAN, through which the critic's loss goes many times before its first step."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    backward(model, 3 * PATIENCE)
    assert optimizer.param_groups


def test_layers_that_are_left_out_of_the_optimizer_on_purpose_are_no_reason() -> None:
    model = network()
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    for _ in range(3 * PATIENCE):
        backward(model, 1)
        optimizer.step()
    assert [s.steps > 0 for s in decorr_fx.stats(model)] == [False, True]


def test_forwards_that_lead_to_no_gradient_are_not_counted() -> None:
    model = network()
    for _ in range(3 * PATIENCE):
        with torch.no_grad():
            model(torch.randn(9, 5))
        model.eval()(torch.randn(9, 5))
        model.train()
    model.requires_grad_(False)
    for _ in range(3 * PATIENCE):
        model(torch.randn(9, 5))


def test_calibration_on_many_batches_is_no_training() -> None:
    decorr_fx.calibrate(network(), [torch.randn(9, 5) for _ in range(3 * PATIENCE)])


def test_lbfgs_owns_its_weights() -> None:
    model, x = network(), torch.randn(9, 5)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=10)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    with pytest.warns(UserWarning, match="LBFGS evaluates the loss several times"):
        optimizer.step(closure)
    for _ in range(5):
        optimizer.step(closure)


def test_a_model_that_is_paused_has_nothing_to_say() -> None:
    model = network()
    with decorr_fx.paused(model):
        backward(model, 3 * PATIENCE)
