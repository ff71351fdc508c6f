"""Calibrating: R is set by a few batches before training starts, and the network's function stands still."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from decorr_fx.errors import ConfigError, LayerError, ModelError
from decorr_fx.inputs import Example, random_numbers_kept
from decorr_fx.passes.rewrite.layer import DecorrelatedLayer
from decorr_fx.runtime.site.shard import reshard
from decorr_fx.runtime.site.state import Site, sites_of
from decorr_fx.runtime.step import hooks as stepper


def calibrate_sites(model: nn.Module, batches: Iterable[Any]) -> None:
    """Let every R of a transformed model that can move follow the rows of the batches; weights follow R.

    Raises:
        ConfigError: a site has no closed form, or a function that would not stand still.
        ModelError: there is no batch, the model does not run on one, or no R can move.
        LayerError: a batch gives a layer what is not finite.
    """
    if isinstance(batches, Tensor | Mapping):
        raise ModelError(f"batches is one {type(batches).__name__}; give several, or a list of one")
    sites = stepper.ready_sites(sites_of(model))
    if not sites:
        raise ModelError("no R can move: every layer is paused, or has a frozen weight")
    for site in sites:
        _check_settings(site)
    number = -1
    with random_numbers_kept(model), _restoring(model, sites), _recording(model, sites):
        for site in sites:
            site.reset_moments()
        for number, batch in enumerate(batches):
            _run(model, batch, number)
            reshard(model)  # weights that a forward has gathered are not those that follow R
            _check_rows(sites, number)
            stepper.move_recorded(sites)
    if number < 0:
        raise ModelError("there is no batch to calibrate on; give a list, or a loader that is not used up")


def _check_settings(site: Site) -> None:
    fqn, config = site.spec.fqn, site.spec.config
    if not site.spec.remembers:
        raise ConfigError(f"layer {fqn!r}: rule {config.rule!r} has no closed form to calibrate; use rule='power'")
    if site.spec.demeaned:
        raise ConfigError(f"layer {fqn!r}: a few batches do not settle the running mean; use center=False")
    if not config.preserve_function:
        raise ConfigError(f"layer {fqn!r}: with preserve_function=False calibrating would change the network's outputs")


def _run(model: nn.Module, batch: Any, number: int) -> None:
    try:
        Example.of(batch).run(model, f"batch {number}")
    except ModelError as error:
        raise ModelError(f"{error}; a batch is what the model is called with, without labels") from error


def _check_rows(sites: Sequence[Site], number: int) -> None:
    if not any(int(site.seen) for site in sites):
        raise ModelError(f"batch {number} does not reach a layer whose R can move")
    for site in sites:
        if not site.rows[: int(site.seen)].isfinite().all():
            raise LayerError(site.spec.fqn, f"its input is not finite for batch {number}; leave such batches out")


@contextmanager
def _recording(model: nn.Module, sites: Sequence[Site]) -> Iterator[None]:
    """Let sites record every forward, and count no step; other modules stay in the modes that they are in."""
    recording = [module for module in model.modules() if isinstance(module, DecorrelatedLayer)]
    modes = {module: module.training for module in [*recording, *sites]}
    attempts = [site.attempts for site in sites]
    try:
        for site in sites:
            site.attempts = 0
        _set_modes(dict.fromkeys(modes, True))
        yield
    finally:
        for site, attempt in zip(sites, attempts, strict=True):
            site.forget()
            site.attempts = attempt
        _set_modes(modes)


def _set_modes(modes: Mapping[nn.Module, bool]) -> None:
    for module, mode in modes.items():
        if isinstance(module, Site):
            module.train(mode)  # which makes room for what is kept in eval mode
        module.training = mode


@contextmanager
def _restoring(model: nn.Module, sites: Sequence[Site]) -> Iterator[None]:
    """Leave everything as it was after a failure, and after success all but the sites and their weights."""
    moved = {id(tensor): tensor for site in sites for tensor in _tensors_of(site)}
    others = [
        (module, name, buffer)
        for module in model.modules()
        if not isinstance(module, Site)
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    tensors = [*moved.values(), *(buffer for _, _, buffer in others)]
    before = {id(tensor): tensor.detach().clone() for tensor in tensors}
    try:
        yield
    except BaseException:
        _copy_back(moved.values(), before)
        raise
    finally:
        _copy_back([buffer for _, _, buffer in others], before)
        for module, name, buffer in others:
            module._buffers[name] = buffer  # a forward may have put another in its place


def _tensors_of(site: Site) -> Iterator[Tensor]:
    yield from (buffer for name, buffer in site.named_buffers() if not name.startswith("kept"))
    yield from (weight.get() for weight in site.weights)


@torch.no_grad()
def _copy_back(tensors: Iterable[Tensor], before: Mapping[int, Tensor]) -> None:
    for tensor in tensors:
        tensor.copy_(before[id(tensor)])
