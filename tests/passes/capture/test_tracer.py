"""What tracing sees of a forward: whatever way it takes, as far as it can be told without running it."""

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import decorr_fx
from decorr_fx.passes.capture.tracer import MOST_STEPS, Graphs, trace_forward


def module_with(forward: Callable[..., object]) -> Any:
    module: Any = type("Module", (nn.Module,), {"forward": forward})()
    module.weight, module.other = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))
    module.layer, module.kept = nn.Linear(4, 4), []
    module.register_buffer("count", torch.zeros(()))
    return module


def trace(forward: Callable[..., object]) -> Graphs:
    return trace_forward(module_with(forward))


def called(graph: fx.Graph) -> list[str]:
    """Return what a graph calls on which attributes, in order: `weight` for a linear with that weight."""
    products = (n for n in graph.nodes if n.op == "call_module" or n.target is F.linear)
    return [str(n.target if n.op == "call_module" else n.args[1].target) for n in products]


def length(self: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x, self.weight) if len(x) > 1 else x


def length_of_shape(self: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x, self.weight) if len(x.shape) == 2 else x


def number_of_dimensions(self: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x, self.weight) if x.dim() == 2 or x.ndim == 3 else x


def unpacked_shape(self: nn.Module, x: Tensor) -> Tensor:
    B, T, C = x.shape
    return F.linear(x.reshape(B * T, C), self.weight)


def int_of_a_value(self: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x[: int(x.shape[0])], self.weight)


def float_of_a_value(self: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x / math.sqrt(x.shape[-1]), self.weight)


def rounded(self: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x[: math.ceil(x.shape[0] / 2) + math.floor(x.shape[0] / 2)], self.weight)


def ranged(self: nn.Module, x: Tensor) -> Tensor:
    for _ in range(x.shape[0]):
        x = F.linear(x, self.weight)
    return x


def looped(self: nn.Module, x: Tensor) -> Tensor:
    return torch.stack([F.linear(row, self.weight) for row in x])[0]


def starred(self: nn.Module, *xs: Tensor, **options: Any) -> Tensor:
    return F.linear(xs[0], self.weight) * options["scale"]


def keywords_passed_on(self: nn.Module, x: Tensor, **options: Any) -> Tensor:
    return F.linear(self.layer(x, **options), self.weight)


def gradient_mode(self: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad(), torch.autocast("cpu"):
        return F.linear(x, self.weight)


@pytest.mark.parametrize(
    "forward",
    [
        length, length_of_shape, number_of_dimensions, unpacked_shape, int_of_a_value, float_of_a_value, rounded,
        ranged, looped, starred, keywords_passed_on, gradient_mode,
    ],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_a_forward_that_asks_for_values_shows_its_calls(forward: Callable[..., object]) -> None:
    found = trace(forward)
    assert "weight" in called(found.graphs[0])
    assert found.reason == ""


class TestWaysOfAForward:
    def test_one_without_branches_has_one_graph(self) -> None:
        found = trace(lambda self, x: self.layer(F.linear(x, self.weight)))
        assert [called(graph) for graph in found.graphs] == [["weight", "layer"]]

    def test_both_ways_of_a_branch_on_a_value_are_taken(self) -> None:
        found = trace(lambda self, x: F.linear(x, self.weight) if x.sum() > 0 else F.linear(x, self.other))
        assert [called(graph) for graph in found.graphs] == [["weight"], ["other"]]

    def test_a_check_that_raises_is_passed_on_one_of_them(self) -> None:
        def checks(self: nn.Module, x: Tensor) -> Tensor:
            if x.shape[-1] != 4:
                raise ValueError("wrong width")
            return F.linear(x, self.weight)

        found = trace(checks)
        assert [called(graph) for graph in found.graphs] == [[], ["weight"]]
        assert found.reason == "ValueError: wrong width"

    def test_a_loop_that_waits_for_a_value_ends(self) -> None:
        def waits(self: nn.Module, x: Tensor) -> Tensor:
            while x.norm() > 1:
                x = F.linear(x, self.weight)
            return F.linear(x, self.other)

        found = trace(waits)
        assert "takes too long" in found.reason and len(found.graphs[0].nodes) < MOST_STEPS
        assert [called(graph)[-1] for graph in found.graphs] == ["weight", "other"]

    def test_optional_arguments_are_given_or_not(self) -> None:
        def optional(self: nn.Module, x: Tensor, memory: Tensor | None = None) -> Tensor:
            return F.linear(x, self.weight) if memory is None else F.linear(memory, self.other)

        assert [called(graph) for graph in trace(optional).graphs] == [["other"], ["weight"]]

    def test_all_of_it_makes_four(self) -> None:
        def ways(self: nn.Module, x: Tensor, a: Tensor | None = None) -> Tensor:
            y = F.linear(x, self.weight if x.sum() > 0 else self.other)
            return y if a is None else self.layer(y)

        found = [called(graph) for graph in trace(ways).graphs]
        assert found == [["weight", "layer"], ["other", "layer"], ["weight"], ["other"]]


@fx.wrap
def projected(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight) if x.shape[0] > 1 else x


@fx.wrap
def projected_twice(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return F.linear(x, weight), x


@fx.wrap
def measured(x: Tensor, weight: Tensor) -> Tensor:
    if not isinstance(weight, Tensor):
        raise TypeError("a tensor is needed")
    return x * weight.sum()


class TestFunctionsKeptOutOfGraphs:
    """By `torch.fx.wrap`, as the attention of torchvision's Swin is: its calls are of weights all the same."""

    def test_they_are_looked_into(self) -> None:
        first, second = trace(lambda self, x: projected(x, self.weight)).graphs
        assert called(first) == ["weight"] and called(second) == []
        (graph,) = trace(lambda self, x: projected_twice(x, self.weight)[0]).graphs
        assert called(graph) == ["weight"]

    def test_one_that_cannot_be_traced_stays_one_call(self) -> None:
        (graph,) = trace(lambda self, x: self.layer(measured(x, self.weight))).graphs
        assert called(graph) == ["layer"] and measured in [node.target for node in graph.nodes]

    def test_those_of_an_adapter_are_not(self) -> None:
        (graph,) = trace_forward(module_with(lambda self, x: projected(x, self.weight)), adapted=True).graphs
        assert called(graph) == [] and projected in [node.target for node in graph.nodes]

    def test_R_of_their_weights_moves(self) -> None:
        model = decorr_fx.transform(module_with(lambda self, x: projected(self.layer(x), self.weight)))
        model(torch.randn(5, 4)).sum().backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        assert {site.fqn: site.steps for site in decorr_fx.stats(model)} == {"": 1, "layer": 1}


class TestWhatIsLeft:
    def test_what_cannot_be_traced_is_shown_up_to_there_with_the_reason(self) -> None:
        def fails(self: nn.Module, x: Tensor) -> Tensor:
            y = F.linear(x, self.weight)
            return F.linear(y * {9: 2.0}[len(x)], self.other)

        found = trace(fails)
        assert called(found.graphs[0]) == ["weight"]
        assert found.reason == "KeyError: 2"

    def test_no_random_number_is_drawn(self) -> None:
        def random_numbers(self: nn.Module, x: Tensor) -> Tensor:
            noise = torch.randn(4) * random.random() * np.random.rand()
            if x.sum() > random.random():
                raise ValueError
            return F.linear(x + noise, self.weight)

        module = module_with(random_numbers)
        before = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tolist()
        trace_forward(module)
        assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])
        assert np.random.get_state()[1].tolist() == before[2]

    def test_no_attribute_of_the_module_or_a_child_is_set(self) -> None:
        def sets(self: Any, x: Tensor) -> Tensor:
            self.last = self.layer.last = F.linear(x, self.weight)
            self.count += 1
            self.kept = [x]
            return self.last * torch.tensor(2.0)

        module = module_with(sets)
        before = [(set(vars(one)), dict(one._buffers)) for one in module.modules()]
        count = module.count
        found = trace_forward(module)
        constants = {name for name in vars(module) if name.startswith("_tensor_constant")}
        assert module.count is count and module.kept == [] and len(constants) == 1  # which the graph names
        after = [(set(vars(one)) - constants, dict(one._buffers)) for one in module.modules()]
        assert after == before
        assert found.reason == "" and called(found.graphs[0]) == ["weight"]

    def test_a_decorated_forward_with_keywords_is_looked_at_itself(self) -> None:
        def decorate(forward: Callable[..., Any]) -> Callable[..., Any]:
            def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
                return forward(self, *args, **kwargs)

            wrapper.__wrapped__ = forward  # type: ignore[attr-defined]
            return wrapper

        def inner(self: nn.Module, x: Tensor, memory: Tensor | None = None, **options: Any) -> Tensor:
            return F.linear(x if memory is None else memory, self.weight)

        graphs = trace(decorate(inner)).graphs
        assert [called(graph) for graph in graphs] == [["weight"], ["weight"]]
        inputs = [next(n for n in graph.nodes if n.target is F.linear).args[0].target for graph in graphs]
        assert inputs == ["memory", "x"]
