"""Taking a step of R that has been made: weights follow, and what is not finite is refused.

Nothing here waits for the device.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from decorr_fx.ops.layout import fold_weight, output_of_mean, stack_weight, unstack_weight
from decorr_fx.ops.rules.step import Step
from decorr_fx.runtime.site.state import Site


@dataclass(frozen=True)
class Update:
    """What replaces what if a step is accepted: one tensor a site."""

    old: list[Tensor]
    new: list[Tensor]


def take_step(sites: Sequence[Site], step: Step, means: list[Tensor] | None, found: Tensor, seen: Tensor) -> None:
    """Put a step of sites of equal shape in the place of what there is, and let their weights follow.

    A site without rows does not move. A step whose results are not finite is refused and counted.

    Args:
        sites: of which it is.
        step: the new R, as every rule gives it.
        means: the new running mean of each site, where rows are demeaned.
        found: correlation and variance error of each site, `[sites, 2]`.
        seen: how many rows each site had, `[sites]`.
    """
    moved = [Update([s.factors[i] for s in sites], split(f, sites)) for i, f in enumerate(step.factors)]
    moved += [Update([s.moments[i] for s in sites], split(m, sites)) for i, m in enumerate(step.moments)]
    if means is not None:
        moved.append(Update([site.mean for site in sites], means))
    followers = list(_followers(sites, step, means)) if sites[0].spec.config.preserve_function else []
    if any(site.sharded for site in sites):  # no rank may refuse for what others do not hold: R would not be the same
        to_check = [update.new for update in moved] + [split(tensor, sites) for tensor in step.carriers]
    else:
        to_check = [update.new for update in (*moved, *followers)]
    _commit(sites, [*moved, *followers], to_check, found, seen > 0)


def split(stacked: Tensor, sites: Sequence[Site]) -> list[Tensor]:
    """Return the part of each site, of what holds them one after the other."""
    return list(stacked.chunk(len(sites)))


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


def _commit(
    sites: Sequence[Site], updates: list[Update], to_check: list[list[Tensor]], found: Tensor, recorded: Tensor
) -> None:
    # a sum is finite if what it adds up is: numbers near the largest one of a type are as good as infinite
    sums = torch.stack([tensor.sum() for of_sites in to_check for tensor in of_sites])
    finite = sums.isfinite().reshape(len(to_check), -1).all(0)
    accepted = recorded & finite
    for i, site in enumerate(sites):
        for update in updates:
            torch.where(accepted[i], update.new[i], update.old[i], out=update.old[i])
        torch.where(accepted[i], found[i], site.losses, out=site.losses)
        site.steps += accepted[i]
        site.refused += recorded[i] & ~finite[i]
