"""What a person reads about a transformed model: which layers are sites, which are not, and how far R has come."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from statistics import fmean as mean

import torch
from tabulate import tabulate
from torch import nn

from decorr_fx.ops.cost import REFERENCE_BATCH, apply_flops, move_flops, own_flops
from decorr_fx.runtime.site.ranks import given_by_each, ranks
from decorr_fx.runtime.site.spec import SiteSpec, SkippedRecord
from decorr_fx.runtime.site.state import Site, sites_of
from decorr_fx.runtime.step.divide import makers


@dataclass(frozen=True)
class SiteRecord:
    """One decorrelated layer. What is shared with others counts for the first of them.

    Attributes:
        fqn: fully qualified name of the layer.
        kind: `linear`, `conv2d`, ...
        d: features of an input row, per group.
        groups: groups of the convolution.
        structure: structure of R that was chosen.
        bytes: size of R's factors, or of V, and of what the rule remembers besides.
        row_bytes: size of the buffer of recorded rows, of which each of several ranks has its part.
        folded_bytes: most that `W R`, or `R x` where that is smaller, takes while the layer runs.
        flops: extra FLOP of one training step, on average, at a batch of 128.
        cost: the same as a part of the layer's own FLOP, of forward and backward.
        shares_with: fqn of the layer with the same input whose R this one uses; empty if it has its own.
        note: what differs from the settings, if anything.
        made_by: of several ranks the one that looks at the rows of this R for all, where one optimizer owns the model's
            weights and all have one `update_every`; None where all ranks do, or there is one. Only of a transformed
            model.
    """

    fqn: str
    kind: str
    d: int
    groups: int
    structure: str
    bytes: int
    row_bytes: int
    folded_bytes: int
    flops: int
    cost: float
    shares_with: str = ""
    note: str = ""
    made_by: int | None = None

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Bytes of R, of its rows, and of the folded weight."""
        return self.bytes, self.row_bytes, self.folded_bytes

    @property
    def maker(self) -> str:
        """What the table says of `made_by`."""
        return "all" if self.made_by is None else str(self.made_by)

    @property
    def remark(self) -> str:
        """What the table says besides the numbers."""
        shared = f"shares the R of {self.shares_with}" if self.shares_with else ""
        return "; ".join(part for part in (shared, self.note) if part)


def describe(spec: SiteSpec, element_size: int, made_by: int | None = None) -> Iterator[SiteRecord]:
    """Yield one record a layer of a site; `element_size` is the bytes of one number of R."""
    layouts = [weight.layout for weight in spec.weights]
    moves = move_flops(layouts, spec.work, spec.config) // spec.config.update_every
    numbers = sum(map(prod, [*spec.layout.factor_shapes, *spec.moment_shapes.values()]))
    for index, weight in enumerate(spec.weights):
        layout, leads = weight.layout, index == 0
        flops = apply_flops([layout], spec.work) + (moves if leads else 0)
        yield SiteRecord(
            fqn=weight.fqn,
            kind=weight.kind,
            d=layout.d,
            groups=layout.groups,
            structure=layout.structure,
            bytes=element_size * numbers if leads else 0,
            row_bytes=element_size * given_by_each(spec.slots, ranks()) * layout.groups * layout.d if leads else 0,
            folded_bytes=element_size * layout.groups * layout.d_out * layout.d,
            flops=flops,
            cost=flops / own_flops([layout], spec.work),
            shares_with="" if leads else spec.fqn,
            note="not centred: no bias of its own" if spec.config.center and not weight.centered else "",
            made_by=made_by,
        )


@dataclass(frozen=True)
class Report:
    """Every conv and linear of a model: sites, and skipped layers with their reasons. Printing it gives a table."""

    sites: tuple[SiteRecord, ...]
    skipped: tuple[SkippedRecord, ...]

    @property
    def cost(self) -> float:
        """Extra FLOP of a training step, as a part of the sites' own, at a batch of 128."""
        own = sum(site.flops / site.cost for site in self.sites if site.cost)
        return sum(site.flops for site in self.sites) / own if own else 0.0

    def __str__(self) -> str:
        """Return the table."""
        divided = any(site.made_by is not None for site in self.sites)
        rows = [
            [
                s.fqn or "(root)", s.kind, s.d, s.groups, s.structure, *(f"{size / 1024:,.0f}" for size in s.sizes),
                f"{s.flops / 1e6:,.2f}", f"{100 * s.cost:.1f}", *([s.maker] if divided else []), s.remark,
            ]
            for s in self.sites
        ]  # fmt: skip
        headers = [
            "layer", "kind", "d", "groups", "R", "KiB of R", "of rows", "of W R", "MFLOP a step", "% of own",
            *(["made by rank"] if divided else []), "note",
        ]  # fmt: skip
        parts = [tabulate(rows, headers, disable_numparse=True), self._total()]
        if self.skipped:
            left = [[s.fqn or "(root)", s.kind, s.reason] for s in self.skipped]
            parts.append(tabulate(left, ["skipped layer", "kind", "reason"], disable_numparse=True))
        return "\n\n".join(parts)

    def _total(self) -> str:
        """Return the line under the table."""
        mebibytes = [f"{sum(column) / 2**20:,.1f}" for column in zip(*(s.sizes for s in self.sites), strict=True)]
        sizes = ", ".join(f"{size} MiB of {what}" for size, what in zip(mebibytes, ("R", "rows", "W R"), strict=False))
        return (
            f"{len(self.sites)} sites, {len(self.skipped)} skipped; {sizes}; {100 * self.cost:.1f} % more FLOP "
            f"in a step of {REFERENCE_BATCH} examples"
        )


@dataclass(frozen=True)
class SiteStats:
    """How one site stands.

    Attributes:
        fqn: fully qualified name of the layer.
        correlation: mean over pairs of features of the squared correlation of z, as the last step of R found it.
        variance_error: mean over features of the squared difference of the variance of z from 1, likewise.
        steps: steps that R has taken.
        refused: steps that were refused since rows or results were not finite.
    """

    fqn: str
    correlation: float
    variance_error: float
    steps: int
    refused: int


class Stats(tuple[SiteStats, ...]):
    """The `SiteStats` of every site; printing it gives a table."""

    def scalars(self) -> dict[str, float]:
        """Return the whole model in six named numbers, as loggers take them, such as TensorBoard's.

        Of correlation and variance error the mean over sites, and the worst site; of steps those of the site that took
        the fewest; refused steps are counted over all sites.
        """
        correlations, errors = [s.correlation for s in self], [s.variance_error for s in self]
        return {
            "decorr/correlation": mean(correlations),
            "decorr/correlation_worst": max(correlations),
            "decorr/variance_error": mean(errors),
            "decorr/variance_error_worst": max(errors),
            "decorr/steps": float(min(s.steps for s in self)),
            "decorr/refused": float(sum(s.refused for s in self)),
        }

    def __str__(self) -> str:
        """Return the table."""
        rows = [[s.fqn or "(root)", s.correlation, s.variance_error, s.steps, s.refused] for s in self]
        return tabulate(rows, ["layer", "correlation", "variance error", "steps", "refused"], floatfmt=".4g")


def site_records(model: nn.Module) -> Iterator[SiteRecord]:
    """Yield one record a decorrelated layer of a transformed model."""
    sites = list(sites_of(model))
    moving = [site for site in sites if all((p := w.find()) is not None and p.requires_grad for w in site.weights)]
    maker = makers(moving, ranks())
    for site in sites:
        yield from describe(site.spec, site.rows.element_size(), maker.get(site))


def collect_stats(sites: Iterable[Site]) -> Stats:
    """Read the counters and losses of the sites; this waits for the device, once a site."""
    return Stats(_read(site) for site in sites)


def _read(site: Site) -> SiteStats:
    counters = torch.stack([site.steps, site.refused]).to(site.losses.dtype)
    correlation, variance_error, steps, refused = torch.cat([site.losses, counters]).tolist()
    return SiteStats(site.spec.fqn, correlation, variance_error, int(steps), int(refused))
