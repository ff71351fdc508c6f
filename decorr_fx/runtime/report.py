"""What a person reads about a transformed model: which layers are sites, which are not, and how far R has come."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from tabulate import tabulate
from torch import nn

from decorr_fx.runtime.spec import SiteSpec
from decorr_fx.runtime.state import Site, sites_of


@dataclass(frozen=True)
class SiteRecord:
    """One decorrelated layer.

    Attributes:
        fqn: fully qualified name of the layer.
        kind: `linear`, `conv2d`, ...
        d: features of an input row, per group.
        groups: groups of the convolution.
        structure: structure of R that was chosen.
        bytes: size of R's factors.
        flops: extra FLOP of one training step, at `max_samples` rows.
        note: what differs from the settings, if anything.
    """

    fqn: str
    kind: str
    d: int
    groups: int
    structure: str
    bytes: int
    flops: int
    note: str = ""

    @classmethod
    def of(cls, spec: SiteSpec, element_size: int) -> "SiteRecord":
        """Describe a site by its specification; `element_size` is the bytes of one number of R."""
        layout = spec.layout
        size = element_size * layout.stacks * sum(side * side for side in layout.modes)
        note = "not centred: no bias of its own" if spec.config.center and not spec.centered else ""
        flops = layout.flops(spec.config.max_samples)
        return cls(spec.fqn, spec.kind, layout.d, layout.groups, layout.structure, size, flops, note)


@dataclass(frozen=True)
class SkippedRecord:
    """One conv or linear layer (or one that hides some) that is left as it is, and why."""

    fqn: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Report:
    """Every conv and linear of a model: sites, and skipped layers with their reasons. Printing it gives a table."""

    sites: tuple[SiteRecord, ...]
    skipped: tuple[SkippedRecord, ...]

    def __str__(self) -> str:
        """Return the table."""
        rows = [
            [s.fqn or "(root)", s.kind, s.d, s.groups, s.structure, f"{s.bytes:,}", f"{s.flops / 1e6:,.2f}", s.note]
            for s in self.sites
        ]
        headers = ["layer", "kind", "d", "groups", "R", "bytes of R", "MFLOP per step", "note"]
        total = f"{len(self.sites)} sites, {sum(s.bytes for s in self.sites):,} bytes of R, {len(self.skipped)} skipped"
        parts = [tabulate(rows, headers, disable_numparse=True), total]
        if self.skipped:
            left = [[s.fqn or "(root)", s.kind, s.reason] for s in self.skipped]
            parts.append(tabulate(left, ["skipped layer", "kind", "reason"], disable_numparse=True))
        return "\n\n".join(parts)


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

    def __str__(self) -> str:
        """Return the table."""
        rows = [[s.fqn or "(root)", s.correlation, s.variance_error, s.steps, s.refused] for s in self]
        return tabulate(rows, ["layer", "correlation", "variance error", "steps", "refused"], floatfmt=".4g")


def site_records(model: nn.Module) -> Iterator[SiteRecord]:
    """Yield one record a site of a transformed model."""
    return (SiteRecord.of(site.spec, site.rows.element_size()) for site in sites_of(model))


def collect_stats(sites: Iterable[Site]) -> Stats:
    """Read the counters and losses of the sites; this waits for the device, once a site."""
    return Stats(_read(site) for site in sites)


def _read(site: Site) -> SiteStats:
    counters = torch.stack([site.steps, site.refused]).to(site.losses.dtype)
    correlation, variance_error, steps, refused = torch.cat([site.losses, counters]).tolist()
    return SiteStats(site.spec.fqn, correlation, variance_error, int(steps), int(refused))
