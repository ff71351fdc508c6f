"""Several ranks: they exchange the rows that they have recorded, and R is the same on all of them, bit by bit.

Each rank gives its share of the rows that R steps on: what is sent for a step of R is `max_samples` rows, however many
ranks there are. R itself is never sent. It starts as the identity, or from one checkpoint, on all ranks; and from the
same rows, or from what one rank found in them, all compute the same R. Which of the two it is, `runtime.divide` tells.

Sites are in the order in which they were made, which is the same on all ranks of a program.
"""

import atexit
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from time import sleep
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from decorr_fx.errors import DistributedError
from decorr_fx.runtime.site.ranks import given_by, ranks
from decorr_fx.runtime.site.state import Recorded, Site
from decorr_fx.runtime.step.divide import makers, numbers_of_rows
from decorr_fx.runtime.step.finding import Finding, numbers_of_finding
from decorr_fx.runtime.step.move import grouped


@dataclass(frozen=True)
class ToAll:
    """Rows on their way to all ranks: each puts its share into its own part of a tensor of zeros, and all are summed.

    The sum of a number and zeros is the number, exactly.
    """

    sites: Sequence[Site]
    rows: Tensor
    work: Any

    @classmethod
    def start(cls, sites: Sequence[Site]) -> "ToAll":
        """Send this rank's share, and go on."""
        rows = torch.cat([_in_its_place(site) for site in sites])
        return cls(sites, rows, dist.all_reduce(rows, async_op=True))

    def wait(self) -> Iterator[tuple[Site, Recorded]]:
        """Yield what all ranks recorded for each site, the same on all of them."""
        self.work.wait()
        sizes = [numbers_of_rows(site) for site in self.sites]
        for site, rows in zip(self.sites, torch.split(self.rows, sizes), strict=True):
            yield site, _read(rows.reshape(site.spec.slots, -1))


@dataclass(frozen=True)
class ToMakers:
    """Rows on their way to the ranks that look at them for all.

    Attributes:
        mine: the sites that this rank looks at.
        rows: all numbers that it receives, by the ranks that they come from, and then by sites.
        work: what is waited for.
    """

    mine: Sequence[Site]
    rows: Tensor
    work: Any

    @classmethod
    def start(cls, sites: Sequence[Site], maker: Mapping[Site, int]) -> "ToMakers":
        """Send this rank's share of each site to the one that makes it, and go on."""
        own, everyone = dist.get_rank(), range(ranks())
        by_maker = [[site for site in sites if maker[site] == rank] for rank in everyone]
        shares = [torch.cat([_share(site).flatten() for site in group]) if group else None for group in by_maker]
        sent = [0 if share is None else len(share) for share in shares]
        received = [sum(_length(site, rank) for site in by_maker[own]) for rank in everyone]
        rows = sites[0].rows.new_empty(sum(received))
        given = torch.cat([share for share in shares if share is not None])
        work = dist.all_to_all_single(rows, given, received, sent, async_op=True)
        return cls(by_maker[own], rows, work)

    def wait(self) -> Iterator[tuple[Site, Recorded]]:
        """Yield what all ranks recorded for each site that this one makes."""
        self.work.wait()
        lengths = [_length(site, rank) for rank in range(ranks()) for site in self.mine]
        parts = torch.split(self.rows, lengths)
        for index, site in enumerate(self.mine):
            yield site, _read(torch.cat(parts[index :: len(self.mine)]).reshape(site.spec.slots, -1))


@dataclass(frozen=True)
class Exchange:
    """Rows of all ranks that are on their way, and which rank makes those sites that one makes for all."""

    makers: dict[Site, int]
    messages: Sequence[ToAll | ToMakers]

    @classmethod
    @torch.no_grad()
    def start(cls, sites: Sequence[Site]) -> "Exchange":
        """Send this rank's share of what the sites have recorded, and go on.

        It is one message, or two where all look at the rows of some sites, for each type and device that there is.
        """
        _outlast_threads()
        maker = makers(sites, ranks())
        messages: list[ToAll | ToMakers] = []
        for group in grouped(sites, lambda site: (site in maker, *_kind(site))):
            messages.append(ToMakers.start(group, maker) if group[0] in maker else ToAll.start(group))
        return cls(maker, messages)

    def wait(self) -> dict[Site, Recorded]:
        """Return what all ranks recorded, for each site that this one looks at."""
        return dict(chain.from_iterable(message.wait() for message in self.messages))


@torch.no_grad()
def share(found: Sequence[Finding], maker: Mapping[Site, int]) -> list[Finding]:
    """Return what all ranks have found: each of them gives it for the sites that it makes, and to all the same bits.

    It is one message a rank, for each type and device that there is.
    """
    own, packed = dist.get_rank(), {one.site: one.pack() for one in found}
    messages = []
    for sites in grouped(maker, lambda site: (maker[site], *_kind(site))):
        rank, sizes = maker[sites[0]], [numbers_of_finding(site) for site in sites]
        mine = [packed[site] for site in sites if rank == own]
        numbers = torch.cat(mine) if mine else sites[0].rows.new_empty(sum(sizes))
        work: Any = dist.broadcast(numbers, rank, async_op=True)
        messages.append((sites, torch.split(numbers, sizes), work))
    shared = {}
    for sites, parts, work in messages:
        work.wait()
        shared.update({site: Finding.unpack(site, part) for site, part in zip(sites, parts, strict=True)})
    return list(shared.values())


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


@cache
def _outlast_threads() -> None:
    """Let the process end a little later than it would; calling it again does nothing.

    A thread of gloo lets go of a message some time after it has arrived, for which it needs the interpreter. Where
    that is gone, it aborts the process: a training that ends right after a step of R would seem to have failed.
    """
    atexit.register(sleep, 0.1)


def _kind(site: Site) -> tuple[torch.dtype, torch.device]:
    return site.rows.dtype, site.rows.device


def _length(site: Site, rank: int) -> int:
    """Return how many numbers a rank gives."""
    return len(given_by(rank, site.spec.slots)) * (site.rows.shape[1] + 1)


def _share(site: Site) -> Tensor:
    """Return the rows that this rank gives, each with a 1 behind it where it is in use; others are zeros."""
    own, count = site.recorded(), len(given_by(dist.get_rank(), site.spec.slots))
    used = own.used[:count, None]
    return torch.cat([own.rows[:count].where(used, 0), used.to(own.rows.dtype)], 1)


def _in_its_place(site: Site) -> Tensor:
    """Return room for the rows of all ranks, with those that this one gives, and zeros."""
    room = site.rows.new_zeros(site.spec.slots, site.rows.shape[1] + 1)
    part = given_by(dist.get_rank(), site.spec.slots)
    room[part.start : part.stop] = _share(site)
    return room.flatten()


def _read(with_flag: Tensor) -> Recorded:
    return Recorded(with_flag[:, :-1], with_flag[:, -1] > 0)


def _fingerprint(site: Site) -> tuple[float, ...]:
    """Return numbers that tell two R apart, with all that is saved with them, and when they move."""
    return sum(float(saved.abs().sum()) for saved in site.state_dict().values()), site.attempts, int(site.steps)
