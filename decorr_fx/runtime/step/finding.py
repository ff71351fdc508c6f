"""What the rows of a site tell: all that a step of it needs besides what every rank has, and small enough to send."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from decorr_fx.runtime.site.state import Site


@dataclass(frozen=True)
class Finding:
    """What the rows of one site tell, for a rule that remembers them.

    Attributes:
        site: of which the rows were.
        sketch: of its running second moment, `[stacks, rank, d]`; see `ops.power`.
        trace: of all of that, `[stacks]`.
        mean: its new running mean; None where rows are not demeaned.
        losses: correlation and variance error of z before the step, `[2]`.
        seen: how many rows there were, `[1]`, of the type of the rest.
    """

    site: Site
    sketch: Tensor
    trace: Tensor
    mean: Tensor | None
    losses: Tensor
    seen: Tensor

    def pack(self) -> Tensor:
        """Return all numbers of it, one after the other."""
        mean = [] if self.mean is None else [self.mean]
        return torch.cat([part.flatten() for part in (self.sketch, self.trace, *mean, self.losses, self.seen)])

    @classmethod
    def unpack(cls, site: Site, numbers: Tensor) -> "Finding":
        """Return what was packed; views."""
        shapes = list(_shapes(site))
        parts = torch.split(numbers, [shape.numel() for shape in shapes])
        sketch, trace, *mean, losses, seen = (part.reshape(shape) for part, shape in zip(parts, shapes, strict=True))
        return cls(site, sketch, trace, mean[0] if mean else None, losses, seen)


def numbers_of_finding(site: Site) -> int:
    """Return how many numbers `Finding.pack` gives for the site."""
    return sum(shape.numel() for shape in _shapes(site))


def _shapes(site: Site) -> Iterator[torch.Size]:
    (V,) = site.factors
    yield from (V.shape, V.shape[:1])
    if site.spec.demeaned:
        yield site.mean.shape
    yield site.losses.shape
    yield torch.Size([1])
