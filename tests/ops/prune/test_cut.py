import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from decorr_fx import ConfigError
from decorr_fx.ops.prune.cut import Priced, Segment, cut_to_budget, total


def chain(*units: int, fixed: int = 3) -> list[Priced]:
    """Return the weights of linears one after another, of groups of so many units, from and to what stays."""
    ends = [(Segment(fixed),), *((Segment(n, group),) for group, n in enumerate(units)), (Segment(fixed),)]
    return [Priced(1, (make, read)) for read, make in itertools.pairwise(ends)]


def costs(seed: int, *units: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.rand(n, generator=generator, dtype=torch.float64).pow(4) for n in units]
    return [one / one.sum() for one in drawn]


def test_a_tensor_costs_what_its_axes_are_long() -> None:
    flattened_beside = (Segment(4, group=0, inner=9), Segment(5))
    assert Priced(7, ((Segment(2, 1),), flattened_beside)).cost([3, 2]) == 7 * 2 * (3 * 9 + 5)
    assert total(chain(4, 6), [4, 6]) == 3 * 4 + 4 * 6 + 6 * 3


@given(seed=st.integers(0, 2**16), keep=st.floats(0.2, 1))
def test_the_budget_is_met_as_nearly_as_units_allow(seed: int, keep: float) -> None:
    tensors, of_groups = chain(200, 300), costs(seed, 200, 300)
    whole = total(tensors, [200, 300])
    cut = cut_to_budget(of_groups, tensors, keep)
    assert keep - 0.01 < total(tensors, cut.kept) / whole <= keep
    for of_group, kept in zip(of_groups, cut.kept, strict=True):
        assert of_group[kept:].sum() <= 1 - cut.tau + 1e-12  # what is lost is within tau
        assert of_group[kept - 1 :].sum() >= 1 - cut.tau - 1e-12  # and with one unit less it would not be


@given(seed=st.integers(0, 2**16))
def test_a_larger_budget_keeps_as_much_of_every_group_and_a_higher_tau(seed: int) -> None:
    cuts = [cut_to_budget(costs(seed, 40, 60), chain(40, 60), keep) for keep in (0.1, 0.3, 0.5, 0.8, 1.0)]
    for smaller, larger in itertools.pairwise(cuts):
        assert all(a <= b for a, b in zip(smaller.kept, larger.kept, strict=True)) and smaller.tau <= larger.tau
    assert cuts[-1].kept == (40, 60) and cuts[-1].tau == 1


def test_units_that_cost_nothing_go_first_and_the_budget_parts_equal_ones() -> None:
    nothing = torch.tensor([0.5, 0.5, *[0.0] * 98], dtype=torch.float64)
    assert cut_to_budget([nothing, nothing], chain(100, 100), 0.5).kept[0] in range(65, 75)
    assert cut_to_budget([nothing, torch.full((100,), 0.01)], chain(100, 100), 0.5).kept[1] > 90


def test_counts_are_multiples_and_no_fewer_than_asked_for() -> None:
    cut = cut_to_budget(costs(0, 50, 64), chain(50, 64), 0.4, round_to=8, min_units=20)
    assert all(kept % 8 == 0 and kept >= 24 for kept in cut.kept)
    assert cut_to_budget(costs(0, 50, 64), chain(50, 64), 1.0, round_to=8).kept == (50, 64)


def test_a_budget_that_cannot_be_met_is_told_with_the_smallest_that_can() -> None:
    with pytest.raises(ConfigError, match=r"keep=0.01 cannot be met: the smallest that can is 0.0769, .* 4 units"):
        cut_to_budget(costs(0, 20, 20), chain(20, 20), 0.01, min_units=4)
    least = cut_to_budget(costs(0, 20, 20), chain(20, 20), 0.0771, min_units=4)
    assert least.kept == (4, 4)
