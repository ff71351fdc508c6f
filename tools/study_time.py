"""What a step of each method costs: methods take turns in one process, with nothing beside them."""

import statistics
from collections.abc import Sequence
from itertools import islice

import torch
from study_grid import Run
from study_run import CPU, contender_of
from study_workloads import WORKLOADS

TURN = 32  # steps: four moves of R on average
TURNS = 5  # that are timed, after one that is not


def step_milliseconds(runs: Sequence[Run]) -> list[float]:
    """Return the median over turns of the milliseconds a step of each run; all are of one workload.

    Uses one thread, as the runs themselves do.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _race(runs)
    finally:
        torch.set_num_threads(threads)


def _race(runs: Sequence[Run]) -> list[float]:
    workload = WORKLOADS[runs[0].workload]
    contenders = [contender_of(run, TURN * (TURNS + 1)) for run in runs]
    stream = workload.data.load(runs[0].seed).training_batches(workload.batch_size, runs[0].seed, CPU)
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(TURNS + 1):
        batches = list(islice(stream, TURN))
        for contender, of_contender in list(zip(contenders, times, strict=True))[:: 1 if turn % 2 else -1]:
            before = contender.seconds
            contender.train(batches)
            if turn:
                of_contender.append(1000 * (contender.seconds - before) / TURN)
    return [statistics.median(values) for values in times]
