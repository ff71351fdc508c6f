"""The processes that train one model together, as `torchrun` starts them; a process that is alone is the first one."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


class RankError(Exception):
    """Another rank is gone, or did not answer in time; the message is one line."""


@contextmanager
def joined(timeout: float) -> Iterator[None]:
    """Meet the other processes, where `torchrun` has started several; none waits for another for longer than this.

    Args:
        timeout: in seconds.

    Raises:
        RankError: another one is gone, or did not answer in time.
    """
    if not dist.is_torchelastic_launched():
        yield
        return
    if local_rank() < torch.cuda.device_count():
        torch.cuda.set_device(local_rank())
    this = f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}"
    try:
        dist.init_process_group(timeout=timedelta(seconds=timeout))
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):  # which has no class of its own for its errors
            raise RankError(f"{this}: another one is gone, or was silent for {timeout:g} seconds") from error
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def ranks() -> int:
    """Return how many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this one; the first one, 0, tells and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank() -> int:
    """Return the number of this one on its machine, which is that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


def share(batch: Sequence[T]) -> Sequence[T]:
    """Return this rank's part of a batch."""
    return batch[rank() :: ranks()]


def wrapped(model: nn.Module) -> nn.Module:
    """Return the model such that the gradients of all ranks are averaged."""
    return DistributedDataParallel(model) if ranks() > 1 else model


def told_by_first(compute: Callable[[], T]) -> T:
    """Return what the first rank computes, on all ranks."""
    if ranks() == 1:
        return compute()
    told = [compute() if rank() == 0 else None]
    dist.broadcast_object_list(told)
    return told[0]  # type: ignore[return-value]
