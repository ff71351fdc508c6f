"""What the passes share: one checked contract, copies of a model, and the layer that runs on decorrelated weights.

A module that calls a conv or a linear becomes a *decorrelated layer*: the same object layout, parameter names and
attributes, with its class replaced by a subclass. The forward of that runs one of two `torch.fx` graphs, picked by
`.train()` and `.eval()`; where no graph is faithful to the module's own forward, it runs that with W R in the place of
W. All other modules are left as they are, so that hooks, control flow and direct calls of submodules go on working.
"""

import linecache
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property, update_wrapper
from inspect import signature
from itertools import count
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from decorr_fx.errors import ModelError, PassError
from decorr_fx.runtime.broadcast import follow_registrations
from decorr_fx.runtime.state import Site
from decorr_fx.runtime.stepper import follow_optimizers
from decorr_fx.runtime.watch import Read, run_watched

Result = TypeVar("Result")
_file_numbers = count()


class Pass(ABC, Generic[Result]):
    """A step of a verb: `requires` checks what comes in, `call` works, `ensures` checks what comes out."""

    def __call__(self, model: nn.Module) -> Result:
        """Run the pass, with its contract checked before and after; the model stays as it is, or the pass says so."""
        self.requires(model)
        result = self.call(model)
        self.ensures(model, result)
        return result

    @abstractmethod
    def requires(self, model: nn.Module) -> None:
        """Raise a `DecorrError` that tells the user what to do, where the pass cannot work on `model`."""

    @abstractmethod
    def call(self, model: nn.Module) -> Result:
        """Do the work."""

    @abstractmethod
    def ensures(self, model: nn.Module, result: Result) -> None:
        """Call `broken` where the result is not what the pass promises."""

    def broken(self, place: str, problem: str) -> PassError:
        """Return the error for a promise that was not kept at `place`."""
        return PassError(
            f"{type(self).__name__}, at {place!r}: {problem}; this is a bug in decorr_fx, please report it"
        )


def copy_model(model: nn.Module, shared: Iterable[object], detached: Iterable[Tensor] = ()) -> nn.Module:
    """Return a deep copy with the very same `shared` objects as the model, and `detached` tensors without their graph.

    Raises:
        ModelError: something that the model holds cannot be copied.
    """
    memo: dict[int, Any] = {id(tensor): tensor.detach().clone() for tensor in detached}
    memo |= {id(thing): thing for thing in shared}
    try:
        return deepcopy(model, memo)
    except (TypeError, RuntimeError) as error:
        raise ModelError(f"{type(model).__name__} cannot be copied: {error}; remove what cannot be, and set it again "
                         "on the result") from error  # fmt: skip


def copy_sharing_tensors(model: nn.Module) -> nn.Module:
    """Return a copy with modules of its own over the same parameters, buffers and other tensors."""
    return copy_model(model, [*model.parameters(), *model.buffers(), *plain_tensors(model)])


def copy_sharing_parameters(model: nn.Module) -> nn.Module:
    """Return a copy over the same parameters and buffers, to be thrown away: other tensors are its own."""
    return copy_model(model, [*model.parameters(), *model.buffers()], detached=computed_tensors(model))


def computed_tensors(model: nn.Module) -> list[Tensor]:
    """Return the plain tensors that a forward has left with their graph; they cannot be copied as they are."""
    return [tensor for tensor in plain_tensors(model) if tensor.grad_fn is not None]


def plain_tensors(model: nn.Module) -> list[Tensor]:
    """Return the tensors that are neither parameters nor buffers but in attributes, as hooks and caches leave them."""
    registered = ("_parameters", "_buffers", "_modules")
    values = [v for module in model.modules() for name, v in vars(module).items() if name not in registered]
    return [leaf for value in values for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


class Graphs:
    """The train and the eval graph of one module's forward. A copy of a model shares them: they hold no tensor."""

    def __init__(self, train: fx.Graph, evaluate: fx.Graph) -> None:
        self.train = train
        self.evaluate = evaluate

    def __deepcopy__(self, memo: dict[int, Any]) -> "Graphs":
        return self

    @cached_property
    def forwards(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """The forwards of train and eval mode, generated once, after the last change of the graphs."""
        return _generate_forward(self.train), _generate_forward(self.evaluate)

    def bind(self, plain_class: type[nn.Module]) -> Callable[..., Any]:
        """Return the forward of a layer that was of `plain_class`."""
        train_forward, eval_forward = self.forwards

        def forward(self_: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return (train_forward if self_.training else eval_forward)(self_, *args, **kwargs)

        return _in_place_of(plain_class, forward)

    def __getstate__(self) -> dict[str, Any]:
        return {"train": self.train, "evaluate": self.evaluate}


@dataclass(frozen=True)
class Watched:
    """A forward that runs as it is, with W R in the place of the weights of `reads`."""

    reads: tuple[Read, ...]

    def bind(self, plain_class: type[nn.Module]) -> Callable[..., Any]:
        """Return the forward of a layer that was of `plain_class`."""

        def forward(self_: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return run_watched(self_, self.reads, plain_class.forward, args, kwargs)

        return _in_place_of(plain_class, forward)


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
    members = {"forward": run.bind(plain_class), "plain_class": plain_class, "run": run, "__module__": __name__}
    return type(f"Decorrelated{plain_class.__name__}", (DecorrelatedLayer, plain_class), members)


def _new_layer(plain_class: type[nn.Module], run: Graphs | Watched) -> nn.Module:
    follow_optimizers()  # this process may have called no `transform`, and only unpickled a model
    follow_registrations()
    layer_class = _layer_class(plain_class, run)
    return layer_class.__new__(layer_class)


def _generate_forward(graph: fx.Graph) -> Callable[..., Any]:
    """Compile the graph's Python code, with its source where tracebacks, debuggers and torch.compile look for it."""
    code = graph.python_code("self")
    filename = f"<decorr_fx graph {next(_file_numbers)}>"
    linecache.cache[filename] = (len(code.src), None, code.src.splitlines(keepends=True), filename)
    namespace = dict(code.globals)
    exec(compile(code.src, filename, "exec"), namespace)
    generated: Callable[..., Any] = namespace["forward"]
    return generated
