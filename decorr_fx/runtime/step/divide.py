"""Which rank computes what: on several ranks one of them reads the rows of a site for all, where that sends no more.

A step of R by the rule `Power` comes to new moments of the rows (see `step.update`), which take long to compute and are
small. So each rank sends its share of the rows to the owner of the site, and the owner sends the update to all.

A rule of small steps is taken by all ranks alike, on rows that are sent to all: its step is a matrix of d x d numbers
or more, which costs more to send than to compute.

Bytes are those that a rank sends, on average over ranks, where each collective does as well as it can. With w ranks, a
sum of N bytes takes 2 N (w - 1) / w, as that of gradients does. N bytes of which each rank has its part take
N (w - 1) / w to be given to all, and a w-th of that where each of them is given to one rank alone.
"""

import heapq
from collections.abc import Sequence

from decorr_fx.config import Power
from decorr_fx.ops.cost import moment_flops
from decorr_fx.runtime.site.state import Site
from decorr_fx.runtime.step.update import numbers_of_update


def owner_ranks(sites: Sequence[Site], ranks: int) -> dict[Site, int]:
    """Return which rank reads the rows of each site for all; none for a site whose rows all ranks read.

    The longest first, each to the rank that has least to do: the same on all ranks, in whatever order the sites are.
    """
    divided = sorted((s for s in sites if is_divided(s, ranks)), key=lambda s: (-update_flops(s), s.spec.fqn))
    loads = [(0, rank) for rank in range(ranks)]
    found = {}
    for site in divided:
        load, rank = loads[0]
        heapq.heapreplace(loads, (load + update_flops(site), rank))
        found[site] = rank
    return found


def is_divided(site: Site, ranks: int) -> bool:
    """Tell whether one rank reads the rows of a site for all: where it may, and that sends no more."""
    return ranks > 1 and isinstance(site.spec.rule, Power) and _sent_divided(site, ranks) <= _sent_to_all(site, ranks)


def update_flops(site: Site) -> int:
    """Return the FLOP of what is divided: by shapes that all ranks have alike, whatever examples they were given."""
    return moment_flops(site.spec.layout, site.spec.slots)


def exchanged_bytes(sites: Sequence[Site], ranks: int) -> int:
    """Count the bytes that a rank sends when the R of all the sites move; see above for how they are counted."""
    return round(sum(_sent_divided(s, ranks) if is_divided(s, ranks) else _sent_to_all(s, ranks) for s in sites))


def numbers_of_rows(site: Site) -> int:
    """Return how many numbers the rows of a site are, each with a flag behind it."""
    return site.spec.slots * (site.rows.shape[1] + 1)


def _sent_to_all(site: Site, ranks: int) -> float:
    return 2 * site.rows.element_size() * numbers_of_rows(site) * (ranks - 1) / ranks


def _sent_divided(site: Site, ranks: int) -> float:
    numbers = numbers_of_rows(site) / ranks + numbers_of_update(site)
    return site.rows.element_size() * numbers * (ranks - 1) / ranks
