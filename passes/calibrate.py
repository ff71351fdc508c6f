"""Calibrating: R is set by a few batches before training starts."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from decorr_fx.config import Power
from decorr_fx.errors import ConfigError, LayerError, ModelError
from decorr_fx.inputs import Example, random_numbers_kept
from decorr_fx.passes.rewrite.fold import is_changed
from decorr_fx.runtime.site.state import Site, sites_of
from decorr_fx.runtime.step import hooks
from decorr_fx.runtime.step.exchange import check_same


def calibrate_sites(model: nn.Module, batches: Iterable[Any]) -> None:
    """Let every R of a transformed model that can move follow the rows of the batches.

    Raises:
        ConfigError: the rule of a site has no closed form, or a step of R would change the function.
        ModelError: there is no batch, the model does not run on one, or no R can move.
        LayerError: a batch gives a layer what is not finite.
    """
    if isinstance(batches, Tensor | Mapping):
        raise ModelError(f"batches is one {type(batches).__name__}; give several, or a list of one")
    sites = hooks.ready(sites_of(model))
    if not sites:
        raise ModelError("no R can move: every layer is paused, or has a frozen weight")
    for site in sites:
        _check_settings(site)
    check_same(sites)
    number = -1
    with random_numbers_kept(model), _restoring(model, sites), _recording(model, sites):
        for site in sites:
            site.reset()
            site.recording_all = True
        for number, batch in enumerate(batches):
            _run(model, batch, number)
            _check_rows(sites, number)
            hooks.move_all(dict.fromkeys(sites, 0.0))  # a rate of 0: the plain mean of all moments since the reset
            for site in sites:
                site.begin_recording()
    if number < 0:
        raise ModelError("there is no batch to calibrate on; give a list, or a loader that is not used up")


def _check_settings(site: Site) -> None:
    fqn, rule = site.spec.fqn, site.spec.rule
    if not isinstance(rule, Power):
        raise ConfigError(f"layer {fqn!r}: {type(rule).__name__} has no closed form to calibrate; use Power")
    if not rule.preserve_function:
        raise ConfigError(f"layer {fqn!r}: with preserve_function=False calibrating would change the network's outputs")


def _run(model: nn.Module, batch: Any, number: int) -> None:
    try:
        Example.of(batch).run(model, f"batch {number}")
    except ModelError as error:
        raise ModelError(f"{error}; a batch is what the model is called with, without labels") from error


def _check_rows(sites: Sequence[Site], number: int) -> None:
    if not any(site.rows_of_step() for site in sites):
        raise ModelError(f"batch {number} does not reach a layer whose R can move")
    for site in sites:
        if not site.rows[: int(site.seen)].isfinite().all():
            raise LayerError(site.spec.fqn, f"its input is not finite for batch {number}; leave such batches out")


@contextmanager
def _recording(model: nn.Module, sites: Sequence[Site]) -> Iterator[None]:
    """Let sites record every forward; all other modules stay in the modes that they are in."""
    recording = {module: module.training for module in model.modules() if is_changed(module)}
    attempts = [site.schedule.attempts for site in sites]
    try:
        for module in recording:
            module.training = True
        yield
    finally:
        for site, attempt in zip(sites, attempts, strict=True):
            site.recording_all = False
            site.schedule.restart(attempt)
            site.begin_recording()
        for module, mode in recording.items():
            module.training = mode


@contextmanager
def _restoring(model: nn.Module, sites: Sequence[Site]) -> Iterator[None]:
    """Leave everything as it was after a failure, and after success all but the sites."""
    moved = [(site, name, buffer) for site in sites for name, buffer in site.named_buffers()]
    others = [
        (module, name, buffer)
        for module in model.modules()
        if not isinstance(module, Site)
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    before = [buffer.detach().clone() for _, _, buffer in (*moved, *others)]
    host = [(site.used, site.is_identity, site.same_on_all_ranks) for site in sites]
    try:
        yield
    except BaseException:
        _put_back(moved, before)
        for site, (used, is_identity, same) in zip(sites, host, strict=True):
            site.used, site.is_identity, site.same_on_all_ranks = used, is_identity, same
        raise
    finally:
        _put_back(others, before[len(moved) :])


@torch.no_grad()
def _put_back(buffers: Iterable[tuple[nn.Module, str, Tensor]], before: Iterable[Tensor]) -> None:
    for (module, name, buffer), old in zip(buffers, before, strict=False):
        buffer.copy_(old)
        module._buffers[name] = buffer  # a forward may have put another in its place
