"""How many ranks train together, and which of the rows that R steps on each of them gives."""

from math import ceil

import torch.distributed as dist


def ranks() -> int:
    """Return how many ranks train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def given_by(rank: int, slots: int) -> range:
    """Return which of the rows of a step a rank gives: the last ranks may give fewer than others, or none."""
    each = given_by_each(slots, ranks())
    return range(min(rank * each, slots), min((rank + 1) * each, slots))


def given_by_each(slots: int, ranks: int) -> int:
    """Return how many rows of a step one of so many ranks gives at most."""
    return ceil(slots / ranks)
