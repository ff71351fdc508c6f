"""The second moment of rows: what every rule looks at."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moment:
    """Second moment M of `z [stacks, n, d]`, whose unused rows are zero, over `count [stacks, 1, 1]` rows.

    `gram` is M itself, `[stacks, d, d]`, or where there are fewer rows than features the matrix over rows
    `[stacks, n, n]`, which has the same eigenvalues but for zeros.
    """

    z: Tensor
    count: Tensor
    gram: Tensor

    @classmethod
    def of(cls, z: Tensor, count: Tensor) -> "Moment":
        """Measure the rows `z`, of which `count` are in use and the others zero."""
        dense = z.shape[1] >= z.shape[2]
        return cls(z, count, (z.mT @ z if dense else z @ z.mT) / count)

    @cached_property
    def off_diagonal(self) -> Tensor | None:
        """M without its diagonal `[stacks, d, d]`, or None where there are fewer rows than features."""
        if self.z.shape[1] < self.z.shape[2]:
            return None
        return self.gram - torch.diag_embed(self.gram.diagonal(dim1=1, dim2=2))

    @cached_property
    def variance(self) -> Tensor:
        """The diagonal of M, `[stacks, d]`."""
        return self.z.square().sum(1) / self.count[:, 0]

    @cached_property
    def norm(self) -> Tensor:
        """The Frobenius norm of M, `[stacks]`."""
        norm: Tensor = self.gram.flatten(1).norm(dim=1)
        return norm

    def largest(self) -> Tensor:
        """Return an upper bound of the largest eigenvalue of M, `tr(M^4)^(1/4)`, `[stacks]`."""
        unit = self.gram / self.norm.clamp(min=torch.finfo(self.z.dtype).tiny)[:, None, None]  # so: no overflow
        largest: Tensor = self.norm * (unit @ unit).flatten(1).norm(dim=1).sqrt()
        return largest

    def correlations_times(self, right: Tensor) -> Tensor:
        """Return `C @ right`."""
        if self.off_diagonal is not None:
            return self.off_diagonal @ right
        return self.z.mT @ (self.z @ right) / self.count - self.variance[..., None] * right

    def correlation(self) -> Tensor:
        """Return the mean over pairs of units of `C^2`, `[stacks]`."""
        d = self.variance.shape[1]
        if self.off_diagonal is not None:
            squared = self.off_diagonal.square().sum((1, 2))
        else:
            squared = (self.norm.square() - self.variance.square().sum(1)).clamp(min=0)
        return squared / max(d * (d - 1), 1)

    def variance_error(self) -> Tensor:
        """Return the mean over units of `D^2`, with D = diag(M) - I, `[stacks]`."""
        return (self.variance - 1).square().mean(1)


def losses(of_z: Sequence[Moment], sites: int) -> Tensor:
    """Return mean squared correlation and variance error of each site, `[sites, 2]`.

    Of z with these second moments: one for each factor, of its own mode.
    """
    of_factors = []
    for one in of_z:
        of_stacks = torch.stack([one.correlation(), one.variance_error()], 1)
        of_factors.append(of_stacks.reshape(sites, -1, 2).mean(1))
    return torch.stack(of_factors).mean(0)
