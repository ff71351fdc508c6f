"""How many units of each group stay: one threshold for all groups, set so that a budget is met.

A weight has as many numbers as the product of its axes is long, and an axis is made of segments, some of which hold the
units of a group. So what a model costs, in multiply-adds or in parameters, is counted from how many units each group
keeps, without a model.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor

from decorr_fx.errors import ConfigError


@dataclass(frozen=True)
class Segment:
    """A part of an axis: so many units of a group, each of `inner` entries; of no group, where it stays as it is."""

    units: int
    group: int | None = None
    inner: int = 1


Axis = tuple[Segment, ...]


@dataclass(frozen=True)
class Priced:
    """A tensor that costs `price` for each of its numbers."""

    price: int
    axes: tuple[Axis, ...]

    def cost(self, kept: Sequence[int]) -> int:
        """Return what it costs where group i keeps `kept[i]` units."""
        return self.price * prod(_length(axis, kept) for axis in self.axes)


def total(priced: Sequence[Priced], kept: Sequence[int]) -> int:
    """Return what all of them cost."""
    return sum(tensor.cost(kept) for tensor in priced)


@dataclass(frozen=True)
class Cut:
    """How many units of each group stay, and the part of what they carry together that each group keeps at least."""

    kept: tuple[int, ...]
    tau: float


def cut_to_budget(
    costs: Sequence[Tensor], priced: Sequence[Priced], keep: float, round_to: int = 1, min_units: int = 1
) -> Cut:
    """Return the largest cut that costs at most the part `keep` of the whole.

    A group keeps the fewest units such that those behind them, together, cost no more than 1 - tau. Units are given
    back one after another, from the largest such cost down: where several have the same, the budget parts them, and
    groups get back as large a part of their units each.

    Args:
        costs: of each group, what each unit costs that is removed with all behind it, as a part of the whole.
        priced: the tensors that cost something.
        keep: the budget, as a part of what all cost now, in (0, 1].
        round_to: groups keep multiples of it, or all of their units.
        min_units: groups keep at least as many, or all.

    Raises:
        ConfigError: the smallest cut costs more.
    """
    steps = [_counts(len(of_group), round_to, min_units) for of_group in costs]
    back = [(tail, group, count) for group, of_group in enumerate(costs)
            for count, tail in _given_back(of_group, steps[group])]  # fmt: skip
    back.sort(key=lambda event: (-event[0], event[2] / len(costs[event[1]])))
    budget = keep * total(priced, [len(of_group) for of_group in costs])

    def kept_after(events: int) -> list[int]:
        kept = [counts[0] for counts in steps]
        for _, group, count in back[:events]:
            kept[group] = count
        return kept

    least = total(priced, kept_after(0))
    if least > budget:
        smallest = least * keep / budget
        raise ConfigError(f"keep={keep:g} cannot be met: the smallest that can is {smallest:.4f}, where every group is "
                          f"down to {min_units} units, in steps of {round_to}")  # fmt: skip
    fits, too_many = 0, len(back) + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        fits, too_many = (middle, too_many) if total(priced, kept_after(middle)) <= budget else (fits, middle)
    return Cut(tuple(kept_after(fits)), 1 - back[fits][0] if fits < len(back) else 1.0)


def _length(axis: Axis, kept: Sequence[int]) -> int:
    return sum(s.inner * (s.units if s.group is None else kept[s.group]) for s in axis)


def _counts(units: int, round_to: int, min_units: int) -> list[int]:
    """Return how many units a group may keep, the fewest first."""
    return [count for count in range(1, units) if count % round_to == 0 and count >= min_units] + [units]


def _given_back(costs: Tensor, counts: Sequence[int]) -> list[tuple[int, float]]:
    """Return the counts after the first, each with what is lost where the one before it is kept."""
    tails = costs.flip(0).cumsum(0).flip(0).tolist()
    return [(count, tails[before]) for before, count in itertools.pairwise(counts)]
