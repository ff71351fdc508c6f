"""Several ranks: they exchange the rows that they have recorded, and then each takes the same step of R.

R itself is never sent. It starts as the identity, or from one checkpoint, on all ranks; from the same rows they compute
the same R, bit by bit. Each rank gives its share of the rows that R steps on: what is sent for a step of R is
`max_samples` rows, however many ranks there are. Every rank puts its share into its own part of a tensor of zeros, and
the sum over ranks is all of them, exactly. Sites are in the order in which they were made, which is the same on all
ranks of a program.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from decorr_fx.errors import DistributedError
from decorr_fx.runtime.state import Recorded, Site


def ranks() -> int:
    """Return how many ranks train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@dataclass(frozen=True)
class Exchange:
    """Rows of all ranks that are on their way, for sites of one type and device."""

    sites: Sequence[Site]
    rows: Tensor
    work: Any

    @classmethod
    @torch.no_grad()
    def start(cls, sites: Sequence[Site]) -> "Exchange":
        """Send this rank's share of what the sites have recorded, and go on."""
        rows = torch.cat([_share(site) for site in sites])
        return cls(sites, rows, dist.all_reduce(rows, async_op=True))

    def wait(self) -> Iterator[tuple[Site, Recorded]]:
        """Yield what all ranks recorded for each site, the same on all of them."""
        self.work.wait()
        sizes = [_size(site) for site in self.sites]
        for site, received in zip(self.sites, torch.split(self.rows, sizes), strict=True):
            with_flag = received.reshape(len(site.rows), -1)
            yield site, Recorded(with_flag[:, :-1], with_flag[:, -1] > 0)


def start_exchange(sites: Sequence[Site]) -> list[Exchange]:
    """Start to exchange the rows of the sites: one message for each type and device that there is."""
    groups: dict[Any, list[Site]] = {}
    for site in sites:
        groups.setdefault((site.rows.dtype, site.rows.device), []).append(site)
    return [Exchange.start(group) for group in groups.values()]


def exchanged_bytes(sites: Sequence[Site]) -> int:
    """Count the bytes that are summed over ranks, as gradients are, when the R of all the sites move."""
    return sum(_size(site) * site.rows.element_size() for site in sites)


def check_same(sites: Sequence[Site]) -> None:
    """Check that R is the same on all ranks, for sites that have not been checked before.

    Raises:
        DistributedError: one is not; nothing has moved then. On all ranks, so that none waits for another.
    """
    unchecked = [site for site in sites if not site.same_on_all_ranks]
    if not unchecked or ranks() == 1:
        return
    own = torch.tensor([_fingerprint(site) for site in unchecked], dtype=torch.float64, device=unchecked[0].rows.device)
    found = [torch.empty_like(own) for _ in range(ranks())]
    dist.all_gather(found, own)
    same = (torch.stack(found) == found[0]).all(2).all(0).tolist()
    for site, is_same in zip(unchecked, same, strict=True):
        if not is_same:
            raise DistributedError(
                f"layer {site.spec.fqn!r}: its R is not the same on all {ranks()} ranks; "
                "load the same checkpoint on every rank before the first step"
            )
        site.same_on_all_ranks = True


def _size(site: Site) -> int:
    return len(site.rows) * (site.rows.shape[1] + 1)


def _share(site: Site) -> Tensor:
    """Return room for the rows of all ranks, each with a 1 behind it where it is in use: own rows, and zeros."""
    slots, rank = len(site.rows), dist.get_rank()
    each = ceil(slots / ranks())
    first, last = min(rank * each, slots), min((rank + 1) * each, slots)
    shared = site.rows.new_zeros(slots, site.rows.shape[1] + 1)
    own = site.recorded()
    used = own.used[: last - first, None]
    shared[first:last, :-1] = own.rows[: last - first].where(used, 0)
    shared[first:last, -1:] = used
    return shared.flatten()


def _fingerprint(site: Site) -> tuple[float, ...]:
    """Return numbers that tell two R apart, with all that is saved with them, and when they move."""
    return sum(float(saved.abs().sum()) for saved in site.state_dict().values()), site.attempts, int(site.steps)
