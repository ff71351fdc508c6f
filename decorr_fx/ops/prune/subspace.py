"""Subspace node pruning: how well some units of a layer stand in for all of them (arXiv 2405.17506).

`x [n]` are the units that a *reader*, the next layer, sees, with the second moment `C = E[x x^T] [n, n]`, and
`W [.., n]` is the reader's weight. Where only the units `kept` stay, the reader is best off with

    W <- W C[:, kept] C[kept, kept]^-1        what the others carried, as far as the kept ones tell it: least squares

With the units in an order P, most wanted first, and `C_P = L D L^T`, one factorisation tells what every cut costs:
keeping the first k, the error of the reader's output is `sum over j >= k of D_j |W_P L_j|^2`, and without a weight the
units not kept have `sum over j >= k of D_j` that nothing tells. All in float64, which second moments need.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 1e-10  # of the mean second moment: what a unit that others tell exactly is taken to have of its own


@dataclass(frozen=True)
class Units:
    """The units of a group, as an order judges them.

    Attributes:
        fqn: of the first layer that makes them.
        moments: their second moments at each reader, `[n, n]`, float64.
        readers: the weight of each reader as `[outputs, n]`, likewise; outputs times taps, where there are taps.
        norms: the L1 norm of what makes each unit, `[n]`.
    """

    fqn: str
    moments: Sequence[Tensor]
    readers: Sequence[Tensor]
    norms: Tensor


def definite(C: Tensor) -> Tensor:
    """Return C with a trace of the identity, where it is too near to singular to be inverted."""
    factor, failed = torch.linalg.cholesky_ex(C)
    own = factor.diagonal().square()  # what each unit adds beyond those before it
    if not int(failed) and bool((own > RIDGE * C.diagonal()).all()):
        return C
    mean = C.diagonal().mean().clamp(min=torch.finfo(C.dtype).tiny)
    return C + RIDGE * mean * torch.eye(len(C), dtype=C.dtype, device=C.device)


def fold_removed(W: Tensor, C: Tensor, kept: Tensor) -> Tensor:
    """Return `W C[:, kept] C[kept, kept]^-1`, `[.., kept]`: the removed units folded into the others."""
    C = definite(C)
    return W @ torch.cholesky_solve(C[kept], torch.linalg.cholesky(C[kept][:, kept])).mT


def unit_costs(units: Units, order: Tensor, weighted: bool) -> Tensor:
    """Return what each unit costs that is removed with all behind it in `order`, as a part of the whole, `[n]`.

    With `weighted` the error of the outputs of all readers, over their size; else the second moment that is lost.
    """
    costs, whole = torch.zeros(len(order), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for C, W in zip(units.moments, units.readers, strict=True):
        factor = torch.linalg.cholesky(definite(C)[order][:, order])
        if weighted:
            costs += (W[:, order] @ factor).square().sum(0)
            whole += ((W @ C) * W).sum()
        else:
            costs += factor.diagonal().square()
            whole += C.diagonal().sum()
    return costs / whole.clamp(min=torch.finfo(whole.dtype).tiny)
