"""Sharing: which weights read the same value, as q, k and v do, so that one R serves them all.

A value is followed from a call to the graph that it comes from: an input of a module is what its caller passes. All
graphs of a caller that show two calls have to agree. A wrong answer costs learning speed, and nothing else.
"""

import inspect
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from decorr_fx.passes.capture.trace import Traced
from decorr_fx.passes.match.weights import FoundWeight

GraphKey = tuple[str, int]  # the piece, and the number of its graph
Value = tuple[GraphKey, fx.Node]


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

    def value(self, graph: GraphKey, node: fx.Node) -> Value:
        """Return a value that a node passes on as what it was before."""
        module = self.traced.scratch.get_submodule(graph[0])
        identity = node.op == "call_module" and isinstance(module.get_submodule(str(node.target)), nn.Identity)
        passed = next(iter(node.args), None) if identity else None
        return self.value(graph, passed) if isinstance(passed, fx.Node) else (graph, node)

    def passed(self, value: Value) -> list[Value]:
        """Return what the callers of a module pass as an input, if it is one and all of them pass a value."""
        (piece, _), node = value
        module = self.traced.scratch.get_submodule(piece)
        callers = self.callers[id(module)]
        one_place = len({caller for caller, _ in callers}) == 1 and all(len(calls) == 1 for calls in callers.values())
        if node.op != "placeholder" or not one_place:
            return []
        found = [(caller, _argument(call, module, str(node.target))) for caller, (call,) in callers.items()]
        known = [self.value(caller, passed) for caller, passed in found if isinstance(passed, fx.Node)]
        return known if len(known) == len(found) else []

    def may_run(self, graph: GraphKey) -> bool:
        """Tell whether a forward may take the way of a graph: not with an optional input that no caller passes."""
        module = self.traced.scratch.get_submodule(graph[0])
        inputs = [str(node.target) for node in self.traced.of(graph[0])[graph[1]].nodes if node.op == "placeholder"]
        return all(self._is_passed(module, name) for name in inputs if name in _optional(module))

    def _is_passed(self, module: nn.Module, name: str) -> bool:
        callers = self.callers[id(module)]
        for (piece, _), calls in callers.items():
            caller = self.traced.scratch.get_submodule(piece)
            for passed in (_argument(call, module, name) for call in calls):
                handed_on = isinstance(passed, fx.Node) and passed.op == "placeholder"
                if handed_on and str(passed.target) in _optional(caller) and not self._is_passed(caller, passed.target):
                    continue
                if passed is not None:
                    return True
        return not callers  # of the whole model nothing is known

    def levels(self, values: Iterable[Value]) -> Iterator[set[Value]]:
        """Yield what a call reads in the graphs of its module, then in those of the callers, as far as it is passed."""
        level = {self.value(*value) for value in values}
        while level:
            yield level
            above = [self.passed(value) for value in level]
            level = {value for found in above for value in found} if all(above) else set()

    def same(self, one: Iterable[Value], other: Iterable[Value]) -> bool:
        """Tell whether two calls read one value: in every graph, of the first module around both, that shows them."""
        by_piece = {graph[0]: level for level in self.levels(one) for graph, _ in level}
        for level in self.levels(other):
            for_one = next((by_piece[graph[0]] for graph, _ in level if graph[0] in by_piece), None)
            if for_one is not None:
                pairs = [(a, b) for a in for_one for b in level if a[0] == b[0] and self.may_run(a[0])]
                return bool(pairs) and all(self._equal(a, b) for a, b in pairs)
        return False

    def _equal(self, one: Value, other: Value) -> bool:
        """Tell whether two values of one graph are the same, by what all callers pass if not by themselves."""
        if one == other:
            return True
        above = {graph: (graph, node) for graph, node in self.passed(other)}
        found = self.passed(one)
        return bool(found) and all(value[0] in above and self._equal(value, above[value[0]]) for value in found)


def _optional(module: nn.Module) -> set[str]:
    return {p.name for p in inspect.signature(module.forward).parameters.values() if p.default is None}


def _argument(call: fx.Node, module: nn.Module, name: str) -> Any:
    """Return what a call passes as the argument `name` of the module's forward."""
    try:
        return inspect.signature(module.forward).bind(*call.args, **call.kwargs).arguments.get(name)
    except TypeError:
        return None


def group_by_input(weights: list[FoundWeight], flow: Flow) -> list[list[FoundWeight]]:
    """Return the weights in groups of the same input, in order; a weight whose input is its own is a group of one."""
    groups: list[list[FoundWeight]] = []
    leaders: dict[Value, list[tuple[list[FoundWeight], list[Value]]]] = defaultdict(list)
    for weight in weights:
        read = _read(weight)
        seen_in = list(dict.fromkeys(value for level in flow.levels(read) for value in level))
        alike = (found for value in seen_in for found in leaders[value])
        joined = next((g for g, other in alike if _fit(g[0], weight) and flow.same(read, other)), None)
        if joined is not None:
            joined.append(weight)
            continue
        groups.append(own := [weight])
        for value in seen_in:
            leaders[value].append((own, read))
    return groups


def _read(weight: FoundWeight) -> list[Value]:
    """Return what the call of the weight reads in each graph that shows it; nothing where several calls use it."""
    found: dict[GraphKey, fx.Node] = {}
    for use in weight.uses:
        if (use.piece, use.graph) in found or use.piece != weight.uses[0].piece:
            return []  # called twice
        passed = use.call.arguments["input"]
        if not isinstance(passed, fx.Node):
            return []
        found[use.piece, use.graph] = passed
    return list(found.items())


def _fit(one: FoundWeight, other: FoundWeight) -> bool:
    """Tell whether one R can serve two weights: equal rows, on one device, and both trained or both not."""

    def rows(weight: FoundWeight) -> tuple[Any, ...]:
        layout, parameter = weight.layout, weight.parameter
        kind = (parameter.dtype, parameter.device, parameter.requires_grad)
        return (layout.groups, layout.channels, layout.taps, weight.geometry, kind)

    return rows(one) == rows(other)
