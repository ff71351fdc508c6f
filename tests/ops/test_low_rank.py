import pytest
import torch
from torch import Tensor

from decorr_fx.ops.low_rank import LowRank


def drawn_U(stacks: int, rank: int, d: int, longest: float = 0.999) -> Tensor:
    directions = torch.linalg.qr(torch.randn(stacks, d, d, dtype=torch.float64))[0][:, :rank]
    return torch.linspace(0, longest, rank, dtype=torch.float64)[:, None].sqrt() * directions


def drawn(stacks: int, rank: int, d: int, gain: bool) -> LowRank:
    return LowRank(drawn_U(stacks, rank, d), 0.5 + torch.rand(stacks, dtype=torch.float64) if gain else None)


def dense(R: LowRank) -> Tensor:
    gain = 1.0 if R.gain is None else R.gain[:, None, None]
    return gain * (torch.eye(R.U.shape[2], dtype=R.U.dtype) - R.U.mT @ R.U)


SHAPES = pytest.mark.parametrize(("stacks", "rank", "d"), [(1, 1, 1), (1, 3, 3), (2, 4, 9), (3, 2, 40)])
GAINS = pytest.mark.parametrize("gain", [False, True], ids=["without gain", "with gain"])


@SHAPES
@GAINS
def test_rows_are_multiplied_by_R(stacks: int, rank: int, d: int, gain: bool) -> None:
    R, rows = drawn(stacks, rank, d, gain), torch.randn(stacks, 5, d, dtype=torch.float64)
    before, expected = rows.clone(), rows @ dense(R)
    torch.testing.assert_close(R.times(rows), expected)
    assert torch.equal(rows, before)
    R.times_(rows)
    torch.testing.assert_close(rows, expected)


@SHAPES
@GAINS
def test_the_transpose_of_R_is_the_transpose(stacks: int, rank: int, d: int, gain: bool) -> None:
    R = drawn(stacks, rank, d, gain)
    torch.testing.assert_close(dense(R.transposed), dense(R).mT)


@SHAPES
@GAINS
def test_rows_are_divided_by_R(stacks: int, rank: int, d: int, gain: bool) -> None:
    R, rows = drawn(stacks, rank, d, gain), torch.randn(stacks, 5, d, dtype=torch.float64)
    before = rows.clone()
    torch.testing.assert_close(R.divide(rows), rows @ torch.linalg.inv(dense(R)))
    assert torch.equal(rows, before)


@GAINS
def test_division_in_float32_loses_nothing_where_one_direction_has_nearly_everything(gain: bool) -> None:
    R, rows = drawn(1, 8, 300, gain), torch.randn(1, 20, 300)
    R = LowRank(drawn_U(1, 8, 300, longest=0.99).float(), None if R.gain is None else R.gain.float())
    torch.testing.assert_close(R.times(R.divide(rows)), rows, rtol=1e-4, atol=1e-4)


def test_U_of_zeros_is_the_identity() -> None:
    R, rows = LowRank(torch.zeros(2, 3, 6)), torch.randn(2, 5, 6)
    assert torch.equal(R.times(rows), rows) and torch.equal(R.divide(rows), rows)


def test_rows_in_place_may_lie_in_any_order() -> None:
    R, rows = drawn(2, 2, 6, gain=True), torch.randn(2, 6, 5, dtype=torch.float64)
    expected = rows.mT @ dense(R)
    R.times_(rows.mT)
    torch.testing.assert_close(rows.mT, expected)
