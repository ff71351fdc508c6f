"""When R moves: right after the step of the optimizer that owns the site's weight, and at no other time.

A loop that is valid for W, which changes in place at `optimizer.step()`, is then valid for R: gradient accumulation,
two forwards before one backward, checkpointing, skipped steps of a GradScaler, several optimizers.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from decorr_fx.runtime.site.ranks import ranks
from decorr_fx.runtime.site.state import LIVE_SITES, Site, sites_of
from decorr_fx.runtime.step.exchange import Exchange, check_same, share
from decorr_fx.runtime.step.move import Move, group_by_shape, group_findings, look, move, take

_ON_THEIR_WAY: "WeakKeyDictionary[Optimizer, Exchange]" = WeakKeyDictionary()  # while an optimizer steps


@cache
def follow_optimizers() -> None:
    """Let every site follow the optimizer that owns its weight, from now on; calling it again does nothing."""
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Let rows of several ranks be on their way while the optimizer steps: all of them are recorded by now."""
    _ON_THEIR_WAY.pop(optimizer, None)  # of a step that failed
    given = (*args[1:], *kwargs.values())  # a closure would run forwards now; the first argument is the optimizer
    if ranks() > 1 and all(argument is None for argument in given):
        sites = ready_sites(_owned_by(optimizer))
        check_same(sites)
        _ON_THEIR_WAY[optimizer] = Exchange.start([site for site in sites if site.due])


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    step_sites(_owned_by(optimizer), _ON_THEIR_WAY.pop(optimizer, None))
    _ON_THEIR_WAY.clear()  # those of an optimizer around this one: what was recorded is used by now


def _owned_by(optimizer: Optimizer) -> Iterator[Site]:
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return (site for site in list(LIVE_SITES) if owned.issuperset(id(weight.find()) for weight in site.weights))


def step_sites(sites: Iterable[Site], on_their_way: Exchange | None = None) -> None:
    """Step the given sites, except those that are paused or have a frozen weight, which could not follow.

    Raises:
        DistributedError: R is not the same on all ranks.
        LayerError: a weight was untied after `transform`; no R has moved then.
    """
    ready = ready_sites(sites)
    if on_their_way is None:
        check_same(ready)
    due = {site: decor_lr for site in ready if (decor_lr := site.advance()) is not None}
    _move_all(due, on_their_way)
    for site in ready:
        site.forget()


def move_recorded(sites: Sequence[Site]) -> None:
    """Move the R of every site on what it recorded; running moments take the plain mean of all since their reset.

    No step of an optimizer is counted.
    """
    check_same(sites)
    _move_all(dict.fromkeys(sites, 0.0))
    for site in sites:
        site.forget()


def _move_all(sites: Mapping[Site, float], on_their_way: Exchange | None = None) -> None:
    """Move the R of each site by its step size, on the rows of all ranks."""
    recorded, divided = {site: site.recorded() for site in sites}, dict[Site, int]()  # by the rank that looks for all
    if ranks() > 1:
        exchange = Exchange.start(list(sites)) if on_their_way is None else on_their_way
        recorded, divided = exchange.wait(), exchange.makers
    moves = [Move(site, rows, sites[site]) for site, rows in recorded.items()]
    for group in group_by_shape(one for one in moves if one.site not in divided):
        move(group)
    found = [one for group in group_by_shape(one for one in moves if one.site in divided) for one in look(group)]
    for steps in group_findings(share(found, divided) if divided else []):
        take(steps)


def ready_sites(sites: Iterable[Site]) -> list[Site]:
    """Return the sites that can move now: not paused, nor of a frozen weight; those drop their rows.

    Raises:
        LayerError: a weight was untied after `transform`.
    """
    ready = []
    for site in sites:
        parameters = [parameter for weight in site.weights if (parameter := weight.find()) is not None]
        site.note_sharding()
        site.make_room()
        if site.paused or len(parameters) < len(site.weights):
            continue
        if all(parameter.requires_grad for parameter in parameters):
            for weight in site.weights:
                weight.check()
            ready.append(site)
        else:
            site.forget()
    return ready


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
