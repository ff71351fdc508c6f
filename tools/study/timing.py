"""How long the first steps of each method take: methods take turns in one process, with nothing beside them.

R moves at each of the first steps, and then ever more seldom, so that the first ones are timed as they are.
"""

import statistics
from collections.abc import Sequence
from itertools import accumulate, islice

import torch

from tools.study.clock import Clock
from tools.study.grid import Run
from tools.study.run import CPU, contender_of
from tools.study.workloads import WORKLOADS

TURN, TURNS = 32, 4  # steps; the last turn stands for all that come later
REPEATS = 3


def time_runs(runs: Sequence[Run]) -> list[Clock]:
    """Return the clock of each run, all of one workload: medians over a few repeats from the start, by one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        repeats = [_race(runs) for _ in range(REPEATS)]
    finally:
        torch.set_num_threads(threads)
    steps = [TURN * turn for turn in range(TURNS + 1)]
    return [Clock(steps, _typical([repeat[i] for repeat in repeats])) for i in range(len(runs))]


def _typical(repeats: Sequence[Sequence[float]]) -> list[float]:
    return list(accumulate(statistics.median(of_turn) for of_turn in zip(*repeats, strict=True)))


def _race(runs: Sequence[Run]) -> list[list[float]]:
    """Return of each run the seconds before its first step, and of each turn."""
    workload = WORKLOADS[runs[0].workload]
    stream = workload.data.load(runs[0].seed).training_batches(workload.batch_size, runs[0].seed, CPU)
    contenders = [contender_of(run, TURN * TURNS) for run in runs]
    times = [[contender.seconds] for contender in contenders]
    for contender in contenders:
        contender.warm_up(next(stream))
    for turn in range(TURNS):
        batches = list(islice(stream, TURN))
        for contender, of_contender in list(zip(contenders, times, strict=True))[:: 1 if turn % 2 else -1]:
            before = contender.seconds
            contender.train(batches)
            of_contender.append(contender.seconds - before)
    return times
