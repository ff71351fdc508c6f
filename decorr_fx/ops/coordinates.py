"""The change of coordinates around a step of the optimizer, of all weights of one shape together.

    before the step   g <- g R^T                       the gradient of W, of the gradient of theta = W R
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


def gradients_to_z(gradients: Sequence[Tensor], R: R, layout: Layout, gains: Tensor | None = None) -> None:
    """Let gradients of theta be those of W, in place: `g <- s g R^T`.

    Args:
        gradients: of weights of one shape.
        R: of all their stacks, one weight after the other.
        layout: how each is read.
        gains: s, `[stacks]`; None where it is 1.
    """
    for gradient, moved in zip(gradients, _products(gradients, R.transposed, layout, gains), strict=True):
        if moved is not gradient:
            gradient.copy_(moved)


def moves_to_x(weights: Sequence[Tensor], olds: Sequence[Tensor], R: R, layout: Layout) -> None:
    """Let the moves of weights since `olds` go through R, in place: `theta <- old + (theta - old) R`.

    A weight is written once, so that whoever reads it meanwhile sees it before or after.
    """
    wide = torch.promote_types(weights[0].dtype, torch.float32)
    deltas = [weight.to(wide) - old.to(wide) for weight, old in zip(weights, olds, strict=True)]
    for weight, old, delta in zip(weights, olds, _products(deltas, R, layout), strict=True):
        weight.copy_(delta.add_(old))


def divided(theta: Tensor, R: R, layout: Layout) -> Tensor:
    """Return `W = theta R^-1`, as stacked rows: what stands still where a step of R changes the function."""
    return R.divide(stack_weight(theta.to(torch.promote_types(theta.dtype, torch.float32)), layout))


def multiply_into(theta: Tensor, W: Tensor, R: R, layout: Layout) -> None:
    """Let `theta <- W R`, for W as `divided` returns it."""
    theta.copy_(unstack_weight(R.times(W), theta.shape, layout))


def _products(tensors: Sequence[Tensor], R: R, layout: Layout, gains: Tensor | None = None) -> list[Tensor]:
    """Return the products with R of tensors in the shape of weights; in place where their rows are a view of them."""
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    if len(tensors) == 1:
        stacked = stack_weight(tensors[0].to(wide), layout)
    else:
        stacked = torch.cat([stack_weight(tensor.to(wide), layout) for tensor in tensors])
    R.times_(stacked)
    if gains is not None:
        stacked.mul_(gains.reshape(-1, *[1] * (stacked.dim() - 1)))
    if len(tensors) == 1 and stacked.data_ptr() == tensors[0].data_ptr():
        return list(tensors)
    return _unstacked(stacked, tensors, layout)


def _unstacked(stacked: Tensor, like: Sequence[Tensor], layout: Layout) -> list[Tensor]:
    parts = stacked.chunk(len(like))
    return [unstack_weight(part, tensor.shape, layout) for part, tensor in zip(parts, like, strict=True)]
