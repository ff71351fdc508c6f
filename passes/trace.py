"""Tracing: the graph of every module that might call a conv or a linear itself, in train and in eval mode.

Each module is traced on its own with its children as leaves. So whatever cannot be traced costs only itself, and what a
module does in Python around its layers stays Python.
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from decorr_fx.passes.base import Graphs, copy_sharing_parameters
from decorr_fx.passes.faithful import LayerTracer, trace_faithfully

# These hand raw weights to a kernel of their own, at least in eval mode: R could not reach the layers inside.
OPAQUE = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.RNNBase, nn.RNNCellBase, nn.Bilinear)


@dataclass(frozen=True)
class Traced:
    """The graphs of the modules that could be traced, and the reasons of those that could not, by fqn.

    `scratch` is the copy of the model that was traced: nodes name its attributes.
    """

    scratch: nn.Module
    graphs: dict[str, Graphs]
    opaque: dict[str, str]
    failed: dict[str, str]


def trace_model(model: nn.Module) -> Traced:
    """Trace every module of a copy of the model that may call a conv or linear; the model is not changed."""
    scratch = copy_sharing_parameters(model)  # a traced forward may leave proxies in attributes
    opaque = _inside_opaque(scratch)
    graphs: dict[str, Graphs] = {}
    failed: dict[str, str] = {}
    for fqn, module in scratch.named_modules():
        if fqn in opaque or not _may_call(module):
            continue
        try:
            graphs[fqn] = Graphs(_trace(module, training=True), _trace(module, training=False))
        except Exception as error:  # tracing runs the user's code on proxies: anything may come
            failed[fqn] = f"{type(error).__name__}: {error}".splitlines()[0]
    return Traced(scratch, graphs, opaque, failed)


def has_own_forward(module: nn.Module) -> bool:
    """Tell whether the module's forward is not torch's, but a user's or another library's."""
    return not str(type(module).forward.__module__).startswith("torch.nn.")


def _may_call(module: nn.Module) -> bool:
    """Tell whether a module's own forward may call a conv or linear: those layers, and whatever is not torch's own."""
    return isinstance(module, nn.Linear | _ConvNd) or has_own_forward(module)


def _inside_opaque(model: nn.Module) -> dict[str, str]:
    """Return the fqn of every opaque module and of all that is inside one, with the fqn of the outermost."""
    inside: dict[str, str] = {}
    for fqn, module in model.named_modules():
        if fqn not in inside and isinstance(module, OPAQUE):
            prefix = f"{fqn}." if fqn else ""
            inside |= {prefix + name if name else fqn: fqn for name, _ in module.named_modules()}
    return inside


def _trace(module: nn.Module, training: bool) -> fx.Graph:
    module.train(training)
    if has_own_forward(module):
        return trace_faithfully(module)
    if "forward" in vars(module):
        raise fx.proxy.TraceError("its forward was replaced on the instance")
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


def resolve_output_padding(input: Tensor, output_size: Any, default: tuple[int, ...], *geometry: Any) -> list[int]:
    """Return the output padding of a transposed convolution that was asked for `output_size` (or None)."""
    torch_own: Any = _ConvTransposeNd._output_padding
    padding: list[int] = torch_own(SimpleNamespace(output_padding=list(default)), input, output_size, *geometry)
    return padding
