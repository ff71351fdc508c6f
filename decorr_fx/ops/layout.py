"""How a weight and its input rows are seen by R, and R as one dense matrix or as a Kronecker pair.

One convention holds everywhere. A conv or linear maps rows of `C_in * taps` features, channel-major, as
`weight.flatten(1)` and `F.unfold` order them. R works on *stacks* of such rows:

    weight   [stacks, d_out, *modes]
    rows     [stacks, n, *modes]
    factor i of R   [stacks, modes[i], modes[i]], or [groups, ...] where the blocks of a group share it
    U of R          [stacks, rank, d], where R is of low rank, see `low_rank`

where `stacks = groups * blocks` counts the blocks of channels, ordered (group, block), and `modes` is `(d,)` for one
dense matrix or `(channels, taps)` for a Kronecker pair, whose factor over taps all blocks of a group share. Examples:

    Linear(64, 10), rank 32                   stacks 1,  modes (64,)      U [1, 32, 64]
    Linear(64, 10), full                      stacks 1,  modes (64,)      R [1, 64, 64]
    Conv2d(128, 256, 3), kronecker x2         stacks 2,  modes (64, 9)    A [2, 64, 64], S [1, 9, 9]
    Conv2d(128, 128, 3, groups=4), 2 blocks   stacks 8,  modes (144,)     R [8, 144, 144]: 16 channels of 9 taps

so that a grouped convolution, a block-diagonal R and a Kronecker pair are all the same few lines.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """The reading of one weight as rows of features, and the structure of R over them.

    Attributes:
        groups: groups of the convolution (1 for a linear).
        d_out: outputs per group.
        channels: input channels per group.
        taps: kernel taps (1 for a linear).
        transposed: the weight is stored `[C_in, d_out, *kernel]`, as transposed convolutions do.
        blocks: number of diagonal blocks that the channels of a group are cut into.
        paired: R is a Kronecker pair (channels, taps) instead of one dense matrix.
        rank: number of directions that R keeps track of, where it is of low rank; 0 for dense factors.
    """

    groups: int
    d_out: int
    channels: int
    taps: int = 1
    transposed: bool = False
    blocks: int = 1
    paired: bool = False
    rank: int = 0

    @cached_property
    def d(self) -> int:
        """Features of a row, per group."""
        return self.channels * self.taps

    @cached_property
    def stacks(self) -> int:
        """Number of blocks of channels, over all groups."""
        return self.groups * self.blocks

    @cached_property
    def size(self) -> int:
        """Numbers of the weight."""
        return self.groups * self.d_out * self.d

    @cached_property
    def factor_shapes(self) -> list[tuple[int, int, int]]:
        """Shapes of the factors of R, or of U."""
        if self.rank:
            return [(self.stacks, self.rank, self.d)]
        first, *others = self.modes
        return [(self.stacks, first, first), *((self.groups, side, side) for side in others)]

    @cached_property
    def modes(self) -> tuple[int, ...]:
        """Sides of the factors of R."""
        width = self.channels // self.blocks
        return (width, self.taps) if self.paired else (width * self.taps,)

    def slots(self, max_samples: int) -> int:
        """Return how many samples of the input give every factor of R `max_samples` rows, or just more.

        A patch is one row for a dense matrix; for a pair it is a row a tap, and a row a channel.
        """
        return ceil(max_samples / (min(self.taps, self.channels) if self.paired else 1))

    @property
    def structure(self) -> str:
        """Name of the structure of R, for people."""
        if self.rank:
            return f"rank {self.rank}"
        name = "kronecker" if self.paired else "full" if self.blocks == 1 else "block"
        return f"{name} x{self.blocks}" if self.blocks > 1 else name


@dataclass(frozen=True)
class Factored:
    """R of some stacks of rows, as one dense factor, or one a mode."""

    factors: Sequence[Tensor]

    def times(self, rows: Tensor) -> Tensor:
        """Return `w R` for rows `w [stacks, n, *modes]`, one factor a mode."""
        for mode, factor in enumerate(self.factors):
            rows = refold_mode(unfold_mode(rows, mode, len(factor)) @ factor, rows, mode)
        return rows

    def times_(self, rows: Tensor) -> None:
        """Do the same in place."""
        rows.copy_(self.times(rows))

    @property
    def transposed(self) -> "Factored":
        """R^T."""
        return Factored([factor.mT for factor in self.factors])

    def divide(self, rows: Tensor) -> Tensor:
        """Return `w R^-1`."""
        return Factored([_inverse(factor) for factor in self.factors]).times(rows)


def stack_weight(W: Tensor, layout: Layout) -> Tensor:
    """Return `W [O, C/groups, *kernel]` (transposed: `[C, O/groups, *kernel]`) as `[stacks, d_out, *modes]`."""
    if layout.blocks == 1 and not layout.transposed:  # rows lie as they are, and this is called often
        return W.reshape(layout.groups, layout.d_out, *layout.modes)
    g, b, width = layout.groups, layout.blocks, layout.channels // layout.blocks
    if layout.transposed:
        cut = W.reshape(g, b, width, layout.d_out, layout.taps).transpose(2, 3)
    else:
        cut = W.reshape(g, layout.d_out, b, width, layout.taps).transpose(1, 2)
    return cut.reshape(layout.stacks, layout.d_out, *layout.modes)


def unstack_weight(stacked: Tensor, shape: Sequence[int], layout: Layout) -> Tensor:
    """Return the inverse of `stack_weight`: a weight of the given `shape`."""
    g, b, width = layout.groups, layout.blocks, layout.channels // layout.blocks
    cut = stacked.reshape(g, b, layout.d_out, width, layout.taps)
    ordered = cut.transpose(2, 3) if layout.transposed else cut.transpose(1, 2)
    return ordered.reshape(shape)


def stack_rows(rows: Tensor, layout: Layout) -> Tensor:
    """Return `rows [sites, n, C * taps]`, channel-major, as `[sites * stacks, n, *modes]`."""
    return rows.reshape(*rows.shape[:2], layout.stacks, *layout.modes).transpose(1, 2).flatten(0, 1)


def unfold_mode(stacked: Tensor, mode: int, stacks: int) -> Tensor:
    """Return `[any, n, *modes]` as rows of one mode, `[stacks, rows, modes[mode]]`, for a factor of so many stacks."""
    return stacked.movedim(2 + mode, -1).reshape(stacks, -1, stacked.shape[2 + mode])


def refold_mode(rows: Tensor, like: Tensor, mode: int) -> Tensor:
    """Return the inverse of `unfold_mode`, in the shape of `like`."""
    shape = like.movedim(2 + mode, -1).shape
    return rows.reshape(shape).movedim(-1, 2 + mode)


def identity_factors(layout: Layout, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Return new factors, or U, such that R is the identity."""
    if layout.rank:
        return [torch.zeros(shape, device=device, dtype=dtype) for shape in layout.factor_shapes]
    eyes = [(stacks, torch.eye(side, device=device, dtype=dtype)) for stacks, side, _ in layout.factor_shapes]
    return [eye.repeat(stacks, 1, 1) for stacks, eye in eyes]


def _inverse(factor: Tensor) -> Tensor:
    """Return the inverses of matrices `[stacks, m, m]`, without a host sync.

    On a CPU one after the other: LU of a batch of large matrices on several threads fails in some builds of torch.
    """
    parts = factor.chunk(len(factor)) if factor.device.type == "cpu" else [factor]
    return torch.cat([torch.linalg.inv_ex(part)[0] for part in parts])
