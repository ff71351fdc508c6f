"""R that shrinks a few directions and leaves all others alone: `R = I - V^T V`, with `V [stacks, rank, d]`.

The rows of V are orthogonal, and shorter than 1, so that R is symmetric, its eigenvalues are in (0, 1], and those along
the rows of V are `1 - |v|^2`. V of zeros is the identity. No d x d matrix is ever formed: rows are multiplied by R in
4 rank FLOP a number.
"""

import torch
from torch import Tensor

from decorr_fx.ops.product import inverse_of_definite, pointwise


def shrink(rows: Tensor, V: Tensor) -> Tensor:
    """Return `rows [stacks, n, d]` times R; R is symmetric, so for input rows this is `R x`."""
    return torch.baddbmm(rows, rows @ V.mT, V, alpha=-1)


def follow(rows: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """Return `rows [stacks, n, d]` times the R of the old V and the inverse of that of the new one.

    The inverse is `I + V^T (I - V V^T)^-1 V`, for any V. All that is read of the rows, and added to them, lies along
    the rows of the two: two products with the rows, however many there are.
    """
    rank = old.shape[1]
    both = torch.cat([old, new], 1)
    along_old, along_new = torch.split(rows @ both.mT, rank, 2)
    eye = torch.eye(rank, dtype=old.dtype, device=old.device)
    inner = inverse_of_definite(eye - new @ new.mT)
    along_new = (along_new - along_old @ (old @ new.mT)) @ inner
    return torch.baddbmm(rows, torch.cat([-along_old, along_new], 2), both)


def shrink_channels(x: Tensor, V: Tensor, spatial: int) -> Tensor:
    """Return `R x` for the channels of a whole input, in its type; see `structure.mix_channels`."""
    V = V.to(x.dtype)
    return x - pointwise(pointwise(x, V, spatial), V.mT, spatial)
