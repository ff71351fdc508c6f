"""Calibrating: R is set by a few batches before training starts, and the network's function stands still."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from decorr_fx.errors import ConfigError, LayerError, ModelError
from decorr_fx.passes.example import Example
from decorr_fx.runtime import stepper
from decorr_fx.runtime.state import Site, sites_of


def calibrate_sites(model: nn.Module, batches: Iterable[Any]) -> None:
    """Let every R of a transformed model follow the rows of each batch; weights follow R.

    Raises:
        ConfigError: a site has no closed form, or weights that do not follow.
        ModelError: there is no batch, the model does not run on one, or no R can move.
        LayerError: a batch gives a layer what is not finite.
    """
    sites = list(sites_of(model))
    for site in sites:
        _check_settings(site)
    number = -1
    with _restoring(model, sites), _recording(model, sites):
        for number, batch in enumerate(batches):
            _run(model, batch, number)
            refused = [int(site.refused) for site in sites]
            if not stepper.move_recorded(sites):
                raise ModelError("no R can move: every layer is paused, or has a frozen weight")
            _check_accepted(sites, refused, number)
        if number < 0:
            raise ModelError("there is no batch to calibrate on; give a list, or a loader that is not used up")


def _check_settings(site: Site) -> None:
    fqn, config = site.spec.fqn, site.spec.config
    if not site.spec.remembers:
        raise ConfigError(f"layer {fqn!r}: rule {config.rule!r} has no closed form to calibrate; use rule='power'")
    if not config.preserve_function:
        raise ConfigError(f"layer {fqn!r}: with preserve_function=False calibrating would change the network's outputs")


def _run(model: nn.Module, batch: Any, number: int) -> None:
    try:
        Example.of(batch).run(model, f"batch {number}")
    except ModelError as error:
        raise ModelError(f"{error}; a batch is what the model is called with, without labels") from error


def _check_accepted(sites: Sequence[Site], refused: Sequence[int], number: int) -> None:
    for site, before in zip(sites, refused, strict=True):
        if int(site.refused) > before:
            raise LayerError(site.spec.fqn, f"its input or R is not finite for batch {number}; leave such batches out")


@contextmanager
def _recording(model: nn.Module, sites: Sequence[Site]) -> Iterator[None]:
    """Let sites record every forward: a model in eval mode is in train mode meanwhile, and steps are not counted."""
    modes = {module: module.training for module in model.modules()}
    attempts = [site.attempts for site in sites]
    for site in sites:
        site.attempts = 0
    if not model.training:
        model.train()
    try:
        yield
    finally:
        for site, attempt in zip(sites, attempts, strict=True):
            site.forget()
            site.attempts = attempt
        for module, mode in modes.items():
            if isinstance(module, Site):
                module.train(mode)
            module.training = mode


@contextmanager
def _restoring(model: nn.Module, sites: Sequence[Site]) -> Iterator[None]:
    """Leave everything as it was after a failure, and after success all but the sites and their weights."""
    moved = {id(tensor): tensor for site in sites for tensor in _tensors_of(site)}
    others = {id(buffer): buffer for buffer in model.buffers() if id(buffer) not in moved}
    before = {key: tensor.detach().clone() for key, tensor in (moved | others).items()}
    try:
        yield
    except BaseException:
        _copy_back(moved, before)
        raise
    finally:
        _copy_back(others, before)


def _tensors_of(site: Site) -> Iterator[Tensor]:
    yield from (buffer for name, buffer in site.named_buffers() if not name.startswith("kept"))
    for weight in site.weights:
        yield weight.get()
        if weight.bias is not None:
            yield weight.bias.get()


@torch.no_grad()
def _copy_back(tensors: dict[int, Tensor], before: dict[int, Tensor]) -> None:
    for key, tensor in tensors.items():
        tensor.copy_(before[key])
