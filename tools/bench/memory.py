"""Peak memory of training steps, each method in a process of its own."""

import gc
from dataclasses import replace
from pathlib import Path

import torch

from tools.bench.cases import Case
from tools.bench.measure import Contender
from tools.common.pool import processes

STEPS = 2  # the optimizer's state is there from the first one on


def peak_bytes(case: Case, method: str) -> int:
    """Return the most memory that training takes, over what torch itself takes before there is a model."""
    with processes(1) as pool:
        return pool.submit(_peak_here, case, method).result()


def _peak_here(case: Case, method: str) -> int:
    Contender(replace(case, model="linears", batch=1, width=8), method).train(1)  # what is loaded at the first use
    gc.collect()
    if case.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        Contender(case, method).train(STEPS)
        return torch.cuda.max_memory_allocated() - before
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    Contender(case, method).train(STEPS)
    return _status("VmHWM") - before


def _status(name: str) -> int:
    """Return a size in bytes of this process's status (Linux); ru_maxrss would count the parent's, too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
