"""Orders: which units of a group are wanted most. Each gives a score for every unit, `[n]`; the largest are kept."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from decorr_fx.ops.prune.subspace import Units, definite

Order = Callable[[Units], Tensor]

BLOCK, CANDIDATES = 64, 4  # units that go before all others are looked at again, and of how many as many are chosen


def _zca(units: Units) -> Tensor:
    """`1 / [C^-1/2]_ii^2`: the least that a whitening near the identity needs of each unit."""
    return _sum(_inverse_root(definite(C)).diagonal() ** -2 for C in units.moments)


def _l1(units: Units) -> Tensor:
    """The L1 norm of what makes each unit."""
    return units.norms


def _backward(units: Units) -> Tensor:
    """Place in which each unit is removed, where one goes at a time: that whose removal costs the readers least.

    Removing unit i, with the rest folded as best, costs `|W_i|^2 / [C^-1]_ii`, as in optimal brain surgery; then W
    and `C^-1` are those of the units that are left. Of many units, a block is chosen among those that are cheapest
    before its first one goes.
    """
    readers = [
        _Reader(torch.linalg.inv(definite(C)), W.mT @ W) for C, W in zip(units.moments, units.readers, strict=True)
    ]
    left, places = torch.arange(len(units.norms)), torch.zeros(len(units.norms), dtype=torch.float64)
    while len(left):
        cheapest = _costs(readers).argsort()[: CANDIDATES * BLOCK]
        among = [reader.of(cheapest) for reader in readers]
        gone = cheapest[_one_by_one(among, min(BLOCK, len(left)))]
        places[left[gone]] = len(places) - len(left) + torch.arange(len(gone), dtype=torch.float64)
        stay = torch.ones(len(left), dtype=torch.bool)
        stay[gone] = False
        readers, left = [reader.without(gone, stay) for reader in readers], left[stay]
    return places


@dataclass(frozen=True)
class _Reader:
    """What a reader needs of the units that are left: `P = C^-1` and `G = W^T W`, `[n, n]`."""

    P: Tensor
    G: Tensor

    def of(self, some: Tensor) -> "_Reader":
        """Return what concerns some of the units: removing one of them changes it by nothing else."""
        return _Reader(self.P[some][:, some], self.G[some][:, some])

    def without(self, gone: Tensor, stay: Tensor) -> "_Reader":
        """Return the same after units are gone, for those that `stay`: `W - W_gone share`, C without them."""
        share = torch.linalg.solve(self.P[gone][:, gone], self.P[gone][:, stay])  # how the others tell them
        beside = self.G[stay][:, gone] @ share
        P = self.P[stay][:, stay] - self.P[stay][:, gone] @ share
        return _Reader(P, self.G[stay][:, stay] - beside - beside.mT + share.mT @ self.G[gone][:, gone] @ share)


def _costs(readers: Sequence[_Reader]) -> Tensor:
    return _sum(reader.G.diagonal() / reader.P.diagonal() for reader in readers)


def _one_by_one(readers: Sequence[_Reader], count: int) -> Tensor:
    """Return so many units in the order in which they are removed, always the cheapest one."""
    left, found = torch.arange(len(readers[0].P)), []
    for _ in range(count):
        place = _costs(readers).argmin(keepdim=True)
        found.append(left[place])
        stay = torch.ones(len(left), dtype=torch.bool)
        stay[place] = False
        readers, left = [reader.without(place, stay) for reader in readers], left[stay]
    return torch.cat(found)


def _inverse_root(C: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(C)
    root: Tensor = (vectors * values.clamp(min=torch.finfo(C.dtype).tiny).rsqrt()) @ vectors.mT
    return root


def _sum(tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(tensors)).sum(0)


ORDERS: Mapping[str, Order] = {"backward": _backward, "zca": _zca, "l1": _l1}
