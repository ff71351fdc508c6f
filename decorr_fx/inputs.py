"""Example inputs: what a model is called with, positionally or by name, and the same at another batch size."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from decorr_fx.errors import ModelError


@dataclass(frozen=True)
class Example:
    """Positional and keyword arguments of a model's forward. Dimension 0 of each tensor is the batch."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, inputs: Any) -> "Example":
        """Take a tensor for one argument, a mapping for keyword arguments, a sequence for positional ones."""
        if isinstance(inputs, Mapping):
            return cls(kwargs=dict(inputs))
        return cls(tuple(inputs) if isinstance(inputs, Sequence) and not isinstance(inputs, str) else (inputs,))

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors, in order."""
        return tensors_in((self.args, self.kwargs))

    @property
    def batch_size(self) -> int:
        """Length of the first tensor that has one."""
        return next((len(t) for t in self.tensors if t.dim()), 1)

    def call(self, model: nn.Module) -> Any:
        """Call the model without gradients."""
        with torch.no_grad():
            return model(*self.args, **self.kwargs)

    def run(self, model: nn.Module, what: str) -> None:
        """Call the model as it is, without gradients.

        Raises:
            ModelError: the model does not run; `what` are the inputs, for people.
        """
        try:
            self.call(model)
        except Exception as error:  # whatever the user's code makes of the inputs
            problem = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ModelError(f"the model does not run on {what}: {problem}") from error

    def of_batch(self, size: int) -> "Example":
        """Return the same with the rows of each tensor repeated, or cut, to `size`."""

        def resize(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or not leaf.dim():
                return leaf
            return leaf[torch.arange(size, device=leaf.device) % len(leaf)]

        return self._map(resize)

    def dynamic_shapes(self) -> Any:
        """Return what `torch.export` is told where dimension 0 may be of any size."""

        def dynamic(leaf: Any) -> Any:
            return {0: torch.export.Dim.DYNAMIC} if isinstance(leaf, Tensor) and leaf.dim() else None

        mapped = self._map(dynamic)
        return mapped.kwargs or mapped.args

    def feeds(self, names: Sequence[str]) -> dict[str, Any]:
        """Return the tensors as numpy arrays by the `names` of a file's inputs: the keywords, or in order."""
        tensors = self.tensors
        by_name = {name: value for name, value in self.kwargs.items() if isinstance(value, Tensor)}
        if by_name.keys() >= set(names):
            tensors = [by_name[name] for name in names]
        return {name: t.detach().cpu().numpy() for name, t in zip(names, tensors, strict=True)}

    def _map(self, change: Callable[[Any], Any]) -> "Example":
        return Example(*pytree.tree_map(change, (self.args, self.kwargs)))


def random_numbers_kept(model: nn.Module) -> AbstractContextManager[None]:
    """Return a context after which random numbers are drawn as if nothing had been drawn in it."""
    devices = [parameter.device for parameter in model.parameters() if parameter.is_cuda]
    return torch.random.fork_rng(list(dict.fromkeys(devices)))


def tensors_in(tree: Any) -> list[Tensor]:
    """Return the tensors of nested containers, in order."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
