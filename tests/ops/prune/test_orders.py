import pytest
import torch
from units import draw, moment, units

from decorr_fx.ops import reference
from decorr_fx.ops.prune.orders import ORDERS
from decorr_fx.ops.prune.subspace import unit_costs


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
    torch.testing.assert_close(ORDERS["l1"](found), found.norms)
    values, vectors = torch.linalg.eigh(C)
    whitening = vectors @ torch.diag(values**-0.5) @ vectors.T
    torch.testing.assert_close(ORDERS["zca"](found), whitening.diagonal() ** -2)
    assert list(ORDERS) == ["backward", "zca", "l1"]


def test_blocks_of_many_units_cost_about_what_one_after_another_does(monkeypatch: pytest.MonkeyPatch) -> None:
    x, W = draw(4, 60, 20)
    found = units((x, W))
    exact = unit_costs(found, ORDERS["backward"](found).argsort(descending=True), weighted=True)
    monkeypatch.setattr("decorr_fx.ops.prune.orders.BLOCK", 5)
    order = ORDERS["backward"](found).argsort(descending=True)
    assert sorted(order.tolist()) == list(range(60))
    assert unit_costs(found, order, weighted=True)[30:].sum() <= 1.05 * exact[30:].sum()
    assert exact[30:].sum() < 0.8 * unit_costs(found, ORDERS["zca"](found).argsort(descending=True), True)[30:].sum()
