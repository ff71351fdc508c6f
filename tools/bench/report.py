"""What came of a case: the table with the bars beside it, and the JSON file."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from tabulate import tabulate

from tools.bench.cases import Bars, Case
from tools.bench.measure import PHASES, Contender, Spread
from tools.bench.methods import CannotMeasureError


@dataclass(frozen=True)
class Result:
    """One method on one case.

    Attributes:
        method: which one.
        steps: how many were timed.
        step: milliseconds of a training step.
        phases: milliseconds of each part of it, medians.
        ratio: of the step to the plain model's median.
        evaluation: milliseconds of a forward in eval mode.
        evaluation_ratio: likewise.
        memory: peak bytes of training; None where it was not measured.
    """

    method: str
    steps: int = 0
    step: Spread | None = None
    phases: dict[str, float] = field(default_factory=dict)
    ratio: Spread | None = None
    evaluation: Spread | None = None
    evaluation_ratio: Spread | None = None
    memory: int | None = None


def result_of(contender: Contender, plain: Contender, memory: int | None) -> Result:
    """Summarise what was measured of a contender."""
    step, forward = contender.step_spread(), Spread.of(contender.evaluations)
    phases = {name: contender.phase_spread(i).median for i, name in enumerate(PHASES)}
    ratio = step.times(1 / plain.step_spread().median)
    evaluation_ratio = forward.times(1 / Spread.of(plain.evaluations).median)
    return Result(contender.method, contender.measured, step, phases, ratio, forward, evaluation_ratio, memory)


def case_table(case: Case, results: Sequence[Result]) -> Table:
    """Return the table of a case; bars stand beside the first method after the plain model."""
    table = Table(title=case.title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("method", no_wrap=True)
    for name in ("ms a step", "ratio (quartiles)", "bar", *PHASES, "eval ratio", "bar", "peak MiB", "ratio", "bar"):
        table.add_column(name, justify="right", no_wrap=True)
    plain = results[0]
    for i, result in enumerate(results):
        bars = case.bars if i == 1 else Bars()
        shares = [f"{result.phases[name]:.1f}" if result.phases else "-" for name in PHASES]
        table.add_row(
            result.method, f"{result.step.median:.1f}" if result.step else "-", _ratio(result.ratio), _bar(bars.step),
            *shares, _ratio(result.evaluation_ratio), _bar(bars.evaluation),
            "-" if result.memory is None else f"{result.memory / 2**20:,.0f}",
            "-" if result.memory is None or plain.memory is None else f"{result.memory / plain.memory:.3f}",
            _bar(bars.memory),
        )  # fmt: skip
    return table


def markdown_table(path: Path) -> str:
    """Return a Markdown table of a JSON file: of each case the plain model and the first method, and the bars.

    Raises:
        CannotMeasureError: the file is none that `write_json` wrote.
    """
    try:
        rows = [_row(measured) for measured in json.loads(path.read_text(encoding="utf-8"))["cases"]]
    except (ValueError, KeyError, TypeError) as error:
        raise CannotMeasureError(f"{path} cannot be read: {error}; measure again") from None
    headers = [
        "training step", "plain (ms)", "decorrelated (ms)", "ratio (quartiles)", "bar", "eval ratio (quartiles)",
        "peak memory", "bar",
    ]  # fmt: skip
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def _row(measured: Mapping[str, Any]) -> list[str]:
    case, (plain, first, *_) = measured["case"], measured["results"]
    bars = case["bars"]
    return [
        Case(**{**case, "methods": (), "bars": Bars()}).title,
        _told(plain["step"], "{median:.0f}"), _told(first["step"], "{median:.0f}"),
        _told(first["ratio"], "{median:.2f} ({low:.2f} - {high:.2f})"), _bar(bars["step"]),
        _told(first["evaluation_ratio"], "{median:.2f} ({low:.2f} - {high:.2f})"),
        f"{first['memory'] / plain['memory']:.3f}" if first["memory"] else "-", _bar(bars["memory"]),
    ]  # fmt: skip


def _told(spread: Mapping[str, float] | None, form: str) -> str:
    return "-" if spread is None else form.format(**spread)


def _ratio(spread: Spread | None) -> str:
    return "-" if spread is None else f"{spread.median:.3f} ({spread.low:.3f} - {spread.high:.3f})"


def _bar(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def write_json(path: Path, measured: Sequence[tuple[Case, Sequence[Result]]]) -> None:
    """Write what was measured, with what it was measured on; whole or not at all."""
    cases = [{"case": asdict(case), "results": [asdict(result) for result in results]} for case, results in measured]
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps({**_environment(measured), "cases": cases}, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _environment(measured: Sequence[tuple[Case, Sequence[Result]]]) -> dict[str, Any]:
    on_gpu = any(case.device.startswith("cuda") for case, _ in measured)
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if on_gpu else platform.machine(),
        "threads": torch.get_num_threads(),
        "unit": "milliseconds; ratios are to the plain model; low and high are quartiles",
    }
