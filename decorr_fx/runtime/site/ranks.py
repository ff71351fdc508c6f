"""The ranks that train together, and which of the rows that R steps on each of them gives."""

from math import ceil
from typing import Any

import torch.distributed as dist


class Ranks:
    """A process group, or the default one if None. Copies of a model have the same one; a pickle has the default."""

    def __init__(self, group: Any = None) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> "Ranks":
        return self

    def __reduce__(self) -> tuple[type["Ranks"], tuple[()]]:
        return Ranks, ()

    @property
    def count(self) -> int:
        """How many there are; 1 where there is no process group."""
        return dist.get_world_size(self.group) if dist.is_available() and dist.is_initialized() else 1

    @property
    def own(self) -> int:
        """Number of this one in the group."""
        return dist.get_rank(self.group) if self.count > 1 else 0


def given_by(rank: int, slots: int, ranks: int) -> range:
    """Return which of the rows of a step a rank gives: the last ranks may give fewer than others, or none."""
    each = given_by_each(slots, ranks)
    return range(min(rank * each, slots), min((rank + 1) * each, slots))


def given_by_each(slots: int, ranks: int) -> int:
    """Return how many rows of a step one of so many ranks gives at most."""
    return ceil(slots / ranks)
