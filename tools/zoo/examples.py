"""What a library of models hands to the checks: a model with random weights, and what it is called with."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor, nn

Inputs = tuple[Any, ...] | dict[str, Any]  # positional or keyword arguments
Probe = Callable[[nn.Module], Any]


def call(model: nn.Module, inputs: Inputs) -> Any:
    """Call the model with positional or keyword arguments."""
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


@dataclass(frozen=True)
class Example:
    """A model and its example inputs.

    Attributes:
        model: the plain model, with random weights.
        inputs: what it is called with in eval mode and exported with.
        train_inputs: what it is called with in train mode, if that is something else (images and their targets).
        probe: outputs to compare after folding in place of the model's own, where those jump with rounding (boxes
            that were sorted by score and suppressed).
    """

    model: nn.Module
    inputs: Inputs
    train_inputs: Inputs | None = None
    probe: Probe | None = None

    def on(self, device: str) -> "Example":
        """Return the example with its inputs on the device."""
        return replace(self, inputs=_moved(self.inputs, device), train_inputs=_moved(self.train_inputs, device))

    def call(self, model: nn.Module) -> Any:
        """Call a model of this kind with the inputs of the mode that it is in."""
        return call(model, self.train_inputs if model.training and self.train_inputs is not None else self.inputs)

    def call_probe(self, model: nn.Module) -> Any:
        """Return the outputs that are smooth in the weights."""
        return self.probe(model) if self.probe is not None else self.call(model)


@dataclass(frozen=True)
class Library:
    """The models of one library.

    Attributes:
        name: as `--library` takes it.
        models: a function for each model's name, which builds its example.
        skipped: the reason for each model that cannot be checked.
        packages: whose versions are told.
    """

    name: str
    models: Mapping[str, Callable[[], Example]]
    skipped: Mapping[str, str] = field(default_factory=dict)
    packages: tuple[str, ...] = ()


class LibraryModule(Protocol):
    """A module that makes a library: importing it imports the library."""

    def library(self) -> Library:
        """Return the models."""


def float_tensors(tree: Any) -> list[Tensor]:
    """Return the floating-point tensors in nested outputs, in order."""
    return [tensor for _, tensor in named_tensors(tree) if tensor.is_floating_point()]


def named_tensors(tree: Any, name: str = "output") -> list[tuple[str, Tensor]]:
    """Return the tensors in nested outputs, each with the way to it; whatever holds no tensor is left out."""
    if isinstance(tree, Tensor):
        return [(name, tree)]
    if isinstance(tree, Mapping):
        return [leaf for key, value in tree.items() for leaf in named_tensors(value, f"{name}[{key!r}]")]
    if isinstance(tree, list | tuple):
        return [leaf for i, value in enumerate(tree) for leaf in named_tensors(value, f"{name}[{i}]")]
    return []


def _moved(tree: Any, device: str) -> Any:
    if isinstance(tree, Tensor):
        return tree.to(device)
    if isinstance(tree, dict):
        return {key: _moved(value, device) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_moved(value, device) for value in tree)
    return tree
