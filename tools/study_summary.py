"""What a study found: how many steps each method takes to what tuned backpropagation reaches.

The targets of a workload and an optimizer are the best validation accuracies that the plain method reaches, over its
learning rates, after all, three quarters and half of the budget. The rate of a method is the one by which it gets to
the first target soonest; where it never does, the one with the best accuracy at the end. So rates are chosen by the
validation split; the test accuracy only stands beside them.
"""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from study_grid import PLAIN

PARTS = (1.0, 0.75, 0.5)  # of the budget, whose accuracies are targets
History = Sequence[Sequence[float]]  # rows of (step, training loss, validation loss, validation accuracy)


@dataclass(frozen=True)
class Tried:
    """One learning rate of one method: what its seeds gave. A history that diverged ends early."""

    lr: float
    histories: Sequence[History]
    tests: Sequence[float]
    budget: int

    @property
    def diverged(self) -> int:
        """How many seeds did not come to the end."""
        return len(self.histories) - len(self.tests)

    def accuracy_at(self, part: float) -> float:
        """Return the mean validation accuracy after a part of the budget; 0 where a seed diverged."""
        if self.diverged:
            return 0.0
        return statistics.mean(max(row for row in h if row[0] <= part * self.budget)[3] for h in self.histories)

    def steps_to(self, accuracy: float) -> float | None:
        """Return the mean over seeds of the steps to an accuracy, or None where one does not reach it."""
        steps = self.steps_of_seeds(accuracy)
        return statistics.mean(steps) if steps else None

    def steps_of_seeds(self, accuracy: float) -> list[float]:
        """Return the steps of each seed to an accuracy; none where one does not reach it."""
        steps = [steps_to(history, accuracy) for history in self.histories]
        reached = [step for step in steps if step is not None]
        return reached if len(reached) == len(steps) else []


def steps_to(history: History, accuracy: float) -> float | None:
    """Return where the line through the evaluations first reaches an accuracy."""
    before: Sequence[float] | None = None
    for row in history:
        if row[3] >= accuracy:
            if before is None:
                return row[0]
            return before[0] + (row[0] - before[0]) * (accuracy - before[3]) / (row[3] - before[3])
        before = row
    return None


@dataclass(frozen=True)
class Summary:
    """One method on one workload, with one optimizer.

    Attributes:
        best: its own best learning rate.
        plain: the plain method's best learning rate.
        at_plain_rate: this method at that rate, or None where that was not run.
        rates: how many learning rates were tried.
        targets: validation accuracies.
    """

    workload: str
    optimizer: str
    method: str
    best: Tried
    plain: Tried
    at_plain_rate: Tried | None
    rates: int
    targets: Sequence[float]

    @property
    def steps(self) -> list[float | None]:
        """The steps to each target with the best rate, or None where it is not reached."""
        return [self.best.steps_to(target) for target in self.targets]

    @property
    def ratios(self) -> list[float | None]:
        """The same over the steps of the plain method."""
        return [self.ratio(self.best, target) for target in self.targets]

    def ratio(self, tried: Tried, target: float) -> float | None:
        """Return the steps to a target over those of the plain method, or None where one does not reach it."""
        own, plain = tried.steps_to(target), self.plain.steps_to(target)
        return None if own is None or plain is None else own / plain


def summarise(lines: Iterable[Mapping[str, Any]]) -> list[Summary]:
    """Return the summaries of all methods, of one workload and optimizer together, the plain one first."""
    tried = collect(lines)
    found = []
    for workload, optimizer in dict.fromkeys((workload, optimizer) for workload, optimizer, _ in tried):
        plain = tried.get((workload, optimizer, PLAIN))
        if plain is None:
            continue  # nothing to compare with
        targets = [max(t.accuracy_at(part) for t in on_all_seeds(plain)) for part in PARTS]
        best = best_of(on_all_seeds(plain), targets[0])
        methods = [method for w, o, method in tried if (w, o) == (workload, optimizer)]
        for method in sorted(methods, key=lambda name: name != PLAIN):
            rates = tried[workload, optimizer, method]
            own = best_of(on_all_seeds(rates), targets[0])
            same = next((t for t in rates if t.lr == best.lr), None)
            found.append(Summary(workload, optimizer, method, own, best, same, len(rates), targets))
    return found


def collect(lines: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str, str], list[Tried]]:
    """Return what was tried of each (workload, optimizer, method)."""
    by_rate: dict[tuple[str, str, str], dict[float, list[Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        if (run := line.get("run")) is not None:
            by_rate[run["workload"], run["optimizer"], run["method"]][run["lr"]].append(line)
    return {key: [_tried(lr, of_rate) for lr, of_rate in sorted(rates.items())] for key, rates in by_rate.items()}


def _tried(lr: float, lines: Sequence[Mapping[str, Any]]) -> Tried:
    return Tried(
        lr,
        [line["history"] for line in lines],
        [line["test"][1] for line in lines if line["test"] is not None],
        lines[0]["budget"],
    )


def on_all_seeds(rates: Sequence[Tried]) -> list[Tried]:
    """Return the learning rates that were run on most seeds: the others were tried on the tuning seeds only."""
    most = max(len(tried.histories) for tried in rates)
    return [tried for tried in rates if len(tried.histories) == most]


def best_of(rates: Sequence[Tried], target: float) -> Tried:
    """Return the learning rate by which the target is reached soonest, or else that with the best end."""
    reaching = [(steps, tried) for tried in rates if (steps := tried.steps_to(target)) is not None]
    if reaching:
        return min(reaching, key=lambda pair: pair[0])[1]
    return max(rates, key=lambda tried: tried.accuracy_at(1.0))
