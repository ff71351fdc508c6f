"""What came of pruning: the tables, and the picture of accuracy over multiply-adds."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from prune_methods import OURS, PEERS
from tabulate import tabulate

Line = Mapping[str, Any]
SCOPES = ("by layer", "everywhere")
COLOURS = {name: f"C{i}" for i, name in enumerate((OURS, *PEERS))}


def accuracy_table(lines: Sequence[Line]) -> str:
    """Return the table of accuracies after pruning: mean and deviation over seeds, in percent."""
    headers = [
        "network", "multiply-adds", "method", "units ranked", "parameters", "accuracy",
        "with new BatchNorm statistics", "after an epoch",
    ]  # fmt: skip
    return tabulate(list(_rows(lines)), headers, tablefmt="github", disable_numparse=True)


def _rows(lines: Sequence[Line]) -> Iterator[list[str]]:
    for net in dict.fromkeys(line["run"]["net"] for line in lines):
        own = [line for line in lines if line["run"]["net"] == net]
        yield [net, "100%", "not pruned", "", "100%", _spread(line["whole"]["accuracy"] for line in own), "", ""]
        for keep in sorted({row["keep"] for line in own for row in line["pruned"]}, reverse=True):
            for method, scope in _methods():
                found = [(line, row) for line in own for row in line["pruned"]
                         if (row["keep"], row["method"], row["scope"]) == (keep, method, scope)]  # fmt: skip
                if found:
                    yield [net, *_row(found, method, scope)]


def _row(found: Sequence[tuple[Line, Line]], method: str, scope: str) -> list[str]:
    rows = [row for _, row in found]
    tuned = [row["fine_tuned"] for row in rows if row["fine_tuned"] is not None]
    parts = [mean(row[size] / line["whole"][size] for line, row in found) for size in ("macs", "params")]
    return [
        f"{parts[0]:.1%}", method, scope, f"{parts[1]:.0%}", _spread(row["accuracy"] for row in rows),
        "" if method == OURS else _spread(row["new_statistics"] for row in rows), _spread(tuned),
    ]  # fmt: skip


def _methods() -> Iterator[tuple[str, str]]:
    yield OURS, "everywhere"
    yield from ((name, scope) for name in PEERS for scope in SCOPES)


def _spread(values: Iterable[float]) -> str:
    found = [100 * value for value in values]
    if not found:
        return ""
    return f"{mean(found):.1f}" + (f" ({stdev(found):.1f})" if len(found) > 1 else "") + f", n={len(found)}"


def latency_table(latency: Mapping[str, Sequence[Line]]) -> str:
    """Return the table of times in onnxruntime."""
    rows = [
        [net, one["batch"], f"{one['whole_ms']:.2f}", f"{one['small_ms']:.2f}",
         f"{one['ratio']:.2f} ({one['quartiles'][0]:.2f} - {one['quartiles'][1]:.2f})", f"{one['macs']:.2f}"]
        for net, found in latency.items() for one in found
    ]  # fmt: skip
    headers = ["network", "batch", "whole (ms)", "pruned (ms)", "ratio (quartiles)", "multiply-adds"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def draw(path: Path, lines: Sequence[Line]) -> None:
    """Draw accuracy right after pruning over the part of the multiply-adds that is left, a panel a network.

    Of each peer the better scope at each budget; dashed with new BatchNorm statistics.
    """
    nets = list(dict.fromkeys(line["run"]["net"] for line in lines))
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
    for keep in sorted({row["keep"] for line in lines for row in line["pruned"]}, reverse=True):
        best = []
        for scope in SCOPES:
            rows = [row[what] for line in lines for row in line["pruned"]
                    if (row["keep"], row["method"], row["scope"]) == (keep, method, scope)]  # fmt: skip
            best += [mean(rows)] if rows else []
        x.append(100 * keep)
        y.append(100 * max(best))
    return x, y
