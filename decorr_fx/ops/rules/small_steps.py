"""Rules of small steps: how R moves, given rows it has made of its input.

Every one of them is a *transition*: a step of R is `R <- T R` with

    T = gain * (I - eps * G),    G = scale * C + diag(shift)
    C = M - diag(M),    M = mean over rows of z z^T,    z = R x

so a rule is a choice of (scale, shift, gain), and of whether its rows are demeaned; nothing else. T acts from the left,
on the rows of R; each factor of R has a T of its own, from the rows of its own mode of z. Weights that follow the step,
so that the function stands still, take `W <- W T^-1`.

When there are fewer rows than features, M is never formed: `M R = z^T (z R) / n` takes 6 n d^2 FLOP with the rows'
own z, instead of 4 n d^2 + 2 d^3.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import Tensor

from decorr_fx.config import RuleName
from decorr_fx.ops.moment import Moment
from decorr_fx.ops.product import inverse_of_definite, times

# eps * lambda_max(G) is kept below this: T is then positive definite with a condition number of at most 3. lambda_max
# is bounded from above, so that no step can overshoot, however wrong eps is: it is at most scale * |M| + max |shift|,
# and the largest eigenvalue |M| is at most tr(M^4)^(1/4), the Frobenius norm of M^2 to the power 1/2. It is M and not C
# that bounds: a tiny C is a difference of large numbers, and a step that scales it up would scale up their rounding
# errors.
STEP_BOUND = 0.5


@dataclass(frozen=True)
class Transition:
    """`T = gain * (I - eps * (scale * C + diag(shift)))`: `shift [stacks, d]`, `eps` and `gain [stacks, 1, 1]`."""

    moment: Moment
    scale: float
    shift: Tensor
    eps: Tensor
    gain: Tensor

    def advance(self, factor: Tensor) -> Tensor:
        """Return `T @ factor`."""
        change = self.scale * self.moment.correlations_times(factor) + self.shift[..., None] * factor
        return self.gain * (factor - self.eps * change)

    def retreat(self, W: Tensor, stacks: slice) -> Tensor:
        """Return `W T^-1` for rows `W [..., o, d]` of the given stacks."""
        if self.moment.off_diagonal is not None:
            return times(W, self._inverted[stacks])
        shrink, scaled, inner = (part[stacks] for part in self._inverted_by_rows)
        return W * shrink + (W @ scaled.mT) @ inner

    @cached_property
    def _inverted(self) -> Tensor:
        """`T^-1 [stacks, d, d]`, where C is known; T is well conditioned, see STEP_BOUND."""
        eye = torch.eye(self.shift.shape[1], dtype=self.shift.dtype, device=self.shift.device)
        C = cast(Tensor, self.moment.off_diagonal)
        T = eye - self.eps * (self.scale * C + torch.diag_embed(self.shift))
        return inverse_of_definite(T) / self.gain

    @cached_property
    def _inverted_by_rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """`T^-1 = diag(shrink) + scaled^T inner`, through an n x n system (Woodbury), for fewer rows than features."""
        z, weight = self.moment.z, self.eps * self.scale / self.moment.count
        diagonal = self.shift - self.scale * self.moment.variance
        shrink = 1 / (1 - self.eps.squeeze(-1) * diagonal)[:, None]
        scaled = z * shrink
        eye = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
        inner = weight * (inverse_of_definite(eye - weight * (z @ scaled.mT)) @ scaled)
        return shrink / self.gain, scaled, inner / self.gain


def transitions(
    moments: Sequence[Moment], x: Tensor, z: Tensor, rule: RuleName, decor_lr: float, kappa: float
) -> list[Transition]:
    """Return the transition of each factor of R.

    Args:
        moments: that of the rows of each factor's own mode of z.
        x: rows `[stacks, n, *modes]`, demeaned where the rule asks for it.
        z: the same rows, decorrelated.
        rule: name of the rule.
        decor_lr: eps; shortened so that `eps * lambda_max(G)` stays below `STEP_BOUND`.
        kappa: weight of the variance error.
    """
    matrices = len(moments[-1].variance)  # R is one matrix for all blocks that share a factor
    gain = _norm_gain(x, z, matrices, len(moments)) if RULES[rule].keeps_norm else x.new_ones(matrices)
    found = []
    for moment in moments:
        scale, shift = RULES[rule].terms(moment.variance, kappa)
        own_gain = gain.repeat_interleave(len(shift) // matrices)[:, None, None]
        found.append(Transition(moment, scale, shift, _bounded(decor_lr, moment, scale, shift), own_gain))
    return found


def _bounded(decor_lr: float, moment: Moment, scale: float, shift: Tensor) -> Tensor:
    """Return eps `[stacks, 1, 1]`: `decor_lr`, or less where `eps * lambda_max(G)` might exceed `STEP_BOUND`."""
    largest = scale * moment.largest() + shift.abs().amax(1)
    eps: Tensor = STEP_BOUND / largest
    return eps.clamp(max=decor_lr)[:, None, None]


def _norm_gain(x: Tensor, z: Tensor, matrices: int, factors: int) -> Tensor:
    """Return the gain of CRGD of each matrix R, mean(|x| / |z|) over the rows with a z; shared out over its factors."""

    def norms(rows: Tensor) -> Tensor:
        """Return the norms of the rows of each matrix, `[matrices, n]`."""
        by_row = rows.reshape(matrices, -1, *rows.shape[1:]).transpose(1, 2).flatten(2)
        norm: Tensor = torch.linalg.vector_norm(by_row, dim=2)
        return norm

    x_norm, z_norm = norms(x), norms(z)
    alive = z_norm > 0
    ratio = torch.where(alive, x_norm / z_norm, 0).sum(1) / alive.sum(1)
    ratio = torch.where(alive.any(1), ratio, 1)
    return ratio ** (1 / factors)


def _dbp(variance: Tensor, kappa: float) -> tuple[float, Tensor]:
    return 1 - kappa, kappa * (variance - 1)


def _dbp_normalized(variance: Tensor, kappa: float) -> tuple[float, Tensor]:
    return (1 - kappa) / max(variance.shape[1] - 1, 1), 2 * kappa * (variance - 1)


def _crgd(variance: Tensor, kappa: float) -> tuple[float, Tensor]:
    return 1.0, variance


@dataclass(frozen=True)
class Rule:
    """A rule: `terms(variance, kappa)` gives (scale, shift); the gain keeps the norm of z at that of x, or is 1."""

    terms: Callable[[Tensor, float], tuple[float, Tensor]]
    keeps_norm: bool = False


RULES: dict[RuleName, Rule] = {
    "dbp": Rule(_dbp),
    "dbp-normalized": Rule(_dbp_normalized),
    "crgd": Rule(_crgd, keeps_norm=True),
}
