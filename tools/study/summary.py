"""What a study found: for each method its best learning rate, and how soon it gets to what backpropagation reaches.

The targets of a workload and an optimizer are the validation accuracies that the plain method reaches, by the learning
rate with the best one at the end, after all, three quarters and half of the budget: those of the same seed, which has
the same initial weights, batches and split. The rate of another method is the one by which it gets to the first target
soonest, or where it never does, the one with the best end. So rates are chosen by the validation split; the test
accuracy only stands beside them.
"""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tools.study.clock import Key
from tools.study.grid import GOAL, PLAIN

PARTS = (1.0, 0.75, 0.5)  # of the budget, whose accuracies are targets
History = Sequence[Sequence[float]]  # rows of (step, training loss, validation loss, validation accuracy)
Target = Mapping[int, float]  # validation accuracy, by seed


@dataclass(frozen=True)
class Tried:
    """One learning rate of one method: what its seeds gave. A history that diverged ends early."""

    lr: float
    histories: Mapping[int, History]
    tests: Mapping[int, float]
    budget: int

    @property
    def whole(self) -> list[int]:
        """The seeds that came to the end: the others diverged."""
        return [seed for seed, history in self.histories.items() if history and history[-1][0] >= self.budget]

    def accuracy_at(self, part: float, seed: int) -> float:
        """Return the validation accuracy after a part of the budget, on the line through the evaluations."""
        steps, accuracies = [row[0] for row in self.histories[seed]], [row[3] for row in self.histories[seed]]
        return float(np.interp(part * self.budget, steps, accuracies))

    def final_accuracy(self) -> float:
        """Return the mean over seeds of the validation accuracy at the end, 0 for one that diverged."""
        return sum(self.accuracy_at(1.0, seed) for seed in self.whole) / len(self.histories)

    def steps_of_seeds(self, target: Target) -> dict[int, float]:
        """Return the steps of each seed to its target; those that do not reach it, or diverge later, are left out."""
        steps = {seed: steps_to(self.histories[seed], target[seed]) for seed in self.whole if seed in target}
        return {seed: step for seed, step in steps.items() if step is not None}

    def steps_to(self, target: Target) -> float | None:
        """Return the mean over seeds of the steps to their targets, or None where one does not reach it."""
        steps = self.steps_of_seeds(target)
        return statistics.mean(steps.values()) if len(steps) == len(self.histories.keys() & target.keys()) > 0 else None


TriedRates = Mapping[Key, Sequence[Tried]]


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
        targets: validation accuracies, by seed.
    """

    workload: str
    optimizer: str
    method: str
    best: Tried
    plain: Tried
    at_plain_rate: Tried | None
    rates: int
    targets: Sequence[Target]

    @property
    def steps(self) -> list[float | None]:
        """The steps to each target with the best rate, or None where it is not reached."""
        return [self.best.steps_to(target) for target in self.targets]

    @property
    def ratios(self) -> list[float | None]:
        """The same over the steps of the plain method."""
        return [self.ratio(self.best, target) for target in self.targets]

    def ratio(self, tried: Tried, target: Target) -> float | None:
        """Return the steps to a target over those of the plain method, or None where one does not reach it."""
        same_seeds = {seed: accuracy for seed, accuracy in target.items() if seed in tried.histories}
        own, plain = tried.steps_to(same_seeds), self.plain.steps_to(same_seeds)
        return None if own is None or plain is None else own / plain


def summarise(tried: TriedRates) -> list[Summary]:
    """Return the summaries of all methods, of one workload and optimizer together, the plain one first."""
    found = []
    for workload, optimizer in dict.fromkeys(key[:2] for key in tried if (*key[:2], PLAIN) in tried):
        best = best_of_plain(tried[workload, optimizer, PLAIN])
        targets = [target_of(best, part) for part in PARTS]
        methods = [method for w, o, method in tried if (w, o) == (workload, optimizer)]
        for method in sorted(methods, key=lambda name: name != PLAIN):
            rates = tried[workload, optimizer, method]
            own = best if method == PLAIN else best_of(rates, targets[0])
            same = next((t for t in rates if t.lr == best.lr), None)
            found.append(Summary(workload, optimizer, method, own, best, same, len(rates), targets))
    return found


def goals_of(tried: TriedRates) -> dict[str, Target]:
    """Return of each workload the best accuracies of plain backpropagation by one optimizer, GOAL."""
    return {
        workload: target_of(best_of_plain(rates), 1.0)
        for (workload, optimizer, method), rates in tried.items()
        if (optimizer, method) == (GOAL, PLAIN)
    }


def chosen_rates(tried: TriedRates, workload: str, optimizer: str) -> dict[str, set[float]]:
    """Return the learning rates of each method that are worth the other seeds, by the tuning seeds.

    They are its best for the plain method's target, its best for the goal, and the plain method's best.
    """
    plain, goal = best_of_plain(tried[workload, optimizer, PLAIN]), goals_of(tried).get(workload)
    chosen = {}
    for (w, o, method), rates in tried.items():
        if (w, o) == (workload, optimizer):
            best = plain if method == PLAIN else best_of(rates, target_of(plain, 1.0))
            chosen[method] = {plain.lr, best.lr, *([best_of(rates, goal).lr] if goal else [])}
    return chosen


def best_of_plain(rates: Sequence[Tried]) -> Tried:
    """Return the learning rate with the best end."""
    return max(on_all_seeds(rates), key=Tried.final_accuracy)


def target_of(best: Tried, part: float) -> Target:
    """Return the accuracies after a part of the budget, of the seeds that did not diverge."""
    return {seed: best.accuracy_at(part, seed) for seed in best.whole}


def collect(lines: Iterable[Mapping[str, Any]]) -> TriedRates:
    """Return what was tried of each (workload, optimizer, method), from the lines of runs."""
    by_rate: dict[Key, dict[float, list[Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        run = line["run"]
        by_rate[run["workload"], run["optimizer"], run["method"]][run["lr"]].append(line)
    return {key: [_tried(lr, of_rate) for lr, of_rate in sorted(rates.items())] for key, rates in by_rate.items()}


def _tried(lr: float, lines: Sequence[Mapping[str, Any]]) -> Tried:
    return Tried(
        lr,
        {line["run"]["seed"]: line["history"] for line in lines},
        {line["run"]["seed"]: line["test"][1] for line in lines if line["test"] is not None},
        lines[0]["budget"],
    )


def on_all_seeds(rates: Sequence[Tried]) -> list[Tried]:
    """Return the learning rates that were run on most seeds: the others were tried on the tuning seeds only."""
    most = max(len(tried.histories) for tried in rates)
    return [tried for tried in rates if len(tried.histories) == most]


def best_of(rates: Sequence[Tried], target: Target) -> Tried:
    """Return the learning rate by which the target is reached soonest, or else that with the best end."""
    candidates = on_all_seeds(rates)
    reaching = [(steps, tried) for tried in candidates if (steps := tried.steps_to(target)) is not None]
    if reaching:
        return min(reaching, key=lambda pair: pair[0])[1]
    return max(candidates, key=Tried.final_accuracy)
