"""Several ranks: they exchange the rows that they have recorded, and R is the same on all of them, bit by bit.

Each rank gives its share of the rows that R steps on: what is sent for a step of R is `max_samples` rows, however many
ranks there are. R itself is never sent. It starts as the identity, or from one checkpoint, on all ranks; and from the
same rows, or from what their owner has read in them, all compute the same R. Which of the two, `step.divide` says.

Sites are in the order of the optimizer's parameters, which is the same on all ranks of a program.
"""

import atexit
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain
from time import sleep
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor

from decorr_fx.errors import DistributedError
from decorr_fx.runtime.site.ranks import given_by, is_distributed
from decorr_fx.runtime.site.state import Recorded, Site
from decorr_fx.runtime.step.batch import grouped
from decorr_fx.runtime.step.divide import numbers_of_rows, owner_ranks
from decorr_fx.runtime.step.update import MomentUpdate, numbers_of_update


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
        return cls(sites, rows, dist.all_reduce(rows, group=sites[0].ranks.group, async_op=True))

    def wait(self) -> Iterator[tuple[Site, Recorded]]:
        """Yield what all ranks recorded for each site, the same on all of them."""
        self.work.wait()
        sizes = [numbers_of_rows(site) for site in self.sites]
        for site, rows in zip(self.sites, torch.split(self.rows, sizes), strict=True):
            yield site, _read(rows.reshape(site.spec.slots, -1))


@dataclass(frozen=True)
class ToOwners:
    """Rows on their way to the ranks that read them for all.

    Attributes:
        mine: the sites that this rank owns.
        rows: all numbers that it receives, by the ranks that they come from, and then by sites.
        work: what is waited for.
    """

    mine: Sequence[Site]
    rows: Tensor
    work: Any

    @classmethod
    def start(cls, sites: Sequence[Site], owner: Mapping[Site, int]) -> "ToOwners":
        """Send this rank's share of each site to its owner, and go on."""
        ranks = sites[0].ranks
        by_owner = [[site for site in sites if owner[site] == rank] for rank in range(ranks.count)]
        shares = [torch.cat([_share(site).flatten() for site in group]) if group else None for group in by_owner]
        sent = [0 if share is None else len(share) for share in shares]
        mine = by_owner[ranks.own]
        received = [sum(_length(site, rank) for site in mine) for rank in range(ranks.count)]
        rows = sites[0].rows.new_empty(sum(received))
        given = torch.cat([share for share in shares if share is not None])
        work = dist.all_to_all_single(rows, given, received, sent, group=ranks.group, async_op=True)
        return cls(mine, rows, work)

    def wait(self) -> Iterator[tuple[Site, Recorded]]:
        """Yield what all ranks recorded for each site that this one owns."""
        self.work.wait()
        count = self.mine[0].ranks.count if self.mine else 0
        lengths = [_length(site, rank) for rank in range(count) for site in self.mine]
        parts = torch.split(self.rows, lengths)
        for index, site in enumerate(self.mine):
            yield site, _read(torch.cat(parts[index :: len(self.mine)]).reshape(site.spec.slots, -1))


@dataclass(frozen=True)
class Exchange:
    """Rows of all ranks that are on their way, and which rank owns those sites whose rows one reads for all."""

    owner: dict[Site, int]
    messages: Sequence[ToAll | ToOwners]

    @classmethod
    @torch.no_grad()
    def start(cls, sites: Sequence[Site]) -> "Exchange":
        """Send this rank's share of what the sites have recorded, and go on.

        It is one message, or two where all read the rows of some sites, for each type, device and process group.
        """
        _outlast_threads()
        owner: dict[Site, int] = {}
        messages: list[ToAll | ToOwners] = []
        for of_group in grouped(sites, lambda site: site.ranks):
            divided = owner_ranks(of_group, of_group[0].ranks.count)
            owner |= divided
            for group in grouped(of_group, partial(_message, divided)):
                messages.append(ToOwners.start(group, owner) if group[0] in owner else ToAll.start(group))
        return cls(owner, messages)

    def wait(self) -> dict[Site, Recorded]:
        """Return what all ranks recorded, for each site whose rows this one reads."""
        return dict(chain.from_iterable(message.wait() for message in self.messages))


@torch.no_grad()
def share(updates: Sequence[MomentUpdate], owner: Mapping[Site, int]) -> list[MomentUpdate]:
    """Return the updates of all ranks: each of them gives those of the sites that it owns, and to all the same bits.

    It is one message a rank, for each type and device that there is.
    """
    packed = {one.site: one.pack() for one in updates}
    messages = []
    for sites in grouped(owner, lambda site: (site.ranks, owner[site], *_kind(site))):
        ranks, rank, sizes = sites[0].ranks, owner[sites[0]], [numbers_of_update(site) for site in sites]
        mine = [packed[site] for site in sites if rank == ranks.own]
        numbers = torch.cat(mine) if mine else sites[0].rows.new_empty(sum(sizes))
        work: Any = dist.broadcast(numbers, group=ranks.group, group_src=rank, async_op=True)
        messages.append((sites, torch.split(numbers, sizes), work))
    shared = []
    for sites, parts, work in messages:
        work.wait()
        shared += [MomentUpdate.unpack(site, part) for site, part in zip(sites, parts, strict=True)]
    return shared


def check_same(sites: Sequence[Site]) -> None:
    """Check that R and its settings are the same on all ranks, of sites that have not been checked before.

    Raises:
        DistributedError: they are not, or the ranks step other layers; nothing has moved then. On all ranks, so that
            none waits for another.
    """
    for unchecked in _on_ranks(site for site in sites if not site.same_on_all_ranks):
        _check_layers(unchecked)
        _check_state(unchecked)


def agree_on_used_ranks(sites: Sequence[Site]) -> None:
    """Let R use as many directions on all ranks: by the rank that has the fewest rows of a layer, once that has some.

    The sites have been checked to be the same, and move at this step.
    """
    for of_group in _on_ranks(site for site in sites if not site.used_is_agreed):
        rows = _gathered([[site.rows_of_step()] for site in of_group], of_group[0]).amin((0, 2)).tolist()
        for site, fewest in zip(of_group, rows, strict=True):
            site.fit_budget(int(fewest))
            site.used_is_agreed = fewest > 0


def _on_ranks(sites: Iterable[Site]) -> Iterator[list[Site]]:
    """Yield the sites of each group of several ranks."""
    if is_distributed():
        yield from (group for group in grouped(sites, lambda site: site.ranks) if group[0].ranks.count > 1)


def _check_layers(sites: Sequence[Site]) -> None:
    names = "\n".join(site.spec.fqn for site in sites)
    found = _gathered([[float(len(sites)), float(crc32(names.encode()))]], sites[0])
    if not bool((found == found[0]).all()):
        counts = ", ".join(str(int(one)) for one in found[:, 0, 0])
        raise DistributedError(
            f"layer {sites[0].spec.fqn!r}: the ranks do not step the same layers (they step {counts}); let each rank's "
            "optimizer own the same parameters, or give each group of ranks its own transform(..., process_group=...)"
        )


def _check_state(sites: Sequence[Site]) -> None:
    found = _gathered([[_settings(site), *_fingerprint(site)] for site in sites], sites[0])
    same_settings, same_R = (
        (found == found[0])[..., part].all(2).all(0).tolist() for part in (slice(1), slice(1, None))
    )
    for site, same_here, same_there in zip(sites, same_settings, same_R, strict=True):
        what = f"layer {site.spec.fqn!r}: its {{}} not the same on all {site.ranks.count} ranks; "
        if not same_here:
            raise DistributedError(what.format("shape or rule is") + "transform the same model by the same rule on all")
        if not same_there:
            raise DistributedError(what.format("R is") + "load the same checkpoint on every rank before the first step")
    for site in sites:
        site.same_on_all_ranks = True


def _gathered(numbers: list[list[float]], site: Site) -> Tensor:
    """Return the numbers of all ranks, `[ranks, *]`."""
    own = torch.tensor(numbers, dtype=torch.float64, device=site.rows.device)
    found = [torch.empty_like(own) for _ in range(site.ranks.count)]
    dist.all_gather(found, own, group=site.ranks.group)
    return torch.stack(found)


@cache
def _outlast_threads() -> None:
    """Let the process end a little later than it would; calling it again does nothing.

    A thread of gloo lets go of a message some time after it has arrived, for which it needs the interpreter. Where
    that is gone, it aborts the process: a training that ends right after a step of R would seem to have failed.
    """
    atexit.register(sleep, 0.1)


def _message(divided: Mapping[Site, int], site: Site) -> tuple[Any, ...]:
    """Return what sites have in common whose rows go in one message."""
    return site in divided, *_kind(site)


def _kind(site: Site) -> tuple[torch.dtype, torch.device]:
    return site.rows.dtype, site.rows.device


def _length(site: Site, rank: int) -> int:
    """Return how many numbers a rank gives."""
    return len(given_by(rank, site.spec.slots, site.ranks.count)) * (site.rows.shape[1] + 1)


def _share(site: Site) -> Tensor:
    """Return the rows that this rank gives, each with a 1 behind it where it is in use; others are zeros."""
    own, count = site.recorded(), len(given_by(site.ranks.own, site.spec.slots, site.ranks.count))
    used = own.used[:count, None]
    return torch.cat([own.rows[:count].where(used, 0), used.to(own.rows.dtype)], 1)


def _in_its_place(site: Site) -> Tensor:
    """Return room for the rows of all ranks, with those that this one gives, and zeros."""
    room = site.rows.new_zeros(site.spec.slots, site.rows.shape[1] + 1)
    part = given_by(site.ranks.own, site.spec.slots, site.ranks.count)
    room[part.start : part.stop] = _share(site)
    return room.flatten()


def _read(with_flag: Tensor) -> Recorded:
    return Recorded(with_flag[:, :-1], with_flag[:, -1] > 0)


def _settings(site: Site) -> float:
    """Return a number that tells two settings of a site apart. A function is taken for any other one."""
    rule = {name: "a function" if callable(value) else value for name, value in vars(site.spec.rule).items()}
    return float(crc32(repr((type(site.spec.rule).__name__, rule, site.spec.weights, site.rows.dtype)).encode()))


def _fingerprint(site: Site) -> tuple[float, ...]:
    """Return numbers that tell two R apart, with all that is saved with them, and when they move."""
    return (
        sum(float(saved.abs().sum()) for saved in site.state_dict().values()),
        site.schedule.attempts,
        int(site.steps),
    )
