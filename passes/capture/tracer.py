"""Tracing for planning: what a forward calls, as far as can be seen without running it.

No graph is ever run: each forward runs as it was written. So a graph may be wrong without harm: it says which weights
are used how, and which layers read the same value. Each way in which a forward may turn is tried: with and without its
optional arguments, and with every branch on a value taken or not.
"""

import inspect
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import fx, nn
from torch.fx.proxy import Attribute, TraceError

MOST_STEPS = 20_000  # of one graph: a loop that waits for a value would go on for ever


@dataclass(frozen=True)
class Graphs:
    """The graphs of the ways that a forward may take, and the first reason why one of them is not complete, if any."""

    graphs: tuple[fx.Graph, ...]
    reason: str = ""


class LayerProxy(fx.Proxy):
    """Stands for a value where Python itself asks for a number: any one will do."""

    def __len__(self) -> int:
        """Agree with how often a loop over a value runs."""
        return 2

    def __index__(self) -> int:
        return 1

    def __float__(self) -> float:
        return 1.0

    def __ceil__(self) -> int:
        return 1

    __floor__ = __ceil__

    def __getattr__(self, name: str) -> "LayerAttribute":
        return LayerAttribute(self, name)


class LayerAttribute(LayerProxy, Attribute):
    """Stands for an attribute of a value, such as its shape."""


class LayerTracer(fx.Tracer):
    """Traces one module's own forward: children are leaves, parameters and buffers are nodes.

    A branch on a value goes the way of `answer`, a loop over a value runs twice.
    """

    proxy_buffer_attributes = True

    def __init__(self, answer: bool, opens: bool) -> None:
        super().__init__()
        self.answer = answer
        self.opens = opens  # look into functions under `torch.fx.wrap`, too
        self.asked = False
        self._steps = 0

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Treat every child as a leaf."""
        return True

    def create_args_for_root(self, root_fn: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, list[Any]]:
        """Look at the forward itself, past its decorators: fx cannot give `**kwargs` to a wrapper."""
        arguments: tuple[Any, list[Any]] = super().create_args_for_root(inspect.unwrap(root_fn), *args, **kwargs)
        return arguments

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Add a node."""
        self._count()
        return super().create_node(*args, **kwargs)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *others: Any, **more: Any) -> Any:
        """Return what stands for the value of a call; a function that a library keeps out of graphs is looked into."""
        if self.opens and kind == "call_function" and _is_of_a_library(target):
            with suppress(Exception):  # its code runs on proxies: anything may come
                found = target(*args, **kwargs)
                if isinstance(found, fx.Proxy):  # fx marks its node
                    return found
        return super().create_proxy(kind, target, args, kwargs, *others, **more)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Return what stands for the value of a node."""
        return LayerProxy(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Take the branch that was asked for."""
        self.asked = True
        self._count()
        return self.answer

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """Yield the parts that the code names, or two."""
        self._count()
        try:
            return super().iter(obj)
        except TraceError:
            parts: Any = obj
            return iter((parts[0], parts[1]))

    def keys(self, obj: fx.Proxy) -> Any:
        """Pass no keywords on: which there are is not known."""
        return iter(())

    def _count(self) -> None:
        self._steps += 1
        if self._steps > MOST_STEPS:
            raise TraceError("tracing it takes too long")


def _is_of_a_library(function: Any) -> bool:
    """Tell whether a function is neither torch's nor Python's own."""
    known = ("torch.", "_operator", "builtins", "math")
    return isinstance(function, FunctionType) and not f"{function.__module__}.".startswith(known)


def trace_forward(module: nn.Module, adapted: bool = False) -> Graphs:
    """Return the graphs of the ways that the module's forward may take, each as far as it can be traced.

    An adapter says by `torch.fx.wrap` what is not to be looked into.
    """
    parameters = inspect.signature(module.forward).parameters.values()
    optional = [p.name for p in parameters if p.default is None]
    fixed = [None, dict.fromkeys(optional)] if optional else [None]
    traced: list[tuple[LayerTracer, str]] = []
    for concrete in fixed:
        traced.append(_trace(module, concrete, True, not adapted))
        if traced[-1][0].asked:
            traced.append(_trace(module, concrete, False, not adapted))
    reason = next((reason for _, reason in traced if reason), "")
    return Graphs(tuple(tracer.graph for tracer, _ in traced), reason)


def _trace(module: nn.Module, concrete: dict[str, None] | None, answer: bool, opens: bool) -> tuple[LayerTracer, str]:
    tracer = LayerTracer(answer, opens)
    tracer.graph = fx.Graph()
    try:
        with random_numbers_kept(), attributes_kept(module):
            tracer.trace(module, concrete)
    except Exception as error:  # tracing runs the user's code on proxies: anything may come
        return tracer, f"{type(error).__name__}: {error}".splitlines()[0]
    return tracer, ""


@contextmanager
def random_numbers_kept() -> Iterator[None]:
    """Set the random generators of Python, torch and numpy back to where they were."""
    numpy: Any = sys.modules.get("numpy")  # torch works without it
    of_python, of_torch = random.getstate(), torch.get_rng_state()
    of_numpy = numpy.random.get_state(legacy=False) if numpy else None
    try:
        yield
    finally:
        random.setstate(of_python)
        torch.set_rng_state(of_torch)
        if numpy:
            numpy.random.set_state(of_numpy)


@contextmanager
def attributes_kept(module: nn.Module) -> Iterator[None]:
    """Set the attributes and buffers of a module and its children back: a traced forward leaves proxies in them."""
    before = [(vars(one), dict(vars(one)), one._buffers, dict(one._buffers)) for one in module.modules()]
    try:
        yield
    finally:
        for attributes, old_attributes, buffers, old_buffers in before:
            constants = {name: value for name, value in attributes.items() if name.startswith("_tensor_constant")}
            attributes.clear()
            attributes.update(constants | old_attributes)  # nodes of the graph name constants
            buffers.clear()
            buffers.update(old_buffers)
