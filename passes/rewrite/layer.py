"""The layer that runs on decorrelated weights.

A module that calls a conv or a linear becomes a *decorrelated layer*: the same object layout, parameter names and
attributes, with its class replaced by a subclass. The forward of that runs one of two `torch.fx` graphs, picked by
`.train()` and `.eval()`; where no graph is faithful to the module's own forward, it runs that with W R in the place of
W. All other modules are left as they are, so that hooks, control flow and direct calls of submodules go on working.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import update_wrapper
from inspect import signature
from typing import Any, ClassVar

from torch import nn

from decorr_fx.passes.capture.graphs import Graphs
from decorr_fx.runtime.site.broadcast import follow_registrations
from decorr_fx.runtime.site.state import Site
from decorr_fx.runtime.step.hooks import follow_optimizers
from decorr_fx.runtime.watch import Read, run_watched


@dataclass(frozen=True)
class Watched:
    """A forward that runs as it is, with W R in the place of the weights of `reads`."""

    reads: tuple[Read, ...]

    def bind(self, plain_class: type[nn.Module]) -> Callable[..., Any]:
        """Return the forward of a layer that was of `plain_class`."""

        def forward(self_: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return run_watched(self_, self.reads, plain_class.forward, args, kwargs)

        return forward


def _in_place_of(plain_class: type[nn.Module], decorrelated: Callable[..., Any]) -> Callable[..., Any]:
    """Return the forward that a layer has while it is decorrelated; it looks like that of its own class.

    Trainers keep a forward in wrappers of theirs, on the instance: after `fold` the layer's own one runs in them. There
    is no `__wrapped__`, by which they would get past R.
    """

    def forward(self_: nn.Module, *args: Any, **kwargs: Any) -> Any:
        of_layer = decorrelated if isinstance(self_, DecorrelatedLayer) else plain_class.forward
        return of_layer(self_, *args, **kwargs)

    update_wrapper(forward, plain_class.forward)
    del forward.__wrapped__  # type: ignore[attr-defined]
    forward.__signature__ = signature(plain_class.forward)  # type: ignore[attr-defined]
    return forward


class DecorrelatedLayer:
    """Mixed into a module's class by `as_decorrelated_layer`: the forward runs graphs of its own, or is watched."""

    plain_class: ClassVar[type[nn.Module]]
    run: ClassVar[Graphs | Watched]
    _modules: dict[str, nn.Module | None]

    def __reduce_ex__(self, protocol: Any) -> Any:
        state: tuple[Any, ...] = tuple(super().__reduce_ex__(protocol))[2:]
        return (_new_layer, (self.plain_class, self.run), *state)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        for name, site in self._modules.items():
            if isinstance(site, Site):
                site.expect(state_dict, prefix, name)
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]


def as_decorrelated_layer(module: nn.Module, run: Graphs | Watched) -> None:
    """Let the module's forward run so from now on; `as_plain_layer` undoes it."""
    module.__class__ = _layer_class(type(module), run)


def as_plain_layer(module: nn.Module) -> None:
    """Give a decorrelated layer its own class back, and take its sites from it."""
    for name in [name for name, child in module.named_children() if isinstance(child, Site)]:
        delattr(module, name)
    for name in [name for name, value in vars(module).items() if isinstance(value, Site)]:  # another module's
        del vars(module)[name]
    if isinstance(module, DecorrelatedLayer):
        setattr(module, "__class__", _plain_class(type(module)))  # noqa: B010 - mypy knows the mixed class only


def _plain_class(mixed: type[DecorrelatedLayer]) -> type:
    """Return a class without ours; others may have mixed theirs into it since, as `fully_shard` does."""
    if DecorrelatedLayer in mixed.__bases__:
        return mixed.plain_class
    bases = (_plain_class(base) if issubclass(base, DecorrelatedLayer) else base for base in mixed.__bases__)
    own = {name: value for name, value in vars(mixed).items() if name not in ("__dict__", "__weakref__")}
    return type(mixed.__name__.replace("Decorrelated", "", 1), tuple(bases), own)


def _layer_class(plain_class: type[nn.Module], run: Graphs | Watched) -> type[nn.Module]:
    forward = _in_place_of(plain_class, run.bind(plain_class))
    members = {"forward": forward, "plain_class": plain_class, "run": run, "__module__": __name__}
    return type(f"Decorrelated{plain_class.__name__}", (DecorrelatedLayer, plain_class), members)


def _new_layer(plain_class: type[nn.Module], run: Graphs | Watched) -> nn.Module:
    follow_optimizers()  # this process may have called no `transform`, and only unpickled a model
    follow_registrations()
    layer_class = _layer_class(plain_class, run)
    return layer_class.__new__(layer_class)
