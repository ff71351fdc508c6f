"""A step of R: what every rule comes to, for all factors of all sites that step together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from decorr_fx.config import DecorrConfig, RuleName
from decorr_fx.ops.layout import mix, refold_mode, unfold_mode
from decorr_fx.ops.moment import Moment
from decorr_fx.ops.rules.small_steps import Transition, transitions

DEMEANING: frozenset[RuleName] = frozenset({"crgd"})  # rules that see rows without their running mean
REMEMBERING: frozenset[RuleName] = frozenset({"power"})  # rules that keep running moments of the rows


class Step(Protocol):
    """One step of the R of all sites that step together, whatever the rule."""

    @property
    def factors(self) -> Sequence[Tensor]:
        """The new factors, or V."""

    @property
    def moments(self) -> Sequence[Tensor]:
        """The new running moments; none where the rule keeps none."""

    @property
    def carriers(self) -> Sequence[Tensor]:
        """What weights are multiplied by to follow, `[stacks, ...]`, where it may not be finite though the rest is."""

    def retreat(self, stacked: Tensor, site: int = 0, sites: int = 1) -> Tensor:
        """Return the stacked weight `[stacks, d_out, *modes]` such that `W R` is what it was before the step.

        It is that of number `site` of `sites` that took the step together.
        """


@dataclass(frozen=True)
class SmallStep:
    """A step of all factors by their transitions."""

    factors: list[Tensor]
    transitions: Sequence[Transition]
    moments: tuple[Tensor, ...] = ()
    carriers: tuple[Tensor, ...] = ()  # a transition is well conditioned

    @property
    def of_z(self) -> list[Moment]:
        """The second moment of z before the step, of each factor's own mode: what the transitions were made of."""
        return [transition.moment for transition in self.transitions]

    def retreat(self, stacked: Tensor, site: int = 0, sites: int = 1) -> Tensor:
        """Return `W T^-1`, one factor after the other."""
        for mode, transition in enumerate(self.transitions):
            stacks = len(self.factors[mode]) // sites
            rows = unfold_mode(stacked, mode, stacks)
            moved = transition.retreat(rows, slice(site * stacks, (site + 1) * stacks))
            stacked = refold_mode(moved, stacked, mode)
        return stacked


def losses(of_z: Sequence[Moment], sites: int) -> Tensor:
    """Return mean squared correlation and variance error of each site, `[sites, 2]`.

    Of z with these second moments: one for each factor, of its own mode.
    """
    of_factors = [torch.stack([moment.correlation(), moment.variance_error()], 1) for moment in of_z]
    return torch.stack([of_factor.reshape(sites, -1, 2).mean(1) for of_factor in of_factors]).mean(0)


def step_factors(
    factors: Sequence[Tensor], x: Tensor, count: Tensor, config: DecorrConfig, decor_lr: float
) -> SmallStep:
    """Move R by one small step.

    Args:
        factors: the factors of R, `[stacks, modes[i], modes[i]]`, the last of fewer stacks where blocks share it.
        x: rows `[stacks, n, *modes]`, demeaned where the rule asks for it; unused rows are zero.
        count: `[stacks]`, the number of rows in use.
        config: the rule, and its settings.
        decor_lr: step size of R.
    """
    z = mix(x, [factor.mT for factor in factors])
    of_z = [Moment.of(rows, used) for rows, used in _rows(z, factors, count)]
    found = transitions(of_z, x, z, config.rule, decor_lr, config.kappa)
    return SmallStep([change.advance(f) for change, f in zip(found, factors, strict=True)], found)


def _rows(stacked: Tensor, factors: Sequence[Tensor], count: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return the rows `[stacks, rows, d]` of the mode of each factor, and how many are in use, `[stacks, 1, 1]`."""
    found = []
    for mode, factor in enumerate(factors):
        rows = unfold_mode(stacked, mode, len(factor))
        found.append((rows, rows.shape[1] // stacked.shape[1] * count.reshape(len(factor), -1)[:, :1, None]))
    return found
