"""Faithful tracing: a graph of a forward that somebody wrote, or the reason why a graph would not do what it does.

Symbolic tracing sees operations and nothing else. What a forward does besides is lost without an error: a branch on the
type of an input or on a missing argument, a context of autograd or autocast, a custom backward, a random number of
Python's, an attribute that it sets. A forward that does any of this is refused, and its module runs as it is.
"""

import inspect
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.fx.proxy import TraceError

ASKS_FOR_TYPES = {"isinstance", "is_tensor", "issubclass", "hasattr"}  # a proxy gives the answer of no tensor


class LayerTracer(fx.Tracer):
    """Traces one module's own forward: children are leaves, parameters and buffers are nodes."""

    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__()
        self._modes = _modes()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Treat every child as a leaf."""
        return True

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Add a node, unless it is to run under another grad mode or autocast, as in a context or a custom backward."""
        if _modes() != self._modes:
            raise TraceError("it changes the grad mode or autocast, or has a backward of its own")
        return super().create_node(*args, **kwargs)


def trace_faithfully(module: nn.Module) -> fx.Graph:
    """Return the graph of the module's forward.

    Raises:
        TraceError: the forward does what a graph would lose; the message says what.
    """
    if isinstance(module, fx.GraphModule):
        raise TraceError("it is a GraphModule; transform the module that it was traced from")
    if "forward" in vars(module):
        raise TraceError("its forward was replaced on the instance")
    asked = ASKS_FOR_TYPES & names_in_forward(module)
    if asked:
        raise TraceError(f"it asks for types ({', '.join(sorted(asked))})")
    graph = _trace_without_traces(module, {})
    _check_optional_arguments(module, graph)
    return graph


def names_in_forward(module: nn.Module) -> set[str]:
    """Return the names of all that the code of the forward itself reads and calls."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return set(code.co_names) if code else set()


def _check_optional_arguments(module: nn.Module, graph: fx.Graph) -> None:
    """Raise where the forward takes another way when an optional argument is missing: a proxy is never None."""
    optional = [p.name for p in inspect.signature(module.forward).parameters.values() if p.default is None]
    for missing in [optional, *([name] for name in optional)] if optional else []:
        without = _trace_without_traces(module, dict.fromkeys(missing))
        if _steps(without) != _steps(graph):
            raise TraceError(f"it depends on whether {', '.join(missing)} is given")


def _trace_without_traces(module: nn.Module, fixed: dict[str, None]) -> fx.Graph:
    """Trace the forward; raise where that drew a random number or changed an attribute, and undo the first."""
    before = _attributes(module)
    with _random_numbers_watched():
        graph = LayerTracer().trace(module, concrete_args=fixed or None)
    after = _attributes(module)
    changed = {name for name in before.keys() | after.keys() if before.get(name) is not after.get(name)}
    if changed:
        raise TraceError(f"it sets attributes or makes constants ({', '.join(sorted(changed))})")
    return graph


@contextmanager
def _random_numbers_watched() -> Iterator[None]:
    python, torch_state = random.getstate(), torch.get_rng_state()
    yield
    drawn = random.getstate() != python or not torch.equal(torch.get_rng_state(), torch_state)
    random.setstate(python)
    torch.set_rng_state(torch_state)
    if drawn:
        raise TraceError("it draws random numbers while it is traced")


def _attributes(module: nn.Module) -> dict[str, object]:
    """Return what is set on the module: attributes, parameters, buffers and children."""
    return {**vars(module), **module._parameters, **module._buffers, **module._modules}


def _steps(graph: fx.Graph) -> list[str]:
    """Return what the graph does, without its inputs and without the checks on them that tracing adds."""
    return [str(n.format_node()) for n in graph.nodes if n.op != "placeholder" and "assert" not in n.name]


def _modes() -> tuple[bool, ...]:
    devices = ("cpu", "cuda")
    return (torch.is_grad_enabled(), *(torch.is_autocast_enabled(device) for device in devices))
