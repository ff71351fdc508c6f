"""What is told of a run: the table, and the coverage table of all JSON files."""

from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from tools.common.errors import UsageError
from tools.common.tables import markdown_table
from tools.zoo.record import Record
from tools.zoo.results import LibraryResults, read_results, results_path
from tools.zoo.settings import LIBRARIES


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
    return markdown_table(headers, [_coverage(results) for results in found])


def _coverage(results: LibraryResults) -> list[str]:
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
