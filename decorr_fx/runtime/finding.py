"""What the rows of a site tell: all that a step of it needs besides what every rank has, and small enough to send."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from decorr_fx.runtime.state import Site


@dataclass(frozen=True)
class Finding:
    """What the rows of one site tell, for a rule that remembers them.

    Attributes:
        site: of which the rows were.
        moments: its new running moments.
        mean: its new running mean; None where rows are not demeaned.
        losses: correlation and variance error of z before the step, `[2]`.
        seen: how many rows there were, `[1]`, of the type of the rest.
    """

    site: Site
    moments: Sequence[Tensor]
    mean: Tensor | None
    losses: Tensor
    seen: Tensor

    def pack(self) -> Tensor:
        """Return all numbers of it, one after the other."""
        mean = [] if self.mean is None else [self.mean]
        return torch.cat([part.flatten() for part in (*self.moments, *mean, self.losses, self.seen)])

    @classmethod
    def unpack(cls, site: Site, numbers: Tensor) -> "Finding":
        """Return what was packed; views."""
        shapes = list(_shapes(site))
        parts = torch.split(numbers, [shape.numel() for shape in shapes])
        *found, losses, seen = (part.reshape(shape) for part, shape in zip(parts, shapes, strict=True))
        mean = found.pop() if site.spec.demeaned else None
        return cls(site, found, mean, losses, seen)


def numbers_of_finding(site: Site) -> int:
    """Return how many numbers `Finding.pack` gives for the site."""
    return sum(shape.numel() for shape in _shapes(site))


def _shapes(site: Site) -> Iterator[torch.Size]:
    yield from (moment.shape for moment in site.moments)
    if site.spec.demeaned:
        yield site.mean.shape
    yield site.losses.shape
    yield torch.Size([1])
