"""Moving R: sites of equal shape take their step together, in one batch; weights follow, and bad steps are refused.

Nothing here waits for the device.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from decorr_fx.ops.power import Past
from decorr_fx.ops.product import full_precision
from decorr_fx.ops.step import Step, losses, step_factors
from decorr_fx.ops.structure import fold_weight, output_of_mean, stack_rows, stack_weight, unstack_weight
from decorr_fx.runtime.state import Recorded, Site

MEAN_MOMENTUM = 0.1  # of the running mean of the rows, as CRGD has it


@dataclass(frozen=True)
class Move:
    """A step of R that is to be taken: of which site, on which rows, and how far."""

    site: Site
    recorded: Recorded
    decor_lr: float


def group_by_shape(moves: Iterable[Move]) -> Iterator[list[Move]]:
    """Yield the moves that can be made together."""
    groups: dict[Any, list[Move]] = {}
    for one in moves:
        shapes = tuple((weight.layout, weight.centered) for weight in one.site.spec.weights)
        rows = one.recorded.rows
        key = (shapes, one.site.spec.config, rows.shape, rows.dtype, rows.device, one.decor_lr)
        groups.setdefault(key, []).append(one)
    yield from groups.values()


@dataclass(frozen=True)
class Update:
    """What replaces what if a step is accepted: one tensor a site."""

    old: list[Tensor]
    new: list[Tensor]


@torch.no_grad()
def move(moves: Sequence[Move]) -> None:
    """Move the R of sites of equal shape by one step, on the rows recorded since the last one.

    A site without rows does not move. A step whose rows or results are not finite is refused and counted.
    """
    sites, decor_lr = [one.site for one in moves], moves[0].decor_lr
    layout, config = sites[0].spec.layout, sites[0].spec.config
    with full_precision(sites[0].rows.device):
        used = torch.stack([one.recorded.used for one in moves])
        x = stack_rows(torch.stack([one.recorded.rows for one in moves]).where(used[..., None], 0), layout)
        seen = used.sum(1)
        count = seen.repeat_interleave(layout.stacks)
        means = None
        if sites[0].spec.demeaned:
            means, x = _demean(sites, x, count, used.repeat_interleave(layout.stacks, 0))
        factors = [_join(of_sites) for of_sites in zip(*(site.factors for site in sites), strict=True)]
        step = step_factors(factors, x, count, config, decor_lr, _past(sites))
        updates = [Update([site.factors[i] for site in sites], _split(f, sites)) for i, f in enumerate(step.factors)]
        updates += [Update([s.moments[i] for s in sites], _split(m, sites)) for i, m in enumerate(step.moments)]
        if means is not None:
            updates.append(Update([site.mean for site in sites], means))
        if config.preserve_function:
            updates += _followers(sites, step, means)
        _commit(sites, updates, step, seen > 0)


def _past(sites: Sequence[Site]) -> Past | None:
    if not sites[0].spec.remembers:
        return None
    moments = [_join(of_sites) for of_sites in zip(*(site.moments for site in sites), strict=True)]
    return Past(moments, torch.stack([site.steps for site in sites]))


def _join(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def _split(stacked: Tensor, sites: Sequence[Site]) -> list[Tensor]:
    return list(stacked.chunk(len(sites)))


def _demean(sites: Sequence[Site], x: Tensor, count: Tensor, used: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return the new running mean of each site, and the rows `[stacks, n, *modes]` without it."""
    old = _join([site.mean for site in sites])
    ones = [1] * (old.dim() - 1)
    mean = old + MEAN_MOMENTUM * (x.sum(1) / count.reshape(-1, *ones) - old)
    return _split(mean, sites), (x - mean[:, None]).where(used.reshape(*used.shape, *ones), 0)


def _followers(sites: Sequence[Site], step: Step, means: list[Tensor] | None) -> Iterator[Update]:
    """Yield the weights, and the biases where centred, such that the function of each layer stands still."""
    for index, weight in enumerate(sites[0].spec.weights):
        yield Update([site.weights[index].held()[0] for site in sites], _moved_weights(sites, step, index))
        if weight.centered and means is not None:
            biases = [bias.get() for site in sites if (bias := site.weights[index].bias) is not None]
            shifts = [_shift(site, index, mean) for site, mean in zip(sites, means, strict=True)]
            yield Update(biases, [(b.to(s.dtype) + s).to(b.dtype) for b, s in zip(biases, shifts, strict=True)])


def _moved_weights(sites: Sequence[Site], step: Step, index: int) -> list[Tensor]:
    """Return weight number `index` of each site as it follows; one by one, since joining them would copy them all."""
    moved = []
    for i, site in enumerate(sites):
        W, layout = site.weights[index].held()
        stacked = step.retreat(stack_weight(W.to(site.rows.dtype), layout), i, len(sites))
        moved.append(unstack_weight(stacked, W.shape, layout).to(W.dtype))
    return moved


def _shift(site: Site, index: int, mean: Tensor) -> Tensor:
    """Return what a bias gains when the mean moves to `mean`: `W R (mean - old mean)`."""
    layout = site.spec.weights[index].layout
    W = site.weights[index].get().to(site.rows.dtype)
    return output_of_mean(fold_weight(W, site.factors, layout), mean - site.mean, layout)


def _commit(sites: Sequence[Site], updates: list[Update], step: Step, recorded: Tensor) -> None:
    # a sum is finite if what it adds up is: numbers near the largest one of a type are as good as infinite
    sums = torch.stack([new.sum() for update in updates for new in update.new])
    finite = sums.isfinite().reshape(len(updates), -1).all(0)
    accepted = recorded & finite
    found = losses(step, len(sites))
    for i, site in enumerate(sites):
        for update in updates:
            torch.where(accepted[i], update.new[i], update.old[i], out=update.old[i])
        torch.where(accepted[i], found[i], site.losses, out=site.losses)
        site.steps += accepted[i]
        site.refused += recorded[i] & ~finite[i]
