"""Ways to make a network smaller: ours, and those of torch-pruning, at the same number of multiply-adds."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property, partial

import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional as F

import decorr_fx
from decorr_fx.passes.prune.moments import estimate_statistics
from tools.train.data import Batch

HALVINGS = 8  # in the search for the ratio that meets a budget
Importance = Callable[[], tp.importance.Importance]

PEERS: Mapping[str, Importance] = {
    "l1": partial(tp.importance.GroupMagnitudeImportance, p=1),
    "bn-scale": tp.importance.BNScaleImportance,
    "fpgm": tp.importance.FPGMImportance,
    "taylor": tp.importance.GroupTaylorImportance,
}
OURS = "decorr_fx"


@dataclass(frozen=True)
class Task:
    """A trained network in eval mode, and the batches of training images that all methods may look at."""

    model: nn.Module
    batches: Sequence[Batch]

    @property
    def example(self) -> Tensor:
        """One image."""
        return self.batches[0][0][:1]

    @property
    def images(self) -> list[Tensor]:
        """The batches without labels."""
        return [images for images, _ in self.batches]

    @cached_property
    def gradients(self) -> list[Tensor]:
        """The gradient of each parameter over all batches, which Taylor's criterion asks for."""
        model = deepcopy(self.model)
        for images, labels in self.batches:
            F.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@dataclass(frozen=True)
class Pruned:
    """A network that a method made.

    Attributes:
        method: which one.
        scope: `everywhere`: units of all layers were ranked together; `by layer`: each lost the same part of its own.
        model: the network.
    """

    method: str
    scope: str
    model: nn.Module


def macs(model: nn.Module, example: Tensor) -> int:
    """Return the multiply-adds of one example, as torch-pruning counts them, for all methods."""
    return int(tp.utils.count_ops_and_params(model, example)[0])


def prune_all(task: Task, keep: float) -> Iterator[Pruned]:
    """Yield what each method makes of the network, of at most this part of its multiply-adds."""
    small = decorr_fx.prune(task.model, task.images, keep=keep, example_inputs=task.example).model
    yield Pruned(OURS, "everywhere", small)
    most = keep * macs(task.model, task.example)
    for name in PEERS:
        for scope in ("by layer", "everywhere"):
            yield Pruned(name, scope, _largest(task, name, scope, most))


def _largest(task: Task, name: str, scope: str, most: float) -> nn.Module:
    """Return the largest network of at most so many multiply-adds that a method of torch-pruning makes."""
    low, high = 0.0, 1.0
    best = None
    for _ in range(HALVINGS):
        ratio = (low + high) / 2
        smaller = _pruned_by(task, name, scope, ratio)
        if macs(smaller, task.example) <= most:
            best, high = smaller, ratio
        else:
            low = ratio
    return _pruned_by(task, name, scope, high) if best is None else best


def _pruned_by(task: Task, name: str, scope: str, ratio: float) -> nn.Module:
    model = deepcopy(task.model)
    head = [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1]
    for parameter, gradient in zip(model.parameters(), task.gradients, strict=True):
        parameter.grad = gradient.clone()
    pruner = tp.pruner.BasePruner(
        model, task.example, PEERS[name](), scope == "everywhere", ratio, ignored_layers=[head]
    )
    pruner.step()
    model.zero_grad()
    return model


def with_new_statistics(model: nn.Module, batches: Sequence[Tensor]) -> nn.Module:
    """Return a copy whose BatchNorm statistics are the plain mean over the batches, as ours has them."""
    model = deepcopy(model)
    estimate_statistics(model, batches)
    return model
