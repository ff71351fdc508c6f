"""What happens to the weights around a step of their optimizer: those of one shape together."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple, TypeVar
from warnings import warn

import torch
from torch import Tensor
from torch.optim import Optimizer

from decorr_fx.ops.coordinates import R, gradients_to_z, moves_to_x
from decorr_fx.ops.layout import Factored, Layout
from decorr_fx.ops.low_rank import LowRank
from decorr_fx.ops.precision import full_precision
from decorr_fx.runtime.private import mapped_version, note_mapped
from decorr_fx.runtime.site.shard import held_here
from decorr_fx.runtime.site.state import Site
from decorr_fx.runtime.site.weight import SiteWeight
from decorr_fx.runtime.step.owned import writes_from_copies

T = TypeVar("T")
ALONE = ("cpu",)  # devices on which each weight has a product of its own, since joining would copy them


@dataclass(frozen=True)
class Batch:
    """Weights of one shape while their optimizer steps: what this rank holds of them.

    Attributes:
        R: of all of them.
        layout: how each is read.
        weights: views of the parameters.
        olds: copies of them, before the step.
        places: of the weights.
        parameters: at these places.
        addresses: of their data.
    """

    R: R
    layout: Layout
    weights: Sequence[Tensor]
    olds: Sequence[Tensor]
    places: Sequence[SiteWeight]
    parameters: Sequence[Tensor]
    addresses: Sequence[int]

    def weights_now(self) -> Sequence[Tensor]:
        """Return views of the parameters after an optimizer has given them other data, by `parameter.data = ...`."""
        pairs = zip(self.places, self.parameters, strict=True)
        return [place.part(parameter.detach())[0] for place, parameter in pairs]


class _Weight(NamedTuple):
    """A weight of a site, what this rank holds of it, and its gradient where that is not mapped yet.

    Weights that have `together` in common go into one product.
    """

    site: Site
    layout: Layout
    held: Tensor
    gradient: Tensor | None
    place: SiteWeight
    parameter: Tensor
    together: Any


@torch.no_grad()
def before_step(sites: Iterable[Site], owned: frozenset[int]) -> list[Batch]:
    """Let the gradients of weights be those in coordinates of z, and return what `after_step` needs.

    A weight without a gradient is left alone, and so is a gradient that is of W already and has not changed since. Of
    several models over one weight, the R of the last one counts.

    Args:
        sites: whose weights are stepped.
        owned: ids of the parameters that are stepped.
    """
    found, gradients = {}, {}
    for site, weight in [(s, w) for s in sites if not s.is_identity or s.schedule.due for w in s.weights]:
        parameter = weight.parameter()
        gradient = parameter.grad
        if gradient is None or gradient.layout is not torch.strided or not parameter.requires_grad:
            continue
        if id(parameter) not in owned:  # it was replaced by hand since
            continue
        written = gradient if type(gradient) is Tensor else held_here(gradient)
        if site.is_identity:  # of W already, also after R has moved
            gradients[id(written)] = written
            continue
        held, to_map, layout = weight.parts(parameter.detach(), gradient)
        version = mapped_version(written)
        if version != written._version:
            if version is not None:
                _warn_if_carried(site, weight, written, version)
            gradients[id(written)] = written
        mapped = version == written._version
        alike = (layout, site.spec.rule, site.used, held.dtype, held.device, mapped)
        together = id(held) if held.device.type in ALONE else alike
        one = _Weight(site, layout, held, None if mapped else to_map, weight, parameter, together)
        found[id(parameter), weight.rows] = one
    batches = []
    if found:
        with full_precision():
            batches = [_begin(group) for group in grouped(found.values(), attrgetter("together"))]
    for gradient in gradients.values():
        note_mapped(gradient)
    return batches


@torch.no_grad()
def after_step(batches: Sequence[Batch], optimizer: Optimizer | None = None) -> None:
    """Let the moves of the weights since `before_step` go through R.

    Where the optimizer writes weights from copies of its own, a move has in it what R has changed of the last ones, so
    that R must not enlarge it: its gain is left out.
    """
    if not batches:
        return
    parameters = [parameter for batch in batches for parameter in batch.parameters]
    copies = optimizer is not None and writes_from_copies(optimizer, parameters)
    with full_precision():
        for batch in batches:
            R = LowRank(batch.R.U) if copies and isinstance(batch.R, LowRank) else batch.R
            same = [*map(Tensor.data_ptr, batch.parameters)] == batch.addresses
            moves_to_x(batch.weights if same else batch.weights_now(), batch.olds, R, batch.layout)


def joined(sites: Sequence[Site]) -> R:
    """Return the R of all sites, one after the other."""
    Rs = [site.matrix() for site in sites]
    if isinstance(Rs[0], LowRank):
        gains = [one.gain for one in Rs if isinstance(one, LowRank) and one.gain is not None]
        U = torch.cat([one.U for one in Rs if isinstance(one, LowRank)])
        return LowRank(U, torch.cat(gains) if gains else None)
    factors = zip(*(one.factors for one in Rs if isinstance(one, Factored)), strict=True)
    return Factored([torch.cat(of_sites) for of_sites in factors])


def grouped(items: Iterable[T], key: Callable[[T], Any]) -> list[list[T]]:
    """Return the items of each key, in the order in which the keys come first."""
    groups: dict[Any, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return [*groups.values()]


def _begin(group: Sequence[_Weight]) -> Batch:
    """Map the gradients of some weights where they are not mapped yet, and keep copies of the weights."""
    sites, layouts, weights, gradients, places, parameters, _ = zip(*group, strict=True)
    R = sites[0].matrix() if len(sites) == 1 else joined(sites)
    if gradients[0] is not None:
        gradients_to_z(gradients, R, layouts[0])
    olds, addresses = [*map(Tensor.clone, weights)], [*map(Tensor.data_ptr, parameters)]
    return Batch(R, layouts[0], weights, olds, places, parameters, addresses)


def _warn_if_carried(site: Site, weight: SiteWeight, gradient: Tensor, mapped: int) -> None:
    """Warn once where a gradient that was mapped before has been added to: it was not set to zero in between.

    A view, as DistributedDataParallel makes them, has its version in common with other gradients, which tells nothing.
    """
    if gradient._version != mapped + 1 or gradient._base is not None or "carried" in site.warned:
        return
    if bool(gradient.any()):
        site.warned.add("carried")
        warn(
            f"layer {weight.spec.fqn!r}: its gradient was not set to zero after the last step, so that a part of it is "
            "decorrelated twice; call optimizer.zero_grad() once for each step",
            stacklevel=2,
        )
