"""The closed form: R shrinks the directions in which a layer's inputs are largest, next to all others.

    Sigma <- (1 - rate) Sigma + rate * mean over rows of x x^T,    of which the `rank` largest directions are kept
    R = gamma ((Sigma + delta) / (rest + delta))^-p in the directions in use,    R = gamma in all others
    delta = damping * mean eigenvalue of the whole second moment,    rest = that of the directions that are not in use
    gamma^2 = tr Sigma / tr(R Sigma R) of R without gamma

p = 1/2 is whitening where an eigenvalue is well above delta; where it is far below, R is gamma. With gamma, z is as
large as x in the mean square, and R is the identity where x is white: steps are about as large as those of the plain
model. The inputs of most layers are large in few directions: the mean and some others have nearly all of the second
moment, and steps of W in those limit its learning rate. Steps of the weight are preconditioned by R^T R. Kaldi's online
natural gradient (arXiv 1410.7455) has the same algebra, and a like scaling.

Sigma is that of a *sketch* `B [stacks, rank, d]` of orthogonal rows, the largest last: `Sigma = B^T B`, cut to its rank
after each step. Its eigenvalues are the squared norms of the rows of B, and U is B with other norms: so the two are
kept as one, U and the `scale` of each of its rows that makes it that of B. A matrix of d x d numbers is formed only
where d is small.

A step has two parts: `update_moments` looks at rows and takes long; `apply_step` needs nothing but its result, so that
one of several ranks may do the first for all.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from decorr_fx.config import Power
from decorr_fx.ops.low_rank import LowRank
from decorr_fx.ops.moment import Moment

NotConverged = torch.linalg.LinAlgError  # type: ignore[attr-defined] # it is documented, but not exported
SMALLEST = 1e-6  # eigenvalue over delta below which R is the identity to float32's last digits


class Moments(NamedTuple):
    """Running moments of x: the sketch `[stacks, rank, d]`, and the mean square of a row, `[stacks]`, tr Sigma."""

    sketch: Tensor
    trace: Tensor


class State(NamedTuple):
    """What is kept of R and of the moments: see above. `gain [stacks]` is that of R."""

    U: Tensor
    scale: Tensor
    trace: Tensor
    gain: Tensor


def update_moments(
    state: State, steps: Tensor, x: Tensor, count: Tensor, rate: float, used: int
) -> tuple[Moments, Moment]:
    """Return the new running moments, and the second moment of z before the step.

    Args:
        state: of all stacks.
        steps: how many rows' moments were taken in before, `[stacks]`.
        x: rows `[stacks, n, d]`; unused ones are zero.
        count: `[stacks]`, the number of rows in use.
        rate: at which running moments follow new ones; the first few steps take their plain mean.
        used: directions that R uses.
    """
    rates = (1 / (steps + 1)).clamp(min=rate).to(x.dtype)
    trace = state.trace.lerp(x.square().sum((1, 2)) / count, rates)
    old_share, new_share = (1 - rates).sqrt(), (rates / count).sqrt()
    sketch = (old_share[:, None] * state.scale)[..., None] * state.U
    together = torch.cat([sketch, new_share[:, None, None] * x], 1)
    of_z = Moment.of(LowRank(state.U[:, -used:], state.gain).times(x), count[:, None, None])
    return Moments(largest_directions(together, state.U.shape[1]), trace), of_z


def apply_step(moments: Moments, rule: Power, used: int) -> State:
    """Return what replaces the state, for new running moments, where R uses so many directions."""
    sketch, trace = moments
    lengths = _lengths(sketch, trace, rule, used)
    U = lengths[..., None] * sketch
    scale = torch.where(lengths > 0, 1 / lengths, 0)  # 0 where p is: nothing is remembered of what never shrinks
    return State(U, scale, trace, gain_of(sketch, U, trace, rule.gain, used))


def gain_of(sketch: Tensor, U: Tensor, trace: Tensor, exponent: float, used: int) -> Tensor:
    """Return `(tr Sigma / tr(R Sigma R))^(exponent / 2)`, `[stacks]`, for `R = I - U^T U`."""
    eigenvalues, shrunk = sketch[:, -used:].square().sum(2), 1 - U[:, -used:].square().sum(2)
    after = trace - (eigenvalues * (1 - shrunk.square())).sum(1)
    return torch.where(after > 0, trace / after, 1) ** (exponent / 2)


def largest_directions(rows: Tensor, rank: int) -> Tensor:
    """Return the sketch of `X^T X` for rows `X [stacks, n, d]`.

    The sketch `B [stacks, rank, d]` has the largest eigenvectors as rows, each as long as the root of its eigenvalue.
    Through the matrix over rows where that is the smaller one. NaN where the rows are not finite.
    """
    dense = rows.shape[1] >= rows.shape[2]
    gram = rows.mT @ rows if dense else rows @ rows.mT
    finite = gram.isfinite().flatten(1).all(1)[:, None, None]
    values, vectors = _eigh(gram.where(finite, 0))
    largest: Tensor = vectors[:, :, -rank:].mT.where(finite, torch.nan)
    lengths: Tensor = values[:, -rank:, None].clamp(min=0).sqrt()  # below 0 by rounding
    return lengths * largest if dense else largest @ rows


def _eigh(M: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues and eigenvectors of finite matrices; NaN where they are not found, which costs a step of R.

    They are those of M with a trace of the identity, below rounding. Without it LAPACK finds no or no finite
    eigenvectors in float32, every tenth time, where some rows of many are zero.
    """
    trace = torch.finfo(M.dtype).eps * M.diagonal(dim1=1, dim2=2).mean(1)
    try:
        return torch.linalg.eigh(M + torch.diag_embed(trace[:, None].expand(M.shape[:2])))  # type: ignore[no-any-return]
    except NotConverged:
        return torch.full_like(M[..., 0], torch.nan), torch.full_like(M, torch.nan)


def _lengths(sketch: Tensor, trace: Tensor, rule: Power, used: int) -> Tensor:
    """Return what makes the rows of a sketch those of U: `I - U^T U = ((Sigma + delta) / (rest + delta))^-p`."""
    d, tiny = sketch.shape[2], torch.finfo(sketch.dtype).tiny
    values = sketch.square().sum(2)
    rest = (trace - values[:, -used:].sum(1)).clamp(min=0) / (d - used) if used < d else torch.zeros_like(trace)
    delta = (rule.damping * trace / d).clamp(min=tiny)  # all rows were zero: so is U
    ratio = ((values - rest[:, None]) / (rest + delta)[:, None]).clamp(min=SMALLEST)
    shrunk = -torch.expm1(-rule.power * torch.log1p(ratio))  # 1 - (1 + ratio)^-power, right for small ones
    return (shrunk / values.clamp(min=tiny)).sqrt()
