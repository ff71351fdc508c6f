"""Recording: copy a few rows of a layer's input into a buffer, and touch nothing else.

Which rows is decided by a low-discrepancy sequence over the number of R's steps, never by the random generator:
dropout masks stay those of the plain model at the same seed. Rows are gathered straight from the input, without
unfolding it and without a host sync.

A forward that runs inside a backward is activation checkpointing recomputing what was recorded before: it records
nothing. So forward and recomputation count once, and the rows of several forwards before one step all count.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, gcd, prod

import torch
from torch import Tensor

GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class ConvGeometry:
    """Where the taps of a convolution fall: one entry a spatial dimension; `padding` is (before, after) for each."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    transposed: bool = False

    def out_size(self, in_size: Sequence[int], output_padding: Sequence[int]) -> list[int]:
        """Return the spatial size of the output; `output_padding` counts for transposed convolutions only."""
        sizes = []
        for i, length in enumerate(in_size):
            span = self.dilation[i] * (self.kernel[i] - 1) + 1
            if self.transposed:
                sizes.append((length - 1) * self.stride[i] - sum(self.padding[i]) + span + output_padding[i])
            else:
                sizes.append((length + sum(self.padding[i]) - span) // self.stride[i] + 1)
        return sizes


def sample_indices(total: int, count: int, steps: Tensor) -> Tensor:
    """Return `count` row numbers below `total`, all different: golden-ratio multiples modulo `total`.

    Args:
        total: rows to choose from, at least `count`.
        count: rows to choose; with `count == total` every row is chosen once.
        steps: scalar int64, the number of steps so far: the sequence goes on where the step before left it.
    """
    stride = max(round(total * GOLDEN), 1)
    while gcd(stride, total) != 1:  # coprime: no row comes twice, and every row and column of an image is visited
        stride += 1
    position = steps * count + torch.arange(count, device=steps.device)
    return position % total * stride % total


@torch.library.custom_op("decorr_fx::sample_indices", mutates_args=())
def sample_indices_op(steps: Tensor, total: int, count: int) -> Tensor:
    """Do the same as a node of a compiled graph, which would be compiled for every `total` otherwise."""
    return sample_indices(total, count, steps)


@sample_indices_op.register_fake
def _(steps: Tensor, total: int, count: int) -> Tensor:
    return steps.new_empty(count)


@torch.library.custom_op("decorr_fx::store_rows", mutates_args=("rows", "seen"))
def store_rows(rows: Tensor, seen: Tensor, picked: Tensor) -> None:
    """Write rows into the buffer; where it is full, the oldest ones are replaced. A recomputation writes nothing.

    Args:
        rows: `[slots, d]`, the buffer.
        seen: scalar int64, the number of rows recorded since the last step of R.
        picked: `[n, d]`, the rows.
    """
    if recomputing():
        return
    slot = (seen + torch.arange(len(picked), device=seen.device)) % len(rows)
    rows[slot] = picked
    seen += len(picked)


def recomputing() -> bool:
    """Tell whether autograd is running a backward: then a forward is one that checkpointing repeats."""
    return torch._C._current_graph_task_id() != -1  # there is no public call for it


def linear_rows(x: Tensor, slots: int, fraction: float, steps: Tensor) -> Tensor:
    """Return some rows `[n, d]` of the input `x [..., d]` of a linear, `fraction` of them and at most `slots`."""
    tokens = x.reshape(-1, x.shape[-1])
    return tokens[_pick(tokens.shape[0], slots, fraction, steps)]


def conv_rows(
    x: Tensor, slots: int, fraction: float, steps: Tensor, geometry: ConvGeometry, output_padding: Sequence[int]
) -> Tensor:
    """Return some patches `[n, C * taps]` of the input `x [(N,) C, *size]` of a convolution, padding zeros included.

    A patch of a transposed convolution is what one output position sees: the input with `stride - 1` zeros between its
    elements.
    """
    batch = x if x.dim() == len(geometry.kernel) + 2 else x.unsqueeze(0)
    out_size = geometry.out_size(batch.shape[2:], output_padding)
    picked = _pick(batch.shape[0] * prod(out_size), slots, fraction, steps)
    return _gather_patches(batch, picked, out_size, geometry)


def _pick(total: int, slots: int, fraction: float, steps: Tensor) -> Tensor:
    count = min(slots, total if fraction == 1 else ceil(fraction * total))
    if torch.compiler.is_compiling():
        indices: Tensor = sample_indices_op(steps, total, count)
        return indices
    return sample_indices(total, count, steps)


def _gather_patches(x: Tensor, picked: Tensor, out_size: Sequence[int], geometry: ConvGeometry) -> Tensor:
    """Return the patches `[n, C * taps]` of `x [N, C, *size]` at the positions numbered over (image, *out_size)."""
    image, *position = _unravel(picked, [x.shape[0], *out_size])
    tap = _unravel(torch.arange(prod(geometry.kernel), device=x.device), geometry.kernel)
    inside = torch.ones((), dtype=torch.bool, device=x.device)
    where = []
    for i, size in enumerate(x.shape[2:]):
        coordinate, valid = _input_coordinate(position[i][:, None], tap[i], i, size, geometry)
        inside = inside & valid
        where.append(coordinate.clamp(0, size - 1))
    patches = x.movedim(1, -1)[image[:, None], *where]  # [n, taps, C], a view gathered once
    # where, not a product: outside the image there is no value, and 0 * inf would make one
    return patches.where(inside[..., None], 0).transpose(1, 2).flatten(1)


def _input_coordinate(
    position: Tensor, tap: Tensor, i: int, size: int, geometry: ConvGeometry
) -> tuple[Tensor, Tensor]:
    """Return the input coordinate in dimension `i` that `tap` meets at output `position`, and whether it exists."""
    stride, dilation, before = geometry.stride[i], geometry.dilation[i], geometry.padding[i][0]
    if geometry.transposed:
        scaled = position + before - tap * dilation
        coordinate = scaled.div(stride, rounding_mode="floor")
        exists = scaled % stride == 0
    else:
        coordinate = position * stride - before + tap * dilation
        exists = torch.ones_like(coordinate, dtype=torch.bool)
    return coordinate, exists & (coordinate >= 0) & (coordinate < size)


def _unravel(flat: Tensor, shape: Sequence[int]) -> list[Tensor]:
    """Split row-major numbers over `shape` into coordinates, the first dimension first."""
    strides = [prod(shape[i:]) for i in range(len(shape) + 1)]
    return [flat % outer // inner for outer, inner in pairwise(strides)]
