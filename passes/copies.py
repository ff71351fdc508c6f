"""Copies of a model: which objects they share with it, and which are their own."""

from collections.abc import Iterable
from copy import deepcopy
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from decorr_fx.errors import ModelError


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
