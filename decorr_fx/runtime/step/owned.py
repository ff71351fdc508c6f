"""What an optimizer owns of transformed models: looked up once, and again where parameters or sites have changed."""

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch.optim import Optimizer

from decorr_fx.runtime.site.registry import changes, list_sharded, sites_of_parameter
from decorr_fx.runtime.site.state import Site


@dataclass(frozen=True)
class Owned:
    """The sites of parameters, as they were after so many `changes`. A model that is dropped is not kept alive by it.

    Attributes:
        ids: of the parameters.
        order: the same, in order.
        changes: see `site.registry`.
        references: to the sites.
    """

    ids: frozenset[int]
    order: list[int]
    changes: int
    references: Sequence[ref[Site]]

    def sites(self) -> list[Site]:
        """Return the sites that are left."""
        return [site for reference in self.references if (site := reference()) is not None]


_OWNED: "WeakKeyDictionary[Optimizer, Owned]" = WeakKeyDictionary()


def owned_by(optimizer: Optimizer) -> Owned:
    """Return what the optimizer owns.

    Raises:
        LayerError: a weight was pruned or parametrized after `transform`.
        DistributedError: a weight is sharded in a way in which rows are not whole.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    ids, known = [*map(id, parameters)], _OWNED.get(optimizer)
    if known is None or known.changes != changes() or known.order != ids:
        known = _OWNED[optimizer] = _look_up(parameters, ids)
    return known


_COPYING: "WeakKeyDictionary[Optimizer, bool]" = WeakKeyDictionary()


def writes_from_copies(optimizer: Optimizer, parameters: Sequence[Tensor]) -> bool:
    """Tell whether an optimizer has just written parameters from copies in its state, as of float32 beside bfloat16.

    Such a copy does not follow the parameter. It is looked for once an optimizer, among parameters that it has stepped,
    which waits for the device; optimizers of torch have none.
    """
    known = _COPYING.get(optimizer)
    if known is None and type(optimizer).__module__.startswith("torch.optim."):
        known = _COPYING[optimizer] = False
    if known is None and parameters:
        pairs = ((p, optimizer.state.get(p)) for p in parameters)
        states = ((p, value) for p, state in pairs if isinstance(state, dict) for value in state.values())
        known = _COPYING[optimizer] = any(_is_copy(value, p) for p, value in states)
    return bool(known)


def _is_copy(value: object, parameter: Tensor) -> bool:
    """Tell whether a value is a copy of a parameter; not of one of zeros, which some layers start from, and momenta."""
    if type(value) is not Tensor or value.shape != parameter.shape or not bool(parameter.any()):
        return False
    return torch.equal(value.to(parameter.device, parameter.dtype), parameter)


def _look_up(parameters: Sequence[Tensor], ids: list[int]) -> Owned:
    """Look at each parameter of the optimizer, and at no other site of the process.

    Raises:
        DistributedError: a weight is sharded in a way in which rows are not whole.
    """
    sites: dict[Site, None] = {}
    list_sharded(parameters)
    for parameter in parameters:
        for site in sites_of_parameter(parameter):
            for weight in site.weights:
                if weight.parameter() is parameter:
                    weight.part(parameter.detach())
                    sites[site] = None
            site.warned.add("unowned")  # of a model that an optimizer steps: other layers may be left out on purpose
    return Owned(frozenset(ids), ids, changes(), [*map(ref, sites)])
