"""Measure a training step, side by side in one process: the plain model, decorrelation, the textbook form, and peers.

    python -m tools.bench --model resnet18 --batch 32 --size 64        one case: the plain model and the default rule
    python -m tools.bench --methods power dbp-full textbook muon       others
    python -m tools.bench --suite cpu                                  the cases that bars are set for (or ranks, gpu)
    python -m tools.bench --sweep batch d samples                      growth, in one picture
    python -m tools.bench --suite cpu --table                          a Markdown table of what was measured

Writes bench-<suite>.json and a picture of the ratios into --out.
"""

import argparse
import gc
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from tools.bench.cases import SUITES, Bars, Case, sweep
from tools.bench.figures import AXES, draw_growth, draw_ratios
from tools.bench.memory import peak_bytes
from tools.bench.methods import METHODS
from tools.bench.results import Result, write_json
from tools.bench.run import results_here, results_on_ranks
from tools.bench.tables import case_table, costs_table
from tools.common.arguments import positive, positive_int
from tools.common.command import exit_code
from tools.common.console import output
from tools.common.results import RESULTS

WIDTH = 180  # of the table in a file


@dataclass(frozen=True)
class Settings:
    """What the command line asks for."""

    name: str
    cases: tuple[Case, ...]
    sweeps: tuple[str, ...]
    seconds: float
    memory: bool
    table: bool
    out: Path


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
        results = measure(case, settings.seconds, settings.memory)
        console.print(case_table(case, results))
        yield case, results


def measure(case: Case, seconds: float, memory: bool = False) -> list[Result]:
    """Return the results of the plain model and of each method of the case."""
    methods = ("plain", *case.methods)
    peaks = {m: peak_bytes(case, m) for m in methods if memory or case.bars.memory is not None}
    if case.bars.memory is not None and case.bars == Bars(memory=case.bars.memory):
        return [Result(method, memory=peaks[method]) for method in methods]
    if case.ranks:
        return results_on_ranks(case, seconds)
    results = results_here(case, seconds, peaks)
    gc.collect()
    torch.compiler.reset()
    return results


def parse_settings(argv: Sequence[str] | None = None) -> Settings:
    """Return what the command line asks for; exits with code 2 where it is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench",
        description="Time a training step of the plain model and of others, side by side in one process.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    default = Case()
    parser.add_argument("--model", default=default.model, help="name of a torchvision classifier or of a timm model")
    parser.add_argument("--batch", type=positive_int, default=default.batch, help="examples in a step")
    parser.add_argument("--size", type=positive_int, default=default.size, help="pixels of a side")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=default.dtype, help="bfloat16: autocast")
    parser.add_argument("--channels-last", action="store_true", help="memory format of model and images")
    parser.add_argument("--compile", action="store_true", help="run under torch.compile")
    parser.add_argument("--device", default=default.device, help="cpu, cuda, ...")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(default.methods), metavar="METHOD",
                        help=f"to compare with the plain model: {', '.join(METHODS)}")  # fmt: skip
    parser.add_argument("--memory", action="store_true", help="measure peak memory, too")
    parser.add_argument("--seconds", type=positive, default=60, help="for the training steps of a case, about")
    several = parser.add_mutually_exclusive_group()
    several.add_argument("--suite", choices=sorted(SUITES), help="measure these cases, beside the bars set for them")
    several.add_argument("--sweep", nargs="+", choices=sorted(AXES), default=(), help="measure growth over these")
    parser.add_argument("--table", action="store_true", help="measure nothing: print the JSON file as Markdown")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file and the picture")
    given = parser.parse_args(argv)
    case = Case(
        given.model, given.batch, given.size, given.dtype, given.channels_last, given.compile, given.device,
        tuple(given.methods),
    )  # fmt: skip
    name = given.suite or ("growth" if given.sweep else given.model)
    cases = SUITES[given.suite] if given.suite else (case,)
    return Settings(name, cases, tuple(given.sweep), given.seconds, given.memory, given.table, given.out)


if __name__ == "__main__":
    sys.exit(main())
