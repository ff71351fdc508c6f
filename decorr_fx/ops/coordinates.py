"""The change of coordinates around a step of the optimizer, of all weights of one shape together.

    before the step   g <- g R^T / gain                the gradient of W, of the gradient of theta = W R
    after the step    theta <- old + (theta - old) R   the move of W, as a move of theta

Both are products of the rows of a weight with R. They are made in float32 at least, whatever the weights are, and
rounded once. With `preserve_function=False` W stands still where R moves: `theta <- theta R_old^-1 R_new`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from decorr_fx.ops.layout import Factored, Layout, stack_weight, unstack_weight
from decorr_fx.ops.low_rank import LowRank

R = LowRank | Factored
CACHED = 2**18  # numbers of a weight that stay in the cache of a CPU, while they are mapped


def gradients_to_z(gradients: Sequence[Tensor], R: R, layout: Layout) -> None:
    """Let gradients of theta be those of W, in place: `g <- g R^T`, without the gain of R.

    Adam and its like do not feel a scalar on the gradient. SGD does: with the gain on gradients as well as on moves,
    its steps grow by the square of it, and a learning rate that is just right for the plain model is too large.

    Args:
        gradients: of weights of one shape.
        R: of all their stacks, one weight after the other.
        layout: how each is read.
    """
    stacked = _stacked(gradients, layout)
    (LowRank(R.U) if isinstance(R, LowRank) else R.transposed).times_(stacked)
    _write(gradients, stacked, layout)


def moves_to_x(weights: Sequence[Tensor], olds: Sequence[Tensor], R: R, layout: Layout) -> None:
    """Let the moves of weights since `olds` go through R, in place: `theta <- old + (theta - old) R`.

    A number is written once, so that whoever reads it meanwhile sees it before or after. On a CPU as many rows are done
    at once as stay in its cache: what takes time is reading weights from memory.
    """
    stacked, starts = _stacked(weights, layout), _stacked(olds, layout)
    rows = max(1, CACHED // (len(stacked) * layout.d)) if stacked.device.type == "cpu" else stacked.shape[1]
    for moved, start in zip(torch.split(stacked, rows, 1), torch.split(starts, rows, 1), strict=True):
        delta = moved - start
        R.times_(delta)
        torch.add(start, delta, out=moved)
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
