"""Copies of a model: which objects they share with it, and which are their own."""

import gc
from collections.abc import Iterable
from copy import deepcopy
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn

from decorr_fx.errors import DistributedError, ModelError
from decorr_fx.runtime.site.shard import is_fully_sharded

# what a deep copy shares
ATOMS = (type, ModuleType, FunctionType, BuiltinFunctionType, str, bytes, int, float, complex, bool, type(None))


def copy_model(model: nn.Module, shared: Iterable[object], detached: Iterable[Tensor] = ()) -> nn.Module:
    """Return a deep copy with the very same `shared` objects as the model, and `detached` tensors without their graph.

    Raises:
        ModelError: something that the model holds cannot be copied.
        DistributedError: the model is sharded by `fully_shard`.
    """
    if any(map(is_fully_sharded, model.modules())):
        raise DistributedError(
            f"{type(model).__name__} is sharded over several ranks by fully_shard and cannot be copied; transform a "
            "model before it is sharded, and fold a sharded one where it is, with decorr_fx.fold_(model) on every rank"
        )
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
    """Return the tensors that are neither parameters nor buffers but in attributes, as hooks and caches leave them.

    Those in lists, dicts and objects of any class, too, as deep as a deep copy would go.
    """
    registered = ("_parameters", "_buffers", "_modules")
    modules = list(model.modules())
    waiting = [value for module in modules for name, value in vars(module).items() if name not in registered]
    known, found = {*map(id, modules)}, []
    while waiting:
        value = waiting.pop()
        if id(value) in known or isinstance(value, ATOMS):
            continue
        known.add(id(value))
        if isinstance(value, Tensor):
            found.append(value)
        else:
            waiting += gc.get_referents(value)
    return found
