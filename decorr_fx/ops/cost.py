"""What R costs: FLOP of a training step, counted from shapes alone, and the structure of R chosen by them.

The choice is made once, at a *reference batch* of 128 examples, whatever batches come later: the shapes of R, which are
in checkpoints, depend on the model alone, and on the size of one example where one is given.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from decorr_fx.config import DecorrConfig
from decorr_fx.ops.layout import Layout

REFERENCE_BATCH = 128
REFERENCE_ROWS = 4096  # that a layer maps in a step of which nothing but the weight is known
EIGENVALUES = 9  # FLOP of an eigendecomposition, over the side cubed
MEMORY_BOUND = 64  # columns below which a product with a weight waits for memory
NARROWEST = 8  # block of channels that is worth a matrix R


@dataclass(frozen=True)
class Work:
    """What a layer does in a step at the reference batch: `rows` that it maps, from an input of `inputs` numbers."""

    rows: int
    inputs: int

    @classmethod
    def unknown(cls, layout: Layout) -> "Work":
        """Return what is assumed of a layer of which only the weight is known."""
        return cls(REFERENCE_ROWS, REFERENCE_ROWS * layout.groups * layout.channels)


def own_flops(layouts: Sequence[Layout], work: Work) -> int:
    """Count the FLOP of forward and backward of the layers that share an input."""
    return 6 * work.rows * sum(_size(layout) for layout in layouts)


def apply_flops(layouts: Sequence[Layout], work: Work) -> int:
    """Count the FLOP of applying R in forward and backward, to the smaller of weight and input where both can be."""
    total = 0
    for layout in layouts:
        smaller = min(_size(layout), work.inputs) if layout.on_channels else _size(layout)
        if layout.rank:
            total += 8 * smaller * layout.rank
            continue
        first, *others = (m for _, m, _ in layout.factor_shapes)
        total += 4 * smaller * first + 4 * _size(layout) * sum(others)
    return total


def move_flops(layouts: Sequence[Layout], work: Work, config: DecorrConfig) -> int:
    """Count the FLOP of one step of R, and of the weights that follow it."""
    layout = layouts[0]
    samples, size = min(layout.slots(config.max_samples), work.rows), layout.groups * layout.d
    if layout.rank:
        replaced = layout.stacks * (8 * layout.rank**2 * layout.d + layout.rank**3)  # what weights follow by
        return learn_flops(layout, samples) + replaced + sum(8 * _size(other) * layout.rank for other in layouts)
    total = 0
    for stacks, m, _ in layout.factor_shapes:
        n = samples * size // (stacks * m)
        smaller = min(n, m)
        total += stacks * (2 * n * m * m + 2 * n * m * smaller)  # z, and its moment
        if n >= m:
            total += stacks * (2 * m**3 + 2 * m**3 + m**3)  # the bound, T R, and T^-1
        else:
            total += stacks * (2 * n**3 + 4 * n * m * m + n**3 + 4 * n * n * m)
        total += sum(2 * _size(other) * (2 * n if n < m else m) for other in layouts)
    return total


def learn_flops(layout: Layout, samples: int) -> int:
    """Count the FLOP of new running moments from so many rows, in a step of the rule `power`."""
    d, rank = layout.d, layout.rank
    rows = samples + rank
    total = 4 * samples * rank * d + 2 * samples * d * min(samples, d)  # z, and its moment
    total += 2 * rows * d * min(rows, d) + EIGENVALUES * min(rows, d) ** 3  # of the sketch and x together
    if rows < d:
        total += 2 * rank * rows * d  # the new sketch
    return layout.stacks * total


def extra_flops(layouts: Sequence[Layout], work: Work, config: DecorrConfig) -> int:
    """Count the extra FLOP of a training step, on average, for the weights that share one R."""
    moves = move_flops(layouts, work, config) // config.update_every
    return apply_flops(layouts, work) + moves


def waiting_flops(layouts: Sequence[Layout]) -> int:
    """Count the FLOP that could be done while a factor over taps waits for memory, beyond its own.

    It has too few columns to keep a processor busy: reading and writing the weight takes longer than the product.
    """
    each = sum(MEMORY_BOUND - m for layout in layouts[:1] for _, m, _ in layout.factor_shapes[1:] if m < MEMORY_BOUND)
    return sum(4 * _size(layout) * each for layout in layouts)


def share_of_budget(own: Sequence[int], i: int, cost_budget: float) -> float:
    """Return the extra FLOP that site number `i` may take, of sites with these `own` FLOP.

    Half of the budget is dealt out by the sites' own FLOP, half evenly: what is cheap for the model as a whole, as a
    good R for a small head, is not refused for being dear for the head.
    """
    return cost_budget * (own[i] + sum(own) / len(own)) / 2


def choose_layouts(plain: Sequence[Layout], config: DecorrConfig, work: Work, affordable: float) -> list[Layout]:
    """Return the layouts that `config.structure` asks for, for weights that share their input, read as `plain`.

    `auto` is the richest structure whose extra FLOP are `affordable`: full up to `max_dim` features; the Kronecker pair
    for a convolution, or its factor over channels alone; and blocks of channels, as large as they can be. Where none
    is, it is the one with the smallest blocks.
    """
    chosen = list(plain)
    for candidate in candidates(plain[0], config):
        chosen = [_as(candidate, layout) for layout in plain]
        if config.structure != "auto" or extra_flops(chosen, work, config) + waiting_flops(chosen) <= affordable:
            break
    return chosen


def candidates(plain: Layout, config: DecorrConfig) -> Iterator[Layout]:
    """Yield the layouts that a structure may come to, the richest first."""
    has_taps = plain.taps > 1
    if config.rule == "power":
        yield replace(plain, rank=min(config.rank, plain.d))
    elif config.structure == "full":
        yield plain
    elif config.structure == "kronecker":
        yield _cut(plain, 1, paired=has_taps)
    elif config.structure == "channels":
        yield _cut(plain, 1, paired=has_taps, mixes_taps=False)
    elif config.structure == "block":
        yield _cut(plain, next(_blocks(plain.channels, config.max_dim // plain.taps)), paired=False)
    else:
        if plain.d <= config.max_dim:
            yield plain
        for blocks in _blocks(plain.channels, config.max_dim):
            yield _cut(plain, blocks, paired=has_taps)
            if has_taps:
                yield _cut(plain, blocks, paired=True, mixes_taps=False)


def _cut(plain: Layout, blocks: int, paired: bool, mixes_taps: bool = True) -> Layout:
    # A pair over a single channel is one dense matrix over the taps: say so, instead of carrying a 1 x 1 factor.
    paired = paired and plain.channels > blocks
    return replace(plain, blocks=blocks, paired=paired, mixes_taps=mixes_taps or not paired)


def _as(chosen: Layout, plain: Layout) -> Layout:
    """Return `plain` with the structure of `chosen`."""
    return replace(plain, blocks=chosen.blocks, paired=chosen.paired, mixes_taps=chosen.mixes_taps, rank=chosen.rank)


def _blocks(channels: int, most: int) -> Iterator[int]:
    """Yield the numbers of equal blocks of at most `most` channels, but no slivers, fewest first; else 1."""
    most = max(most, 1)
    least = min(NARROWEST, most, channels)
    widths = [width for width in range(min(most, channels), least - 1, -1) if channels % width == 0]
    yield from [channels // width for width in widths] or [1]


def _size(layout: Layout) -> int:
    """Return how many numbers the weight has."""
    return layout.groups * layout.d_out * layout.d
