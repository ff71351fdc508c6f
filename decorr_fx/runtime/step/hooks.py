"""What happens around `optimizer.step()`: a change of coordinates, and then R moves where it is due.

Where one optimizer steps inside another, as in Lookahead and in ZeRO, the inner one makes the moves of the weights, and
what the outer one writes besides is left as it is. R moves at the end of the outer one, which owns the same on
all ranks.
"""

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any
from warnings import warn
from weakref import WeakSet

import torch
from torch import nn
from torch.optim import LBFGS, Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from decorr_fx.ops.precision import full_precision
from decorr_fx.runtime.site.ranks import is_distributed
from decorr_fx.runtime.site.registry import while_sites_live
from decorr_fx.runtime.site.shard import is_zero
from decorr_fx.runtime.site.state import Site, sites_of
from decorr_fx.runtime.step.batch import Batch, after_step, before_step, grouped
from decorr_fx.runtime.step.exchange import Exchange, agree_on_used_ranks, check_same, share
from decorr_fx.runtime.step.move import Move, apply_updates, move, shape_of, update_moments
from decorr_fx.runtime.step.owned import owned_by

_handles: list[RemovableHandle] = []
_plain: "WeakSet[Optimizer]" = WeakSet()  # optimizers that look at the loss several times a step: left as they are


@dataclass
class _Step:
    """A step that is being made.

    Attributes:
        optimizer: whose; None for `stepping`.
        owned: ids of the parameters that it owns.
        sites: of those.
        batches: what is needed after it.
        exchange: rows of several ranks that are on their way meanwhile.
        evaluations: how often it has called its closure.
        outer: another one is made inside of it, of parameters that it owns, too; or other ranks make theirs (ZeRO).
        inner: it is made inside of such a one.
    """

    optimizer: Optimizer | None
    owned: frozenset[int]
    sites: Sequence[Site]
    batches: Sequence[Batch] = ()
    exchange: Exchange | None = None
    evaluations: int = 0
    outer: bool = False
    inner: bool = False

    def begin(self, moves: bool) -> None:
        """Map the gradients that are there now, and let rows be on their way where R `moves` later on several ranks."""
        self.batches = before_step(self.sites, self.owned)
        if not moves:
            return
        due = ready(site for site in self.sites if site.schedule.due and site.ranks.count > 1)
        if due:
            agree_on_used_ranks(due)
            self.exchange = Exchange.start(due)


@dataclass
class _Steps(threading.local):
    """The steps that are being made in a thread, the outermost first."""

    steps: list[_Step] = field(default_factory=list)


_running = _Steps()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _before(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    owned, steps = owned_by(optimizer), _running.steps
    if steps:
        steps[:] = [step for step in steps if step.optimizer is None or _is_running(step.optimizer, optimizer)]
    around = [step for step in steps if not step.owned.isdisjoint(owned.ids)] if steps else []
    for step in around:
        step.outer = True
    sites = owned.sites() if owned.references else []
    if not sites:
        return None
    if isinstance(optimizer, LBFGS) or optimizer in _plain:
        _leave_plain(optimizer)
        return None
    several = is_distributed()
    if several and not around:
        check_same(sites)
    steps.append(step := _Step(optimizer, owned.ids, sites, outer=several and is_zero(optimizer), inner=bool(around)))
    if callable(closure := kwargs.get("closure")):
        return args, {**kwargs, "closure": _evaluated(step, closure)}
    if len(args) > 1 and callable(args[1]):
        return (args[0], _evaluated(step, args[1]), *args[2:]), kwargs
    step.begin(several and not step.inner)
    return None


def _evaluated(step: _Step, closure: Callable[[], Any]) -> Callable[[], Any]:
    """Return the closure of a step: once it was called, the gradients are there."""

    def evaluate() -> Any:
        loss = closure()
        step.evaluations += 1
        if step.evaluations == 1:
            step.begin(False)
        return loss

    return evaluate


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _after(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    steps = _running.steps
    if not steps or steps[-1].optimizer is not optimizer:
        return
    step = steps.pop()
    if not step.outer:
        after_step(step.batches, optimizer)
        if step.evaluations > 1:
            _leave_plain(optimizer)
    if not step.inner:
        move_due(step.sites, step.exchange)


def _is_running(optimizer: Optimizer, inner: Optimizer) -> bool:
    """Tell whether the step of an optimizer is being made now: one that raised an error has left its record behind."""
    if optimizer is inner:
        return False
    return any(frame.f_locals.get("self") is optimizer for frame in _callers())


def _leave_plain(optimizer: Optimizer) -> None:
    """Leave the steps of an optimizer as they are from now on, and say so once."""
    for site in owned_by(optimizer).sites():
        site.schedule.unowned = 0
    if optimizer not in _plain:
        _plain.add(optimizer)
        name = type(optimizer).__name__
        warn(f"{name} evaluates the loss several times a step: its steps are made without decorrelation", stacklevel=2)


@contextmanager
def stepping_sites(model: nn.Module) -> Iterator[None]:
    """Do around the body what is done around a step of a `torch.optim.Optimizer` that owns all weights of the model."""
    steps = _running.steps
    sites = list(sites_of(model))
    owned = frozenset(id(weight.parameter()) for site in sites for weight in site.weights)
    around = [step for step in steps if not step.owned.isdisjoint(owned)]
    if not around and is_distributed():
        check_same(sites)
    steps.append(step := _Step(None, owned, sites, inner=bool(around)))
    try:
        step.begin(is_distributed() and not step.inner)
        yield
        if not step.outer:
            after_step(step.batches)
    finally:
        steps.remove(step)
    if not step.inner:
        move_due(sites, step.exchange)


def move_due(sites: Iterable[Site], on_their_way: Exchange | None = None) -> None:
    """Count a step of the optimizer for each of the sites, and move R where it is due.

    Raises:
        ConfigError: `decor_lr` is a function and returned no step size.
    """
    sites = list(sites)
    due = [site for site in sites if site.schedule.due]
    if due and (due := ready(due)):
        if on_their_way is None and is_distributed():
            agree_on_used_ranks(due)
        move_all({site: site.spec.rule.rate_at(site.schedule.attempts) for site in due}, on_their_way)
    for site in sites:
        if site.schedule.count():
            site.begin_recording()


def move_all(sites: Mapping[Site, float], on_their_way: Exchange | None = None) -> None:
    """Move the R of each site at its rate, on the rows of all ranks."""
    alone = [site for site in sites if site.ranks.count == 1] if is_distributed() else sites
    recorded = {site: site.recorded() for site in alone}
    owner: dict[Site, int] = {}
    if len(recorded) < len(sites):
        exchange = on_their_way or Exchange.start([site for site in sites if site not in recorded])
        recorded |= exchange.wait()
        owner = exchange.owner
    for site in alone:
        site.fit_budget()
    moves = [Move(site, rows, sites[site]) for site, rows in recorded.items()]
    with full_precision():
        if owner:
            _move_divided([one for one in moves if one.site in owner], owner)
            moves = [one for one in moves if one.site not in owner]
        for group in grouped(moves, shape_of):
            move(group)


def _move_divided(mine: Sequence[Move], owner: Mapping[Site, int]) -> None:
    """Move the R of all sites that have an owner, those of this rank by the rows that it has read for all."""
    updates = [one for group in grouped(mine, shape_of) for one in update_moments(group)]
    for of_shape in grouped(share(updates, owner), shape_of):
        apply_updates(of_shape)


def ready(sites: Iterable[Site]) -> list[Site]:
    """Return the sites that can move now: not paused, nor of frozen weights alone."""
    found, several = [site for site in sites if not site.paused and site.trained], is_distributed()
    for site in found:
        site.make_room(site.ranks.count if several else 1)
    return found


@contextmanager
def paused_sites(model: nn.Module) -> Iterator[None]:
    """Keep every R of the model where it is; rows that were not used by the end are dropped."""
    held = [site for site in sites_of(model) if not site.paused]
    for site in held:
        site.paused = True
        site.begin_recording()
    try:
        yield
    finally:
        for site in held:
            site.paused = False
            site.schedule.restart(site.schedule.attempts)
            site.begin_recording()


def _start() -> None:
    if not _handles:
        _handles.append(register_optimizer_step_pre_hook(_before))
        _handles.append(register_optimizer_step_post_hook(_after))


def _stop() -> None:
    """Take the hooks out, but not while a step goes through them: the last model may vanish at any moment."""
    if any(frame.f_globals.get("__name__") == Optimizer.__module__ for frame in _callers()):
        return
    while _handles:
        _handles.pop().remove()


def _callers() -> Iterator[FrameType]:
    """Yield the frames of all functions that are being called in this thread, the innermost first."""
    frame = sys._getframe(1)
    while (caller := frame.f_back) is not None:
        frame = caller
        yield frame


while_sites_live(_start, _stop)
