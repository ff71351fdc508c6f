"""Tests in several real processes, which find each other by gloo."""

from collections.abc import Callable, Sequence
from pathlib import Path
from time import sleep
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_ranks(world_size: int, check: Callable[..., None], folder: Path, *arguments: Any) -> None:
    """Call a function of a test module on so many ranks; `folder` is for them to meet, and is to be empty."""
    mp.spawn(_run, (world_size, str(folder / "store"), check, arguments), nprocs=world_size)


def distributed_test(world_size: Sequence[int]) -> Callable[[Callable[[], None]], Any]:
    """Run a function of a test module on so many ranks, as a test for each number of them."""

    def decorate(check: Callable[[], None]) -> Any:
        @pytest.mark.parametrize("world_size", world_size)
        def test(world_size: int, tmp_path: Path) -> None:
            on_ranks(world_size, test, tmp_path)

        for name in ("__name__", "__qualname__", "__module__", "__doc__"):  # by which a new process finds it again
            setattr(test, name, getattr(check, name))
        test.check = check  # type: ignore[attr-defined]
        return test

    return decorate


def _run(rank: int, world_size: int, store: str, check: Any, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    try:
        getattr(check, "check", check)(*arguments)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        # a thread of gloo lets go of the last message a little later, for which it needs Python: it must not be gone;
        # here for messages of torch itself, for those of ours decorr_fx sees to it
        sleep(0.1)
