"""What a person reads about a model before and after `transform`: which layers are sites, at what cost, and why not."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

from tabulate import tabulate
from torch import nn

from decorr_fx.config import Power
from decorr_fx.ops.cost import ASSUMED_ROWS, around_flops, move_flops, own_flops, used_rank
from decorr_fx.runtime.site.ranks import given_by_each
from decorr_fx.runtime.site.spec import SiteSpec, SkippedRecord
from decorr_fx.runtime.site.state import sites_of
from decorr_fx.runtime.step.divide import owner_ranks


@dataclass(frozen=True)
class SiteRecord:
    """One decorrelated layer. What is shared with others counts for the first of them.

    Attributes:
        fqn: fully qualified name of the layer.
        kind: `linear`, `conv2d`, ...
        d: features of an input row, per group.
        groups: groups of the convolution.
        structure: structure of R that was chosen.
        used: directions that R of low rank uses in steps of so many rows; 0 for others.
        bytes: size of R and of what is remembered of the input.
        row_bytes: size of the buffer of recorded rows, of which each of several ranks has its part.
        rows: rows that the layer maps in a step, counted or assumed.
        flops: extra FLOP of one training step, on average.
        cost: the same as a part of the layer's own FLOP, of forward and backward.
        shares_with: fqn of the layer with the same input whose R this one uses; empty if it has its own.
        owner_rank: of several ranks the one that reads the rows of this R for all, where one optimizer owns the model's
            weights and all have one `update_every`; None where all ranks do, or there is one. Only of a transformed
            model.
    """

    fqn: str
    kind: str
    d: int
    groups: int
    structure: str
    used: int
    bytes: int
    row_bytes: int
    rows: int
    flops: int
    cost: float
    shares_with: str = ""
    owner_rank: int | None = None


def describe(
    spec: SiteSpec, element_size: int, rows: int = 0, ranks: int = 1, owner_rank: int | None = None
) -> Iterator[SiteRecord]:
    """Yield one record a layer of a site.

    Args:
        spec: of the site.
        element_size: bytes of one number of R.
        rows: that the layers map in a step; 0 where that is not known.
        ranks: how many train together.
        owner_rank: see `SiteRecord`.
    """
    rows, rule = rows or ASSUMED_ROWS, spec.rule
    used = used_rank(spec.layout.rank, rows, rule.cost_budget) if isinstance(rule, Power) else 0
    moves = move_flops(spec.layout, min(spec.slots, rows)) // rule.update_every
    numbers = sum(map(prod, spec.state_shapes.values()))
    for index, weight in enumerate(spec.weights):
        layout, leads = weight.layout, index == 0
        flops = around_flops([layout], used) + (moves if leads else 0)
        yield SiteRecord(
            fqn=weight.fqn,
            kind=weight.kind,
            d=layout.d,
            groups=layout.groups,
            structure=layout.structure,
            used=used,
            bytes=element_size * numbers if leads else 0,
            row_bytes=element_size * given_by_each(spec.slots, ranks) * layout.groups * layout.d if leads else 0,
            rows=rows,
            flops=flops,
            cost=flops / own_flops([layout], rows),
            shares_with="" if leads else spec.fqn,
            owner_rank=owner_rank,
        )


@dataclass(frozen=True)
class Report:
    """Every conv and linear of a model: sites, and skipped layers with their reasons. Printing it gives a table."""

    sites: tuple[SiteRecord, ...]
    skipped: tuple[SkippedRecord, ...]
    counted: bool = False

    @property
    def cost(self) -> float:
        """Extra FLOP of a training step, as a part of the sites' own."""
        own = sum(site.flops / site.cost for site in self.sites if site.cost)
        return sum(site.flops for site in self.sites) / own if own else 0.0

    def __str__(self) -> str:
        """Return the table."""
        divided = any(site.owner_rank is not None for site in self.sites)
        rows = [
            [
                s.fqn or "(root)", s.kind, s.d, s.groups, s.structure, s.used or "", s.rows, f"{s.bytes / 1024:,.0f}",
                f"{s.row_bytes / 1024:,.0f}", f"{s.flops / 1e6:,.2f}", f"{100 * s.cost:.1f}",
                *([("all" if s.owner_rank is None else s.owner_rank)] if divided else []),
                f"shares the R of {s.shares_with}" if s.shares_with else "",
            ]
            for s in self.sites
        ]  # fmt: skip
        headers = [
            "layer", "kind", "d", "groups", "R", "rank used", "rows a step", "KiB of R", "of rows", "MFLOP a step",
            "% of own", *(["owner rank"] if divided else []), "note",
        ]  # fmt: skip
        parts = [tabulate(rows, headers, disable_numparse=True), self._total()]
        if self.skipped:
            left = [[s.fqn or "(root)", s.kind, s.reason] for s in self.skipped]
            parts.append(tabulate(left, ["skipped layer", "kind", "reason"], disable_numparse=True))
        return "\n\n".join(parts)

    def _total(self) -> str:
        """Return the line under the table."""
        sizes = [sum(s.bytes for s in self.sites) / 2**20, sum(s.row_bytes for s in self.sites) / 2**20]
        rows = "rows as in one forward on example_inputs" if self.counted else f"{ASSUMED_ROWS} rows a step assumed"
        return (
            f"{len(self.sites)} sites, {len(self.skipped)} skipped; {sizes[0]:,.1f} MiB of R, {sizes[1]:,.1f} MiB of "
            f"rows; {100 * self.cost:.1f} % more FLOP in a training step ({rows})"
        )


def site_records(model: nn.Module, rows: Mapping[str, int]) -> Iterator[SiteRecord]:
    """Yield one record a decorrelated layer of a transformed model; `rows` by the fqn of the site."""
    sites = list(sites_of(model))
    owner = owner_ranks([site for site in sites if site.trained], sites[0].ranks.count)
    for site in sites:
        counted, ranks = rows.get(site.spec.fqn, 0), site.ranks.count
        yield from describe(site.spec, site.rows.element_size(), counted, ranks, owner.get(site))
