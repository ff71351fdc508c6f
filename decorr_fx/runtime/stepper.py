"""When R moves: right after the step of the optimizer that owns the site's weight, and at no other time.

A loop that is valid for W, which changes in place at `optimizer.step()`, is then valid for R: gradient accumulation,
two forwards before one backward, checkpointing, skipped steps of a GradScaler, several optimizers.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from decorr_fx.errors import DistributedError
from decorr_fx.runtime.move import group_by_shape, move
from decorr_fx.runtime.state import LIVE_SITES, Site, sites_of


@cache
def follow_optimizers() -> None:
    """Let every site follow the optimizer that owns its weight, from now on; calling it again does nothing."""
    register_optimizer_step_post_hook(_after_step)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    step_sites(site for site in list(LIVE_SITES) if owned.issuperset(id(weight.find()) for weight in site.weights))


def step_sites(sites: Iterator[Site]) -> None:
    """Step the given sites, except those that are paused or have a frozen weight, which could not follow.

    Raises:
        DistributedError: there are several ranks, each of which would move R by its own rows.
        LayerError: a weight was untied after `transform`; no R has moved then.
    """
    ready = ready_sites(sites)
    due = [(site, decor_lr) for site in ready if (decor_lr := site.advance()) is not None]
    for group, decor_lr in group_by_shape(due):
        move(group, decor_lr)
    for site in ready:
        site.forget()


def move_recorded(sites: Sequence[Site]) -> None:
    """Move the R of every site on what it recorded; running moments take the plain mean of all since their reset.

    No step of an optimizer is counted.
    """
    for group, rate in group_by_shape((site, 0.0) for site in sites):
        move(group, rate)
    for site in sites:
        site.forget()


def ready_sites(sites: Iterable[Site]) -> list[Site]:
    """Return the sites that can move now: not paused, nor of a frozen weight; those drop their rows.

    Raises:
        DistributedError: there are several ranks, each of which would move R by its own rows.
        LayerError: a weight was untied after `transform`.
    """
    ready = []
    for site in sites:
        parameters = [parameter for weight in site.weights if (parameter := weight.find()) is not None]
        if site.paused or len(parameters) < len(site.weights):
            continue
        if all(parameter.requires_grad for parameter in parameters):
            _check_one_rank(site)
            for weight in site.weights:
                weight.check()
            ready.append(site)
        else:
            site.forget()
    return ready


def _check_one_rank(site: Site) -> None:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise DistributedError(
            f"layer {site.spec.fqn!r}: {dist.get_world_size()} ranks train together, and each would move R on its own; "
            "train on one rank, or keep R still with decorr_fx.paused(model)"
        )


@contextmanager
def paused_sites(model: nn.Module) -> Iterator[None]:
    """Keep every R of the model where it is; rows that were not used by the end are dropped."""
    held = [site for site in sites_of(model) if not site.paused]
    for site in held:
        site.paused = True
    try:
        yield
    finally:
        for site in held:
            site.paused = False
            site.forget()
