"""The ranks that train together, and which of the rows that R steps on each of them gives."""

from functools import cache
from math import ceil
from typing import Any

import torch.distributed as dist

from decorr_fx.errors import DistributedError


class Ranks:
    """A process group, or the default one if None. Copies of a model have the same one; a pickle has the default."""

    def __init__(self, group: Any = None) -> None:
        """Note the group.

        Raises:
            DistributedError: this process is not in it.
        """
        self.group = group
        if self.count < 1:
            raise DistributedError("this rank is not in the process group of transform(..., process_group=...); give "
                                   "each rank the group in which it trains the model")  # fmt: skip

    def __deepcopy__(self, memo: dict[int, Any]) -> "Ranks":
        return self

    def __reduce__(self) -> tuple[type["Ranks"], tuple[()]]:
        return Ranks, ()

    @property
    def count(self) -> int:
        """How many there are; 1 where there is no process group."""
        return dist.get_world_size(self.group) if is_distributed() else 1

    @property
    def own(self) -> int:
        """Number of this one in the group."""
        return dist.get_rank(self.group) if self.count > 1 else 0


def is_distributed() -> bool:
    """Tell whether there is a process group."""
    return dist.is_available() and dist.is_initialized()


def given_by(rank: int, slots: int, ranks: int) -> range:
    """Return which of the rows of a step a rank gives: the last ranks may give fewer than others, or none."""
    each = given_by_each(slots, ranks)
    return range(min(rank * each, slots), min((rank + 1) * each, slots))


@cache
def given_by_each(slots: int, ranks: int) -> int:
    """Return how many rows of a step one of so many ranks gives at most."""
    return ceil(slots / ranks)
