"""Sharing: which weights read the same value, as q, k and v do, so that one R serves them all.

A value is followed from a call to the graph that it comes from: an input of a module is what its caller passes. All
graphs of a caller that show two calls have to agree. A wrong answer costs learning speed,
and never exactness: folding is exact with any R.
"""

import inspect
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from decorr_fx.passes.capture.trace import Traced
from decorr_fx.passes.match.weights import FoundWeight

GraphKey = tuple[str, int]  # the piece, and the number of its graph or glimpse


@dataclass(frozen=True)
class Flow:
    """Who calls which module with what, in all graphs."""

    traced: Traced
    callers: dict[int, dict[GraphKey, list[fx.Node]]] = field(default_factory=lambda: defaultdict(dict))

    @classmethod
    def of(cls, traced: Traced) -> "Flow":
        """Find all calls of modules."""
        flow = cls(traced)
        for piece, module in traced.scratch.named_modules():
            for number, graph in enumerate(traced.of(piece)):
                for node in graph.nodes:
                    if node.op == "call_module":
                        child = module.get_submodule(str(node.target))
                        flow.callers[id(child)].setdefault((piece, number), []).append(node)
        return flow

    def origins(self, graph: GraphKey, node: fx.Node) -> dict[GraphKey, fx.Node]:
        """Return where the value of a node comes from, in each of the graphs that show it."""
        module = self.traced.scratch.get_submodule(graph[0])
        if node.op == "call_module" and isinstance(module.get_submodule(str(node.target)), nn.Identity):
            passed = next(iter(node.args), None)
            return self.origins(graph, passed) if isinstance(passed, fx.Node) else {graph: node}
        callers = self.callers[id(module)]
        pieces = {piece for piece, _ in callers}
        if node.op != "placeholder" or len(pieces) != 1 or any(len(calls) > 1 for calls in callers.values()):
            return {graph: node}
        found: dict[GraphKey, fx.Node] = {}
        for caller, (call,) in callers.items():
            passed = _argument(call, module, str(node.target))
            if not isinstance(passed, fx.Node):
                return {graph: node}
            found |= self.origins(caller, passed)
        return found


def _argument(call: fx.Node, module: nn.Module, name: str) -> Any:
    """Return what a call passes as the argument `name` of the module's forward."""
    try:
        return inspect.signature(module.forward).bind(*call.args, **call.kwargs).arguments.get(name)
    except TypeError:
        return None


def group_by_input(weights: list[FoundWeight], flow: Flow) -> list[list[FoundWeight]]:
    """Return the weights in groups of the same input, in order; a weight whose input is its own is a group of one."""
    groups: list[list[FoundWeight]] = []
    leaders: dict[tuple[Any, ...], list[tuple[list[FoundWeight], dict[GraphKey, fx.Node]]]] = defaultdict(list)
    for weight in weights:
        origin = _origin(flow, weight)
        alike = [leaders[value] for value in origin.items()]
        groups_alike = (group for found in alike for group, other in found if _agree(origin, other))
        joined = next((group for group in groups_alike if _fit(group[0], weight)), None)
        if joined is not None:
            joined.append(weight)
            continue
        groups.append(own := [weight])
        for found in alike:
            found.append((own, origin))
    return groups


def _origin(flow: Flow, weight: FoundWeight) -> dict[GraphKey, fx.Node]:
    """Return where the weight's input comes from in each graph that shows it, if one call uses it, else nothing."""
    found: dict[GraphKey, fx.Node] = {}
    seen: set[GraphKey] = set()
    for use in weight.uses:
        if (use.piece, use.graph) in seen or use.piece != weight.uses[0].piece:
            return {}  # called twice
        seen.add((use.piece, use.graph))
        passed = use.call.arguments["input"]
        if isinstance(passed, fx.Node):
            found |= flow.origins((use.piece, use.graph), passed)
    return found


def _agree(one: dict[GraphKey, fx.Node], other: dict[GraphKey, fx.Node]) -> bool:
    return all(other[graph] is node for graph, node in one.items() if graph in other)


def _fit(one: FoundWeight, other: FoundWeight) -> bool:
    """Tell whether one R can serve two weights: equal rows, on one device, and both trained or both not."""

    def rows(weight: FoundWeight) -> tuple[Any, ...]:
        layout, parameter = weight.layout, weight.parameter
        kind = (parameter.dtype, parameter.device, parameter.requires_grad)
        return (layout.groups, layout.channels, layout.taps, weight.geometry, kind)

    return rows(one) == rows(other)
