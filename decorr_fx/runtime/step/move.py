"""Moving R: sites of equal shape take their step together, in one batch.

A step of the rule `Power` has two parts: one reads the rows, and what it comes to is small; the other takes the step.
On several ranks the first part may be done elsewhere. Nothing here waits for the device.
"""

from collections.abc import Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from decorr_fx.config import Power, Rule, SmallSteps
from decorr_fx.ops.coordinates import divided, multiply_into
from decorr_fx.ops.layout import Layout, stack_rows
from decorr_fx.ops.moment import losses
from decorr_fx.ops.rules import power
from decorr_fx.ops.rules.small_steps import step_factors
from decorr_fx.runtime.site.state import Recorded, Site
from decorr_fx.runtime.step.update import MomentUpdate

MEAN_MOMENTUM = 0.1  # of the running mean of the rows, as CRGD has it


class Move(NamedTuple):
    """A step of R that is to be taken: of which site, on which rows, and at which rate."""

    site: Site
    recorded: Recorded
    rate: float


def shape_of(one: Move | MomentUpdate) -> tuple[Any, ...]:
    """Return what moves, or updates, have in common that are made in one batch."""
    site, rate = one.site, one.rate if isinstance(one, Move) else 0.0
    return rate, site.spec.layouts, site.spec.rule, site.used, site.rows.shape, site.rows.dtype, site.rows.device


@torch.no_grad()
def move(moves: Sequence[Move]) -> None:
    """Move the R of sites of equal shape by one step, on the rows recorded since the last one.

    A site without rows does not move. A step whose rows or results are not finite is refused and counted.
    """
    sites, recorded, rates = zip(*moves, strict=True)
    rule: Rule = sites[0].spec.rule
    if isinstance(rule, Power):
        moments, found, seen = _moments(sites, recorded, rates[0])
        _commit(sites, power.apply_step(moments, rule, sites[0].used), found, seen > 0)
        return
    assert isinstance(rule, SmallSteps)
    x, seen, used = _rows(recorded, sites[0].spec.layout)
    count, means = seen.repeat_interleave(sites[0].spec.layout.stacks), []
    if sites[0].spec.demeaned:
        x, mean = _demean(sites, x, count, used)
        means = [mean]
    factors = [_join(of_sites) for of_sites in zip(*(site.matrix().factors for site in sites), strict=True)]
    stepped, of_z = step_factors(factors, x, count, rule, rates[0])
    _commit(sites, [*stepped, *means], losses(of_z, len(sites)), seen > 0)


@torch.no_grad()
def update_moments(moves: Sequence[Move]) -> list[MomentUpdate]:
    """Return the new moments of sites of equal shape; nothing has moved then."""
    sites, recorded, rates = zip(*moves, strict=True)
    moments, found, seen = _moments(sites, recorded, rates[0])
    rows = seen.to(found.dtype)[:, None]
    parts = (moments.sketch.chunk(len(sites)), moments.trace.chunk(len(sites)), found, rows)
    return [MomentUpdate(*one) for one in zip(sites, *parts, strict=True)]


@torch.no_grad()
def apply_updates(updates: Sequence[MomentUpdate]) -> None:
    """Take the step of sites of equal shape, by the new moments of their rows; see `move`."""
    sites = [one.site for one in updates]
    rule: Any = sites[0].spec.rule
    moments = power.Moments(_join([one.sketch for one in updates]), _join([one.trace for one in updates]))
    found, seen = torch.stack([one.losses for one in updates]), torch.cat([one.seen for one in updates])
    _commit(sites, power.apply_step(moments, rule, sites[0].used), found, seen > 0)


def _moments(sites: Sequence[Site], recorded: Sequence[Recorded], rate: float) -> tuple[power.Moments, Tensor, Tensor]:
    """Return the new moments of all stacks, the losses of z of each site, and how many rows it has in use."""
    x, seen, _ = _rows(recorded, sites[0].spec.layout)
    stacks = sites[0].spec.layout.stacks
    state = sites[0].state if len(sites) == 1 else _joined_state(sites)
    steps = torch.stack([*map(attrgetter("steps"), sites)]).repeat_interleave(stacks)
    before = power.State(state[0], state[1], state[2], state[-1])
    moments, of_z = power.update_moments(before, steps, x, seen.repeat_interleave(stacks), rate, sites[0].used)
    return moments, losses([of_z], len(sites)), seen


def _joined_state(sites: Sequence[Site]) -> list[Tensor]:
    return [*map(torch.cat, zip(*[site.state for site in sites], strict=True))]


def _rows(recorded: Sequence[Recorded], layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows `[stacks, n, *modes]`, of which unused ones are zero, how many a site has in use, and which."""
    all_rows, all_used = zip(*recorded, strict=True)
    used = torch.stack(all_used)
    rows = torch.stack(all_rows).where(used[..., None], 0)
    return stack_rows(rows, layout), used.sum(1), used


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
    new, finite = [], torch.ones_like(recorded)
    for tensor in state[: len(sites[0].spec.state_shapes)]:
        of_sites = tensor.reshape(len(sites), -1, *tensor.shape[1:])
        new.append(of_sites)
        # a sum is finite if what it adds up is: numbers near the largest one of a type are as good as infinite
        finite &= of_sites.flatten(1).sum(1).isfinite()
    accepted = recorded & finite
    standing = [] if sites[0].spec.rule.preserve_function else [_divided(site) for site in sites]
    for i, site in enumerate(sites):
        for old, of_sites in zip(site.state, new, strict=True):
            torch.where(accepted[i], of_sites[i], old, out=old)
        torch.where(accepted[i], found[i], site.losses, out=site.losses)
        site.steps.add_(accepted[i])
        site.is_identity = False
        site.refused.add_(recorded[i] & ~finite[i])
    for site, Ws in zip(sites, standing, strict=False):
        for (theta, layout), W in Ws:
            multiply_into(theta, W, site.matrix(), layout)


def _divided(site: Site) -> list[tuple[tuple[Tensor, Layout], Tensor]]:
    """Return what this rank holds of each weight theta of a site, with its layout, and W."""
    held = [weight.part(weight.parameter().detach()) for weight in site.weights]
    return [(one, divided(one[0], site.matrix(), one[1])) for one in held]
