"""What came of a case, and the JSON file of several."""

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from tools.bench.cases import Case
from tools.bench.measure import PHASES, Contender, Spread
from tools.common.files import write_whole


@dataclass(frozen=True)
class Result:
    """One method on one case.

    Attributes:
        method: which one.
        steps: how many were timed.
        step: milliseconds of a training step.
        phases: milliseconds of each part of it, medians.
        ratio: of the step to the plain model's median, in a long training.
        first_ratio: likewise, in the first 250 steps, in which R moves more often.
        evaluation: milliseconds of a forward in eval mode.
        evaluation_ratio: likewise.
        memory: peak bytes of training; None where it was not measured.
    """

    method: str
    steps: int = 0
    step: Spread | None = None
    phases: dict[str, float] = field(default_factory=dict)
    ratio: Spread | None = None
    first_ratio: Spread | None = None
    evaluation: Spread | None = None
    evaluation_ratio: Spread | None = None
    memory: int | None = None


def result_of(contender: Contender, plain: Contender, memory: int | None) -> Result:
    """Summarise what was measured of a contender."""
    step, forward = contender.step_spread(), Spread.of(contender.evaluations)
    phases = {name: contender.phase_spread(i).median for i, name in enumerate(PHASES)}
    of_plain = 1 / plain.step_spread().median
    ratio, first_ratio = step.times(of_plain), contender.step_spread(first=True).times(of_plain)
    evaluation_ratio = forward.times(1 / Spread.of(plain.evaluations).median)
    return Result(
        contender.method, contender.measured, step, phases, ratio, first_ratio, forward, evaluation_ratio, memory
    )  # fmt: skip


def write_json(path: Path, measured: Sequence[tuple[Case, Sequence[Result]]]) -> None:
    """Write what was measured, with what it was measured on; whole or not at all."""
    cases = [{"case": asdict(case), "results": [asdict(result) for result in results]} for case, results in measured]
    write_whole(path, json.dumps({**_environment(measured), "cases": cases}, indent=1) + "\n")


def _environment(measured: Sequence[tuple[Case, Sequence[Result]]]) -> dict[str, Any]:
    on_gpu = any(case.device.startswith("cuda") for case, _ in measured)
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if on_gpu else platform.machine(),
        "threads": torch.get_num_threads(),
        "unit": "milliseconds; ratios are to the plain model; low and high are quartiles",
    }
