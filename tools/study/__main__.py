"""Study how fast methods learn: a grid of workloads, optimizers, methods, learning rates and seeds.

    python -m tools.study tools/studies/quick.toml           run what is not in the results yet; table and picture
    python -m tools.study tools/studies/full.toml --table    only the table, as Markdown

Learning rates are chosen on the validation split, for each method alone; the test split is used once a run, at its end,
and chooses nothing. Writes study-<name>.jsonl, one line a run, and study-<name>.png into --out.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tools.common.arguments import positive_int
from tools.common.command import exit_code
from tools.common.console import Bar
from tools.common.errors import UsageError
from tools.common.pool import perform_all
from tools.common.results import RESULTS, Results
from tools.study.clock import clocks_of, timing_line
from tools.study.figures import draw
from tools.study.grid import Race, Run, Study, read_study
from tools.study.run import perform
from tools.study.summary import chosen_rates, collect, summarise
from tools.study.tables import goal_table, learning_table
from tools.study.timing import time_runs
from tools.study.workloads import WORKLOADS

TIMING_RATE = 1e-3  # any would do: a step costs the same


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study; return 0, 2 where it cannot be run, or 130 after Ctrl-C."""
    return exit_code("study", lambda: run(parse_settings(argv)), "interrupted: the same command goes on from here")


def run(settings: argparse.Namespace) -> None:
    """Run what is missing, unless only the table was asked for, and tell what there is."""
    study = read_study(settings.study)
    settings.out.mkdir(parents=True, exist_ok=True)
    results = Results(settings.out / f"study-{study.name}.jsonl")
    if not settings.table:
        run_study(study, results, settings.jobs)
    tell(study, results, settings.out)


def run_study(study: Study, results: Results, jobs: int) -> None:
    """Run what is not in the results: of each workload all races, and then the clock, with nothing beside it."""
    for check in {WORKLOADS[race.workload].data.check for race in study.races}:
        check()
    for workload in dict.fromkeys(race.workload for race in study.races):
        races = [race for race in study.races if race.workload == workload]
        for race in races:
            _perform(study.tuning_runs(race), results, jobs)
            tuned = collect(line for line in study.own(results.lines) if line["run"]["seed"] in study.tune)
            _perform(study.final_runs(race, chosen_rates(tuned, race.workload, race.optimizer)), results, jobs)
        _time(study, races, results)


def _time(study: Study, races: Sequence[Race], results: Results) -> None:
    """Time all methods of the races, side by side, if one of them has no time yet."""
    runs = [study.run(race, method, TIMING_RATE, study.seeds[0]) for race in races for method in race.rates]
    timed = clocks_of(results.lines, study.methods)
    if any((run.workload, run.optimizer, run.method) not in timed for run in runs):
        results.append(timing_line(runs, time_runs(runs)))


def tell(study: Study, results: Results, out: Path) -> None:
    """Print the tables, and draw the picture."""
    tried, clocks = collect(study.own(results.lines)), clocks_of(results.lines, study.methods)
    summaries = summarise(tried)
    if not summaries:
        raise UsageError(f"{results.path} has no run of the plain method: run the study without --table first")
    print(learning_table(summaries, clocks), goal_table(tried, clocks), sep="\n\n")
    draw(out / f"study-{study.name}.png", summaries)


def _perform(runs: Sequence[Run], results: Results, jobs: int) -> None:
    missing = [run for run in runs if results.of(run) is None]
    with Bar(len(missing)) as bar:
        for line in perform_all(perform, missing, jobs):
            results.append(line)
            bar.move(f"{line['run']['workload']} {line['run']['method']}", advance=1)


def parse_settings(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return what the command line asks for; exits with code 2 where it is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.study", description="Study how fast methods learn, from a TOML file."
    )
    parser.add_argument("study", type=Path, help="TOML file of the grid, see tools/study/grid.py")
    parser.add_argument("--table", action="store_true", help="run nothing: the table of what there is")
    parser.add_argument("--jobs", type=positive_int, default=os.cpu_count() or 1, help="runs side by side")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
