"""How long the first steps of each method take, in a file of results and read off it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tools.study.grid import Run

Key = tuple[str, str, str]  # workload, optimizer, method


@dataclass(frozen=True)
class Clock:
    """Seconds of training after so many steps; both start with 0 steps, and the seconds of what comes before them."""

    steps: Sequence[float]
    seconds: Sequence[float]

    def at(self, step: float) -> float:
        """Return the seconds of training up to a step; beyond the last measured one it goes on as at the end."""
        if step <= self.steps[-1]:
            return float(np.interp(step, self.steps, self.seconds))
        pace = (self.seconds[-1] - self.seconds[-2]) / (self.steps[-1] - self.steps[-2])
        return self.seconds[-1] + pace * (step - self.steps[-1])


def timing_line(runs: Sequence[Run], clocks: Sequence[Clock]) -> dict[str, Any]:
    """Return the line of a results file for what was timed side by side, all on one workload."""
    timed = [
        {"optimizer": run.optimizer, "method": run.method, "config": dict(run.config), "steps": list(clock.steps),
         "seconds": list(clock.seconds)}
        for run, clock in zip(runs, clocks, strict=True)
    ]  # fmt: skip
    return {"timing": runs[0].workload, "timed": timed}


def clocks_of(lines: Iterable[Mapping[str, Any]], methods: Mapping[str, Mapping[str, Any]]) -> dict[Key, Clock]:
    """Return what `timing_line` wrote of methods with these settings, the latest of each."""
    return {
        (line["timing"], timed["optimizer"], timed["method"]): Clock(timed["steps"], timed["seconds"])
        for line in lines
        for timed in line.get("timed", ())
        if methods.get(timed["method"]) == timed["config"]
    }
