"""How far R has come: numbers that a person reads while a model trains."""

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean as mean

import torch
from tabulate import tabulate

from decorr_fx.runtime.site.state import Site


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


def collect_stats(sites: Iterable[Site]) -> Stats:
    """Read the counters and losses of the sites; this waits for the device, once a site."""
    return Stats(_read(site) for site in sites)


def _read(site: Site) -> SiteStats:
    counters = torch.stack([site.steps, site.refused]).to(site.losses.dtype)
    correlation, variance_error, steps, refused = torch.cat([site.losses, counters]).tolist()
    return SiteStats(site.spec.fqn, correlation, variance_error, int(steps), int(refused))
