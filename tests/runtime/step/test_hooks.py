"""The hooks around `optimizer.step()`: nested steps, closures, errors, and what a step costs."""

import copy
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest
import torch
from optimizers import Wrapper
from torch import Tensor, nn
from torch.nn import functional as F

import decorr_fx
from decorr_fx import ConfigError, Dbp, Power
from decorr_fx.runtime.site.state import sites_of
from decorr_fx.runtime.step import hooks

SOURCES = (str(decorr_fx.__path__[0]), str(decorr_fx.passes.__path__[0]))


def two_layers(**settings: Any) -> nn.Module:
    plain = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    return decorr_fx.transform(plain, Power(**{"update_every": 1, **settings}))


def backward(model: nn.Module, x: Tensor) -> None:
    model.zero_grad()
    model(x).square().sum().backward()


def trained(optimizer: str = "SGD", steps: int = 2) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = two_layers()
    own = getattr(torch.optim, optimizer)(model.parameters(), lr=0.01)
    for _ in range(steps):
        backward(model, torch.randn(9, 5))
        own.step()
    backward(model, torch.randn(9, 5))
    return model, own


def twin(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a copy of both, with the same gradients and rows."""
    other = copy.deepcopy(model)
    again = type(optimizer)(other.parameters(), lr=0.01)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p, own in zip(other.parameters(), model.parameters(), strict=True):
        p.grad = own.grad.clone()
    return other, again


def assert_same(model: nn.Module, other: nn.Module) -> None:
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())


class Fails(Wrapper):
    """An optimizer whose first step raises an error."""

    failed = False

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        if not self.failed:
            self.failed = True
            raise RuntimeError("out of memory")
        return super().step(closure)


def test_a_step_that_raises_an_error_and_is_tried_again_is_one_step() -> None:
    model, optimizer = trained("Adam")
    other, again = twin(model, optimizer)
    fails = Fails(again)
    with pytest.raises(RuntimeError, match="out of memory"):
        fails.step()
    fails.step()
    optimizer.step()
    assert_same(model, other)


def test_a_step_that_raises_an_error_leaves_the_steps_of_others_alone() -> None:
    model, optimizer = trained()
    other, again = twin(model, optimizer)
    broken = Fails(torch.optim.SGD(two_layers().parameters(), lr=0.1))
    own = Fails(torch.optim.SGD(other.parameters(), lr=0.1))
    for one in (broken, own):
        with pytest.raises(RuntimeError, match="out of memory"):
            one.step()
    again.step()
    optimizer.step()
    assert_same(model, other)
    assert hooks._running.steps == []


def test_an_error_inside_of_stepping_moves_no_R() -> None:
    model, _ = trained()
    R = decorr_fx.matrices(model)["0"]
    with pytest.raises(RuntimeError, match="inside"), decorr_fx.stepping(model):
        raise RuntimeError("inside")
    assert torch.equal(decorr_fx.matrices(model)["0"], R)
    assert hooks._running.steps == []


def test_an_error_of_the_closure_is_an_error_of_the_step() -> None:
    model, optimizer = trained()
    other, again = twin(model, optimizer)

    def fails() -> Tensor:
        raise RuntimeError("no data")

    with pytest.raises(RuntimeError, match="no data"):
        again.step(fails)
    again.step()
    optimizer.step()
    assert_same(model, other)


def test_an_error_of_the_rule_names_the_setting() -> None:
    model = decorr_fx.transform(nn.Linear(5, 4), Dbp(decor_lr=lambda step: "fast"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    backward(model, torch.randn(9, 5))
    with pytest.raises(ConfigError, match=r"decor_lr\(0\) returned 'fast'"):
        optimizer.step()


class InTheMiddle(torch.optim.SGD):
    """An optimizer that steps others, of parameters of its own choice, in its step."""

    others: tuple[torch.optim.Optimizer, ...] = ()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = super().step(closure)
        for other in self.others:
            other.step()
        return loss


def test_a_step_of_other_parameters_inside_of_a_step_is_a_step_of_its_own() -> None:
    model, optimizer = trained()
    second, of_second = trained()
    expected, own = twin(model, optimizer)
    expected_second, own_second = twin(second, of_second)
    outer = InTheMiddle(model.parameters(), lr=0.01)
    outer.others = (of_second,)
    outer.step()
    own.step()
    own_second.step()
    assert_same(model, expected)
    assert_same(second, expected_second)


def test_of_nested_steps_the_innermost_makes_the_moves() -> None:
    model, optimizer = trained("Adam")
    other, again = twin(model, optimizer)
    Wrapper(Wrapper(Wrapper(again))).step()
    optimizer.step()
    assert_same(model, other)


def test_an_optimizer_that_owns_a_part_inside_of_one_that_owns_all() -> None:
    model, optimizer = trained()
    other, _ = twin(model, optimizer)
    parts = [torch.optim.SGD(layer.parameters(), lr=0.01) for layer in (other[0], other[2])]

    class All(torch.optim.Optimizer):
        def step(self, closure: Callable[[], Any] | None = None) -> None:
            for part in parts:
                part.step()

    All(other.parameters(), {}).step()
    optimizer.step()
    assert_same(model, other)


def test_steps_of_two_threads_do_not_meet() -> None:
    pairs = [trained() for _ in range(2)]
    twins = [twin(*pair) for pair in pairs]
    barrier = threading.Barrier(2)

    class Waits(torch.optim.SGD):
        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            barrier.wait()
            loss = super().step(closure)
            barrier.wait()
            return loss

    threads = [threading.Thread(target=Waits(model.parameters(), lr=0.01).step) for model, _ in twins]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (model, optimizer), (other, _) in zip(pairs, twins, strict=True):
        optimizer.step()
        assert_same(model, other)


def test_a_closure_that_is_no_keyword_reaches_a_step_with_other_arguments() -> None:
    class Scaled(torch.optim.SGD):
        def step(self, closure: Callable[[], Any] | None = None, *, scale: float = 1.0) -> float:
            with torch.enable_grad():
                loss = closure()
            return scale * float(super().step() or loss.detach())

    model, _ = trained()
    optimizer = Scaled(model.parameters(), lr=0.01)

    def closure() -> Tensor:
        model.zero_grad()
        loss = model(torch.ones(3, 5)).square().sum()
        loss.backward()
        return loss

    expected = float(closure().detach())
    assert optimizer.step(closure, scale=2.0) == pytest.approx(2 * expected)
    assert optimizer.step(closure=closure, scale=0.0) == 0


def test_steps_of_optimizers_of_plain_models_do_nothing() -> None:
    two_layers()
    plain = nn.Linear(5, 4)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    plain(torch.randn(3, 5)).sum().backward()
    expected = plain.weight.detach() - 0.1 * plain.weight.grad
    optimizer.step()
    torch.testing.assert_close(plain.weight.detach(), expected)
    assert hooks._running.steps == []


def test_lbfgs_says_so_once_for_each_optimizer() -> None:
    model, _ = trained()
    for _ in range(2):
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)

        def closure(optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = model(torch.ones(3, 5)).square().sum()
            loss.backward()
            return loss

        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            optimizer.step(closure)
            optimizer.step(closure)
        assert len(said) == 1 and "LBFGS evaluates the loss several times a step" in str(said[0].message)


def test_a_skipped_step_of_a_compiled_optimizer_is_not_needed_to_compile() -> None:
    model, optimizer = trained("Adam")
    other, again = twin(model, optimizer)
    torch.compile(again.step, backend="eager")()
    optimizer.step()
    for p, expected in zip(other.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, expected)


@contextmanager
def counted_calls() -> Iterator[list[str]]:
    """Yield a list that is filled with the functions of ours that are called meanwhile."""
    calls: list[str] = []

    def note(frame: FrameType, event: str, arg: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(SOURCES):
            calls.append(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        yield calls
    finally:
        sys.setprofile(None)


def calls_of_a_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    x, y = torch.randn(64, 32), torch.randint(10, (64,))
    with counted_calls() as calls:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return len(calls)


def test_a_training_step_in_which_R_moves_calls_few_functions() -> None:
    model = decorr_fx.transform(nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10)))
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(3):
        calls_of_a_step(model, optimizer)
    assert all(site.due for site in sites_of(model))
    assert 100 < calls_of_a_step(model, optimizer) <= 150
    assert [s.steps for s in decorr_fx.stats(model)] == [4, 4]


def test_a_training_step_in_which_no_R_moves_calls_fewer() -> None:
    model = decorr_fx.transform(nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10)))
    optimizer = torch.optim.Adam(model.parameters())
    calls_of_a_step(model, optimizer)
    with decorr_fx.paused(model):
        calls_of_a_step(model, optimizer)
        assert calls_of_a_step(model, optimizer) <= 70


def test_an_idle_step_calls_one_function_a_site() -> None:
    """Nothing is due, and no R has moved: all sites are counted, and no tensor is touched."""
    model = decorr_fx.transform(nn.Sequential(*[nn.Linear(4, 4) for _ in range(50)]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for site in sites_of(model):
        site.schedule.restart(100_000)
    model(torch.randn(3, 4)).sum().backward()
    with decorr_fx.paused(model):
        optimizer.step()
        calls = []
        for _ in range(40):
            with counted_calls() as of_step:
                optimizer.step()
            calls.append(len(of_step))
    assert min(calls) <= 50 + 20
    assert max(calls) <= 2 * 50 + 20  # where a step would be due if it were not paused
