"""Weights that are cut over ranks, as `fully_shard` leaves them between forwards: what this rank holds of them.

A weight that follows R changes each of its rows by itself: a rank moves those that it holds, and needs no others. So
nothing is sent for it, and its work is divided among the ranks.
"""

from math import ceil
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn


def is_sharded(tensor: object) -> bool:
    """Tell whether a tensor is a part of one that several ranks hold together."""
    if type(tensor) is nn.Parameter or not dist.is_available():  # a sharded one is of another type
        return False
    from torch.distributed.tensor import DTensor  # there is no such module in a torch without torch.distributed

    return isinstance(tensor, DTensor)


def reshard(model: nn.Module) -> None:
    """Let each rank hold no more than its part of every weight, where a forward has left them gathered."""
    if dist.is_available():
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


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
