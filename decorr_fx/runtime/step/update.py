"""What the rows of a site come to: all that its step needs besides what every rank has, and small enough to send."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from decorr_fx.runtime.site.state import Site


@dataclass(frozen=True)
class MomentUpdate:
    """The running moments of one site of the rule `Power` after a step, and what is told of it.

    Attributes:
        site: of which the rows were.
        sketch: of its running second moment, `[stacks, rank, d]`; see `ops.rules.power`.
        trace: of all of that, `[stacks]`.
        losses: correlation and variance error of z before the step, `[2]`.
        seen: how many rows there were, `[1]`, of the type of the rest.
    """

    site: Site
    sketch: Tensor
    trace: Tensor
    losses: Tensor
    seen: Tensor

    def pack(self) -> Tensor:
        """Return all numbers of it, one after the other."""
        return torch.cat([part.flatten() for part in (self.sketch, self.trace, self.losses, self.seen)])

    @classmethod
    def unpack(cls, site: Site, numbers: Tensor) -> "MomentUpdate":
        """Return what was packed; views."""
        shapes = list(_shapes(site))
        parts = torch.split(numbers, [shape.numel() for shape in shapes])
        return cls(site, *(part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)))


def numbers_of_update(site: Site) -> int:
    """Return how many numbers `MomentUpdate.pack` gives for the site."""
    return sum(shape.numel() for shape in _shapes(site))


def _shapes(site: Site) -> Iterator[torch.Size]:
    U = site.state[0]
    yield from (U.shape, U.shape[:1], site.losses.shape, torch.Size([1]))
