import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from decorr_fx.ops import reference
from decorr_fx.ops.prune.orders import ORDERS
from decorr_fx.ops.prune.subspace import Units, fold_removed, unit_costs


def draw(seed: int, n: int, o: int) -> tuple[Tensor, Tensor]:
    """Return rows of correlated units, and the weight of a reader."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(n, dtype=torch.float64) + 0.5 * torch.randn(n, n, generator=generator, dtype=torch.float64)
    x = (torch.randn(8 * n, n, generator=generator, dtype=torch.float64) @ mixing.T).relu()
    return x, torch.randn(o, n, generator=generator, dtype=torch.float64)


def moment(x: Tensor) -> Tensor:
    return x.mT @ x / len(x)


def units(*readers: tuple[Tensor, Tensor]) -> Units:
    norms = torch.rand(readers[0][0].shape[1], dtype=torch.float64)
    return Units("layer", [moment(x) for x, _ in readers], [W for _, W in readers], norms)


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
    added = torch.stack([_told_by(x, order[:j], order[j]) for j in range(k, n)]).sum() if k < n else torch.zeros(())
    torch.testing.assert_close(costs[k:].sum(), (added / x.square().sum(1).mean()).double(), rtol=1e-8, atol=1e-10)


def _told_by(x: Tensor, kept: Tensor, unit: Tensor) -> Tensor:
    """Return the mean square of what the kept units do not tell of one more."""
    if not len(kept):
        return x[:, unit].square().mean()
    return reference.reader_error(torch.eye(x.shape[1], dtype=x.dtype)[unit][None], x, kept.tolist())


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


@pytest.mark.parametrize("n", [7, 12])
def test_the_order_backward_removes_what_costs_least_one_after_another(n: int) -> None:
    x, W = draw(3, n, 4)
    left, expected = list(range(n)), []
    while left:
        errors = [reference.reader_error(W, x, [j for j in left if j != i]) if len(left) > 1 else 0.0 for i in left]
        expected.append(left.pop(min(range(len(left)), key=lambda place: float(errors[place]))))
    assert ORDERS["backward"](units((x, W))).argsort().tolist() == expected


def test_orders_are_what_they_say() -> None:
    x, W = draw(5, 5, 3)
    found, C = units((x, W)), moment(x)
    torch.testing.assert_close(ORDERS["variance"](found), x.square().mean(0))
    torch.testing.assert_close(ORDERS["l1"](found), found.norms)
    alone = [_told_by(x, torch.tensor([j for j in range(5) if j != i]), torch.tensor(i)) for i in range(5)]
    torch.testing.assert_close(ORDERS["loo"](found), torch.stack(alone))
    values, vectors = torch.linalg.eigh(C)
    whitening = vectors @ torch.diag(values**-0.5) @ vectors.T
    torch.testing.assert_close(ORDERS["zca"](found), whitening.diagonal() ** -2)
    torch.manual_seed(1)
    first = ORDERS["random"](found)
    torch.manual_seed(1)
    assert torch.equal(first, ORDERS["random"](found))


def test_blocks_of_many_units_cost_about_what_one_after_another_does(monkeypatch: pytest.MonkeyPatch) -> None:
    x, W = draw(4, 60, 20)
    found = units((x, W))
    exact = unit_costs(found, ORDERS["backward"](found).argsort(descending=True), weighted=True)
    monkeypatch.setattr("decorr_fx.ops.prune.orders.BLOCK", 5)
    order = ORDERS["backward"](found).argsort(descending=True)
    assert sorted(order.tolist()) == list(range(60))
    assert unit_costs(found, order, weighted=True)[30:].sum() <= 1.05 * exact[30:].sum()
    assert exact[30:].sum() < 0.8 * unit_costs(found, ORDERS["zca"](found).argsort(descending=True), True)[30:].sum()
