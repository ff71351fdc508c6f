"""How rows of inputs are seen: by a hook of torch's own layers, and by a watch over the calls of all other forwards."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

import decorr_fx
from decorr_fx import Power
from decorr_fx.passes.rewrite.layer import WatchedLayer
from decorr_fx.runtime.site.state import sites_of
from decorr_fx.runtime.watch import Call, Watch


class Behind(nn.Module):
    """A module that calls a layer, or its weight, in a way of its own."""

    def __init__(self, rule: Callable[[nn.Linear, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.rule = nn.Linear(6, 4), rule

    def forward(self, x: Tensor) -> Tensor:
        return self.rule(self.layer, x)


WAYS: dict[str, Callable[[nn.Linear, Tensor], Tensor]] = {
    "linear": lambda layer, x: F.linear(x, layer.weight, layer.bias),
    "by keyword": lambda layer, x: F.linear(input=x, weight=layer.weight),
    "the layer": lambda layer, x: layer(x),
    "the layer by keyword": lambda layer, x: layer(input=x),
    "cast": lambda layer, x: F.linear(x.double(), layer.weight.double()),
    "transposed": lambda layer, x: x @ layer.weight.T,
    "on the left": lambda layer, x: (layer.weight @ x.mT).mT,
    "addmm": lambda layer, x: torch.addmm(layer.bias, x, layer.weight.t()),
    "standardised": lambda layer, x: F.linear(x, layer.weight - layer.weight.mean(1, keepdim=True)),
    "reshaped": lambda layer, x: F.conv1d(x.T[None], layer.weight.unsqueeze(2))[0].T,
}


@pytest.mark.parametrize("way", WAYS)
def test_rows_are_recorded_once_and_only_where_R_moves(way: str) -> None:
    plain, x = Behind(WAYS[way]), torch.randn(5, 6)
    model = decorr_fx.transform(plain)
    assert isinstance(model, WatchedLayer) == ("the layer" not in way) and type(model.layer) is nn.Linear
    assert torch.equal(model(x), plain(x))
    (site,) = sites_of(model)
    assert site.seen == 5
    torch.testing.assert_close(site.rows[:5].sort(0)[0], x.sort(0)[0])
    model.eval()(x)
    with torch.no_grad():
        model.train()(x)
    site.schedule.due = False
    model(x)
    assert site.seen == 5


@pytest.mark.parametrize("way", WAYS)
def test_folding_is_exact_after_steps(way: str) -> None:
    model, x = decorr_fx.transform(Behind(WAYS[way]), Power(update_every=1)), torch.randn(30, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert [s.steps for s in decorr_fx.stats(model)] == [3]
    assert torch.equal(decorr_fx.fold(model)(x), model(x))


def test_the_watch_ends_with_an_error_of_the_forward() -> None:
    def fails(layer: nn.Linear, x: Tensor) -> Tensor:
        F.linear(x, layer.weight)
        if len(x) == 5:
            raise ValueError("no")
        return x

    model = decorr_fx.transform(Behind(fails))
    with pytest.raises(ValueError, match="no"):
        model(torch.randn(5, 6))
    assert _get_current_function_mode_stack() == []
    model(torch.randn(4, 6))
    assert next(sites_of(model)).seen == 9


SHAPE_ERRORS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 4)), (5, 7)),
    "conv": (lambda: nn.Sequential(nn.Conv2d(64, 16, 3, padding=1)), (4, 8, 16, 16)),
    "watched": (lambda: Behind(WAYS["linear"]), (5, 7)),
}


@pytest.mark.parametrize("name", SHAPE_ERRORS)
def test_an_input_that_does_not_fit_raises_torchs_own_error(name: str) -> None:
    make, shape = SHAPE_ERRORS[name]
    plain, messages = make(), []
    for model in (plain, decorr_fx.transform(plain)):
        with pytest.raises(RuntimeError) as error:
            model(torch.randn(shape))
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_a_hook_sees_the_input_before_those_of_the_user_change_the_output() -> None:
    layer, seen = nn.Linear(6, 4), []
    layer.register_forward_hook(lambda module, args, output: seen.append(args[0]) or output + 1)
    layer.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    model, x = decorr_fx.transform(layer), torch.randn(5, 6)
    torch.testing.assert_close(model(x), F.linear(2 * x, layer.weight, layer.bias) + 1)
    torch.testing.assert_close(model.weight_decorr.rows[:5].sort(0)[0], (2 * x).sort(0)[0])
    assert torch.equal(seen[0], 2 * x)


def test_frozen_weights_of_a_watched_forward_record_nothing() -> None:
    model = decorr_fx.transform(Behind(WAYS["linear"])).requires_grad_(False)
    model(torch.randn(5, 6, requires_grad=True)).sum().backward()
    assert next(sites_of(model)).seen == 0


def test_threads_run_one_model_in_eval_mode() -> None:
    model = decorr_fx.transform(nn.Sequential(nn.Linear(6, 6), Behind(WAYS["linear"])), Power(update_every=1))
    x = torch.randn(50, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    expected, wrong = model.eval()(x).detach(), []

    def serve() -> None:
        wrong.extend(1 for _ in range(50) if not torch.equal(model(x), expected))

    threads = [threading.Thread(target=serve) for _ in range(4)]
    for act in (threading.Thread.start, threading.Thread.join):
        for thread in threads:
            act(thread)
    assert not wrong


def told(weights: list[Tensor], run: Callable[[], Any]) -> list[tuple[int, tuple[int, int] | None]]:
    """Return which weights, and rows of them, are called."""
    found: list[tuple[int, tuple[int, int] | None]] = []

    def tell(index: int, rows: tuple[int, int] | None, call: Call) -> None:
        found.append((index, rows))

    with Watch(weights, tell):
        run()
    return found


def test_of_a_packed_weight_it_tells_the_rows() -> None:
    W, x = nn.Parameter(torch.randn(12, 6)), torch.randn(5, 6)
    assert told([W], lambda: F.linear(x, W)) == [(0, None)]
    assert told([W], lambda: F.linear(x, W[4:8])) == [(0, (4, 8))]
    assert told([W], lambda: [F.linear(x, part) for part in W.chunk(3)]) == [(0, (0, 4)), (0, (4, 8)), (0, (8, 12))]
    assert told([W], lambda: [F.linear(x, part) for part in W.split([2, 10])]) == [(0, (0, 2)), (0, (2, 12))]


def test_it_tells_nothing_of_other_weights_and_of_what_has_no_input() -> None:
    W, other, x = nn.Parameter(torch.randn(6, 6)), torch.randn(6, 6), torch.randn(5, 6)
    assert told([W], lambda: F.linear(x, other)) == []
    assert told([W], lambda: W @ W.T) == []
    assert told([W], lambda: W.square().sum()) == []
    assert told([other, W], lambda: F.linear(x, W)) == [(1, None)]


def test_a_call_tells_the_size_of_its_output() -> None:
    W, sizes = nn.Parameter(torch.randn(4, 3, 3, 3)), []
    with Watch([W], lambda index, rows, call: sizes.append(call.out_size)):
        F.conv2d(torch.randn(2, 3, 8, 9), W, stride=2)
        F.linear(torch.randn(5, 27), W.flatten(1))
    assert sizes == [[3, 4], []]
