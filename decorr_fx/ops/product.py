"""Products of many rows with a small matrix, which every use of R comes down to, their precision, and inverses."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.amp import is_autocast_available

CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
NARROW, LONG = 16, 8192  # columns and rows of a product for which there is something faster


def times(rows: Tensor, matrix: Tensor) -> Tensor:
    """Return `rows [stacks, n, m] @ matrix [stacks, m, m]`."""
    stacks, n, m = rows.shape
    if m > NARROW or n < LONG:
        return rows @ matrix
    if torch.compiler.is_compiling():  # which fuses this, and does not fuse a matrix product
        return (rows[..., None] * matrix[:, None]).sum(-2)
    if rows.device.type != "cpu":
        return rows @ matrix
    products = [_NarrowProduct.apply(rows[i], matrix[i]) for i in range(stacks)]
    return products[0][None] if stacks == 1 else torch.stack(products)


def _convolve(rows: Tensor, matrix: Tensor) -> Tensor:
    """Return `rows [n, m] @ matrix [m, m]` as a convolution over n pixels of m channels: five times as fast."""
    image = rows[None, None].permute(0, 3, 1, 2)  # channels last, as the numbers lie in memory
    return F.conv2d(image, matrix.mT[:, :, None, None]).permute(0, 2, 3, 1)[0, 0]


class _NarrowProduct(torch.autograd.Function):
    """The convolution, with a backward that is one, too: that of torch would be slower than the matrix product."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor, matrix: Tensor) -> Tensor:
        return _convolve(rows, matrix)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (grad,) = grads
        rows, matrix = ctx.saved_tensors
        to_rows = times(grad[None], matrix.mT[None])[0] if ctx.needs_input_grad[0] else None
        return to_rows, rows.mT @ grad if ctx.needs_input_grad[1] else None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        rows, matrix = ctx.saved_tensors
        of_rows, of_matrix = tangents
        moved = torch.zeros_like(rows) if of_rows is None else of_rows @ matrix
        return moved if of_matrix is None else moved + rows @ of_matrix


def pointwise(x: Tensor, matrix: Tensor, spatial: int) -> Tensor:
    """Multiply the channels of a whole input by a matrix, each stack of channels by its own.

    Args:
        x: `[..., C]` of a linear (`spatial` 0), or `[N, C, *size]`, or `[C, *size]`, of a convolution.
        matrix: `[stacks, out, C / stacks]`, of the type of x.
        spatial: number of spatial dimensions.
    """
    stacks, out, width = matrix.shape
    if spatial:
        weight = matrix.reshape(stacks * out, width, *[1] * spatial)
        return CONVOLUTIONS[spatial - 1](x, weight, groups=stacks)
    if stacks == 1:
        return F.linear(x, matrix[0])
    return torch.einsum("...sc,soc->...so", x.reshape(*x.shape[:-1], stacks, width), matrix).flatten(-2)


def inverse_of_definite(A: Tensor) -> Tensor:
    """Return the inverses of symmetric positive definite matrices `[stacks, d, d]`; NaN where one is not.

    By Cholesky: half the work of an LU, which some builds of torch get wrong for batches on several CPU threads.
    """
    L = torch.linalg.cholesky_ex(A)[0]  # _ex: no host sync
    inverse: Tensor = torch.cholesky_inverse(L)
    return inverse


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context without autocast."""
    return torch.autocast(device.type, enabled=False) if is_autocast_available(device.type) else nullcontext()
