"""What is told of a run: the table, the JSON file, and the coverage table of all JSON files."""

import json
import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from tabulate import tabulate

from tools.zoo.examples import Library
from tools.zoo.record import STAGES, Record
from tools.zoo.settings import LIBRARIES, Limits, UsageError


@dataclass(frozen=True)
class Results:
    """The JSON file of one library: what it was checked with, and one record a model."""

    header: Mapping[str, Any]
    records: Sequence[Record]

    def write(self, folder: Path) -> Path:
        """Write the file, whole or not at all."""
        path = results_path(folder, str(self.header["library"]))
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        whole = {**self.header, "models": [_finite(record.as_json()) for record in self.records]}
        temporary.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
        return path

    def with_records(self, records: Iterable[Record], order: Sequence[str]) -> "Results":
        """Return the results with these records, in the order of the library's list."""
        place = {name: i for i, name in enumerate(order)}
        return Results(self.header, sorted(records, key=lambda record: place.get(record.name, len(place))))


def results_path(folder: Path, library: str) -> Path:
    """Return where the results of a library are."""
    return folder / f"zoo-{library}.json"


def read_results(path: Path) -> Results | None:
    """Return the results in a file, or None where there is none; raise `UsageError` where it cannot be read."""
    if not path.exists():
        return None
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
        records = [Record.from_json(record) for record in whole.pop("models")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} cannot be read: {error}; move it away") from None
    return Results(whole, records)


def header_of(library: Library, limits: Limits) -> dict[str, Any]:
    """Return what a library is checked with: records of another header say nothing about this one."""
    device = torch.cuda.get_device_name(limits.device) if limits.device.startswith("cuda") else limits.device
    asked_for = {"onnx": limits.onnx, "compile": limits.compile}
    return {
        "library": library.name,
        "device": device,
        "machine": platform.machine(),
        "versions": {name: version(name) for name in library.packages},
        "stages": [stage for stage in STAGES if asked_for.get(stage, True)],
    }


def results_table(library: str, records: Sequence[Record]) -> Table:
    """Return the table of a run, one row a model."""
    table = Table(title=library, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("model", no_wrap=True)
    for name in ("parameters", "weights", "sites", "eval", "fold", "ONNX", "s", "GiB"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("result", overflow="fold")
    for record in records:
        errors = [_error(record.errors.get(name)) for name in ("eval", "fold", "onnx")]
        numbers = [f"{record.parameters:,}", str(record.weights), str(record.sites), *errors]
        table.add_row(record.name, *numbers, f"{record.total_seconds:.0f}", f"{record.memory:.1f}", _told(record))
    return table


def summary_line(library: str, records: Sequence[Record]) -> str:
    """Return how many models passed, failed and were skipped."""
    counts = {status: sum(record.status == status for record in records) for status in ("passed", "failed", "skipped")}
    return f"{library}: " + ", ".join(f"{count} {status}" for status, count in counts.items())


def failure_line(library: str, record: Record) -> str:
    """Return the failure of a model: its name, the stage and the reason."""
    return f"FAILED {library}:{record.name} at {record.stage}: {record.reason}"


def coverage_table(folder: Path) -> str:
    """Return a Markdown table over the JSON files of a folder; raise `UsageError` where there is none."""
    found = [results for name in LIBRARIES if (results := read_results(results_path(folder, name))) is not None]
    if not found:
        raise UsageError(f"no zoo-*.json in {folder}; run python -m tools.zoo first")
    headers = [
        "library", "models", "passed", "conv and linear weights", "of which sites (%)", "largest fold error",
        "ONNX exported: plain, folded", "largest ONNX error",
    ]  # fmt: skip
    return tabulate([_coverage(results) for results in found], headers, tablefmt="github", disable_numparse=True)


def _coverage(results: Results) -> list[str]:
    checked = [record for record in results.records if record.status != "skipped"]
    weights, sites = sum(record.weights for record in checked), sum(record.sites for record in checked)
    folded = sum(record.onnx == "exported" and record.status == "passed" for record in checked)
    plain = sum(record.onnx == "exported" or (record.stage == "onnx" and not record.onnx) for record in checked)
    library = str(results.header["library"])
    return [
        f"{library} {results.header['versions'].get(library, '')}".strip(),
        str(len(checked)),
        str(sum(record.status == "passed" for record in checked)),
        f"{weights:,}",
        f"{100 * sites / weights:.1f}" if weights else "-",
        _largest(checked, "fold"),
        f"{plain}, {folded}",
        _largest(checked, "onnx"),
    ]


def _largest(records: Sequence[Record], name: str) -> str:
    return _error(max((record.errors[name] for record in records if name in record.errors), default=None))


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def _told(record: Record) -> str:
    if record.status == "failed":
        return f"failed at {record.stage}: {record.reason}"
    if record.status == "skipped":
        return f"skipped: {record.reason}"
    notes = [] if record.onnx in ("", "exported") else [record.onnx]
    notes += [] if record.finite else ["its own outputs are not finite"]
    return "passed" + "".join(f"; {note}" for note in notes)


def _finite(tree: Any) -> Any:
    """Return the tree with numbers that JSON does not have as text."""
    if isinstance(tree, float) and not math.isfinite(tree):
        return str(tree)
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    return tree
