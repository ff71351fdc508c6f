"""The rules: how R moves, given rows it has made of its input.

Every rule is a *transition*: a step of R is `R <- T R` with

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
from decorr_fx.ops.product import times
from decorr_fx.ops.structure import mix, refold_mode, unfold_mode

# eps * lambda_max(G) is kept below this: T is then positive definite with a condition number of at most 3. lambda_max
# is bounded from above, so that no step can overshoot, however wrong eps is: it is at most scale * |M| + max |shift|,
# and the largest eigenvalue |M| is at most tr(M^4)^(1/4), the Frobenius norm of M^2 to the power 1/2. It is M and not C
# that bounds: a tiny C is a difference of large numbers, and a step that scales it up would scale up their rounding
# errors.
STEP_BOUND = 0.5


@dataclass(frozen=True)
class Moment:
    """Second moment M of `z [stacks, n, d]`, whose unused rows are zero, over `count [stacks, 1, 1]` rows.

    `C [stacks, d, d]` is M without its diagonal, or None where there are fewer rows than features;
    `variance [stacks, d]` is the diagonal, `norm [stacks]` the Frobenius norm of M, and `largest [stacks]` is an upper
    bound of its largest eigenvalue.
    """

    z: Tensor
    count: Tensor
    C: Tensor | None
    variance: Tensor
    norm: Tensor
    largest: Tensor

    @classmethod
    def of(cls, z: Tensor, count: Tensor) -> "Moment":
        """Measure the rows `z [stacks, n, d]`, of which `count [stacks, 1, 1]` are in use and the others zero."""
        dense = z.shape[1] >= z.shape[2]
        product = (z.mT @ z if dense else z @ z.mT) / count  # the same eigenvalues but for zeros, the smaller side
        norm = product.flatten(1).norm(dim=1)
        unit = product / norm.clamp(min=torch.finfo(z.dtype).tiny)[:, None, None]  # its square does not overflow
        largest = norm * (unit @ unit).flatten(1).norm(dim=1).sqrt()
        C = product - torch.diag_embed(product.diagonal(dim1=1, dim2=2)) if dense else None
        return cls(z, count, C, z.square().sum(1) / count[:, 0], norm, largest)

    def correlations_times(self, right: Tensor) -> Tensor:
        """Return `C @ right`."""
        if self.C is not None:
            return self.C @ right
        return self.z.mT @ (self.z @ right) / self.count - self.variance[..., None] * right

    def correlation(self) -> Tensor:
        """Return the mean over pairs of units of `C^2`, `[stacks]`."""
        d = self.variance.shape[1]
        if self.C is not None:
            squared = self.C.square().sum((1, 2))
        else:
            squared = (self.norm.square() - self.variance.square().sum(1)).clamp(min=0)
        return squared / max(d * (d - 1), 1)

    def variance_error(self) -> Tensor:
        """Return the mean over units of `V^2`, with V = diag(M) - I, `[stacks]`."""
        return (self.variance - 1).square().mean(1)


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
        """Return `W @ T^-1` for rows `W [..., o, d]` of the given stacks."""
        if self.moment.C is not None:
            return times(W, self._inverted[stacks])
        shrink, scaled, inner = (part[stacks] for part in self._inverted_by_rows)
        return W * shrink + (W @ scaled.mT) @ inner

    @cached_property
    def _inverted(self) -> Tensor:
        """`T^-1 [stacks, d, d]`, where C is known; T is well conditioned, see STEP_BOUND."""
        eye = torch.eye(self.shift.shape[1], dtype=self.shift.dtype, device=self.shift.device)
        C = cast(Tensor, self.moment.C)
        T = eye - self.eps * (self.scale * C + torch.diag_embed(self.shift))
        return _inverse(T) / self.gain

    @cached_property
    def _inverted_by_rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """`T^-1 = diag(shrink) + scaled^T inner`, through an n x n system (Woodbury), for fewer rows than features."""
        z, weight = self.moment.z, self.eps * self.scale / self.moment.count
        diagonal = self.shift - self.scale * self.moment.variance
        shrink = 1 / (1 - self.eps.squeeze(-1) * diagonal)[:, None]
        scaled = z * shrink
        eye = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
        inner = weight * (_inverse(eye - weight * (z @ scaled.mT)) @ scaled)
        return shrink / self.gain, scaled, inner / self.gain


def _inverse(A: Tensor) -> Tensor:
    """Return the inverses of symmetric positive definite matrices `[stacks, d, d]`; NaN where one is not.

    By Cholesky: half the work of an LU, which some builds of torch get wrong for batches on several CPU threads.
    """
    L = torch.linalg.cholesky_ex(A)[0]  # _ex: no host sync
    inverse: Tensor = torch.cholesky_inverse(L)
    return inverse


@dataclass(frozen=True)
class Step:
    """One step of all factors of R: the new factors, and the transitions that led there."""

    factors: list[Tensor]
    transitions: list[Transition]

    def retreat(self, stacked: Tensor, site: int = 0, sites: int = 1) -> Tensor:
        """Return the stacked weight `[stacks, d_out, *modes]` such that `W R` is what it was before the step.

        It is that of number `site` of `sites` that took the step together.
        """
        for mode, transition in enumerate(self.transitions):
            stacks = len(transition.eps) // sites
            rows = unfold_mode(stacked, mode, stacks)
            moved = transition.retreat(rows, slice(site * stacks, (site + 1) * stacks))
            stacked = refold_mode(moved, stacked, mode)
        return stacked

    def correlation(self, sites: int) -> Tensor:
        """Return the mean squared correlation before the step, over stacks and factors, `[sites]`."""
        return _mean_of_sites([t.moment.correlation() for t in self.transitions], sites)

    def variance_error(self, sites: int) -> Tensor:
        """Return the mean squared variance error before the step, over stacks and factors, `[sites]`."""
        return _mean_of_sites([t.moment.variance_error() for t in self.transitions], sites)


def _mean_of_sites(losses: list[Tensor], sites: int) -> Tensor:
    return torch.stack([of_factor.reshape(sites, -1).mean(1) for of_factor in losses]).mean(0)


def step_factors(
    factors: Sequence[Tensor], x: Tensor, count: Tensor, rule: RuleName, decor_lr: float, kappa: float
) -> Step:
    """Move R by one step of `rule`.

    Args:
        factors: the factors of R, `[stacks, modes[i], modes[i]]`, the last of fewer stacks where blocks share it.
        x: rows `[stacks, n, *modes]`, demeaned where the rule asks for it; unused rows are zero.
        count: `[stacks]`, the number of rows in use.
        rule: name of the rule.
        decor_lr: eps; shortened so that `eps * lambda_max(G)` stays below `STEP_BOUND`.
        kappa: weight of the variance error.
    """
    z = mix(x, [factor.mT for factor in factors])
    matrices = len(factors[-1])  # R is one matrix for all blocks that share a factor
    gain = _norm_gain(x, z, matrices, len(factors)) if RULES[rule].keeps_norm else x.new_ones(matrices)
    transitions = []
    for mode, factor in enumerate(factors):
        rows = unfold_mode(z, mode, len(factor))
        used = rows.shape[1] // z.shape[1] * count.reshape(len(factor), -1)[:, :1, None]
        moment = Moment.of(rows, used)
        scale, shift = RULES[rule].terms(moment.variance, kappa)
        own_gain = gain.repeat_interleave(len(factor) // matrices)[:, None, None]
        transitions.append(Transition(moment, scale, shift, _bounded(decor_lr, moment, scale, shift), own_gain))
    return Step([t.advance(f) for t, f in zip(transitions, factors, strict=True)], transitions)


def _bounded(decor_lr: float, moment: Moment, scale: float, shift: Tensor) -> Tensor:
    """Return eps `[stacks, 1, 1]`: `decor_lr`, or less where `eps * lambda_max(G)` might exceed `STEP_BOUND`."""
    largest = scale * moment.largest + shift.abs().amax(1)
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
    demeans: bool = False


RULES: dict[RuleName, Rule] = {
    "dbp": Rule(_dbp),
    "dbp-normalized": Rule(_dbp_normalized),
    "crgd": Rule(_crgd, keeps_norm=True, demeans=True),
}
