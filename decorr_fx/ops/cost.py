"""What R costs: FLOP of a training step, counted from shapes alone; how many directions and which shape it gets."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from math import log2

from decorr_fx.config import Power, Rule, SmallSteps
from decorr_fx.ops.layout import Layout

ASSUMED_ROWS = 4096  # that a layer maps in a step of which nothing but the weight is known
EIGENVALUES = 9  # FLOP of an eigendecomposition, over the side cubed
LARGEST_FULL = 256  # features up to which R is one dense matrix, where no structure is asked for
NARROWEST = 8  # block of channels that is worth a matrix R
AROUND = 8  # FLOP a direction of U and number of a weight around a step: two products of the gradient, two of the move
FEWEST = 4  # directions that R uses: products with fewer take as long, since reading the weight is what takes time


def own_flops(layouts: Sequence[Layout], rows: int) -> int:
    """Count the FLOP of forward and backward of the layers that share an input of so many rows."""
    return 6 * rows * sum(layout.size for layout in layouts)


@lru_cache(maxsize=1024)
def used_rank(rank: int, rows: int, cost_budget: float) -> int:
    """Return how many of `rank` directions R of low rank uses in steps of so many rows.

    It is the power of two that is nearest to what the budget allows: products that are 15 or 24 wide take longer than
    those that are 16 or 32 wide.
    """
    return min(rank, max(FEWEST, int(2 ** round(log2(cost_budget * 6 * rows / AROUND)))))


def around_flops(layouts: Sequence[Layout], used: int) -> int:
    """Count the FLOP of the products around a step of the optimizer: with the gradient, and with the move."""
    first = layouts[0]
    each = AROUND * used if first.rank else 4 * sum(first.modes)
    return each * sum(layout.size for layout in layouts)


def move_flops(layout: Layout, samples: int) -> int:
    """Count the FLOP of one step of R, on so many rows."""
    if layout.rank:
        return moment_flops(layout, samples)
    total = 0
    for stacks, m, _ in layout.factor_shapes:
        n = samples * layout.groups * layout.d // (stacks * m)
        total += stacks * (2 * n * m * m + 2 * n * m * min(n, m))  # z, and its moment
        total += stacks * (4 * m**3 if n >= m else 2 * n**3 + 4 * n * m * m)  # the bound, and T R
    return total


def moment_flops(layout: Layout, samples: int) -> int:
    """Count the FLOP of new running moments from so many rows, for R of low rank."""
    d, rank = layout.d, layout.rank
    rows = samples + rank
    total = 4 * samples * rank * d + 2 * samples * d * min(samples, d)  # z, and its moment
    total += 2 * rows * d * min(rows, d) + EIGENVALUES * min(rows, d) ** 3  # of the sketch and x together
    if rows < d:
        total += 2 * rank * rows * d  # the new sketch
    return layout.stacks * total


def choose_layouts(plain: Sequence[Layout], rule: Rule) -> list[Layout]:
    """Return the layouts, with the structure of R, of weights that share their input, read as `plain`."""
    chosen = _chosen(plain[0], rule)
    return [replace(one, blocks=chosen.blocks, paired=chosen.paired, rank=chosen.rank) for one in plain]


def _chosen(plain: Layout, rule: Rule) -> Layout:
    if isinstance(rule, Power):
        return replace(plain, rank=min(rule.rank, plain.d))
    assert isinstance(rule, SmallSteps)
    structure = rule.structure
    if structure is None:
        structure = "full" if plain.d <= LARGEST_FULL else "kronecker" if plain.taps > 1 else "block"
    if structure == "block":
        return replace(plain, blocks=_blocks(plain.channels, LARGEST_FULL // plain.taps))
    # a pair over a single channel is one dense matrix over the taps
    return replace(plain, paired=structure == "kronecker" and plain.taps > 1 and plain.channels > 1)


def _blocks(channels: int, most: int) -> int:
    """Return the smallest number of equal blocks of at most `most` channels, but no slivers; else 1."""
    most = max(most, 1)
    least = min(NARROWEST, most, channels)
    widths = (width for width in range(min(most, channels), least - 1, -1) if channels % width == 0)
    return channels // next(widths, channels)
