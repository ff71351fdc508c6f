"""The picture of accuracy over multiply-adds."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tools.prune.methods import OURS, PEERS
from tools.prune.tables import SCOPES, Line, budgets_of, nets_of, rows_of

COLOURS = {name: f"C{i}" for i, name in enumerate((OURS, *PEERS))}


def draw(path: Path, lines: Sequence[Line]) -> None:
    """Draw accuracy right after pruning over the part of the multiply-adds that is left, a panel a network.

    Of each peer the better scope at each budget; dashed with new BatchNorm statistics.
    """
    nets = nets_of(lines)
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
    for keep in budgets_of(lines):
        of_scopes = ([row[what] for _, row in rows_of(lines, keep, method, scope)] for scope in SCOPES)
        x.append(100 * keep)
        y.append(100 * max(map(mean, filter(None, of_scopes))))
    return x, y
