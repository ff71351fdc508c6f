"""The closed form: R shrinks the directions in which a layer's inputs are largest, and is the identity in all others.

    Sigma <- (1 - rate) Sigma + rate * mean over rows of x x^T,    of which the `rank` largest directions are kept
    R = (I + Sigma / delta)^-p,    delta = damping * mean eigenvalue of the whole second moment

p = 1/2 is whitening where an eigenvalue is well above delta; where it is far below, R is 1. The inputs of most layers
are large in few directions: the mean and some others have nearly all of the second moment, and steps of W in those
limit its learning rate. R never enlarges anything: no step of W goes further than it would without. Steps of W are
preconditioned by R^T R. Weights that follow take `W <- W R_old R_new^-1`, as in natural neural networks
(arXiv 1507.00210), where p is 1/2 and R a whole root.

Sigma is kept as a *sketch* `B [stacks, rank, d]` of orthogonal rows, the largest last: `Sigma = B^T B`, cut to its rank
after each step. A matrix of d x d numbers is formed only where d is small.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from decorr_fx.ops.moment import Moment
from decorr_fx.ops.shrink import Following, shrink

SMALLEST = 1e-6  # eigenvalue over delta below which R is the identity to float32's last digits


@dataclass(frozen=True)
class Past:
    """What is remembered of x, after how many `steps [sites]`.

    Attributes:
        moments: the sketch, `[stacks, rank, d]`, and the mean square of a row, `[stacks]`: the trace of all of Sigma.
        steps: how many there were.
    """

    moments: Sequence[Tensor]
    steps: Tensor


@dataclass(frozen=True)
class Replacement:
    """R that is replaced: the new V in `factors`, the new running moments, the moment of z before, and what follows."""

    factors: list[Tensor]
    moments: list[Tensor]
    of_z: list[Moment]
    following: Following

    def retreat(self, stacked: Tensor, site: int = 0, sites: int = 1) -> Tensor:
        """Return `W R_old R_new^-1` for the stacked weight of one of the sites that took the step together."""
        each = len(self.factors[0]) // sites
        return self.following(stacked, slice(site * each, (site + 1) * each))


def renew(V: Tensor, x: Tensor, count: Tensor, past: Past, rate: float, power: float, damping: float) -> Replacement:
    """Return what replaces R.

    Args:
        V: of R, `[stacks, rank, d]`.
        x: rows `[stacks, n, d]`; unused ones are zero.
        count: `[stacks]`, the number of rows in use.
        past: what is remembered.
        rate: at which running moments follow new ones; the first few steps take their plain mean.
        power: p.
        damping: delta over the mean eigenvalue.
    """
    sketch, trace = past.moments
    rates = (1 / (past.steps + 1)).clamp(min=min(rate, 1)).to(x.dtype).repeat_interleave(len(V) // len(past.steps))
    trace = trace.lerp(x.square().sum((1, 2)) / count, rates)
    old_share, new_share = (1 - rates).sqrt(), (rates / count).sqrt()
    together = torch.cat([old_share[:, None, None] * sketch, new_share[:, None, None] * x], 1)
    values, sketch = largest_directions(together, V.shape[1])
    new = directions_to_shrink(values, sketch, damping * trace / x.shape[2], power)
    of_z = Moment.of(shrink(x, V), count[:, None, None])
    return Replacement([new], [sketch, trace], [of_z], Following.between(V, new))


def largest_directions(rows: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the largest eigenvalues of `X^T X` for rows `X [stacks, n, d]`, `[stacks, rank]`, and their sketch.

    The sketch `B [stacks, rank, d]` has the eigenvectors as rows, each as long as the root of its eigenvalue. Through
    the matrix over rows where that is the smaller one. NaN where the rows are not finite.
    """
    dense = rows.shape[1] >= rows.shape[2]
    gram = rows.mT @ rows if dense else rows @ rows.mT
    finite = gram.isfinite().flatten(1).all(1)[:, None]
    values, vectors = torch.linalg.eigh(gram.where(finite[..., None], 0))  # which raises for what is not finite
    values = values[:, -rank:].clamp(min=0).where(finite, torch.nan)  # below 0 by rounding
    vectors = vectors[:, :, -rank:].mT
    return values, values.sqrt()[..., None] * vectors if dense else vectors @ rows


def directions_to_shrink(values: Tensor, sketch: Tensor, delta: Tensor, power: float) -> Tensor:
    """Return V of `I - V^T V = (I + B^T B / delta)^-power` for a sketch B, its eigenvalues, and `delta [stacks]`."""
    delta = delta.clamp(min=torch.finfo(delta.dtype).tiny)[:, None]  # all rows were zero: so is V
    ratio = (values / delta).clamp(min=SMALLEST)
    shrunk = -torch.expm1(-power * torch.log1p(ratio))  # 1 - (1 + ratio)^-power, right for small ones
    return (shrunk / ratio / delta).sqrt()[..., None] * sketch
