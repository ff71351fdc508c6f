"""The tables of what came of pruning."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from tools.common.tables import markdown_table
from tools.prune.methods import OURS, PEERS

Line = Mapping[str, Any]
SCOPES = ("by layer", "everywhere")
MEASURED = ("accuracy", "new_statistics")


def short_table(lines: Sequence[Line]) -> str:
    """Return the table of the budget at which results are trained on: mean and deviation over seeds, in percent.

    Of each peer the better scope, for each column; trained on is the one that validation images chose.
    """
    headers = ["network", "method", "right after", "BatchNorm statistics anew", "after an epoch"]
    return markdown_table(headers, _short_rows(lines))


def _short_rows(lines: Sequence[Line]) -> Iterator[list[str]]:
    for net in nets_of(lines):
        own = [line for line in lines if line["run"]["net"] == net]
        yield [net, f"not pruned, n={len(own)}", _spread(line["whole"]["accuracy"] for line in own), "", ""]
        for method in (OURS, *PEERS):
            scopes = [[row for _, row in rows_of(own, own[0]["run"]["tuned"], method, scope)] for scope in SCOPES]
            tuned = [row["fine_tuned"] for rows in scopes for row in rows if row["fine_tuned"] is not None]
            best = [max(filter(None, ([row[what] for row in rows] for rows in scopes)), key=mean) for what in MEASURED]
            yield [net, method, *map(_spread, best), _spread(tuned)]


def accuracy_table(lines: Sequence[Line]) -> str:
    """Return the table of everything: mean and deviation over seeds, in percent."""
    headers = [
        "network", "multiply-adds", "method", "units ranked", "parameters", "right after",
        "BatchNorm statistics anew", "after an epoch",
    ]  # fmt: skip
    return markdown_table(headers, _rows(lines))


def _rows(lines: Sequence[Line]) -> Iterator[list[str]]:
    for net in nets_of(lines):
        own = [line for line in lines if line["run"]["net"] == net]
        yield [net, "100%", f"not pruned, n={len(own)}", "", "100%", _spread(line["whole"]["accuracy"] for line in own),
               "", ""]  # fmt: skip
        for keep in budgets_of(own):
            for method in (OURS, *PEERS):
                for scope in SCOPES:
                    if found := rows_of(own, keep, method, scope):
                        yield [net, *_row(found, method, scope)]


def _row(found: Sequence[tuple[Line, Line]], method: str, scope: str) -> list[str]:
    rows = [row for _, row in found]
    tuned = [row["fine_tuned"] for row in rows if row["fine_tuned"] is not None]
    parts = [mean(row[size] / line["whole"][size] for line, row in found) for size in ("macs", "params")]
    count = f", n={len(tuned)}" if 0 < len(tuned) < len(rows) else ""
    return [
        f"{parts[0]:.1%}", method, scope, f"{parts[1]:.0%}", *(_spread(row[what] for row in rows) for what in MEASURED),
        _spread(tuned) + count,
    ]  # fmt: skip


def nets_of(lines: Sequence[Line]) -> list[str]:
    """Return the networks, in order."""
    return list(dict.fromkeys(line["run"]["net"] for line in lines))


def budgets_of(lines: Sequence[Line]) -> list[float]:
    """Return the budgets, the largest first."""
    return sorted({row["keep"] for line in lines for row in line["pruned"]}, reverse=True)


def rows_of(lines: Sequence[Line], keep: float, method: str, scope: str) -> list[tuple[Line, Line]]:
    """Return what a method gave at a budget, a row a seed, each with the line that it is of."""
    wanted = (keep, method, scope)
    return [
        (line, row) for line in lines for row in line["pruned"] if (row["keep"], row["method"], row["scope"]) == wanted
    ]


def _spread(values: Iterable[float]) -> str:
    found = [100 * value for value in values]
    if not found:
        return ""
    return f"{mean(found):.1f}" + (f" ({stdev(found):.1f})" if len(found) > 1 else "")


def latency_table(latency: Mapping[str, Sequence[Line]]) -> str:
    """Return the table of times in onnxruntime."""
    rows = [
        [net, one["round_to"], f"{one['macs']:.3f}", f"{100 * one['accuracy']:.1f}", one["batch"],
         f"{one['whole_ms']:.2f}", f"{one['small_ms']:.2f}",
         f"{one['ratio']:.2f} ({one['quartiles'][0]:.2f} - {one['quartiles'][1]:.2f})"]
        for net, found in latency.items() for one in found
    ]  # fmt: skip
    headers = [
        "network",
        "round_to",
        "multiply-adds",
        "accuracy",
        "batch",
        "whole (ms)",
        "pruned (ms)",
        "ratio (quartiles)",
    ]
    return markdown_table(headers, rows)
