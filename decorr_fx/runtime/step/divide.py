"""Who makes what: on several ranks one of them looks at the rows of a site for all, where that sends no more.

A step of R by a rule that remembers comes to what rows tell of a site (see `runtime.finding`), which takes long to make
and is small. So each rank sends its share of the rows to the one that makes it, and that one sends the finding to all.

A rule of small steps is taken by all ranks alike, on rows that are sent to all: weights follow by what its step is made
of, matrices of d x d numbers and more, which cost more to send than to make.

Bytes are those that a rank sends, on average over ranks, where each collective does as well as it can. With w ranks, a
sum of N bytes takes 2 N (w - 1) / w, as that of gradients does. N bytes of which each rank has its part take
N (w - 1) / w to be given to all, and a w-th of that where each of them is given to one rank alone.
"""

import heapq
from collections.abc import Sequence

from decorr_fx.ops.cost import learn_flops
from decorr_fx.runtime.site.state import Site
from decorr_fx.runtime.step.finding import numbers_of_finding


def makers(sites: Sequence[Site], ranks: int) -> dict[Site, int]:
    """Return which rank looks at the rows of each site for all; none for a site at which all look.

    The longest first, each to the rank that has least to do: the same on all ranks, in whatever order the sites are.
    """
    divided = sorted((s for s in sites if is_divided(s, ranks)), key=lambda s: (-look_flops(s), s.spec.fqn))
    loads = [(0, rank) for rank in range(ranks)]
    found = {}
    for site in divided:
        load, rank = loads[0]
        heapq.heapreplace(loads, (load + look_flops(site), rank))
        found[site] = rank
    return found


def is_divided(site: Site, ranks: int) -> bool:
    """Tell whether one rank looks at the rows of a site for all: where it may, and that sends no more."""
    return ranks > 1 and site.spec.remembers and _sent_divided(site, ranks) <= _sent_to_all(site, ranks)


def look_flops(site: Site) -> int:
    """Return the FLOP of what is divided: by shapes that all ranks have alike, whatever examples they were given."""
    return learn_flops(site.spec.layout, site.spec.slots)


def exchanged_bytes(sites: Sequence[Site], ranks: int) -> int:
    """Count the bytes that a rank sends when the R of all the sites move; see above for how they are counted."""
    return round(sum(_sent_divided(s, ranks) if is_divided(s, ranks) else _sent_to_all(s, ranks) for s in sites))


def numbers_of_rows(site: Site) -> int:
    """Return how many numbers the rows of a site are, each with a flag behind it."""
    return site.spec.slots * (site.rows.shape[1] + 1)


def _sent_to_all(site: Site, ranks: int) -> float:
    return 2 * site.rows.element_size() * numbers_of_rows(site) * (ranks - 1) / ranks


def _sent_divided(site: Site, ranks: int) -> float:
    numbers = numbers_of_rows(site) / ranks + numbers_of_finding(site)
    return site.rows.element_size() * numbers * (ranks - 1) / ranks
