"""Runs side by side, each process with one thread, so that no run waits for another's."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from threading import Thread
from typing import Any, TypeVar

import torch

Run = TypeVar("Run")


def perform_all(perform: Callable[[Run], dict[str, Any]], runs: Sequence[Run], jobs: int) -> Iterator[dict[str, Any]]:
    """Yield what `perform` made of each run, as they end; what still waits is dropped where the caller stops."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, context, initializer=_begin)
    try:
        yield from (future.result() for future in as_completed([pool.submit(perform, run) for run in runs]))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin() -> None:
    torch.set_num_threads(1)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process as soon as the one that started it is gone, however that ended: nobody would take the result."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
