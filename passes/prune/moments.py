"""Second moments of what layers read, over calibration batches; and BatchNorm statistics, estimated anew."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from tqdm import tqdm

from decorr_fx.errors import LayerError, ModelError
from decorr_fx.inputs import Example
from decorr_fx.passes.prune.groups import Slice


@dataclass
class Moments:
    """The mean of `x x^T` over rows, each the units that a layer reads at one place, `[n, n]`, float64."""

    sums: Tensor
    rows: int = 0

    @property
    def mean(self) -> Tensor:
        """The second moment, not centred."""
        return self.sums / self.rows

    def add(self, rows: Tensor) -> None:
        """Take rows `[.., n]` into account."""
        flat = rows.flatten(0, -2).double()
        self.sums += flat.mT @ flat
        self.rows += len(flat)


@torch.no_grad()
def collect_moments(model: nn.Module, readers: Sequence[Slice], batches: Iterable[Any]) -> Mapping[str, Moments]:
    """Return what each reader reads, by the name of its weight; the model is in eval mode, and stays as it is.

    Raises:
        ModelError: there is no batch, or the model does not run on one.
        LayerError: a batch gives a layer what is not finite, a layer is not called as a module, or reads fewer rows
            than it has units.
    """
    found: dict[str, Moments] = {}
    hooks = []
    for reader in readers:
        units = sum(segment.units for segment in reader.axis)
        layer = model.get_submodule(reader.layer)
        found[reader.tensor] = Moments(torch.zeros(units, units, dtype=torch.float64, device=_device(model, reader)))
        hooks.append(layer.register_forward_pre_hook(_recorder(reader, found[reader.tensor])))
    try:
        for number in _run_all(model, batches, "second moments"):
            for reader in readers:
                if not found[reader.tensor].sums.isfinite().all():
                    raise LayerError(
                        reader.layer, f"its input is not finite for batch {number}; leave such batches out"
                    )
    finally:
        for hook in hooks:
            hook.remove()
    for reader in readers:
        _check_rows(reader, found[reader.tensor])
    return found


@torch.no_grad()
def estimate_statistics(model: nn.Module, batches: Iterable[Any]) -> None:
    """Let the running statistics of every BatchNorm be the plain mean over the batches; others stay in eval mode.

    Raises:
        ModelError: there is no batch: what gave the first ones is used up.
    """
    norms = [module for module in model.modules() if isinstance(module, _NormBase) and module.track_running_stats]
    if norms:
        with _estimating(norms):
            for _ in _run_all(model, batches, "BatchNorm statistics"):
                pass


@contextmanager
def _estimating(norms: Sequence[_NormBase]) -> Iterator[None]:
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean
        norm.training = True
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum, norm.training = momentum, False


def _run_all(model: nn.Module, batches: Iterable[Any], what: str) -> Iterator[int]:
    """Run the model on every batch, behind a progress bar; yield the number of each."""
    number = -1
    for number, batch in enumerate(tqdm(batches, what, leave=False, disable=None)):
        try:
            Example.of(batch).run(model, f"batch {number}")
        except ModelError as error:
            raise ModelError(f"{error}; a batch is what the model is called with, without labels") from error
        yield number
    if number < 0:
        raise ModelError("there is no batch to calibrate on; give a list, or a loader that is not used up: the batches "
                         "are run twice where there is BatchNorm")  # fmt: skip


def _recorder(reader: Slice, moments: Moments) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def record(layer: nn.Module, args: tuple[Any, ...]) -> None:
        moments.add(_rows(layer, args[0], reader))

    return record


def _rows(layer: nn.Module, x: Tensor, reader: Slice) -> Tensor:
    """Return what the layer reads of its input as rows `[.., n]`."""
    if not isinstance(layer, _ConvNd):
        return by_unit(x, -1, reader)
    if not layer.transposed and not any(layer.padding) and all(side == 1 for side in layer.kernel_size):
        x = x[(slice(None), slice(None), *(slice(None, None, step) for step in layer.stride))]  # no other is read
    return by_unit(x, 1, reader)


def by_unit(tensor: Tensor, dim: int, reader: Slice) -> Tensor:
    """Return the tensor with the units of the reader last: where each has several entries, those come before."""
    inner = reader.axis[0].inner
    return torch.unflatten(tensor.movedim(dim, -1), -1, (-1, inner)).movedim(-1, -2)


def _device(model: nn.Module, reader: Slice) -> torch.device:
    return model.get_parameter(reader.tensor).device


def _check_rows(reader: Slice, moments: Moments) -> None:
    units = len(moments.sums)
    if not moments.rows:
        raise LayerError(
            reader.layer,
            "its input is not seen: it is not called as a module; leave the layers before it alone by filter_fn",
        )
    if moments.rows < units:
        raise LayerError(
            reader.layer,
            f"the calibration batches give it {moments.rows} rows for {units} units; at least {units} are needed, and "
            "ten times as many are better",
        )
