"""Moving R: sites of equal shape take their step together, in one batch.

A step of the rule `Power` has two parts: one reads the rows, and what it comes to is small; the other takes the step.
On several ranks the first part may be done elsewhere. Nothing here waits for the device.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from decorr_fx.config import Power, SmallSteps
from decorr_fx.ops.coordinates import divided, multiply_into
from decorr_fx.ops.layout import Layout, stack_rows
from decorr_fx.ops.moment import losses
from decorr_fx.ops.precision import full_precision
from decorr_fx.ops.rules import power
from decorr_fx.ops.rules.small_steps import step_factors
from decorr_fx.runtime.site.state import Recorded, Site
from decorr_fx.runtime.step.batch import grouped
from decorr_fx.runtime.step.update import MomentUpdate

MEAN_MOMENTUM = 0.1  # of the running mean of the rows, as CRGD has it


@dataclass(frozen=True)
class Move:
    """A step of R that is to be taken: of which site, on which rows, and at which rate."""

    site: Site
    recorded: Recorded
    rate: float


def group_by_shape(moves: Iterable[Move]) -> Iterator[list[Move]]:
    """Yield the moves that can be made together."""
    return grouped(moves, lambda one: (shape_of(one.site), one.rate))


def shape_of(site: Site) -> tuple[Any, ...]:
    """Return what sites have in common that step in one batch."""
    layouts = tuple(weight.layout for weight in site.spec.weights)
    return layouts, site.spec.rule, site.used, site.rows.shape, site.rows.dtype, site.rows.device


@torch.no_grad()
def move(moves: Sequence[Move]) -> None:
    """Move the R of sites of equal shape by one step, on the rows recorded since the last one.

    A site without rows does not move. A step whose rows or results are not finite is refused and counted.
    """
    sites, rule = [one.site for one in moves], moves[0].site.spec.rule
    if isinstance(rule, Power):
        apply_updates(update_moments(moves))
        return
    assert isinstance(rule, SmallSteps)
    with full_precision(sites[0].rows.device):
        x, seen, used = _rows(moves)
        count, means = seen.repeat_interleave(sites[0].spec.layout.stacks), []
        if sites[0].spec.demeaned:
            x, mean = _demean(sites, x, count, used)
            means = [mean]
        factors = [_join(of_sites) for of_sites in zip(*(site.R().factors for site in sites), strict=True)]  # type: ignore[union-attr]
        stepped, of_z = step_factors(factors, x, count, rule, moves[0].rate)
        _commit(sites, [*stepped, *means], losses(of_z, len(sites)), seen > 0)


@torch.no_grad()
def update_moments(moves: Sequence[Move]) -> list[MomentUpdate]:
    """Return the new moments of sites of equal shape; nothing has moved then."""
    sites = [one.site for one in moves]
    with full_precision(sites[0].rows.device):
        x, seen, _ = _rows(moves)
        stacks = sites[0].spec.layout.stacks
        state = [_join(of_sites) for of_sites in zip(*(site.state for site in sites), strict=True)]
        steps = torch.stack([site.steps for site in sites]).repeat_interleave(stacks)
        before = power.State(state[0], state[1], state[2], state[-1])
        moments, of_z = power.update_moments(
            before, steps, x, seen.repeat_interleave(stacks), moves[0].rate, sites[0].used
        )
        found, rows = losses([of_z], len(sites)), seen.to(x.dtype)[:, None]
        parts = (moments.sketch.chunk(len(sites)), moments.trace.chunk(len(sites)), found, rows)
        return [MomentUpdate(*one) for one in zip(sites, *parts, strict=True)]


@torch.no_grad()
def apply_updates(updates: Sequence[MomentUpdate]) -> None:
    """Take the step of sites of equal shape, by the new moments of their rows; see `move`."""
    sites = [one.site for one in updates]
    rule = sites[0].spec.rule
    assert isinstance(rule, Power)
    with full_precision(sites[0].rows.device):
        moments = power.Moments(_join([one.sketch for one in updates]), _join([one.trace for one in updates]))
        state = power.apply_step(moments, rule, sites[0].used)
        found, seen = torch.stack([one.losses for one in updates]), torch.cat([one.seen for one in updates])
        _commit(sites, state[: len(sites[0].state)], found, seen > 0)


def _rows(moves: Sequence[Move]) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows `[stacks, n, *modes]`, of which unused ones are zero, how many a site has in use, and which."""
    used = torch.stack([one.recorded.used for one in moves])
    rows = torch.stack([one.recorded.rows for one in moves]).where(used[..., None], 0)
    return stack_rows(rows, moves[0].site.spec.layout), used.sum(1), used


def _demean(sites: Sequence[Site], x: Tensor, count: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows `[stacks, n, *modes]` without their running mean, and that mean as it is then."""
    old = _join([site.state[-1] for site in sites])
    ones = [1] * (old.dim() - 1)
    mean = old + MEAN_MOMENTUM * (x.sum(1) / count.reshape(-1, *ones) - old)
    used = used.repeat_interleave(len(x) // len(sites), 0)
    return (x - mean[:, None]).where(used.reshape(*used.shape, *ones), 0), mean


def _join(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def _commit(sites: Sequence[Site], state: Sequence[Tensor], found: Tensor, recorded: Tensor) -> None:
    """Put the new state in the place of the old one, of all sites whose step is finite; weights follow if asked to."""
    new = [tensor.chunk(len(sites)) for tensor in state]
    # a sum is finite if what it adds up is: numbers near the largest one of a type are as good as infinite
    sums = torch.stack([tensor.sum() for of_sites in new for tensor in of_sites])
    finite = sums.isfinite().reshape(len(new), -1).all(0)
    accepted = recorded & finite
    standing = [] if sites[0].spec.rule.preserve_function else [_divided(site) for site in sites]
    for i, site in enumerate(sites):
        for old, of_sites in zip(site.state, new, strict=True):
            torch.where(accepted[i], of_sites[i], old, out=old)
        torch.where(accepted[i], found[i], site.losses, out=site.losses)
        site.steps += accepted[i]
        site.is_identity = False
        site.refused += recorded[i] & ~finite[i]
    for site, Ws in zip(sites, standing, strict=False):
        for (theta, layout), W in Ws:
            multiply_into(theta, W, site.R(), layout)


def _divided(site: Site) -> list[tuple[tuple[Tensor, Layout], Tensor]]:
    """Return what this rank holds of each weight theta of a site, with its layout, and W."""
    held = [weight.part(weight.parameter().detach()) for weight in site.weights]
    return [(one, divided(one[0], site.R(), one[1])) for one in held]
