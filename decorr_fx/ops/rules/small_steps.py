"""Rules of small steps: how R moves, given rows of its input.

Every one of them is a *transition*: a step of R is `R <- T R` with

    T = gain * (I - eps * G),    G = scale * C + diag(shift)
    C = M - diag(M),    M = mean over rows of z z^T,    z = R x

so a rule is a choice of (scale, shift, gain), and of whether its rows are demeaned; nothing else. T acts from the left,
on the rows of R; each factor of R has a T of its own, from the rows of its own mode of z.

When there are fewer rows than features, M is never formed: `M R = z^T (z R) / n` takes 6 n d^2 FLOP with the rows'
own z, instead of 4 n d^2 + 2 d^3.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from decorr_fx.config import Crgd, Dbp, SmallSteps
from decorr_fx.ops.layout import Factored, unfold_mode
from decorr_fx.ops.moment import Moment

# eps * lambda_max(G) is kept below this: T is then positive definite with a condition number of at most 3. lambda_max
# is bounded from above, so that no step can overshoot, however wrong eps is: it is at most scale * |M| + max |shift|,
# and the largest eigenvalue |M| is at most tr(M^4)^(1/4), the Frobenius norm of M^2 to the power 1/2. It is M and not C
# that bounds: a tiny C is a difference of large numbers, and a step that scales it up would scale up their rounding
# errors.
STEP_BOUND = 0.5


def step_factors(
    factors: Sequence[Tensor], x: Tensor, count: Tensor, rule: SmallSteps, eps: float
) -> tuple[list[Tensor], list[Moment]]:
    """Return the factors of R after a step, and the second moment of z before it, of each factor's own mode.

    Args:
        factors: of R, `[stacks, modes[i], modes[i]]`, the last of fewer stacks where blocks share it.
        x: rows `[stacks, n, *modes]`, demeaned where the rule asks for it; unused rows are zero.
        count: `[stacks]`, the number of rows in use.
        rule: the rule, and its settings.
        eps: step size, shortened so that `eps * lambda_max(G)` stays below `STEP_BOUND`.
    """
    z = Factored(factors).transposed.times(x)
    gain = norm_gain(x, z, len(factors[-1]), len(factors)) if isinstance(rule, Crgd) else None
    stepped, of_z = [], []
    for mode, factor in enumerate(factors):
        moment = _moment(z, mode, len(factor), count)
        scale, shift = terms(rule, moment.variance)
        bounded = (STEP_BOUND / (scale * moment.largest() + shift.abs().amax(1))).clamp(max=eps)[:, None, None]
        change = scale * moment.correlations_times(factor) + shift[..., None] * factor
        moved = factor - bounded * change
        if gain is not None:  # R is one matrix for all blocks that share a factor
            moved *= gain.repeat_interleave(len(factor) // len(gain))[:, None, None]
        stepped.append(moved)
        of_z.append(moment)
    return stepped, of_z


def terms(rule: SmallSteps, variance: Tensor) -> tuple[float, Tensor]:
    """Return (scale, shift) of G, for variances of z `[stacks, d]`."""
    if isinstance(rule, Dbp):
        return 1 - rule.kappa, rule.kappa * (variance - 1)
    return 1.0, variance


def norm_gain(x: Tensor, z: Tensor, matrices: int, factors: int) -> Tensor:
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


def _moment(z: Tensor, mode: int, stacks: int, count: Tensor) -> Moment:
    """Return the second moment of the rows of one mode of z, `[stacks, rows, d]`."""
    rows = unfold_mode(z, mode, stacks)
    return Moment.of(rows, rows.shape[1] // z.shape[1] * count.reshape(stacks, -1)[:, :1, None])
