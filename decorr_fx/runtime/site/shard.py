"""Weights that are cut over ranks, as `fully_shard` leaves them between forwards: what this rank holds of them.

The products around a step of the optimizer change each row of a weight by itself: a rank makes those of the rows that
it holds, and needs no others. So nothing is sent for them, and their work is divided among the ranks.
"""

import sys
from math import ceil
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn


def is_sharded(tensor: object) -> bool:
    """Tell whether a tensor is a part of one that several ranks hold together."""
    if not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor  # there is no such module in a torch without torch.distributed

    return isinstance(tensor, DTensor)


def is_fsdp1(module: nn.Module) -> bool:
    """Tell whether a module is a `FullyShardedDataParallel`."""
    return _is_a(module, "torch.distributed.fsdp", "FullyShardedDataParallel")


def is_fully_sharded(module: nn.Module) -> bool:
    """Tell whether `fully_shard` has been applied to a module itself."""
    return _is_a(module, "torch.distributed.fsdp", "FSDPModule")


def is_zero(optimizer: object) -> bool:
    """Tell whether an optimizer is a `ZeroRedundancyOptimizer`, whose parameters are stepped by one rank each."""
    return _is_a(optimizer, "torch.distributed.optim", "ZeroRedundancyOptimizer")


def _is_a(thing: object, module: str, name: str) -> bool:
    """Tell whether a thing is of a class, without importing its module, which takes a while."""
    return isinstance(thing, getattr(sys.modules.get(module), name, ()))


def held_here(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor: what is written by `fully_shard`, and has a version that tells of it."""
    return tensor.to_local() if type(tensor) is not Tensor and is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def rows_here(parameter: Any, rows: tuple[int, int] | None) -> Tensor | None:
    """Return those of some rows, or of all, that this rank holds: a view. None where it is not cut along its rows.

    Args:
        parameter: a DTensor.
        rows: the first of them and the one after the last.
    """
    placements, mesh = parameter.placements, parameter.device_mesh
    cut = [dimension for dimension, placement in enumerate(placements) if not placement.is_replicate()]
    if len(cut) != 1 or type(placements[cut[0]]).__name__ != "Shard" or not placements[cut[0]].is_shard(0):
        return None
    local: Tensor = parameter.to_local()
    if rows is None:
        return local
    start = mesh.get_local_rank(cut[0]) * ceil(parameter.shape[0] / mesh.size(cut[0]))  # as torch.chunk cuts
    return local[min(max(rows[0] - start, 0), len(local)) : min(max(rows[1] - start, 0), len(local))]
