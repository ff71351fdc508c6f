"""The pictures of a run. A `Figure` made without pyplot draws with Agg: no display is needed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tools.train.correlations import Correlation
from tools.train.loop import Evaluation

NAMES = {"bp": "backpropagation", "decorr": "decorrelation"}
COLOURS = {"bp": "tab:orange", "decorr": "tab:blue"}
MOST_LAYERS, MOST_FEATURES = 4, 64


def draw_curves(path: Path, histories: Mapping[str, Sequence[Evaluation]], title: str) -> None:
    """Draw validation loss and accuracy over steps and over seconds of training, one line a method."""
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col", sharey="row")
    for column, x in enumerate(("step", "seconds")):
        for method, history in histories.items():
            _draw_history(axes[0, column], axes[1, column], x, method, history)
        axes[1, column].set_xlabel({"step": "training steps", "seconds": "seconds of training"}[x])
    _finish(axes)
    accuracies = [100 * e.val_accuracy for history in histories.values() for e in history]
    axes[1, 0].set_ylim(bottom=np.quantile(accuracies, 0.1) - 1)  # the end, where they differ, rather than the start
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def _draw_history(loss: Axes, accuracy: Axes, x: str, method: str, history: Sequence[Evaluation]) -> None:
    at = [getattr(evaluation, x) for evaluation in history]
    colour = COLOURS[method]
    train = [np.nan if e.train_loss is None else e.train_loss for e in history]
    loss.plot(at, [e.val_loss for e in history], color=colour, label=f"{NAMES[method]}, validation")
    loss.plot(at, train, color=colour, ls=":", lw=1.2, label=f"{NAMES[method]}, training")
    accuracy.plot(at, [100 * e.val_accuracy for e in history], color=colour, label=NAMES[method])


def _finish(axes: Any) -> None:
    for ax in axes.flat:
        ax.grid(alpha=0.3)
        ax.legend(fontsize="small")
    axes[0, 0].set_yscale("log")
    axes[0, 0].set_ylabel("loss (cross-entropy)")
    axes[1, 0].set_ylabel("validation accuracy (%)")


def draw_correlations(path: Path, stages: Mapping[str, Sequence[Correlation]], title: str) -> None:
    """Draw the correlations of a few layers spread over the depth: one row a stage of training, one column a layer."""
    depth = len(next(iter(stages.values())))
    columns = np.unique(np.linspace(0, depth - 1, min(MOST_LAYERS, depth)).round().astype(int))
    figure = Figure(figsize=(3 * len(columns) + 1.4, 3.1 * len(stages) + 0.8), layout="constrained")
    axes = figure.subplots(len(stages), len(columns), squeeze=False)
    for row, (stage, correlations) in zip(axes, stages.items(), strict=True):
        for ax, index in zip(row, columns, strict=True):
            image = _draw_matrix(ax, correlations[index])
        row[0].set_ylabel(stage, fontsize="large")
    figure.colorbar(image, ax=axes, label="|correlation| of two input features", shrink=0.7)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def _draw_matrix(ax: Axes, correlation: Correlation) -> Any:
    shown = correlation.matrix[:MOST_FEATURES, :MOST_FEATURES]
    d = len(correlation.matrix)
    part = f"{d} features" if len(shown) == d else f"{len(shown)} of {d} features"
    ax.set_title(f"{correlation.fqn} ({part})\nmean r² = {correlation.mean_square:.2g}", fontsize="medium")
    ax.set_xticks([])
    ax.set_yticks([])
    return ax.imshow(shown.numpy(), vmin=0, vmax=1, cmap="magma", interpolation="nearest")
