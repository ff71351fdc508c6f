"""The table of a case with the bars beside it, and the table of a file."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from tools.bench.cases import Bars, Case
from tools.bench.measure import PHASES, Spread
from tools.bench.results import Result
from tools.common.errors import UsageError
from tools.common.tables import markdown_table


def case_table(case: Case, results: Sequence[Result]) -> Table:
    """Return the table of a case; bars stand beside the first method after the plain model."""
    table = Table(title=case.title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("method", no_wrap=True)
    timed = ("ms a step", "ratio (quartiles)", "bar", "first 250 steps", *PHASES, "eval ratio", "bar")
    for name in (*timed, "peak MiB", "ratio", "bar"):
        table.add_column(name, justify="right", no_wrap=True)
    plain = results[0]
    for i, result in enumerate(results):
        bars = case.bars if i == 1 else Bars()
        shares = [f"{result.phases[name]:.1f}" if result.phases else "-" for name in PHASES]
        table.add_row(
            result.method, f"{result.step.median:.1f}" if result.step else "-", _ratio(result.ratio), _bar(bars.step),
            _ratio(result.first_ratio), *shares, _ratio(result.evaluation_ratio), _bar(bars.evaluation),
            "-" if result.memory is None else f"{result.memory / 2**20:,.0f}",
            "-" if result.memory is None or plain.memory is None else f"{result.memory / plain.memory:.3f}",
            _bar(bars.memory),
        )  # fmt: skip
    return table


def costs_table(path: Path) -> str:
    """Return a Markdown table of a JSON file: of each case the plain model and the first method, and the bars.

    Raises:
        UsageError: the file is none that `write_json` wrote.
    """
    try:
        rows = [_row(measured) for measured in json.loads(path.read_text(encoding="utf-8"))["cases"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} cannot be read: {error}; measure again") from None
    headers = [
        "training step", "plain (ms)", "decorrelated (ms)", "ratio (quartiles)", "bar", "first 250 steps",
        "eval ratio (quartiles)", "peak memory", "bar",
    ]  # fmt: skip
    return markdown_table(headers, rows)


def _row(measured: Mapping[str, Any]) -> list[str]:
    case, (plain, first, *_) = measured["case"], measured["results"]
    bars = case["bars"]
    return [
        Case(**{**case, "methods": (), "bars": Bars()}).title,
        _told(plain["step"], "{median:.0f}"), _told(first["step"], "{median:.0f}"),
        _told(first["ratio"], "{median:.2f} ({low:.2f} - {high:.2f})"), _bar(bars["step"]),
        _told(first.get("first_ratio"), "{median:.2f}"),  # files of earlier versions have none
        _told(first["evaluation_ratio"], "{median:.2f} ({low:.2f} - {high:.2f})"),
        f"{first['memory'] / plain['memory']:.3f}" if first["memory"] else "-", _bar(bars["memory"]),
    ]  # fmt: skip


def _told(spread: Mapping[str, float] | None, form: str) -> str:
    return "-" if spread is None else form.format(**spread)


def _ratio(spread: Spread | None) -> str:
    return "-" if spread is None else f"{spread.median:.3f} ({spread.low:.3f} - {spread.high:.3f})"


def _bar(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
