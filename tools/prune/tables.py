"""What came of pruning: the tables, and the picture of accuracy over multiply-adds."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tabulate import tabulate

from tools.prune.methods import OURS, PEERS

Line = Mapping[str, Any]
SCOPES = ("by layer", "everywhere")
MEASURED = ("accuracy", "new_statistics")
COLOURS = {name: f"C{i}" for i, name in enumerate((OURS, *PEERS))}


def short_table(lines: Sequence[Line]) -> str:
    """Return the table of the budget at which results are trained on: mean and deviation over seeds, in percent.

    Of each peer the better scope, for each column; trained on is the one that validation images chose.
    """
    headers = ["network", "method", "right after", "BatchNorm statistics anew", "after an epoch"]
    return tabulate(list(_short_rows(lines)), headers, tablefmt="github", disable_numparse=True)


def _short_rows(lines: Sequence[Line]) -> Iterator[list[str]]:
    for net in _nets(lines):
        own = [line for line in lines if line["run"]["net"] == net]
        yield [net, f"not pruned, n={len(own)}", _spread(line["whole"]["accuracy"] for line in own), "", ""]
        for method in (OURS, *PEERS):
            scopes = [[row for _, row in _found(own, own[0]["run"]["tuned"], method, scope)] for scope in SCOPES]
            tuned = [row["fine_tuned"] for rows in scopes for row in rows if row["fine_tuned"] is not None]
            best = [max(filter(None, ([row[what] for row in rows] for rows in scopes)), key=mean) for what in MEASURED]
            yield [net, method, *map(_spread, best), _spread(tuned)]


def accuracy_table(lines: Sequence[Line]) -> str:
    """Return the table of everything: mean and deviation over seeds, in percent."""
    headers = [
        "network", "multiply-adds", "method", "units ranked", "parameters", "right after",
        "BatchNorm statistics anew", "after an epoch",
    ]  # fmt: skip
    return tabulate(list(_rows(lines)), headers, tablefmt="github", disable_numparse=True)


def _rows(lines: Sequence[Line]) -> Iterator[list[str]]:
    for net in _nets(lines):
        own = [line for line in lines if line["run"]["net"] == net]
        yield [net, "100%", f"not pruned, n={len(own)}", "", "100%", _spread(line["whole"]["accuracy"] for line in own),
               "", ""]  # fmt: skip
        for keep in _budgets(own):
            for method in (OURS, *PEERS):
                for scope in SCOPES:
                    if found := _found(own, keep, method, scope):
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


def _nets(lines: Sequence[Line]) -> list[str]:
    return list(dict.fromkeys(line["run"]["net"] for line in lines))


def _budgets(lines: Sequence[Line]) -> list[float]:
    return sorted({row["keep"] for line in lines for row in line["pruned"]}, reverse=True)


def _found(lines: Sequence[Line], keep: float, method: str, scope: str) -> list[tuple[Line, Line]]:
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
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def draw(path: Path, lines: Sequence[Line]) -> None:
    """Draw accuracy right after pruning over the part of the multiply-adds that is left, a panel a network.

    Of each peer the better scope at each budget; dashed with new BatchNorm statistics.
    """
    nets = _nets(lines)
    figure = Figure(figsize=(5.2 * len(nets), 4.2), layout="constrained")
    axes = figure.subplots(1, len(nets), squeeze=False, sharey=True)[0]
    for ax, net in zip(axes, nets, strict=True):
        _draw_net(ax, net, [line for line in lines if line["run"]["net"] == net])
    axes[0].set_ylabel("test accuracy, not fine-tuned (%)")
    axes[0].legend(fontsize="small", loc="lower right")
    figure.savefig(path, dpi=120)


def _draw_net(ax: Axes, net: str, lines: Sequence[Line]) -> None:
    whole = 100 * mean(line["whole"]["accuracy"] for line in lines)
    ax.axhline(whole, color="black", lw=0.8, ls=":")
    for method in (OURS, *PEERS):
        ax.plot(*_curve(lines, method, "accuracy", whole), marker="o", color=COLOURS[method], label=method)
        if method != OURS:
            ax.plot(*_curve(lines, method, "new_statistics", whole), ls="--", marker=".", color=COLOURS[method])
    ax.set_title(f"{net}; dashed: BatchNorm statistics estimated anew", fontsize="medium")
    ax.set_xlabel("multiply-adds left (%)")
    ax.grid(alpha=0.3)


def _curve(lines: Sequence[Line], method: str, what: str, whole: float) -> tuple[list[float], list[float]]:
    x, y = [100.0], [whole]
    for keep in _budgets(lines):
        of_scopes = ([row[what] for _, row in _found(lines, keep, method, scope)] for scope in SCOPES)
        x.append(100 * keep)
        y.append(100 * max(map(mean, filter(None, of_scopes))))
    return x, y
