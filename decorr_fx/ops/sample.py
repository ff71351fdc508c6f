"""Sampling: copy a few rows of a layer's input into a buffer, and touch nothing else.

Which rows is decided by a low-discrepancy sequence over the number of R's steps, never by the random generator:
dropout masks stay those of the plain model at the same seed. Rows are gathered straight from the input, without
unfolding it and without a host sync.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, gcd, prod

import torch
from torch import Tensor

GOLDEN = (5**0.5 - 1) / 2
DUE, FORWARDS, ROWS = range(3)  # what the tensor `host` of a site holds: whether R moves next, and what came since


@dataclass(frozen=True)
class ConvGeometry:
    """Where the taps of a convolution fall: one entry a spatial dimension; `padding` is (before, after) for each."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    transposed: bool = False

    @property
    def numbers(self) -> list[int]:
        """All numbers in order, for an operator, which takes numbers only."""
        padding = [end for pair in self.padding for end in pair]
        return [*self.kernel, *self.stride, *self.dilation, *padding, int(self.transposed)]

    @classmethod
    def of_numbers(cls, numbers: Sequence[int]) -> "ConvGeometry | None":
        """Return the geometry with these `numbers`; None for none, as a linear has."""
        if not numbers:
            return None
        n = len(numbers) // 5
        kernel, stride, dilation, ends = (tuple(numbers[a * n : b * n]) for a, b in ((0, 1), (1, 2), (2, 3), (3, 5)))
        return cls(kernel, stride, tuple(zip(ends[::2], ends[1::2], strict=True)), dilation, bool(numbers[-1]))


def rows_of(x: Tensor, geometry: ConvGeometry | None, out_size: Sequence[int]) -> int:
    """Return how many rows a call maps that gives an output of this spatial size."""
    if geometry is None:
        return x.numel() // max(x.shape[-1], 1)
    return prod(out_size) * (x.shape[0] if x.dim() == len(geometry.kernel) + 2 else 1)


def sample_rows(
    x: Tensor, count: int, fraction: float, steps: Tensor, geometry: ConvGeometry | None, out_size: Sequence[int],
    total: int | None = None,
) -> Tensor:  # fmt: skip
    """Return some rows `[n, d]` that a call maps: at most `count`, and at most this fraction of all.

    Args:
        x: the input, `[..., d]` of a linear, `[(N,) C, *size]` of a convolution, of which a row is a patch
            `[C * taps]`, padding zeros included. A patch of a transposed convolution is what one output position
            sees: the input with `stride - 1` zeros between its elements.
        count: see above.
        fraction: see above.
        steps: scalar int64, the number of R's steps so far.
        geometry: of the convolution; None for a linear.
        out_size: the spatial size of its output.
        total: the number of all rows, where it is known.
    """
    total = rows_of(x, geometry, out_size) if total is None else total
    chosen = sample_indices(total, min(count, total if fraction == 1 else ceil(fraction * total)), steps)
    if geometry is None:
        return x.reshape(-1, x.shape[-1])[chosen]
    batch = x if x.dim() == len(geometry.kernel) + 2 else x.unsqueeze(0)
    return _gather_patches(batch, chosen, out_size, geometry)


def sample_indices(total: int, count: int, steps: Tensor) -> Tensor:
    """Return `count` row numbers below `total`, all different: golden-ratio multiples modulo `total`.

    Args:
        total: rows to choose from, at least `count`.
        count: rows to choose; with `count == total` every row is chosen once.
        steps: scalar int64, the number of steps so far: the sequence goes on where the step before left it.
    """
    if not total:
        return torch.zeros(0, dtype=torch.int64, device=steps.device)
    stride = max(round(total * GOLDEN), 1)
    while gcd(stride, total) != 1:  # coprime: no row comes twice, and every row and column of an image is visited
        stride += 1
    position = steps * count + torch.arange(count, device=steps.device)
    return position % total * stride % total


@torch.no_grad()
def record_rows(
    x: Tensor, rows: Tensor, seen: Tensor, steps: Tensor, host: Tensor, fraction: float, numbers: Sequence[int],
    out_size: Sequence[int],
) -> None:  # fmt: skip
    """Write some rows of an input into the buffer; where it is full, the oldest ones are replaced.

    Where R does not move next, nothing is done. A forward that runs inside a backward is activation checkpointing
    recomputing one that was recorded before, unless that ran without gradients and so recorded nothing: forwards
    inside of a backward are recorded as long as there is none outside.

    Args:
        x: the input, see `sample_rows`.
        rows: `[slots, groups * d]`, the buffer.
        seen: scalar int64, the number of rows recorded since the last step of R.
        steps: scalar int64, the number of R's steps so far.
        host: int64 on the host, see `DUE`, `FORWARDS` and `ROWS`.
        fraction: part of the rows that is recorded, at most.
        numbers: of the `ConvGeometry`; none for a linear.
        out_size: spatial size of the output.
    """
    due, forwards, _ = host.tolist()
    repeated = recomputing()
    if not due or (forwards and repeated):
        return
    geometry = ConvGeometry.of_numbers(numbers) if numbers else None
    total = rows_of(x, geometry, out_size)
    picked = sample_rows(x, len(rows), fraction, steps, geometry, out_size, total)
    slot = (seen + torch.arange(len(picked), device=seen.device)) % len(rows)
    rows[slot] = picked.to(rows.dtype)
    seen += len(picked)
    host += torch.tensor((0, int(not repeated), total), device=host.device)


@torch.library.custom_op("decorr_fx::record_rows", mutates_args=("rows", "seen", "host"))
def record_rows_op(
    x: Tensor, rows: Tensor, seen: Tensor, steps: Tensor, host: Tensor, fraction: float, numbers: list[int],
    out_size: list[int],
) -> None:  # fmt: skip
    """Do the same as a node of a compiled graph."""
    record_rows(x, rows, seen, steps, host, fraction, numbers, out_size)


def recomputing() -> bool:
    """Tell whether autograd is running a backward: then a forward is one that checkpointing repeats."""
    return torch._C._current_graph_task_id() != -1  # there is no public call for it


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
