"""What is told of a study: the table, and the picture."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from study_grid import PLAIN
from study_summary import PARTS, Summary, Target, Tried
from tabulate import tabulate

Milliseconds = Mapping[str, Mapping[tuple[str, str], float]]  # a step of each (optimizer, method), by workload

GOAL = "adam"  # the optimizer whose best accuracy is what all others are compared by


def markdown_table(summaries: Sequence[Summary], milliseconds: Milliseconds) -> str:
    """Return the table of all summaries."""
    targets = [f"steps to {part:.0%}" for part in PARTS]
    headers = [
        "workload", "optimizer", "method", "lr (tried)", *targets, "seconds to 100%", "test accuracy (%)",
        "steps to 100% at plain's lr",
    ]  # fmt: skip
    rows = [_row(summary, milliseconds.get(summary.workload, {})) for summary in summaries]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def _row(summary: Summary, milliseconds: Mapping[tuple[str, str], float]) -> list[str]:
    steps = [_steps(summary, summary.best, target) for target in summary.targets]
    return [
        summary.workload, summary.optimizer, summary.method, f"{summary.best.lr:g} ({summary.rates})", *steps,
        _seconds(summary, milliseconds), _accuracy(summary.best), _at_plain_rate(summary),
    ]  # fmt: skip


def _steps(summary: Summary, tried: Tried, target: Target) -> str:
    """Return mean and standard deviation over seeds of the steps to a target, and the ratio to the plain method's."""
    steps, ratio = list(tried.steps_of_seeds(target).values()), summary.ratio(tried, target)
    if ratio is None:
        return f"by {len(steps)} of {len(tried.histories)}"
    return f"{_mean(steps, 0)}: {ratio:.2f}"


def _mean(values: Sequence[float], digits: int) -> str:
    spread = f" ({statistics.stdev(values):.{digits}f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def _seconds(summary: Summary, milliseconds: Mapping[tuple[str, str], float]) -> str:
    """Return the seconds of training to the first target: steps, times what a step costs side by side."""
    own, plain = (milliseconds.get((summary.optimizer, method)) for method in (summary.method, PLAIN))
    steps, ratio = summary.steps[0], summary.ratios[0]
    if own is None or plain is None or steps is None or ratio is None:
        return "-"
    return f"{steps * own / 1000:.1f}: {ratio * own / plain:.2f}"


def _accuracy(tried: Tried) -> str:
    """Return mean and standard deviation of the test accuracy over seeds."""
    if not tried.tests:
        return "diverged"
    lost = f", {tried.diverged} diverged" if tried.diverged else ""
    return f"{_mean([100 * test for test in tried.tests], 1)}, n={len(tried.tests)}{lost}"


def _at_plain_rate(summary: Summary) -> str:
    if summary.method == PLAIN or summary.at_plain_rate is None:
        return "-"
    return _steps(summary, summary.at_plain_rate, summary.targets[0])


def goal_table(summaries: Sequence[Summary], milliseconds: Milliseconds) -> str:
    """Return steps and seconds of everything to one accuracy a workload: the best of plain backpropagation by GOAL.

    "by 2 of 3": of three seeds one does not get there.
    """
    goals = {s.workload: s.targets[0] for s in summaries if (s.optimizer, s.method) == (GOAL, PLAIN)}
    best = {(s.workload, s.optimizer, s.method): s.best for s in summaries}
    pairs = list(dict.fromkeys((s.optimizer, s.method) for s in summaries))
    rows = []
    for workload, goal in goals.items():
        times = milliseconds.get(workload, {})
        ways = [_way(best.get((workload, *pair)), goal, times.get(pair)) for pair in pairs]
        rows.append([f"{workload}, {statistics.mean(goal.values()):.1%}", *ways])
    headers = [optimizer if method == PLAIN else f"{optimizer}, {method}" for optimizer, method in pairs]
    return tabulate(rows, ["workload, accuracy", *headers], tablefmt="github", disable_numparse=True)


def _way(tried: Tried | None, goal: Target, milliseconds: float | None) -> str:
    """Return the steps to an accuracy, and the seconds that they take."""
    if tried is None:
        return ""
    steps = tried.steps_to(goal)
    if steps is None:
        return f"by {len(tried.steps_of_seeds(goal))} of {len(tried.histories)}"
    return f"{steps:.0f}" if milliseconds is None else f"{steps:.0f}, {steps * milliseconds / 1000:.1f} s"


def draw(path: Path, summaries: Sequence[Summary]) -> None:
    """Draw validation accuracy over steps, with each method's best rate; one panel a workload and optimizer."""
    panels = list(dict.fromkeys((s.workload, s.optimizer) for s in summaries))
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for ax, panel in zip(axes, panels, strict=False):
        _draw_panel(ax, [s for s in summaries if (s.workload, s.optimizer) == panel])
        ax.set_title(", ".join(panel))
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    figure.supxlabel("training steps")
    figure.supylabel("validation accuracy (%)")
    figure.savefig(path, dpi=120)


def _draw_panel(ax: Axes, summaries: Sequence[Summary]) -> None:
    lowest = []
    for summary in summaries:
        ended = [history for history in summary.best.histories.values() if history]
        whole = [history for history in ended if history[-1][0] >= summary.best.budget]
        if not whole:
            continue
        steps = [row[0] for row in whole[0]]
        accuracies = 100 * np.array([[row[3] for row in history] for history in whole])
        (line,) = ax.plot(steps, accuracies.mean(0), label=f"{summary.method}, lr {summary.best.lr:g}")
        if len(whole) > 1:
            ax.fill_between(steps, accuracies.min(0), accuracies.max(0), color=line.get_color(), alpha=0.2)
        lowest.append(np.quantile(accuracies, 0.2))
    ax.axhline(100 * statistics.mean(summaries[0].targets[0].values()), color="grey", lw=0.8, ls="--")
    if lowest:
        ax.set_ylim(bottom=min(lowest) - 2)
    ax.grid(alpha=0.3)
    ax.legend(fontsize="small", loc="lower right")


def timing_line(workload: str, milliseconds: Mapping[tuple[str, str], float]) -> dict[str, Any]:
    """Return the line of a results file that holds what a step of each (optimizer, method) costs."""
    return {"timing": workload, "milliseconds": [[*pair, value] for pair, value in milliseconds.items()]}


def milliseconds_of(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[tuple[str, str], float]]:
    """Return what `timing_line` wrote, of each workload the latest."""
    return {
        line["timing"]: {(optimizer, method): value for optimizer, method, value in line["milliseconds"]}
        for line in lines
        if "timing" in line
    }
