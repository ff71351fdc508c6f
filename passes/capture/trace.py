"""Capture: graphs of every module's own forward, for planning.

Each module is traced on its own with its children as leaves. So whatever cannot be traced costs only itself, and what a
module does in Python around its layers stays Python.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from decorr_fx.passes.capture.adapters import Adapter, adapter_of
from decorr_fx.passes.capture.tracer import Graphs, trace_forward
from decorr_fx.passes.copies import copy_sharing_parameters

# These hand raw weights to a kernel of their own, so that no call of a conv or linear can be seen.
OPAQUE = (nn.RNNBase, nn.RNNCellBase, nn.Bilinear)


@dataclass(frozen=True)
class Traced:
    """What is known of the forwards of all modules, by fqn.

    Attributes:
        scratch: the copy of the model that was traced: nodes name its attributes.
        opaque: modules that hand raw weights to a kernel, and all that is inside, with the fqn of the outermost.
        graphs: of all other modules that have a forward, in train mode.
        failed: why the others cannot be decorrelated.
        adapters: of modules whose calls are seen through one.
    """

    scratch: nn.Module
    opaque: Mapping[str, str]
    graphs: dict[str, Graphs] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    adapters: dict[str, Adapter] = field(default_factory=dict)

    def of(self, fqn: str) -> tuple[fx.Graph, ...]:
        """Return the graphs of a module; none of one that was not traced."""
        return self.graphs[fqn].graphs if fqn in self.graphs else ()

    def is_layer(self, fqn: str) -> bool:
        """Tell whether the module's forward is that of torch's own linear or convolution, parametrized ones too."""
        module = self.scratch.get_submodule(fqn)
        return isinstance(module, nn.Linear | _ConvNd) and not has_own_forward(module) and fqn not in self.adapters


def trace_model(model: nn.Module) -> Traced:
    """Trace every module of a copy of the model; the model is not changed, and no `train` of a user's is called."""
    scratch = copy_sharing_parameters(model)  # a traced forward may leave proxies in attributes
    for module in scratch.modules():
        module.training = True  # past a `train()` that a user wrote: it may change what the copy shares
    traced = Traced(scratch, _inside_opaque(scratch))
    for fqn, module in scratch.named_modules():
        if fqn in traced.opaque or type(module).forward is nn.Module.forward:
            continue
        if isinstance(module, fx.GraphModule):
            traced.failed[fqn] = "it is a GraphModule; transform the module that it was traced from"
        elif "forward" in vars(module):
            traced.failed[fqn] = "its forward was replaced on the instance"
        else:
            adapter = adapter_of(module)
            if adapter is not None:  # the adapter is the forward of the copy from here on
                module.__class__ = type(type(module).__name__, (type(module),), {"forward": adapter})
                traced.adapters[fqn] = adapter
            traced.graphs[fqn] = trace_forward(module, adapted=adapter is not None)
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


def _inside_opaque(model: nn.Module) -> dict[str, str]:
    """Return the fqn of every opaque module and of all that is inside one, with the fqn of the outermost."""
    inside: dict[str, str] = {}
    for fqn, module in model.named_modules():
        if fqn not in inside and is_opaque(module) and adapter_of(module) is None:
            prefix = f"{fqn}." if fqn else ""
            inside |= {prefix + name if name else fqn: fqn for name, _ in module.named_modules()}
    return inside
