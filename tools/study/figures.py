"""The picture of a study: validation accuracy over steps."""

import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tools.study.summary import Summary


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
        whole = [summary.best.histories[seed] for seed in summary.best.whole]
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
