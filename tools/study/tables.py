"""The tables of a study."""

import statistics
from collections.abc import Collection, Mapping, Sequence

from tools.common.tables import markdown_table
from tools.study.clock import Clock, Key
from tools.study.grid import PLAIN
from tools.study.summary import PARTS, Summary, Target, Tried, TriedRates, best_of, goals_of

Clocks = Mapping[Key, Clock]


def learning_table(summaries: Sequence[Summary], clocks: Clocks) -> str:
    """Return the table of all summaries: steps to what the plain method reaches after parts of its budget.

    After a colon is the ratio to the plain method, in brackets the standard deviation over seeds.
    """
    headers = [
        "workload", "optimizer", "method", "lr (tried)", *(f"to plain's at {part:.0%}" for part in PARTS),
        "seconds to 100%", "test accuracy (%)", "to 100% at plain's lr",
    ]  # fmt: skip
    rows = [_row(summary, clocks) for summary in summaries]
    return markdown_table(headers, rows)


def _row(summary: Summary, clocks: Clocks) -> list[str]:
    steps = [_steps(summary, summary.best, target) for target in summary.targets]
    return [
        summary.workload, summary.optimizer, summary.method, f"{summary.best.lr:g} ({summary.rates})", *steps,
        _seconds(summary, clocks), _accuracy(summary.best), _at_plain_rate(summary),
    ]  # fmt: skip


def _steps(summary: Summary, tried: Tried, target: Target) -> str:
    """Return mean and standard deviation over seeds of the steps to a target, and the ratio to the plain method's."""
    steps, ratio = tried.steps_of_seeds(target).values(), summary.ratio(tried, target)
    if ratio is None:
        return f"by {len(steps)} of {len(tried.histories)}"
    return f"{_mean(steps, 0)}: {ratio:.2f}"


def _mean(values: Collection[float], digits: int) -> str:
    spread = f" ({statistics.stdev(values):.{digits}f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def _seconds(summary: Summary, clocks: Clocks) -> str:
    """Return the seconds of training to the first target, as if nothing else ran, and the ratio to the plain method."""
    own, plain = (clocks.get((summary.workload, summary.optimizer, method)) for method in (summary.method, PLAIN))
    steps, of_plain = summary.steps[0], summary.plain.steps_to(summary.targets[0])
    if own is None or plain is None or steps is None or of_plain is None:
        return "-"
    return f"{own.at(steps):.1f}: {own.at(steps) / plain.at(of_plain):.2f}"


def _accuracy(tried: Tried) -> str:
    """Return mean and standard deviation of the test accuracy over seeds."""
    if not tried.tests:
        return "diverged"
    diverged = len(tried.histories) - len(tried.tests)
    lost = f", {diverged} diverged" if diverged else ""
    return f"{_mean([100 * test for test in tried.tests.values()], 1)}, n={len(tried.tests)}{lost}"


def _at_plain_rate(summary: Summary) -> str:
    if summary.method == PLAIN or summary.at_plain_rate is None:
        return "-"
    return _steps(summary, summary.at_plain_rate, summary.targets[0])


def goal_table(tried: TriedRates, clocks: Clocks) -> str:
    """Return steps and seconds of everything to one accuracy a workload: the best of plain backpropagation by GOAL.

    Each at its own best learning rate for that. "by 2 of 3": of three seeds one does not get there.
    """
    pairs = list(dict.fromkeys((optimizer, method) for _, optimizer, method in tried))
    rows = []
    for workload, goal in goals_of(tried).items():
        ways = [_way(tried.get((workload, *pair)), goal, clocks.get((workload, *pair))) for pair in pairs]
        rows.append([f"{workload}, {statistics.mean(goal.values()):.1%}", *ways])
    headers = [optimizer if method == PLAIN else f"{optimizer}, {method}" for optimizer, method in pairs]
    return markdown_table(["workload, accuracy", *headers], rows)


def _way(rates: Sequence[Tried] | None, goal: Target, clock: Clock | None) -> str:
    """Return the steps to an accuracy, and the seconds that they take."""
    if rates is None:
        return ""
    best = best_of(rates, goal)
    steps = best.steps_to(goal)
    if steps is None:
        return f"by {len(best.steps_of_seeds(goal))} of {len(best.histories)}"
    return f"{steps:.0f}" if clock is None else f"{steps:.0f}, {clock.at(steps):.1f} s"
