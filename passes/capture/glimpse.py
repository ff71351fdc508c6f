"""Glimpses: what can be seen of a forward that no graph is faithful to.

Such a forward runs as it is, so a glimpse may be wrong without harm: it tells which weights are used how, and which
layers read the same value, as far as tracing gets. Each way in which the forward may turn is tried: with and without
its optional arguments, and with every branch on a value taken or not.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import product
from typing import Any

from torch import fx, nn

from decorr_fx.passes.capture.faithful import LayerTracer, random_numbers_kept

MOST_STEPS = 20_000  # of one glimpse: a loop that waits for a value would go on for ever


class GlimpseProxy(fx.Proxy):
    """Stands for a value where Python itself asks for a number: any one will do."""

    def __len__(self) -> int:
        """Agree with how often a loop over a value runs."""
        return 2

    def __index__(self) -> int:
        return 1

    __int__ = __index__

    def __float__(self) -> float:
        return 1.0

    def __ceil__(self) -> int:
        return 1

    __floor__ = __ceil__


class GlimpseTracer(LayerTracer):
    """Traces on where a faithful tracer refuses: a branch goes the way of `answer`, a loop over a value runs twice."""

    def __init__(self, answer: bool) -> None:
        super().__init__()
        self.answer = answer
        self._steps = 0

    def create_args_for_root(self, root_fn: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, list[Any]]:
        """Look at the forward itself, past its decorators: fx cannot give `**kwargs` to a wrapper."""
        arguments: tuple[Any, list[Any]] = super().create_args_for_root(inspect.unwrap(root_fn), *args, **kwargs)
        return arguments

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Add a node, whatever the modes are."""
        self._count()
        return fx.Tracer.create_node(self, *args, **kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Return what stands for the value of a node."""
        return GlimpseProxy(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Take the branch that was asked for."""
        self._count()
        return self.answer

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """Yield the parts that the code names, or two."""
        self._count()
        try:
            return fx.Tracer.iter(self, obj)
        except fx.proxy.TraceError:
            parts: Any = obj
            return iter((parts[0], parts[1]))

    def _count(self) -> None:
        self._steps += 1
        if self._steps > MOST_STEPS:
            raise fx.proxy.TraceError("the glimpse takes too long")


def glimpse(module: nn.Module) -> tuple[fx.Graph, ...]:
    """Return the graphs of the ways that the module's forward may take, each as far as it can be traced."""
    optional = [p.name for p in inspect.signature(module.forward).parameters.values() if p.default is None]
    fixed = [None, dict.fromkeys(optional)] if optional else [None]
    return tuple(_trace(module, concrete, answer) for concrete, answer in product(fixed, (True, False)))


def _trace(module: nn.Module, concrete: dict[str, None] | None, answer: bool) -> fx.Graph:
    tracer = GlimpseTracer(answer)
    tracer.graph = fx.Graph()
    with suppress(Exception), random_numbers_kept():  # tracing runs the user's code on proxies: anything may come
        tracer.trace(module, concrete)
    return tracer.graph
