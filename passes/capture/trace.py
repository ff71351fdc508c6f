"""Tracing: the graph of every module that might call a conv or a linear itself, in train and in eval mode.

Each module is traced on its own with its children as leaves. So whatever cannot be traced costs only itself, and what a
module does in Python around its layers stays Python.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from decorr_fx.passes.capture.adapters import adapter_of
from decorr_fx.passes.capture.faithful import LayerTracer, trace_faithfully
from decorr_fx.passes.capture.glimpse import glimpse
from decorr_fx.passes.capture.graphs import Graphs
from decorr_fx.passes.copies import copy_sharing_parameters

# These hand raw weights to a kernel of their own, at least in eval mode: R could not reach the layers inside.
FUSED = (nn.MultiheadAttention, nn.TransformerEncoderLayer)  # the forwards of these, which an adapter replaces
OPAQUE = (nn.RNNBase, nn.RNNCellBase, nn.Bilinear)


@dataclass(frozen=True)
class Glimpse:
    """What could be seen of a forward that no graph is faithful to, and why none is."""

    reason: str
    graphs: tuple[fx.Graph, ...]


@dataclass(frozen=True)
class Traced:
    """What is known of the forwards of all modules that may call a conv or linear, by fqn.

    Attributes:
        scratch: the copy of the model that was traced: nodes name its attributes.
        graphs: of the modules whose forward a graph is faithful to.
        glimpses: of those whose forward has to run as it is.
        failed: why the others can be neither traced nor run with other weights.
        opaque: modules that hand raw weights to a kernel, and all that is inside, with the fqn of the outermost.
        adapted: modules that run the graph of an adapter in place of their forward.
        containers: graphs of torch's own modules that only call others.
    """

    scratch: nn.Module
    opaque: Mapping[str, str]
    graphs: dict[str, Graphs] = field(default_factory=dict)
    glimpses: dict[str, Glimpse] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    adapted: set[str] = field(default_factory=set)
    containers: dict[str, fx.Graph] = field(default_factory=dict)

    def run_as_it_is(self, fqn: str, reason: str) -> None:
        """Take the graphs of a module for glimpses: they show a reader of a weight that only its own forward can be."""
        graphs = self.graphs.pop(fqn)
        self.glimpses[fqn] = Glimpse(reason, (graphs.train,))

    def train_graphs(self, fqn: str) -> tuple[fx.Graph, ...]:
        """Return all that is known of what a module does in train mode: one graph, some glimpses, or nothing."""
        if fqn in self.graphs:
            return (self.graphs[fqn].train,)
        if fqn in self.glimpses:
            return self.glimpses[fqn].graphs
        return (self.containers[fqn],) if fqn in self.containers else ()


def trace_model(model: nn.Module) -> Traced:
    """Trace every module of a copy of the model that may call a conv or linear; the model is not changed."""
    scratch = copy_sharing_parameters(model)  # a traced forward may leave proxies in attributes
    traced = Traced(scratch, _inside_opaque(scratch))
    for fqn, module in scratch.named_modules():
        if fqn in traced.opaque:
            continue
        adapter = adapter_of(module)
        if adapter is not None:  # the adapter is the forward of the copy from here on
            module.__class__ = type(type(module).__name__, (type(module),), {"forward": adapter})
            traced.adapted.add(fqn)
        if _may_call(module) or adapter is not None:
            _trace_module(traced, fqn, module)
        elif next(module.children(), None) is not None:
            _trace_container(traced, fqn, module)
    return traced


def has_own_forward(module: nn.Module) -> bool:
    """Tell whether the module's forward is not torch's, but a user's or another library's."""
    return not str(type(module).forward.__module__).startswith("torch.nn.")


def is_opaque(module: nn.Module) -> bool:
    """Tell whether the weights of the module and of all in it are out of reach."""
    return isinstance(module, OPAQUE) or is_quantised(module)


def is_quantised(module: nn.Module) -> bool:
    """Tell whether the module is one of torch's that hold a quantised weight, which is no parameter."""
    return ".quantized" in type(module).__module__ and type(module).__module__.startswith("torch.ao.nn")


def _may_call(module: nn.Module) -> bool:
    """Tell whether a module's own forward may call a conv or linear: those layers, and whatever is not torch's own."""
    return isinstance(module, nn.Linear | _ConvNd) or has_own_forward(module)


def _inside_opaque(model: nn.Module) -> dict[str, str]:
    """Return the fqn of every opaque module and of all that is inside one, with the fqn of the outermost."""
    inside: dict[str, str] = {}
    for fqn, module in model.named_modules():
        if fqn not in inside and is_opaque(module) and adapter_of(module) is None:
            prefix = f"{fqn}." if fqn else ""
            inside |= {prefix + name if name else fqn: fqn for name, _ in module.named_modules()}
    return inside


def _trace_module(traced: Traced, fqn: str, module: nn.Module) -> None:
    if isinstance(module, fx.GraphModule):
        traced.failed[fqn] = "it is a GraphModule; transform the module that it was traced from"
        return
    if "forward" in vars(module):
        traced.failed[fqn] = "its forward was replaced on the instance"
        return
    trusted = fqn in traced.adapted
    try:
        traced.graphs[fqn] = Graphs(_trace(module, True, trusted), _trace(module, False, trusted))
    except Exception as error:  # tracing runs the user's code on proxies: anything may come
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if trusted:
            traced.failed[fqn] = f"its adapter cannot be traced: {reason}"
        else:
            module.train()
            traced.glimpses[fqn] = Glimpse(reason, glimpse(module))


def _trace_container(traced: Traced, fqn: str, module: nn.Module) -> None:
    module.train()
    with suppress(Exception):  # nothing is lost but the knowledge of which layers share their input
        traced.containers[fqn] = LayerTracer().trace(module)


def _trace(module: nn.Module, training: bool, trusted: bool) -> fx.Graph:
    module.train(training)
    if has_own_forward(module):
        return trace_faithfully(module, trusted)
    if isinstance(module, _ConvTransposeNd):
        module = _with_traceable_output_padding(module)
    return LayerTracer().trace(module)


def _with_traceable_output_padding(module: _ConvTransposeNd) -> _ConvTransposeNd:
    """Make the choice between `output_padding` and `output_size`, which is Python on shapes, one node of the graph."""
    default = tuple(module.output_padding)

    def traced(input: fx.Proxy, output_size: fx.Proxy, *geometry: Any) -> Any:
        arguments = (input, output_size, default, *geometry)
        return input.tracer.create_proxy("call_function", resolve_output_padding, arguments, {})

    module.__dict__["_output_padding"] = traced
    return module


@dataclass(frozen=True)
class _Padded:
    """All of a transposed convolution that `_output_padding` reads; of a class that torch.compile can trace."""

    output_padding: list[int]


def resolve_output_padding(input: Tensor, output_size: Any, default: tuple[int, ...], *geometry: Any) -> list[int]:
    """Return the output padding of a transposed convolution that was asked for `output_size` (or None)."""
    torch_own: Any = _ConvTransposeNd._output_padding
    padding: list[int] = torch_own(_Padded(list(default)), input, output_size, *geometry)
    return padding
