import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from decorr_fx.ops.low_rank import Following, shrink, shrink_channels


def drawn_V(stacks: int, rank: int, d: int, longest: float = 0.999) -> Tensor:
    directions = torch.linalg.qr(torch.randn(stacks, d, d, dtype=torch.float64))[0][:, :rank]
    return torch.linspace(0, longest, rank, dtype=torch.float64)[:, None].sqrt() * directions


def dense(V: Tensor) -> Tensor:
    return torch.eye(V.shape[2], dtype=V.dtype) - V.mT @ V


SHAPES = pytest.mark.parametrize(("stacks", "rank", "d"), [(1, 1, 1), (1, 3, 3), (2, 4, 9), (3, 2, 40)])


@SHAPES
def test_rows_are_multiplied_by_R(stacks: int, rank: int, d: int) -> None:
    V, rows = drawn_V(stacks, rank, d), torch.randn(stacks, 5, d, dtype=torch.float64)
    torch.testing.assert_close(shrink(rows, V), rows @ dense(V))


@SHAPES
def test_rows_follow_from_the_old_R_to_the_new_one(stacks: int, rank: int, d: int) -> None:
    old, new = drawn_V(stacks, rank, d), drawn_V(stacks, rank, d, longest=0.9)
    rows = torch.randn(stacks, 5, d, dtype=torch.float64)
    torch.testing.assert_close(Following.between(old, new)(rows), rows @ dense(old) @ torch.linalg.inv(dense(new)))


def test_no_step_in_float32_loses_the_function_where_one_direction_has_nearly_everything() -> None:
    old, new = (drawn_V(1, 8, 300, longest=0.99).float() for _ in range(2))
    rows = torch.randn(1, 20, 300)
    torch.testing.assert_close(shrink(Following.between(old, new)(rows), new), shrink(rows, old), rtol=1e-4, atol=1e-4)


def test_rows_follow_exactly_where_V_is_not_quite_orthogonal() -> None:
    old, new = (drawn_V(2, 4, 9, longest=0.5) + 0.05 * torch.randn(2, 4, 9, dtype=torch.float64) for _ in range(2))
    rows = torch.randn(2, 5, 9, dtype=torch.float64)
    torch.testing.assert_close(shrink(Following.between(old, new)(rows), new), shrink(rows, old))


@pytest.mark.parametrize("groups", [1, 3])
def test_R_on_the_channels_of_an_image_is_R_on_a_pointwise_weight(groups: int) -> None:
    V, x = drawn_V(groups, 2, 4), torch.randn(2, 4 * groups, 5, 6, dtype=torch.float64)
    W = torch.randn(groups, 7, 4, dtype=torch.float64)
    on_weight = F.conv2d(x, shrink(W, V).reshape(7 * groups, 4, 1, 1), groups=groups)
    on_input = F.conv2d(shrink_channels(x, V, 2), W.reshape(7 * groups, 4, 1, 1), groups=groups)
    torch.testing.assert_close(on_input, on_weight)


def test_gradients_go_through_both() -> None:
    V, rows = drawn_V(2, 2, 5), torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda rows: shrink(rows, V), (rows,))
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: shrink_channels(x, V[:1], 0), (x,))
