import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from units import draw, moment, told_by, units

from decorr_fx.ops import reference
from decorr_fx.ops.prune.orders import ORDERS
from decorr_fx.ops.prune.subspace import fold_removed, unit_costs

shapes = given(seed=st.integers(0, 2**16), n=st.integers(2, 12), o=st.integers(1, 6), cut=st.floats(0, 1))


@shapes
def test_folding_is_least_squares_of_all_units_on_the_kept_ones(seed: int, n: int, o: int, cut: float) -> None:
    x, W = draw(seed, n, o)
    kept = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[: max(1, round(cut * n))].sort().values
    expected = reference.fold_removed(W, x, kept.tolist())
    torch.testing.assert_close(fold_removed(W, moment(x), kept), expected, rtol=1e-8, atol=1e-8)


@shapes
def test_what_a_cut_costs_is_the_error_of_the_readers_outputs(seed: int, n: int, o: int, cut: float) -> None:
    readers = [draw(seed, n, o), draw(seed + 1, n, o)]
    order, k = torch.randperm(n, generator=torch.Generator().manual_seed(seed)), max(1, round(cut * n))
    errors = sum(reference.reader_error(W, x, order[:k].tolist()) for x, W in readers)
    whole = sum((x @ W.T).square().sum(1).mean() for x, W in readers)
    got = unit_costs(units(*readers), order, weighted=True)[k:].sum()
    torch.testing.assert_close(got, errors / whole, rtol=1e-8, atol=1e-10)


@shapes
def test_without_weights_it_is_what_the_kept_units_do_not_tell(seed: int, n: int, o: int, cut: float) -> None:
    x, _ = draw(seed, n, o)
    order, k = torch.randperm(n, generator=torch.Generator().manual_seed(seed)), max(1, round(cut * n))
    costs = unit_costs(units((x, torch.zeros(1, n, dtype=torch.float64))), order, weighted=False)
    added = torch.stack([told_by(x, order[:j], order[j]) for j in range(k, n)]).sum() if k < n else torch.zeros(())
    torch.testing.assert_close(costs[k:].sum(), (added / x.square().sum(1).mean()).double(), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("order", ORDERS)
def test_units_that_others_tell_exactly_cost_nothing(order: str) -> None:
    x, W = draw(0, 6, 3)
    mixed = x @ torch.rand(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x, W = torch.cat([x, mixed, torch.zeros(len(x), 1)], 1), torch.cat([W, W.new_ones(3, 3)], 1)
    found = units((x, W))
    assert ORDERS[order](found).isfinite().all()
    costs = unit_costs(found, torch.arange(9), weighted=True)
    assert costs[:6].min() > 1e-6 and costs[6:].max() < 1e-9
    torch.testing.assert_close(x[:, :6] @ fold_removed(W, moment(x), torch.arange(6)).T, x @ W.T, rtol=0, atol=1e-6)
