from typing import Any

import pytest

from tools.study.clock import Clock
from tools.study.grid import Run
from tools.study.summary import Summary, Tried, chosen_rates, collect, steps_to, summarise
from tools.study.tables import goal_table


def test_steps_to_an_accuracy_are_read_off_the_line_through_the_evaluations() -> None:
    history = [[10, 0, 0, 0.5], [20, 0, 0, 0.7], [30, 0, 0, 0.6], [40, 0, 0, 0.8]]
    assert steps_to(history, 0.4) == 10
    assert steps_to(history, 0.6) == pytest.approx(15)
    assert steps_to(history, 0.75) == pytest.approx(37.5)
    assert steps_to(history, 0.9) is None


def summary_of(lines: list[dict[str, Any]]) -> list[Summary]:
    return summarise(collect(lines))


def line_of(method: str, lr: float, seed: int, accuracies: list[float]) -> dict[str, Any]:
    run = Run("cnn", "adam", method, lr, seed, len(accuracies)).as_json()
    history = [[10 * (i + 1), 1.0, 1.0, accuracy] for i, accuracy in enumerate(accuracies)]
    return {
        "run": run,
        "budget": 10 * len(accuracies),
        "history": history,
        "diverged": None,
        "test": [1.0, accuracies[-1]],
    }


def test_targets_are_what_the_best_plain_rate_reaches_and_rates_are_chosen_by_them() -> None:
    lines = [
        line_of("plain", 0.1, 0, [0.1, 0.2, 0.3, 0.4]), line_of("plain", 0.2, 0, [0.2, 0.4, 0.5, 0.6]),
        line_of("fast", 0.1, 0, [0.5, 0.55, 0.58, 0.59]), line_of("fast", 0.4, 0, [0.3, 0.6, 0.6, 0.6]),
    ]  # fmt: skip
    plain, fast = summary_of(lines)
    assert plain.targets == [{0: 0.6}, {0: 0.5}, {0: 0.4}] and plain.steps == [40, 30, 20] and plain.best.lr == 0.2
    assert fast.best.lr == 0.4 and fast.steps[0] == 20 and fast.ratios[0] == 0.5
    assert fast.at_plain_rate is None
    assert fast.steps[1] == pytest.approx(10 + 10 * 0.2 / 0.3)


def test_rates_of_the_tuning_seeds_alone_do_not_stand_beside_those_of_all() -> None:
    lines = [line_of("plain", 0.1, seed, [0.1, 0.5]) for seed in (0, 1)] + [line_of("plain", 0.2, 0, [0.9, 0.9])]
    (plain,) = summary_of(lines)
    assert plain.best.lr == 0.1 and plain.targets[0] == {0: 0.5, 1: 0.5} and plain.rates == 2


def test_a_target_is_that_of_the_same_seed() -> None:
    lines = [line_of("plain", 0.1, 0, [0.1, 0.5]), line_of("plain", 0.1, 1, [0.2, 0.9])]
    lines += [line_of("fast", 0.1, 0, [0.5, 0.6]), line_of("fast", 0.1, 1, [0.9, 0.9])]
    plain, fast = summary_of(lines)
    assert plain.steps[0] == 20 and fast.steps[0] == 10 and fast.ratios[0] == 0.5
    _, tuned_only = summary_of(lines[:3])
    assert tuned_only.steps[0] == 10 and tuned_only.ratios[0] == 0.5


def test_a_run_that_diverges_reaches_nothing_and_sets_no_target() -> None:
    lines = [line_of("plain", 0.1, seed, [0.2, 0.4, 0.5, 0.6]) for seed in (0, 1)]
    lines += [line_of("fast", 0.1, 0, [0.6, 0.7, 0.7, 0.7]), line_of("fast", 0.2, 0, [0.7, 0.7, 0.7, 0.7])]
    lines[1] |= {"history": lines[1]["history"][:2], "test": None, "diverged": 30}
    lines[3] |= {"history": lines[3]["history"][:2], "test": None, "diverged": 30}
    plain, fast = summary_of(lines)
    assert plain.targets[0] == {0: 0.6} and plain.steps[0] == 40
    assert fast.best.lr == 0.1 and fast.ratios[0] == 0.25


def test_rates_are_chosen_by_the_own_target_and_by_the_goal() -> None:
    adam = [line_of("plain", 0.1, 0, [0.2, 0.4, 0.8, 0.9])]
    sgd = [line_of("plain", 0.1, 0, [0.1, 0.2, 0.3, 0.5]), line_of("plain", 0.2, 0, [0.1, 0.2, 0.3, 0.4])]
    sgd += [line_of("fast", 0.2, 0, [0.5, 0.6, 0.6, 0.6]), line_of("fast", 0.3, 0, [0.1, 0.5, 0.8, 0.92])]
    for line in sgd:
        line["run"] |= {"optimizer": "sgd"}
    assert chosen_rates(collect([*adam, *sgd]), "cnn", "sgd") == {"plain": {0.1}, "fast": {0.1, 0.2, 0.3}}
    assert goal_table(collect([*adam, *sgd]), {}).splitlines()[-1].count("by 0 of 1") == 1


def test_a_seed_that_does_not_reach_a_target_is_not_left_out() -> None:
    tried = Tried(0.1, {0: [[10, 0, 0, 0.9]], 1: [[10, 0, 0, 0.5]]}, {0: 0.9, 1: 0.5}, 10)
    assert tried.steps_to({0: 0.8, 1: 0.8}) is None and tried.steps_to({0: 0.8, 1: 0.5}) == 10


def test_everything_is_compared_by_the_best_of_plain_adam() -> None:
    lines = [line_of("plain", 0.1, 0, [0.2, 0.4, 0.5, 0.6]), line_of("fast", 0.4, 0, [0.3, 0.6, 0.6, 0.6])]
    other = line_of("plain", 0.1, 0, [0.1, 0.2, 0.3, 0.5])
    other["run"] = {**other["run"], "optimizer": "sgd"}
    clocks = {
        ("cnn", "adam", "plain"): Clock([0, 10], [0, 1.0]),
        ("cnn", "adam", "fast"): Clock([0, 10, 15], [0, 2, 2.5]),
    }
    table = goal_table(collect([*lines, other]), clocks)
    cells = [cell.strip() for cell in table.splitlines()[-1].strip("|").split("|")]
    assert cells == ["cnn, 60.0%", "40, 4.0 s", "20, 3.0 s", "by 0 of 1"]
