"""Several ranks: they exchange the rows that they have recorded, and then each takes the same step of R.

R itself is never sent. It starts as the identity, or from one checkpoint, on all ranks; from the same rows they compute
the same R, bit by bit. Each rank gives its share of the rows that R steps on, so that what is sent for a step of R is
`max_samples` rows, however many ranks there are. Sites are in the order in which they were made, which is the same on
all ranks of a program.
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
    """An all-gather that is on its way: rows of all ranks for the sites, which are of one type and device."""

    sites: Sequence[Site]
    received: Tensor
    work: Any

    @classmethod
    @torch.no_grad()
    def start(cls, sites: Sequence[Site]) -> "Exchange":
        """Send this rank's share of what the sites have recorded, and go on."""
        sent = torch.cat([_payload(site) for site in sites])
        received = sent.new_empty(ranks(), len(sent))
        return cls(sites, received, dist.all_gather(list(received), sent, async_op=True))

    def wait(self) -> Iterator[tuple[Site, Recorded]]:
        """Yield what all ranks recorded for each site, the same on all of them."""
        self.work.wait()
        sizes = [_share(site) * site.rows.shape[1] + 1 for site in self.sites]
        by_site = torch.split(self.received, sizes, 1)
        for site, received in zip(self.sites, by_site, strict=True):
            share, width = _share(site), site.rows.shape[1]
            used = torch.arange(share, device=received.device) < received[:, -1:]
            yield site, Recorded(received[:, :-1].reshape(-1, width), used.flatten())


def start_exchange(sites: Sequence[Site]) -> list[Exchange]:
    """Start to exchange the rows of the sites: one all-gather for each type and device that there is."""
    groups: dict[Any, list[Site]] = {}
    for site in sites:
        groups.setdefault((site.rows.dtype, site.rows.device), []).append(site)
    return [Exchange.start(group) for group in groups.values()]


def exchanged_bytes(sites: Sequence[Site]) -> int:
    """Count what a rank sends and receives when the R of all the sites move."""
    return sum(ranks() * _payload(site).nbytes for site in sites)


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


def _share(site: Site) -> int:
    """Return how many rows each rank gives."""
    return ceil(len(site.rows) / ranks())


def _payload(site: Site) -> Tensor:
    share = _share(site)
    return torch.cat([site.rows[:share].flatten(), site.seen.clamp(max=share).to(site.rows.dtype)[None]])


def _fingerprint(site: Site) -> tuple[float, ...]:
    """Return numbers that tell two R apart, and when they move."""
    return sum(float(factor.abs().sum()) for factor in site.factors), site.attempts, int(site.steps)
