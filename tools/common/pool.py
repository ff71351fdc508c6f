"""Work in other processes, several at once, which end with the process that started them."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from threading import Thread
from typing import TypeVar

import torch

Task = TypeVar("Task")
Result = TypeVar("Result")


def processes(count: int, threads: int | None = None) -> ProcessPoolExecutor:
    """Return new processes of so many threads each, or of torch's own number."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(count, context, initializer=begin, initargs=(threads,))


def perform_all(perform: Callable[[Task], Result], tasks: Sequence[Task], jobs: int) -> Iterator[Result]:
    """Yield what `perform` made of each task, as they end; each process has one thread, so that none waits."""
    with processes(jobs, threads=1) as pool:
        yield from (result for _, result in as_they_end(pool, perform, tasks))


def as_they_end(
    executor: Executor, perform: Callable[[Task], Result], tasks: Sequence[Task]
) -> Iterator[tuple[Task, Result]]:
    """Yield each task with its result; where the caller stops, what still waits is dropped."""
    pending = {executor.submit(perform, task): task for task in tasks}
    try:
        yield from ((pending[future], future.result()) for future in as_completed(pending))
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


def begin(threads: int | None = None) -> None:
    """Set up this process, which another one started: its number of threads, and its end with the other one."""
    if threads is not None:
        torch.set_num_threads(threads)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process as soon as the one that started it is gone, however that ended: nobody would take the result."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
