"""What an optimizer owns of transformed models: looked up once, and again where parameters or sites have changed."""

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.optim import Optimizer

from decorr_fx.runtime.site.registry import changes, sites_of_parameter
from decorr_fx.runtime.site.state import Site
from decorr_fx.runtime.site.weight import SiteWeight


@dataclass(frozen=True)
class Owned:
    """Weights of sites, and the sites, of the parameters with these `ids`, as they were after so many `changes`."""

    ids: list[int]
    changes: int
    weights: Sequence[tuple[Site, SiteWeight]] = ()
    sites: Sequence[Site] = ()

    @classmethod
    def of_sites(cls, sites: Sequence[Site]) -> "Owned":
        """Return all weights of some sites."""
        return cls([], 0, [(site, weight) for site in sites for weight in site.weights], sites)


_OWNED: "WeakKeyDictionary[Optimizer, Owned]" = WeakKeyDictionary()


def owned_by(optimizer: Optimizer) -> Owned:
    """Return what the optimizer owns.

    Raises:
        LayerError: a weight was pruned or parametrized after `transform`.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    ids, known = [*map(id, parameters)], _OWNED.get(optimizer)
    if known is None or known.changes != changes() or known.ids != ids:
        known = _OWNED[optimizer] = _look_up(parameters, ids)
    return known


def _look_up(parameters: Sequence[Tensor], ids: list[int]) -> Owned:
    """Look at each parameter of the optimizer, and at no other site of the process."""
    weights: list[tuple[Site, SiteWeight]] = []
    sites: dict[Site, None] = {}
    for parameter in parameters:
        for site in sites_of_parameter(parameter):
            weights += [(site, weight) for weight in site.weights if weight.parameter() is parameter]
            sites[site] = None
    return Owned(ids, changes(), weights, list(sites))
