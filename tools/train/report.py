"""What is told of a run: the table at the end, and a line about the export."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from decorr_fx import ExportReport
from tools.train.figures import NAMES
from tools.train.loop import Contender, Evaluation, Score
from tools.train.settings import Settings


def best_of(history: Sequence[Evaluation]) -> Evaluation:
    """Return the first evaluation with the best validation accuracy."""
    return max(history, key=lambda evaluation: evaluation.val_accuracy)


def first_at(history: Sequence[Evaluation], accuracy: float) -> Evaluation | None:
    """Return the first evaluation whose validation accuracy is at least `accuracy`."""
    return next((evaluation for evaluation in history if evaluation.val_accuracy >= accuracy), None)


def result_of(contender: Contender, others: Sequence[Contender], test: Score | None) -> dict[str, Any]:
    """Return what a method has reached; `test` is None where training was cut short."""
    history, best = contender.history, best_of(contender.history)
    rival = max((best_of(other.history).val_accuracy for other in others if other.history), default=None)
    reached = None if rival is None else first_at(history, rival)
    return {
        "method": contender.method,
        "steps": history[-1].step,
        "seconds": history[-1].seconds,
        "val_loss": history[-1].val_loss,
        "val_accuracy": history[-1].val_accuracy,
        "best_val_accuracy": best.val_accuracy,
        "test_loss": test and test.loss,
        "test_accuracy": test and test.accuracy,
        "others_best": rival,
        "steps_to_others_best": reached and reached.step,
        "seconds_to_others_best": reached and reached.seconds,
    }


def results_table(results: Sequence[Mapping[str, Any]], settings: Settings) -> Table:
    """Return the table of what every method has reached."""
    caption = (
        f"Same initial weights and batches, {settings.optimizer} from lr {settings.lr:g} linearly to 0 for all. "
        "Time is that of training steps alone. The other's best is its highest validation accuracy, reached where an "
        "evaluation first shows it. The test set is used once, at the end."
    )
    table = Table(title=f"{settings.model} on {settings.data}", caption=caption, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("method", no_wrap=True)
    rows: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "test acc. (%)": lambda r: _percent(r["test_accuracy"]),
        "test loss": lambda r: _number(r["test_loss"], ".4f"),
        "best val. acc. (%)": lambda r: _percent(r["best_val_accuracy"]),
        "time (s)": lambda r: _number(r["seconds"], ".1f"),
        "ms per step": lambda r: _number(1000 * r["seconds"] / max(r["steps"], 1), ".1f"),
    }
    if len(results) > 1:
        rows["steps to best of other"] = lambda r: _number(r["steps_to_others_best"], "d")
        rows["time to it (s)"] = lambda r: _number(r["seconds_to_others_best"], ".1f")
    for name in rows:
        table.add_column(name, justify="right", min_width=6)
    for result in results:
        table.add_row(NAMES[result["method"]], *(cell(result) for cell in rows.values()))
    return table


def export_line(report: ExportReport) -> str:
    """Return one line about the exported file."""
    operators = ", ".join(f"{count} {name}" for name, count in report.operators.items())
    return f"{report.path}: {operators}; {report.provider} differs by {report.max_error:.1e} of the largest output"


def _percent(value: float | None) -> str:
    return _number(value and 100 * value, ".2f")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"
