"""How a weight and its input rows are seen by R, and how R is factored.

One convention holds everywhere. A conv or linear maps rows of `C_in * taps` features, channel-major, as
`weight.flatten(1)` and `F.unfold` order them. R works on *stacks* of such rows:

    weight   [stacks, d_out, *modes]
    rows     [stacks, n, *modes]
    factor i of R   [stacks, modes[i], modes[i]], or [groups, ...] where the blocks of a group share it
    V of R          [stacks, rank, d], where R only shrinks a few directions: R = I - V^T V, see `shrink`

where `stacks = groups * blocks` counts the blocks of channels, ordered (group, block), and `modes` is `(d,)` for one
dense matrix or `(channels, taps)` for a Kronecker pair, whose factor over taps all blocks of a group share. Examples:

    Linear(64, 10), rank 32                   stacks 1,  modes (64,)      V [1, 32, 64]
    Linear(64, 10), full                      stacks 1,  modes (64,)      R [1, 64, 64]
    Conv2d(128, 256, 3), kronecker x2         stacks 2,  modes (64, 9)    A [2, 64, 64], S [1, 9, 9]
    Conv2d(128, 256, 3), channels x2          stacks 2,  modes (64, 9)    A [2, 64, 64]
    Conv2d(128, 128, 3, groups=4), 2 blocks   stacks 8,  modes (144,)     R [8, 144, 144]: 16 channels of 9 taps

so that a grouped convolution, a block-diagonal R and a Kronecker pair are all the same few lines.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import ceil

import torch
from torch import Tensor

from decorr_fx.ops.low_rank import shrink, shrink_channels
from decorr_fx.ops.product import pointwise, times


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
        mixes_taps: the pair has a factor over taps; without one R is the same for each tap.
        rank: number of directions that R shrinks, if it is `I - V^T V`; 0 for dense factors.
    """

    groups: int
    d_out: int
    channels: int
    taps: int = 1
    transposed: bool = False
    blocks: int = 1
    paired: bool = False
    mixes_taps: bool = True
    rank: int = 0

    @property
    def d(self) -> int:
        """Features of a row, per group."""
        return self.channels * self.taps

    @property
    def stacks(self) -> int:
        """Number of blocks of channels, over all groups."""
        return self.groups * self.blocks

    @property
    def factor_shapes(self) -> list[tuple[int, int, int]]:
        """Shapes of the factors of R, or of V."""
        if self.rank:
            return [(self.stacks, self.rank, self.d)]
        first, *others = self.modes if self.mixes_taps else self.modes[:1]
        return [(self.stacks, first, first), *((self.groups, side, side) for side in others)]

    @property
    def modes(self) -> tuple[int, ...]:
        """Sides of the factors of R."""
        width = self.channels // self.blocks
        return (width, self.taps) if self.paired else (width * self.taps,)

    @property
    def numbers(self) -> list[int]:
        """The fields in order, for an operator, which takes numbers only."""
        return [int(getattr(self, field.name)) for field in fields(self)]

    def slots(self, max_samples: int) -> int:
        """Return how many samples of the input give every factor of R `max_samples` rows, or just more.

        A patch is one row for a dense matrix; for a pair it is a row a tap, and a row a channel.
        """
        rows = 1
        if self.paired:
            rows = min(self.taps, self.channels) if self.mixes_taps else self.taps
        return ceil(max_samples / rows)

    @classmethod
    def of_numbers(cls, numbers: Sequence[int]) -> "Layout":
        """Return the layout with these `numbers`."""
        groups, d_out, channels, taps, transposed, blocks, paired, mixes_taps, rank = numbers
        return cls(groups, d_out, channels, taps, bool(transposed), blocks, bool(paired), bool(mixes_taps), rank)

    @property
    def on_channels(self) -> bool:
        """Whether the first factor works on channels alone, and so could be applied to the layer's input as well."""
        return self.paired or self.taps == 1

    @property
    def structure(self) -> str:
        """Name of the structure of R, for people."""
        if self.rank:
            return f"rank {self.rank}"
        if self.paired:
            name = "kronecker" if self.mixes_taps else "channels"
        else:
            name = "full" if self.blocks == 1 else "block"
        return f"{name} x{self.blocks}" if self.blocks > 1 else name


def stack_weight(W: Tensor, layout: Layout) -> Tensor:
    """Return `W [O, C/groups, *kernel]` (transposed: `[C, O/groups, *kernel]`) as `[stacks, d_out, *modes]`."""
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
    return ordered.reshape(shape).contiguous()  # as the weight is, so that the same kernel runs on it


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


def mix(stacked: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """Multiply every row `w` of `stacked [stacks, n, *modes]` by R from the right: `w^T R`, one factor a mode.

    With the factors transposed this is `R x` for input rows.
    """
    for mode, factor in enumerate(factors):
        stacked = refold_mode(times(unfold_mode(stacked, mode, len(factor)), factor), stacked, mode)
    return stacked


def identity_factors(layout: Layout, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Return new factors, or V, such that R is the identity."""
    if layout.rank:
        return [torch.zeros(shape, device=device, dtype=dtype) for shape in layout.factor_shapes]
    eyes = [(stacks, torch.eye(side, device=device, dtype=dtype)) for stacks, side, _ in layout.factor_shapes]
    return [eye.repeat(stacks, 1, 1) for stacks, eye in eyes]


def decorrelate_rows(x: Tensor, factors: Sequence[Tensor], layout: Layout) -> Tensor:
    """Return `R x` for rows `x [stacks, n, *modes]`."""
    return shrink(x, factors[0]) if layout.rank else mix(x, [factor.mT for factor in factors])


def fold_weight(W: Tensor, factors: Sequence[Tensor], layout: Layout) -> Tensor:
    """Return `W R` in the shape of W: the weight that acts on plain inputs as W acts on decorrelated ones."""
    stacked = stack_weight(W, layout)
    first = shrink(stacked, factors[0]) if layout.rank else mix(stacked, factors[:1])
    return fold_taps(unstack_weight(first, W.shape, layout), factors)


def fold_taps(W: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """Return W, in its own shape, times the factor over taps where there is one; `mix_channels` applies the other."""
    if len(factors) == 1:
        return W
    groups, taps, _ = factors[1].shape
    return times(W.reshape(groups, -1, taps), factors[1]).reshape(W.shape)


def mix_channels(x: Tensor, factor: Tensor, spatial: int, layout: Layout) -> Tensor:
    """Return `R x` for the channels of a whole input, in its type.

    Args:
        x: `[..., C]` of a linear (`spatial` 0), or `[N, C, *size]`, or `[C, *size]`, of a convolution.
        factor: the first one, over channels, or V; each block works on its own channels.
        spatial: number of spatial dimensions.
        layout: that of the layer's weight.
    """
    if layout.rank:
        return shrink_channels(x, factor, spatial)
    return pointwise(x, factor.to(x.dtype), spatial)


def output_of_mean(W_eff: Tensor, mean: Tensor, layout: Layout) -> Tensor:
    """Return `W R mu` `[d_out * groups]`, a layer's response to the mean row `mean [stacks, *modes]`."""
    per_block = (stack_weight(W_eff, layout) * mean[:, None]).flatten(2).sum(2)
    return per_block.reshape(layout.groups, layout.blocks, layout.d_out).sum(1).flatten()
