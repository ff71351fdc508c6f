"""Measure a training step, side by side in one process: the plain model, decorrelation, the textbook form, and peers.

    python -m tools.bench --model resnet18 --batch 32 --size 64        one case: the plain model and the default rule
    python -m tools.bench --methods power dbp-full textbook muon       others
    python -m tools.bench --suite cpu                                  the cases that bars are set for (or ranks, gpu)
    python -m tools.bench --sweep batch d samples                      growth, in one picture
    python -m tools.bench --suite cpu --table                          a Markdown table of what was measured

Writes bench-<suite>.json and a picture of the ratios into --out.
"""

import gc
import sys
from collections.abc import Iterator, Sequence

import torch
from rich.console import Console

from tools.bench.cases import Case, sweep
from tools.bench.figures import draw_growth, draw_ratios
from tools.bench.memory import peak_bytes
from tools.bench.results import Result, write_json
from tools.bench.run import results_here, results_on_ranks
from tools.bench.settings import Settings, parse_settings
from tools.bench.tables import case_table, costs_table
from tools.common.command import exit_code
from tools.common.console import output

WIDTH = 180  # of the table in a file


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; return 0, or 2 where what was asked for cannot be measured."""
    return exit_code("bench", lambda: run(parse_settings(argv)))


def run(settings: Settings) -> None:
    """Measure every case, print its table as soon as it is known, and write the files; or print what is there."""
    settings.out.mkdir(parents=True, exist_ok=True)
    path = settings.out / f"bench-{settings.name}"
    if settings.table:
        print(costs_table(path.with_suffix(".json")))
        return
    console = output(WIDTH)
    if settings.sweeps:
        sweeps = {over: list(_measured(sweep(settings.cases[0], over), settings, console)) for over in settings.sweeps}
        write_json(path.with_suffix(".json"), [point for points in sweeps.values() for point in points])
        draw_growth(path.with_suffix(".png"), sweeps)
    else:
        measured = list(_measured(settings.cases, settings, console))
        write_json(path.with_suffix(".json"), measured)
        draw_ratios(path.with_suffix(".png"), measured)
    console.print(f"written: {path}.json, {path}.png", highlight=False, soft_wrap=True)


def _measured(cases: Sequence[Case], settings: Settings, console: Console) -> Iterator[tuple[Case, list[Result]]]:
    for case in cases:
        results = measure(case, settings.seconds)
        console.print(case_table(case, results))
        yield case, results


def measure(case: Case, seconds: float) -> list[Result]:
    """Return the results of the plain model and of each method of the case."""
    methods = ("plain", *case.methods)
    peaks = {method: peak_bytes(case, method) for method in methods} if case.memory else {}
    if not case.timed:
        return [Result(method, memory=peaks.get(method)) for method in methods]
    if case.ranks:
        return results_on_ranks(case, seconds)
    results = results_here(case, seconds, peaks)
    gc.collect()
    torch.compiler.reset()
    return results


if __name__ == "__main__":
    sys.exit(main())
