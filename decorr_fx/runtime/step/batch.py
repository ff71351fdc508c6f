"""What happens to the weights around a step of their optimizer: those of one shape together."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from warnings import warn

import torch
from torch import Tensor

from decorr_fx.ops.coordinates import R, gradients_to_z, moves_to_x
from decorr_fx.ops.layout import Factored, Layout
from decorr_fx.ops.low_rank import LowRank
from decorr_fx.ops.precision import full_precision
from decorr_fx.runtime.private import mapped_version, note_mapped
from decorr_fx.runtime.site.state import Site
from decorr_fx.runtime.site.weight import SiteWeight

T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """Weights of one shape, each with the site that it belongs to: what this rank holds of them.

    Attributes:
        sites: of each weight.
        layout: how each is read.
        weights: views of the parameters.
        olds: copies of them, before the step.
    """

    sites: Sequence[Site]
    layout: Layout
    weights: Sequence[Tensor]
    olds: Sequence[Tensor]


@torch.no_grad()
def before_step(owned: Iterable[tuple[Site, SiteWeight]]) -> list[Batch]:
    """Let the gradients of weights be those in coordinates of z, and return what `after_step` needs.

    A weight without a gradient is left alone, and so is a gradient that was mapped before and has not changed since.
    """
    found, gradients = [], {}
    for site, weight in owned:
        if site.is_identity:
            continue
        parameter = weight.parameter()
        gradient = parameter.grad
        if gradient is None or gradient.layout is not torch.strided or not parameter.requires_grad:
            continue
        held, layout = weight.part(parameter.detach())
        mapped = mapped_version(gradient) == gradient._version
        _warn_if_carried(site, weight, gradient)
        found.append((site, layout, held, None if mapped else weight.part(gradient)[0]))
        gradients[id(gradient)] = gradient
    batches = []
    for group in grouped(found, lambda one: (one[1], one[0].used, one[2].dtype, one[2].device, one[3] is None)):
        sites, layouts, weights, of_group = zip(*group, strict=True)
        for part in _together(len(group), weights[0].device):
            own = sites[part]
            if of_group[0] is not None:
                with full_precision(weights[0].device):
                    gradients_to_z(of_group[part], joined(own), layouts[0], _gains(own))
            batches.append(Batch(own, layouts[0], weights[part], [weight.clone() for weight in weights[part]]))
    for gradient in gradients.values():
        note_mapped(gradient)
    return batches


@torch.no_grad()
def after_step(batches: Iterable[Batch]) -> None:
    """Let the moves of the weights since `before_step` go through R."""
    for batch in batches:
        with full_precision(batch.weights[0].device):
            moves_to_x(batch.weights, batch.olds, joined(batch.sites), batch.layout)


def joined(sites: Sequence[Site]) -> R:
    """Return the R of all sites, one after the other."""
    Rs = [site.R() for site in sites]
    if len(Rs) == 1:
        return Rs[0]
    if isinstance(Rs[0], LowRank):
        return LowRank(torch.cat([one.U for one in Rs if isinstance(one, LowRank)]))
    factors = zip(*(one.factors for one in Rs if isinstance(one, Factored)), strict=True)
    return Factored([torch.cat(of_sites) for of_sites in factors])


def grouped(items: Iterable[T], key: Callable[[T], Any]) -> Iterator[list[T]]:
    """Yield the items of each key, in the order in which the keys come first."""
    groups: dict[Any, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    yield from groups.values()


def _together(count: int, device: torch.device) -> list[slice]:
    """Return which of so many weights go into one product: on a CPU each by itself, since joining would copy them."""
    return [slice(i, i + 1) for i in range(count)] if device.type == "cpu" else [slice(0, count)]


def _gains(sites: Sequence[Site]) -> Tensor | None:
    if not getattr(sites[0].spec.rule, "gradient_gain", 0.0):
        return None
    return torch.cat([site.state[-1] for site in sites])


def _warn_if_carried(site: Site, weight: SiteWeight, gradient: Tensor) -> None:
    """Warn once where a gradient that was mapped before has been added to: it was not set to zero in between."""
    version = mapped_version(gradient)
    if version is None or gradient._version != version + 1 or "carried" in site.warned:
        return
    if bool(gradient.any()):
        site.warned.add("carried")
        warn(
            f"layer {weight.spec.fqn!r}: its gradient was not set to zero after the last step, so that a part of it is "
            "decorrelated twice; call optimizer.zero_grad() once for each step",
            stacklevel=2,
        )
