"""The change of coordinates around a step of the optimizer, of all weights of one shape together.

    before the step   g <- g R^T                       the gradient of W, of the gradient of theta = W R
    after the step    theta <- old + (theta - old) R   the move of W, as a move of theta

Both are products of the rows of a weight with R. They are made in float32 at least, whatever the weights are, and
rounded once. Where `R = I - U^T U`, the old weights are not needed in full, but `P = old U^T`, as narrow as U:
`theta <- theta - (theta U^T - P) U`. With `preserve_function=False` W stands still where R moves:
`theta <- theta R_old^-1 R_new`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from decorr_fx.ops.layout import Factored, Layout, stack_weight, unstack_weight
from decorr_fx.ops.low_rank import LowRank
from decorr_fx.ops.precision import is_exact

R = LowRank | Factored
Remembered = Tensor | Sequence[Tensor]  # P [stacks, d_out, rank] where that is enough, else copies of the weights


def gradients_to_z(gradients: Sequence[Tensor], R: R, layout: Layout, gains: Tensor | None = None) -> None:
    """Let gradients of theta be those of W, in place: `g <- s g R^T`.

    Args:
        gradients: of weights of one shape.
        R: of all their stacks, one weight after the other.
        layout: how each is read.
        gains: s, `[stacks]`; None where it is 1.
    """
    stacked = _stacked(gradients, layout)
    R.transposed.times_(stacked)
    if gains is not None:
        stacked.mul_(gains.reshape(-1, *[1] * (stacked.dim() - 1)))
    _write(gradients, stacked, layout)


def remember(weights: Sequence[Tensor], R: R, layout: Layout) -> Remembered:
    """Return what `moves_to_x` needs of the weights as they are before the step."""
    if isinstance(R, LowRank) and R.gain is None and is_exact(weights[0].device):
        return _stacked(weights, layout) @ R.U.mT
    return [*map(Tensor.clone, weights)]


def moves_to_x(weights: Sequence[Tensor], olds: Remembered, R: R, layout: Layout) -> None:
    """Let the moves of weights since `remember` go through R, in place: `theta <- old + (theta - old) R`.

    A weight is written once, so that whoever reads it meanwhile sees it before or after.
    """
    stacked = _stacked(weights, layout)
    if isinstance(olds, Tensor):
        assert isinstance(R, LowRank)
        stacked.baddbmm_((stacked @ R.U.mT).sub_(olds), R.U, alpha=-1)
    else:
        start = _stacked(olds, layout)
        stacked = stacked - start
        R.times_(stacked)
        stacked.add_(start)
    _write(weights, stacked, layout)


def divided(theta: Tensor, R: R, layout: Layout) -> Tensor:
    """Return `W = theta R^-1`, as stacked rows: what stands still where a step of R changes the function."""
    return R.divide(stack_weight(theta.to(torch.promote_types(theta.dtype, torch.float32)), layout))


def multiply_into(theta: Tensor, W: Tensor, R: R, layout: Layout) -> None:
    """Let `theta <- W R`, for W as `divided` returns it."""
    theta.copy_(unstack_weight(R.times(W), theta.shape, layout))


def _stacked(tensors: Sequence[Tensor], layout: Layout) -> Tensor:
    """Return the rows of tensors in the shape of weights; of a single one a view, where its type and order allow."""
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    if len(tensors) == 1:
        return stack_weight(tensors[0].to(wide), layout)
    return torch.cat([stack_weight(tensor.to(wide), layout) for tensor in tensors])


def _write(tensors: Sequence[Tensor], stacked: Tensor, layout: Layout) -> None:
    """Put rows where they belong, if they are not there already."""
    if len(tensors) == 1 and stacked.data_ptr() == tensors[0].data_ptr():
        return
    for tensor, part in zip(tensors, stacked.chunk(len(tensors)), strict=True):
        tensor.copy_(unstack_weight(part, tensor.shape, layout))
