"""A step of R: what every rule comes to, for all factors of all sites that step together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from decorr_fx.config import DecorrConfig, RuleName
from decorr_fx.ops.moment import Moment
from decorr_fx.ops.power import Past, replacements
from decorr_fx.ops.rules import transitions
from decorr_fx.ops.structure import mix, refold_mode, unfold_mode

DEMEANING: frozenset[RuleName] = frozenset({"crgd"})  # rules that see rows without their running mean
REMEMBERING: frozenset[RuleName] = frozenset({"power"})  # rules that keep running moments of the rows


class Change(Protocol):
    """What one factor of R becomes, and what the weights do about it."""

    @property
    def moment(self) -> Moment:
        """Second moment of the factor's own mode of z, before the step."""

    def retreat(self, W: Tensor, stacks: slice) -> Tensor:
        """Return rows `W [..., o, d]` of the given stacks times the old factor times the inverse of the new one."""


@dataclass(frozen=True)
class Step:
    """One step of all factors of R: the new factors, the changes that led there, and the new running moments."""

    factors: list[Tensor]
    changes: Sequence[Change]
    moments: Sequence[Tensor]

    def retreat(self, stacked: Tensor, site: int = 0, sites: int = 1) -> Tensor:
        """Return the stacked weight `[stacks, d_out, *modes]` such that `W R` is what it was before the step.

        It is that of number `site` of `sites` that took the step together.
        """
        for mode, change in enumerate(self.changes):
            stacks = len(self.factors[mode]) // sites
            rows = unfold_mode(stacked, mode, stacks)
            moved = change.retreat(rows, slice(site * stacks, (site + 1) * stacks))
            stacked = refold_mode(moved, stacked, mode)
        return stacked

    def correlation(self, sites: int) -> Tensor:
        """Return the mean squared correlation before the step, over stacks and factors, `[sites]`."""
        return _mean_of_sites([change.moment.correlation() for change in self.changes], sites)

    def variance_error(self, sites: int) -> Tensor:
        """Return the mean squared variance error before the step, over stacks and factors, `[sites]`."""
        return _mean_of_sites([change.moment.variance_error() for change in self.changes], sites)


def _mean_of_sites(losses: list[Tensor], sites: int) -> Tensor:
    return torch.stack([of_factor.reshape(sites, -1).mean(1) for of_factor in losses]).mean(0)


def step_factors(
    factors: Sequence[Tensor], x: Tensor, count: Tensor, config: DecorrConfig, decor_lr: float, past: Past | None = None
) -> Step:
    """Move R by one step.

    Args:
        factors: the factors of R, `[stacks, modes[i], modes[i]]`, the last of fewer stacks where blocks share it.
        x: rows `[stacks, n, *modes]`, demeaned where the rule asks for it; unused rows are zero.
        count: `[stacks]`, the number of rows in use.
        config: the rule, and its settings.
        decor_lr: step size of R, or rate of the running moments.
        past: what the rule `power` remembers.
    """
    z = mix(x, [factor.mT for factor in factors])
    of_z = [Moment.of(rows, used) for rows, used in _rows(z, factors, count)]
    if past is not None:
        of_x = [rows.mT @ rows / used for rows, used in _rows(x, factors, count)]
        replaced = replacements(factors, of_z, of_x, past, decor_lr, config.power, config.damping, config.gain)
        return Step([r.new for r in replaced], replaced, [r.running for r in replaced])
    changes = transitions(of_z, x, z, config.rule, decor_lr, config.kappa)
    return Step([change.advance(f) for change, f in zip(changes, factors, strict=True)], changes, [])


def _rows(stacked: Tensor, factors: Sequence[Tensor], count: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return the rows `[stacks, rows, d]` of the mode of each factor, and how many are in use, `[stacks, 1, 1]`."""
    found = []
    for mode, factor in enumerate(factors):
        rows = unfold_mode(stacked, mode, len(factor))
        found.append((rows, rows.shape[1] // stacked.shape[1] * count.reshape(len(factor), -1)[:, :1, None]))
    return found
