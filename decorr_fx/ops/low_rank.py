"""R that shrinks a few directions and leaves all others alone: `R = I - V^T V`, with `V [stacks, rank, d]`.

The rows of V are orthogonal, and shorter than 1, so that R is symmetric, its eigenvalues are in (0, 1], and those along
the rows of V are `1 - |v|^2`. V of zeros is the identity. No d x d matrix is ever formed: rows are multiplied by R in
4 rank FLOP a number.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from decorr_fx.ops.product import inverse_of_definite, pointwise


def shrink(rows: Tensor, V: Tensor) -> Tensor:
    """Return `rows [stacks, n, d]` times R; R is symmetric, so for input rows this is `R x`."""
    return torch.baddbmm(rows, rows @ V.mT, V, alpha=-1)


@dataclass(frozen=True)
class Following:
    """What rows are multiplied by where R moves and they are to follow: `R_old R_new^-1 = I + read^T added`.

    All that is read of the rows, and added to them, lies along the rows of the two V: two products with the rows,
    however many there are.

    Attributes:
        read: `[stacks, 2 rank, d]`.
        added: likewise.
    """

    read: Tensor
    added: Tensor

    @classmethod
    def between(cls, old: Tensor, new: Tensor) -> "Following":
        """Return it for the V before and after, by `R^-1 = I + V^T (I - V V^T)^-1 V`, for any V."""
        eye = torch.eye(new.shape[1], dtype=new.dtype, device=new.device)
        inverted = inverse_of_definite(eye - new @ new.mT) @ new
        both = torch.cat([old, new], 1)
        return cls(both, torch.cat([torch.baddbmm(old, old @ new.mT, inverted).neg_(), inverted], 1))

    def __call__(self, rows: Tensor, own: slice = slice(None)) -> Tensor:
        """Return the rows `[stacks, n, d]` as they follow, of those stacks of all that are here."""
        return torch.baddbmm(rows, rows @ self.read[own].mT, self.added[own])


def shrink_channels(x: Tensor, V: Tensor, spatial: int) -> Tensor:
    """Return `R x` for the channels of a whole input, in its type; see `structure.mix_channels`."""
    V = V.to(x.dtype)
    return x - pointwise(pointwise(x, V, spatial), V.mT, spatial)
