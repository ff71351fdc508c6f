"""Moving R: sites of equal shape take their step together, in one batch.

A step of a rule that remembers has two parts: one looks at the rows, and what it finds is small; the other takes the
step. On several ranks the first part may be made elsewhere.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from decorr_fx.ops.layout import stack_rows
from decorr_fx.ops.product import full_precision
from decorr_fx.ops.rules import power
from decorr_fx.ops.rules.step import losses, step_factors
from decorr_fx.runtime.site.state import Recorded, Site
from decorr_fx.runtime.step.finding import Finding
from decorr_fx.runtime.step.follow import split, take_step

MEAN_MOMENTUM = 0.1  # of the running mean of the rows, as CRGD has it

T = TypeVar("T")


@dataclass(frozen=True)
class Move:
    """A step of R that is to be taken: of which site, on which rows, and how far."""

    site: Site
    recorded: Recorded
    decor_lr: float


def group_by_shape(moves: Iterable[Move]) -> Iterator[list[Move]]:
    """Yield the moves that can be made together."""
    return grouped(moves, lambda one: (_shape(one.site), one.decor_lr))


def group_findings(findings: Iterable[Finding]) -> Iterator[list[Finding]]:
    """Yield the findings of which the steps can be taken together."""
    return grouped(findings, lambda one: _shape(one.site))


def grouped(items: Iterable[T], key: Callable[[T], Any]) -> Iterator[list[T]]:
    """Yield the items of each key, in the order in which the keys come first."""
    groups: dict[Any, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    yield from groups.values()


def _shape(site: Site) -> tuple[Any, ...]:
    """Return what sites have in common that step in one batch."""
    shapes = tuple((weight.layout, weight.centered) for weight in site.spec.weights)
    return shapes, site.spec.config, site.rows.shape, site.rows.dtype, site.rows.device


@torch.no_grad()
def move(moves: Sequence[Move]) -> None:
    """Move the R of sites of equal shape by one step, on the rows recorded since the last one.

    A site without rows does not move. A step whose rows or results are not finite is refused and counted.
    """
    if moves[0].site.spec.remembers:
        take(look(moves))
        return
    sites, config = [one.site for one in moves], moves[0].site.spec.config
    with full_precision(sites[0].rows.device):
        rows = _rows(moves)
        step = step_factors(_factors(sites), rows.x, rows.count, config, moves[0].decor_lr)
        take_step(sites, step, rows.means, losses(step.of_z, len(sites)), rows.seen)


@torch.no_grad()
def look(moves: Sequence[Move]) -> list[Finding]:
    """Return what the rows of sites of equal shape tell, for a rule that remembers; nothing has moved then."""
    sites = [one.site for one in moves]
    with full_precision(sites[0].rows.device):
        rows = _rows(moves)
        (V,) = _factors(sites)
        learned = power.learn(V, rows.x, rows.count, _past(sites), moves[0].decor_lr)
        moments = split(learned.sketch, sites), split(learned.trace, sites)
        means: Sequence[Tensor | None] = [None] * len(sites) if rows.means is None else rows.means
        found, seen = losses(learned.of_z, len(sites)), rows.seen.to(V.dtype)[:, None]
        return [Finding(*parts) for parts in zip(sites, *moments, means, found, seen, strict=True)]


@torch.no_grad()
def take(findings: Sequence[Finding]) -> None:
    """Take the step of sites of equal shape, by what their rows tell; see `move`."""
    sites = [one.site for one in findings]
    config = sites[0].spec.config
    with full_precision(sites[0].rows.device):
        sketch, trace = _join([one.sketch for one in findings]), _join([one.trace for one in findings])
        (V,) = _factors(sites)
        step = power.replace(V, sketch, trace, config.power, config.damping)
        means = [one.mean for one in findings if one.mean is not None] or None
        found, seen = torch.stack([one.losses for one in findings]), torch.cat([one.seen for one in findings])
        take_step(sites, step, means, found, seen)


@dataclass(frozen=True)
class _Rows:
    """Rows of sites of equal shape.

    Attributes:
        x: `[stacks, n, *modes]`, demeaned where the rule asks for it; unused ones are zero.
        count: how many are in use, `[stacks]`.
        seen: how many are in use, `[sites]`.
        means: the new running mean of each site, where rows are demeaned.
    """

    x: Tensor
    count: Tensor
    seen: Tensor
    means: list[Tensor] | None


def _rows(moves: Sequence[Move]) -> _Rows:
    sites, layout = [one.site for one in moves], moves[0].site.spec.layout
    used = torch.stack([one.recorded.used for one in moves])
    x = stack_rows(torch.stack([one.recorded.rows for one in moves]).where(used[..., None], 0), layout)
    seen = used.sum(1)
    count = seen.repeat_interleave(layout.stacks)
    means = None
    if sites[0].spec.demeaned:
        means, x = _demean(sites, x, count, used.repeat_interleave(layout.stacks, 0))
    return _Rows(x, count, seen, means)


def _factors(sites: Sequence[Site]) -> list[Tensor]:
    return [_join(of_sites) for of_sites in zip(*(site.factors for site in sites), strict=True)]


def _past(sites: Sequence[Site]) -> power.Past:
    scale, trace = (_join(of_sites) for of_sites in zip(*(site.moments for site in sites), strict=True))
    return power.Past(scale, trace, torch.stack([site.steps for site in sites]))


def _join(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def _demean(sites: Sequence[Site], x: Tensor, count: Tensor, used: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return the new running mean of each site, and the rows `[stacks, n, *modes]` without it."""
    old = _join([site.mean for site in sites])
    ones = [1] * (old.dim() - 1)
    mean = old + MEAN_MOMENTUM * (x.sum(1) / count.reshape(-1, *ones) - old)
    return split(mean, sites), (x - mean[:, None]).where(used.reshape(*used.shape, *ones), 0)
