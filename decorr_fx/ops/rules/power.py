"""The closed form: R shrinks the directions in which a layer's inputs are largest, and is the identity in all others.

    Sigma <- (1 - rate) Sigma + rate * mean over rows of x x^T,    of which the `rank` largest directions are kept
    R = (I + Sigma / delta)^-p,    delta = damping * mean eigenvalue of the whole second moment

p = 1/2 is whitening where an eigenvalue is well above delta; where it is far below, R is 1. The inputs of most layers
are large in few directions: the mean and some others have nearly all of the second moment, and steps of W in those
limit its learning rate. R never enlarges anything: no step of W goes further than it would without. Steps of W are
preconditioned by R^T R. Weights that follow take `W <- W R_old R_new^-1`, as in natural neural networks
(arXiv 1507.00210), where p is 1/2 and R a whole root.

Sigma is that of a *sketch* `B [stacks, rank, d]` of orthogonal rows, the largest last: `Sigma = B^T B`, cut to its rank
after each step. Its eigenvalues are the squared norms of the rows of B, and V is B with other norms: so the two are
kept as one, V and the `scale` of each of its rows that makes it that of B. A matrix of d x d numbers is formed only
where d is small.

A step has two parts: `learn` looks at rows and takes long; `replace` needs nothing but what was learned and the V
before, so that one of several ranks may learn for all.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from decorr_fx.ops.low_rank import Following, shrink
from decorr_fx.ops.moment import Moment

SMALLEST = 1e-6  # eigenvalue over delta below which R is the identity to float32's last digits


@dataclass(frozen=True)
class Past:
    """What is remembered of x, after how many `steps [sites]`.

    Attributes:
        scale: `[stacks, rank]`; the sketch is V with its rows scaled by it.
        trace: the mean square of a row, `[stacks]`: the trace of all of Sigma.
        steps: how many there were.
    """

    scale: Tensor
    trace: Tensor
    steps: Tensor


@dataclass(frozen=True)
class Learned:
    """What rows of x tell: the new sketch and trace, and the second moment of z before the step."""

    sketch: Tensor
    trace: Tensor
    of_z: list[Moment]


@dataclass(frozen=True)
class Replacement:
    """R that is replaced: the new V in `factors`, the new scale and trace in `moments`, and what follows."""

    factors: list[Tensor]
    moments: Sequence[Tensor]
    following: Following

    @property
    def carriers(self) -> tuple[Tensor]:
        """What is not finite where R cannot be inverted."""
        return (self.following.added,)

    def retreat(self, stacked: Tensor, site: int = 0, sites: int = 1) -> Tensor:
        """Return `W R_old R_new^-1` for the stacked weight of one of the sites that took the step together."""
        each = len(self.factors[0]) // sites
        return self.following(stacked, slice(site * each, (site + 1) * each))


def learn(V: Tensor, x: Tensor, count: Tensor, past: Past, rate: float) -> Learned:
    """Return the new running moments.

    Args:
        V: of R, `[stacks, rank, d]`.
        x: rows `[stacks, n, d]`; unused ones are zero.
        count: `[stacks]`, the number of rows in use.
        past: what is remembered.
        rate: at which running moments follow new ones; the first few steps take their plain mean.
    """
    rates = (1 / (past.steps + 1)).clamp(min=min(rate, 1)).to(x.dtype).repeat_interleave(len(V) // len(past.steps))
    trace = past.trace.lerp(x.square().sum((1, 2)) / count, rates)
    old_share, new_share = (1 - rates).sqrt(), (rates / count).sqrt()
    sketch = (old_share[:, None] * past.scale)[..., None] * V
    together = torch.cat([sketch, new_share[:, None, None] * x], 1)
    of_z = Moment.of(shrink(x, V), count[:, None, None])
    return Learned(largest_directions(together, V.shape[1]), trace, [of_z])


def replace(V: Tensor, sketch: Tensor, trace: Tensor, power: float, damping: float) -> Replacement:
    """Return what replaces R of this V, `[stacks, rank, d]`, for the new running moments.

    Args:
        V: before the step.
        sketch: as `learn` returns it.
        trace: likewise.
        power: p.
        damping: delta over the mean eigenvalue.
    """
    lengths = _lengths(sketch, damping * trace / V.shape[2], power)
    new = lengths[..., None] * sketch
    scale = torch.where(lengths > 0, 1 / lengths, 0)  # 0 where p is: nothing is remembered of what never shrinks
    return Replacement([new], [scale, trace], Following.between(V, new))


def largest_directions(rows: Tensor, rank: int) -> Tensor:
    """Return the sketch of `X^T X` for rows `X [stacks, n, d]`.

    The sketch `B [stacks, rank, d]` has the largest eigenvectors as rows, each as long as the root of its eigenvalue.
    Through the matrix over rows where that is the smaller one. NaN where the rows are not finite.
    """
    dense = rows.shape[1] >= rows.shape[2]
    gram = rows.mT @ rows if dense else rows @ rows.mT
    finite = gram.isfinite().flatten(1).all(1)[:, None, None]
    values, vectors = torch.linalg.eigh(gram.where(finite, 0))  # which raises for what is not finite
    largest: Tensor = vectors[:, :, -rank:].mT.where(finite, torch.nan)
    lengths: Tensor = values[:, -rank:, None].clamp(min=0).sqrt()  # below 0 by rounding
    return lengths * largest if dense else largest @ rows


def directions_to_shrink(sketch: Tensor, delta: Tensor, power: float) -> Tensor:
    """Return V of `I - V^T V = (I + B^T B / delta)^-power` for a sketch B, and `delta [stacks]`."""
    return _lengths(sketch, delta, power)[..., None] * sketch


def _lengths(sketch: Tensor, delta: Tensor, power: float) -> Tensor:
    """Return what makes the rows of a sketch those of V, `[stacks, rank]`."""
    delta = delta.clamp(min=torch.finfo(delta.dtype).tiny)[:, None]  # all rows were zero: so is V
    ratio = (sketch.square().sum(2) / delta).clamp(min=SMALLEST)
    shrunk = -torch.expm1(-power * torch.log1p(ratio))  # 1 - (1 + ratio)^-power, right for small ones
    return (shrunk / ratio / delta).sqrt()
