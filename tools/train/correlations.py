"""How correlated the inputs of the layers are: what decorrelation is to change."""

from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import decorr_fx
from decorr_fx import Rule
from decorr_fx.ops.layout import stack_rows, unfold_mode
from decorr_fx.runtime.site.state import Site, sites_of


@dataclass(frozen=True)
class Correlation:
    """The correlations between the input features of one layer.

    Attributes:
        fqn: name of the layer.
        matrix: absolute correlation of each pair, `[d, d]`; uncentred where the rule works on uncentred rows.
    """

    fqn: str
    matrix: Tensor

    @property
    def mean_square(self) -> float:
        """Mean squared correlation over the pairs of different features."""
        d = len(self.matrix)
        return float(self.matrix.triu(1).square().sum()) / max(d * (d - 1) / 2, 1)


def measure_correlations(model: nn.Module, images: Tensor, rule: Rule) -> list[Correlation]:
    """Return the correlations in z = R x of every layer that decorrelation works on, for one batch of images.

    The model is not changed. A plain one is measured where `rule` would decorrelate, with R the identity. Where R has
    blocks it is the first one, where it is a Kronecker pair it is the channels.
    """
    probe = deepcopy(model)  # a forward in training mode moves the statistics of BatchNorm
    if next(sites_of(probe), None) is None:
        decorr_fx.transform_(probe, rule)
    for site in sites_of(probe):
        site.steps.zero_()  # by which rows are chosen: always the same ones
        site.schedule.restart(0)  # a move is due, and so rows are recorded
        site.begin_recording()
        site.recording_all = True
    probe.train()
    with torch.no_grad():
        probe(images)
        return [Correlation(site.spec.fqn, _correlate(_features(site))) for site in sites_of(probe)]


def mean_of(correlations: list[Correlation]) -> float:
    """Return the mean of the layers' mean squared correlations."""
    return sum(correlation.mean_square for correlation in correlations) / len(correlations)


def _features(site: Site) -> Tensor:
    """Return rows of z `[n, d]`, of the first stack and mode."""
    x = stack_rows(site.rows[None, : int(site.seen)], site.spec.layout)
    if site.spec.demeaned:
        x = x - x.mean(1, keepdim=True)
    return unfold_mode(site.matrix().transposed.times(x), 0, len(x))[0]


def _correlate(z: Tensor) -> Tensor:
    """Return |correlation| of the columns of z; a column that is zero throughout correlates with nothing."""
    unit = z / z.norm(dim=0).clamp(min=1e-12)
    correlation: Tensor = unit.mT @ unit
    return correlation.abs().cpu()
