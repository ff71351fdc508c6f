"""R of low rank: `R = gain (I - U^T U)`, the identity but for a few directions, and never a matrix of d x d numbers.

The rows of `U [stacks, k, d]` are orthogonal and shorter than 1, so that R is symmetric, and its eigenvalues along them
are `gain (1 - |u|^2) > 0`. U of zeros is the identity. A product with rows takes 4 k FLOP a number.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """R of some stacks of rows.

    Attributes:
        U: `[stacks, k, d]`.
        gain: `[stacks]`; None where it is 1.
    """

    U: Tensor
    gain: Tensor | None = None

    def times(self, rows: Tensor) -> Tensor:
        """Return `w R` for rows `w [stacks, n, d]`."""
        moved = torch.baddbmm(rows, rows @ self.U.mT, self.U, alpha=-1)
        return moved if self.gain is None else moved.mul_(self.gain[:, None, None])

    def times_(self, rows: Tensor) -> None:
        """Do the same in place."""
        rows.baddbmm_(rows @ self.U.mT, self.U, alpha=-1)
        if self.gain is not None:
            rows.mul_(self.gain[:, None, None])

    @property
    def transposed(self) -> "LowRank":
        """R^T, which is R."""
        return self

    def divide(self, rows: Tensor) -> Tensor:
        """Return `w R^-1`, by `(I - U^T U)^-1 = I + U^T (I - U U^T)^-1 U` with orthogonal rows of U."""
        longer = self.U / (1 - self.U.square().sum(2, keepdim=True))
        moved = torch.baddbmm(rows, rows @ self.U.mT, longer)
        return moved if self.gain is None else moved / self.gain[:, None, None]
