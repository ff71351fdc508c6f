"""The pictures: ratios of a suite as bars, and growth over batch, features and rows as curves."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tools.bench.cases import Case
from tools.bench.results import Result

AXES = {
    "batch": ("examples in a batch", lambda case: case.batch),
    "d": ("features d of a linear", lambda case: case.width),
    "samples": ("rows that R steps on", lambda case: case.max_samples),
}


def draw_ratios(path: Path, measured: Sequence[tuple[Case, Sequence[Result]]]) -> None:
    """Draw the ratio of each method to the plain model, a panel a case; lines are quartiles, the mark is the bar."""
    timed = [(case, [r for r in results if r.ratio is not None]) for case, results in measured]
    timed = [(case, results) for case, results in timed if results]
    heights = [len(results) + 1.2 for _, results in timed]
    figure = Figure(figsize=(9, 0.34 * sum(heights) + 0.6), layout="constrained")
    axes = figure.subplots(len(timed), 1, squeeze=False, height_ratios=heights)
    for ax, (case, results) in zip(axes[:, 0], timed, strict=True):
        _draw_case(ax, case, results)
    axes[-1, 0].set_xlabel("time of a training step over that of the plain model")
    figure.savefig(path, dpi=120)


def _draw_case(ax: Axes, case: Case, results: Sequence[Result]) -> None:
    names = [result.method for result in results]
    spreads = [result.ratio for result in results if result.ratio is not None]
    middle = [spread.median for spread in spreads]
    error = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
    colours = ["tab:grey" if name == "plain" else "tab:blue" if i == 1 else "tab:cyan" for i, name in enumerate(names)]
    ax.barh(names, middle, xerr=error, color=colours)
    for name, value in zip(names, middle, strict=True):
        ax.annotate(f" {value:.2f}", (value, name), va="bottom", fontsize="small")
    if max(middle) > 5 * min(middle):
        ax.set_xscale("log")
    if case.bars.step is not None:
        ax.axvline(case.bars.step, color="tab:red", ls="--", lw=1)
    ax.axvline(1, color="black", lw=0.8)
    ax.invert_yaxis()
    ax.set_title(case.title, fontsize="medium", loc="left")


def draw_growth(path: Path, sweeps: Mapping[str, Sequence[tuple[Case, Sequence[Result]]]]) -> None:
    """Draw the ratio over what a sweep changes, a panel a sweep, a line a method; bands are quartiles."""
    figure = Figure(figsize=(4.6 * len(sweeps), 4), layout="constrained")
    axes = figure.subplots(1, len(sweeps), squeeze=False)[0]
    for ax, (over, measured) in zip(axes, sweeps.items(), strict=True):
        label, value = AXES[over]
        for method in [result.method for result in measured[0][1] if result.method != "plain"]:
            points = [(value(c), r.ratio) for c, results in measured for r in results if r.method == method and r.ratio]
            at = [x for x, _ in points]
            (line,) = ax.plot(at, [ratio.median for _, ratio in points], marker="o", label=method)
            low, high = [r.low for _, r in points], [r.high for _, r in points]
            ax.fill_between(at, low, high, color=line.get_color(), alpha=0.2)
        ax.axhline(1, color="black", lw=0.8)
        ax.set_xscale("log", base=2)
        ax.set_xlabel(label)
        ax.set_title(measured[0][0].model if over != "d" else "three linears, 2048 rows a step", fontsize="medium")
        ax.grid(alpha=0.3)
        ax.legend(fontsize="small")
    axes[0].set_ylabel("time of a training step\nover that of the plain model")
    figure.savefig(path, dpi=120)
