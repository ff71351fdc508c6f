"""The closed form: R is a power of the second moment of the layer's input, made anew from running moments.

    Sigma <- (1 - rate) Sigma + rate * mean over rows of x x^T
    R = c * (Sigma + damping * mean eigenvalue of Sigma)^-p,    c such that |z| = gain * |x| in the mean square

Each factor of R has a Sigma of its own, of the rows of its own mode of x; the gain is that of the first one. p = 1/2
would be whitening; a step of W is preconditioned by R^T R, which goes with twice the power. How large the inputs of the
weights are decides how far a step of W goes, so that the gain says which learning rates are right. Weights that follow
take `W <- W R_old R_new^-1`, as in natural neural networks (arXiv 1507.00210), where p is 1/2.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from decorr_fx.ops.moment import Moment
from decorr_fx.ops.product import times


@dataclass(frozen=True)
class Past:
    """What is remembered: running moments of x for each factor, `[stacks, d, d]`, after how many `steps [sites]`."""

    moments: Sequence[Tensor]
    steps: Tensor


@dataclass(frozen=True)
class Replacement:
    """A factor of R that is replaced by a `new` one.

    `moment` is that of its mode of z before, `running` the new Sigma, `follow` is `old new^-1`, all `[stacks, d, d]`.
    """

    moment: Moment
    running: Tensor
    new: Tensor
    follow: Tensor

    def retreat(self, W: Tensor, stacks: slice) -> Tensor:
        """Return `W old new^-1` for rows `W [..., o, d]` of the given stacks."""
        return times(W, self.follow[stacks])


def replacements(
    factors: Sequence[Tensor],
    of_z: Sequence[Moment],
    of_x: Sequence[Tensor],
    past: Past,
    rate: float,
    power: float,
    damping: float,
    gain: float,
) -> list[Replacement]:
    """Return what replaces each factor of R.

    Args:
        factors: the factors of R, `[stacks, d, d]`.
        of_z: the moment of each factor's own mode of z.
        of_x: the second moments of each factor's own mode of x, `[stacks, d, d]`.
        past: what is remembered.
        rate: at which running moments follow new ones; the first few steps take their plain mean.
        power: p.
        damping: part of the mean eigenvalue that is added to all of them.
        gain: of the norm of z over that of x; for a pair, the first factor's.
    """
    found: list[Replacement] = []
    rates = (1 / (past.steps + 1)).clamp(min=min(rate, 1))
    for old, moment, new_moment, before in zip(factors, of_z, of_x, past.moments, strict=True):
        rate_of_stack = rates.repeat_interleave(len(old) // len(rates))[:, None, None]
        running = before.lerp(new_moment, rate_of_stack.to(before.dtype))
        new, inverse = root(running, power, damping)
        own = 1.0 if found else gain
        found.append(Replacement(moment, running, own * new, old @ inverse / own))
    return found


def root(Sigma: Tensor, power: float, damping: float) -> tuple[Tensor, Tensor]:
    """Return R for `Sigma [stacks, d, d]` with a gain of 1, and its inverse; NaN where Sigma is not finite, or zero.

    By eigenvalues, which are right to float32's last digits for any p and any condition of Sigma.
    """
    finite = Sigma.isfinite().flatten(1).all(1)[:, None]
    values, vectors = torch.linalg.eigh(Sigma.where(finite[..., None], 0))  # which raises for what is not finite
    values = values.clamp(min=0)  # rounding
    mean = values.mean(1, keepdim=True).where(finite, torch.nan)
    of_R = (values + damping * mean) ** -power
    of_R = of_R * (mean / (values * of_R.square()).mean(1, keepdim=True)).sqrt()
    return (vectors * of_R[:, None]) @ vectors.mT, (vectors / of_R[:, None]) @ vectors.mT
