"""Faithful tracing: a graph of a forward that somebody wrote, or the reason why a graph would not do what it does.

Symbolic tracing sees operations and nothing else. What a forward does besides is lost without an error: a branch on the
type of an input or on a missing argument, a context of autograd or autocast, a custom backward, a random number of
Python's, an attribute that it sets. A forward that does any of this is refused, and its module runs as it is.
"""

import inspect
import pickle
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import fx, nn
from torch.fx.proxy import TraceError

from decorr_fx.passes.capture.code import names_in_forward

# A proxy, and a forward that is traced but once, give the answers of no tensor and of one mode only.
ASKS = {
    "isinstance", "issubclass", "is_tensor", "hasattr", "getattr", "type",
    "is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled",
}  # fmt: skip


class LayerTracer(fx.Tracer):
    """Traces one module's own forward: children are leaves, parameters and buffers are nodes.

    What cannot be traced is kept in `refused`, too: a forward may catch the error and take another way.
    """

    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__()
        self.refused: TraceError | None = None
        self._modes = _modes()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Treat every child as a leaf."""
        return True

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Add a node, unless it is to run under another grad mode or autocast, as in a context or a custom backward."""
        if _modes() != self._modes:
            self._refuse("it changes the grad mode or autocast, or has a backward of its own")
        return super().create_node(*args, **kwargs)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Refuse to branch on a value."""
        return self._refuse("it branches on a value that is only known when it runs")

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """Refuse to loop over a value, except where the number of its parts is written in the code."""
        try:
            return super().iter(obj)
        except TraceError as error:
            return self._refuse(str(error))

    def _refuse(self, reason: str) -> NoReturn:
        self.refused = TraceError(reason)
        raise self.refused


def trace_faithfully(module: nn.Module, trusted: bool) -> fx.Graph:
    """Return the graph of the module's forward; one that is `trusted`, an adapter, may ask for types and modes.

    Raises:
        TraceError: the forward does what a graph would lose; the message says what.
    """
    asked = ASKS & names_in_forward(module)
    if asked and not trusted:
        raise TraceError(f"it asks for types or modes ({', '.join(sorted(asked))})")
    graph = _trace_without_traces(module, {})
    _check_optional_arguments(module, graph)
    return graph


def _check_optional_arguments(module: nn.Module, graph: fx.Graph) -> None:
    """Raise where the forward takes another way when an optional argument is missing: a proxy is never None."""
    optional = [p.name for p in inspect.signature(module.forward).parameters.values() if p.default is None]
    for missing in [optional, *([name] for name in optional)] if optional else []:
        without = _trace_without_traces(module, dict.fromkeys(missing))
        if _steps(without, missing) != _steps(graph, missing):
            raise TraceError(f"it depends on whether {', '.join(missing)} is given")


def _trace_without_traces(module: nn.Module, fixed: dict[str, None]) -> fx.Graph:
    """Trace the forward; raise where that drew a random number or changed an attribute, and undo the first."""
    before, tracer = _attributes(module), LayerTracer()
    with _random_numbers_watched():
        graph = tracer.trace(module, concrete_args=fixed or None)
    if tracer.refused:
        raise tracer.refused
    after = _attributes(module)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    if changed:
        raise TraceError(f"it sets attributes or makes constants ({', '.join(sorted(changed))})")
    return graph


@contextmanager
def random_numbers_kept() -> Iterator[None]:
    """Set the random generators of Python, torch and numpy back to where they were."""
    before = _random_states()
    try:
        yield
    finally:
        random.setstate(before["python"])
        torch.set_rng_state(before["torch"])
        if "numpy" in before:
            sys.modules["numpy"].random.set_state(before["numpy"])


@contextmanager
def _random_numbers_watched() -> Iterator[None]:
    with random_numbers_kept():
        before = _fingerprint()
        yield
        if _fingerprint() != before:
            raise TraceError("it draws random numbers while it is traced")


def _random_states() -> dict[str, Any]:
    numpy: Any = sys.modules.get("numpy")  # torch works without it
    states = {"python": random.getstate(), "torch": torch.get_rng_state()}
    return states | ({"numpy": numpy.random.get_state(legacy=False)} if numpy else {})


def _fingerprint() -> bytes:
    states = _random_states()
    return pickle.dumps((states["python"], states["torch"].tolist(), states.get("numpy")))


def _attributes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the identity of all that is set on the module and below it, and of the parts of lists and dicts."""
    found = {}
    for fqn, owner in module.named_modules():
        for name, value in {**vars(owner), **owner._parameters, **owner._buffers, **owner._modules}.items():
            parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
            found[f"{fqn}.{name}".lstrip(".")] = (id(value), *(id(part) for _, part in parts))
    return found


def _steps(graph: fx.Graph, missing: list[str]) -> list[tuple[Any, ...]]:
    """Return what the graph does with None for `missing`, without its inputs and the checks that tracing adds."""

    def name(node: fx.Node) -> Any:
        return None if node.op == "placeholder" and node.target in missing else node.name

    steps = (n for n in graph.nodes if n.op != "placeholder" and "assert" not in n.name)
    return [(n.op, str(n.target), str(fx.map_arg((n.args, n.kwargs), name))) for n in steps]


def _modes() -> tuple[bool, ...]:
    devices = ("cpu", "cuda")
    return (torch.is_grad_enabled(), *(torch.is_autocast_enabled(device) for device in devices))
