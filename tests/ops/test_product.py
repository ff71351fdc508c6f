import pytest
import torch
from torch import Tensor
from torch.func import jvp, vmap

from decorr_fx.ops.product import LONG, NARROW, times


@pytest.mark.parametrize(("stacks", "n", "m"), [(1, LONG, 9), (3, LONG, NARROW), (2, 50, 9), (2, LONG, NARROW + 1)])
def test_every_way_is_the_product(stacks: int, n: int, m: int) -> None:
    rows, matrix = torch.randn(stacks, n, m, dtype=torch.float64), torch.randn(stacks, m, m, dtype=torch.float64)
    torch.testing.assert_close(times(rows, matrix), rows @ matrix)
    torch.testing.assert_close(torch.compile(times)(rows, matrix), rows @ matrix)


def test_the_narrow_product_has_the_derivatives_of_the_product() -> None:
    rows, matrix = torch.randn(1, LONG, 4, dtype=torch.float64), torch.randn(1, 4, 4, dtype=torch.float64)
    of_rows, of_matrix = torch.randn_like(rows), torch.randn_like(matrix)

    def derivatives(product: object) -> list[Tensor]:
        inputs = (rows.clone().requires_grad_(), matrix.clone().requires_grad_())
        first = torch.autograd.grad(product(*inputs).square().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(gradient.square().sum() for gradient in first), inputs)
        return [*first, *second, jvp(product, (rows, matrix), (of_rows, of_matrix))[1]]

    for got, expected in zip(derivatives(times), derivatives(torch.matmul), strict=True):
        torch.testing.assert_close(got, expected)
    several = torch.randn(3, *rows.shape, dtype=torch.float64)
    torch.testing.assert_close(vmap(times, in_dims=(0, None))(several, matrix), several @ matrix)
