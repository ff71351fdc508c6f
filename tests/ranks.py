"""Tests in several real processes, which find each other by gloo: started once, for one test after another."""

import atexit
import multiprocessing
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from time import monotonic
from traceback import format_exc
from typing import Any

import pytest
import torch
import torch.distributed as dist

PATIENCE = 120  # seconds that a test has: ranks that wait for each other would never end
PATIENCE_AFTER_FAILURE = 5  # since others may wait for the rank that has failed


def on_ranks(world_size: int, check: Callable[..., None], folder: Path, *arguments: Any) -> None:
    """Call a function of a test module on so many ranks; `folder` is for them to meet, and is to be empty."""
    while len(_workers) < world_size:
        _workers.append(_Worker())
    ranks = _workers[:world_size]
    for rank, worker in enumerate(ranks):
        worker.pipe.send((rank, world_size, str(folder / "store"), check, arguments))
    problems = _problems(ranks)
    assert not problems, "\n".join(problems)


def distributed_test(world_size: Sequence[int]) -> Callable[[Callable[[], None]], Any]:
    """Run a function of a test module on so many ranks, as a test for each number of them."""

    def decorate(check: Callable[[], None]) -> Any:
        @pytest.mark.parametrize("world_size", world_size)
        def test(world_size: int, tmp_path: Path) -> None:
            on_ranks(world_size, test, tmp_path)

        for name in ("__name__", "__qualname__", "__module__", "__doc__"):  # by which a process finds it again
            setattr(test, name, getattr(check, name))
        test.check = check  # type: ignore[attr-defined]
        return test

    return decorate


class _Worker:
    """A process that is a rank of one test after another."""

    def __init__(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.pipe, theirs = spawn.Pipe()
        self.process = spawn.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()


_workers: list[_Worker] = []


def _problems(ranks: Sequence[_Worker]) -> list[str]:
    """Wait for the ranks, and return the traceback of each that has failed; after a failure others end soon."""
    pending, end = {worker.pipe: rank for rank, worker in enumerate(ranks)}, monotonic() + PATIENCE
    problems = []
    while pending and (ready := wait(list(pending), max(0.0, end - monotonic()))):
        for pipe in ready:
            rank = pending.pop(pipe)  # type: ignore[call-overload]
            try:
                problem = pipe.recv()  # type: ignore[union-attr]
            except EOFError:
                problem = "its process is gone"
            if problem is not None:
                problems.append(f"rank {rank}: {problem}")
                end = min(end, monotonic() + PATIENCE_AFTER_FAILURE)
    problems += [f"rank {rank} has not ended" for rank in pending.values()]
    if problems:
        _end_all()
    return problems


@atexit.register
def _end_all() -> None:
    while _workers:
        worker = _workers.pop()
        worker.process.kill()
        worker.process.join()


def _serve(pipe: "Connection[Any, Any]") -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("error", module="decorr_fx")
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        try:
            _run(*job)
        except BaseException:
            pipe.send(format_exc())
        else:
            pipe.send(None)


def _run(rank: int, world_size: int, store: str, check: Any, arguments: tuple[Any, ...]) -> None:
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    try:
        getattr(check, "check", check)(*arguments)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
