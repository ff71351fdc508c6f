"""Layers that record their input.

torch's own convs and linears keep their class and get a forward hook. A module with another forward, which calls a
weight itself, gets a subclass of its own class: the forward that its author wrote, watched while a step of R is due.
Everything else is left as it is, so that hooks, control flow and direct calls of submodules go on working.
"""

from collections.abc import Callable
from functools import update_wrapper
from inspect import signature
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from torch import nn

from decorr_fx.passes.capture.adapters import Adapter
from decorr_fx.runtime.private import remove_recording_hook
from decorr_fx.runtime.site.registry import forget
from decorr_fx.runtime.site.state import Site
from decorr_fx.runtime.watch import Read, record_input, run_watched

_classes: "WeakValueDictionary[Any, type[nn.Module]]" = WeakValueDictionary()


class WatchedLayer:
    """Mixed into a module's class by `as_watched_layer`."""

    plain_class: ClassVar[type[nn.Module]]
    reads: ClassVar[tuple[Read, ...]]
    adapter: ClassVar[Adapter | None]

    def __reduce_ex__(self, protocol: Any) -> Any:
        state: tuple[Any, ...] = tuple(super().__reduce_ex__(protocol))[2:]
        return (_new_layer, (self.plain_class, self.reads, _adapter_of(type(self))), *state)


def as_watched_layer(module: nn.Module, reads: tuple[Read, ...], adapter: Adapter | None) -> None:
    """Let the calls of some weights in the module's forward be recorded; `as_plain_layer` undoes it."""
    module.__class__ = _layer_class(type(module), reads, adapter)


def as_plain_layer(module: nn.Module) -> None:
    """Give a layer its own class back, and take hook and sites from it."""
    for name, site in [(name, child) for name, child in module.named_children() if isinstance(child, Site)]:
        forget(site)
        delattr(module, name)
    for name in [name for name, value in vars(module).items() if isinstance(value, Site)]:  # another module's
        del vars(module)[name]
    remove_recording_hook(module, record_input)
    if isinstance(module, WatchedLayer):
        setattr(module, "__class__", _plain_class(type(module)))  # noqa: B010 - mypy knows the mixed class only


def _plain_class(mixed: type[WatchedLayer]) -> type:
    """Return a class without ours; others may have mixed theirs into it since, as `fully_shard` does."""
    if WatchedLayer in mixed.__bases__:
        return mixed.plain_class
    bases = (_plain_class(base) if issubclass(base, WatchedLayer) else base for base in mixed.__bases__)
    own = {name: value for name, value in vars(mixed).items() if name not in ("__dict__", "__weakref__")}
    return type(mixed.__name__.replace("Watched", "", 1), tuple(bases), own)


def _layer_class(plain_class: type[nn.Module], reads: tuple[Read, ...], adapter: Adapter | None) -> type[nn.Module]:
    """Return the class of all layers of one class that call their weights in one way: torch.compile sees one code."""
    key = (plain_class, reads, adapter)
    known = _classes.get(key)
    if known is None:
        members = {
            "forward": _watched_forward(plain_class, reads, adapter), "plain_class": plain_class, "reads": reads,
            "adapter": adapter, "__module__": __name__,
        }  # fmt: skip
        known = _classes[key] = type(f"Watched{plain_class.__name__}", (WatchedLayer, plain_class), members)
    return known


def _watched_forward(plain_class: type[nn.Module], reads: tuple[Read, ...], adapter: Adapter | None) -> Any:
    """Return the forward of a watched layer; it looks like that of its own class.

    Trainers keep a forward in wrappers of theirs, on the instance: after `fold` the layer's own one runs in them.
    """
    names = tuple(read.site for read in reads)
    plain_forward: Callable[..., Any] = plain_class.forward
    watched_forward = adapter or plain_forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        watched = self.training and isinstance(self, WatchedLayer)
        if watched and (torch.compiler.is_compiling() or any(getattr(self, name).due for name in names)):
            return run_watched(self, reads, watched_forward, args, kwargs)
        return plain_forward(self, *args, **kwargs)

    update_wrapper(forward, plain_forward)
    del forward.__wrapped__  # type: ignore[attr-defined] # it leads past the recording
    forward.__signature__ = signature(plain_forward)  # type: ignore[attr-defined]
    return forward


def _adapter_of(layer_class: type[WatchedLayer]) -> Adapter | None:
    return vars(layer_class).get("adapter") or layer_class.adapter


def _new_layer(plain_class: type[nn.Module], reads: tuple[Read, ...], adapter: Adapter | None) -> nn.Module:
    layer_class = _layer_class(plain_class, reads, adapter)
    return layer_class.__new__(layer_class)
