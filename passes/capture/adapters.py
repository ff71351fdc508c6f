"""Adapters: for a type of layer, an equivalent forward in which every conv and linear can be seen.

An adapter takes the arguments of the layer's forward, `self` first, and computes the same from the same parameters with
`F.linear`, `F.conv*` or a matrix product. It is traced in place of the forward. A subclass that defines a forward of
its own has no part in it.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from decorr_fx.errors import ConfigError
from decorr_fx.passes.capture.attention import attention_forward, encoder_forward, encoder_layer_forward

Adapter = Callable[..., Any]

_ADAPTERS: dict[type[nn.Module], Adapter] = {
    nn.MultiheadAttention: attention_forward,
    nn.TransformerEncoderLayer: encoder_layer_forward,
    nn.TransformerEncoder: encoder_forward,
}


def register_layer(layer_type: type[nn.Module], adapter: Adapter) -> None:
    """Let `transform` see the convs and linears of layers of this type through `adapter`, from now on.

    For a layer that is linear in other clothes (an `einsum`, a kernel of one's own), or whose forward cannot be traced.
    Instances of the type and of subclasses that keep its forward then run the adapter's graph while they are
    transformed; `fold` gives them their own forward back. Registering the same adapter again does nothing.

    Args:
        layer_type: the class of the layer.
        adapter: a function of the layer and the arguments of its forward that returns what the forward does, and uses
            `F.linear`, `F.conv*` or `x @ weight` for what is to be decorrelated. It must be traceable by `torch.fx`:
            put what is not in a function under `torch.fx.wrap`.

    Raises:
        ConfigError: the type is no module class, the adapter cannot be called, or the type has another adapter.
    """
    if not (isinstance(layer_type, type) and issubclass(layer_type, nn.Module)):
        raise ConfigError(f"layer_type is {layer_type!r}; use a subclass of torch.nn.Module")
    if not callable(adapter):
        raise ConfigError(f"adapter is {adapter!r}; use a function of the layer and its forward's arguments")
    known = _ADAPTERS.setdefault(layer_type, adapter)
    if known is not adapter:
        raise ConfigError(
            f"{layer_type.__name__} already has the adapter {_name(known)}, and {_name(adapter)} is another one; "
            "a layer type can have one only"
        )


def adapter_of(module: nn.Module) -> Adapter | None:
    """Return the adapter for a module: that of the class whose forward it runs, if that has one."""
    for parent in type(module).__mro__:
        if parent in _ADAPTERS:
            return _ADAPTERS[parent]
        if "forward" in vars(parent):
            return None
    return None


def _name(adapter: Adapter) -> str:
    return str(getattr(adapter, "__qualname__", repr(adapter)))
