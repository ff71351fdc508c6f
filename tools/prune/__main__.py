"""Prune trained networks to several budgets, with this library and with torch-pruning, from the same weights.

    python -m tools.prune                      the whole comparison; trained networks are kept in runs/prune
    python -m tools.prune --nets vgg --seeds 0 --keep 0.5 --data digits --size 28 --epochs 20
    python -m tools.prune --table              measure nothing: the tables of what there is
    python -m tools.prune --latency            only the times in onnxruntime, with nothing beside

Writes prune.jsonl, a line a network and seed, prune-latency.json, and a picture into --out. It goes on from there.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import decorr_fx
from tools.common.arguments import part, positive_int
from tools.common.command import exit_code
from tools.common.console import Bar
from tools.common.errors import UsageError
from tools.common.pool import perform_all
from tools.common.results import RESULTS, Results
from tools.prune.figures import draw
from tools.prune.latency import compare_batches
from tools.prune.methods import Task, macs
from tools.prune.nets import NETS
from tools.prune.run import Job, Run, perform, weights_file
from tools.prune.tables import accuracy_table, latency_table, short_table
from tools.prune.training import accuracy, calibration, load, trained

MULTIPLES = (1, 16)  # of which layers keep units, where time is measured: kernels of 16 channels are the fast ones


def main(argv: Sequence[str] | None = None) -> int:
    """Compare; return 0, 2 where what was asked for cannot be done, or 130 after Ctrl-C."""
    return exit_code("prune", lambda: run(parse_settings(argv)), "interrupted: the same command goes on from here")


def run(given: argparse.Namespace) -> None:
    """Measure what is missing, unless only the tables were asked for, and tell what there is."""
    given.out.mkdir(parents=True, exist_ok=True)
    results, jobs = Results(given.out / "prune.jsonl"), jobs_of(given)
    if given.latency:
        write_latency(given.out / "prune-latency.json", jobs)
    elif not given.table:
        run_all(jobs, results, given.jobs)
    tell(results, jobs, given.out)


def jobs_of(given: argparse.Namespace) -> list[Job]:
    """Return a job for each network and seed."""
    data = ["--data", given.data]
    data += ["--data-dir", str(given.data_dir)] if given.data_dir else []
    data += ["--size", str(given.size)] if given.size else []
    make = partial(Run, data=tuple(data), epochs=given.epochs, keep=tuple(given.keep), tuned=given.fine_tune,
                   batches=given.batches)  # fmt: skip
    return [Job(make(net=net, seed=seed), given.weights) for net in given.nets for seed in given.seeds]


def run_all(jobs: Sequence[Job], results: Results, processes: int) -> None:
    """Perform what is not in the results."""
    missing = [job for job in jobs if results.of(job.run) is None]
    with Bar(len(missing)) as bar:
        for line in perform_all(perform, missing, processes):
            results.append(line)
            bar.move(f"{line['run']['net']} {line['run']['seed']}", advance=1)


def write_latency(path: Path, jobs: Sequence[Job]) -> None:
    """Time the networks of the first seed, whole and pruned to the budget of fine-tuning."""
    first = min(job.run.seed for job in jobs)
    found = {job.run.net: list(_latency(job)) for job in jobs if job.run.seed == first}
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _latency(job: Job) -> Iterator[dict[str, Any]]:
    run = job.run
    data = load(run.data, run.seed)
    model = trained(run.net, data, run.seed, run.epochs, weights_file(job))
    task = Task(model, calibration(data, run.seed, run.batches))
    for multiple in MULTIPLES:
        small = decorr_fx.prune(
            model, task.images, keep=run.tuned, round_to=multiple, example_inputs=task.example
        ).model
        what = {
            "round_to": multiple,
            "macs": macs(small, task.example) / macs(model, task.example),
            "accuracy": accuracy(small, data, "test"),
        }
        yield from ({**what, **one} for one in compare_batches(model, small, task.images[0]))


def tell(results: Results, jobs: Sequence[Job], out: Path) -> None:
    """Print the tables, and draw the picture."""
    lines = [line for job in jobs if (line := results.of(job.run)) is not None]
    if lines:
        print(accuracy_table(lines), short_table(lines), sep="\n\n")
        draw(out / "prune.png", lines)
    if (path := out / "prune-latency.json").exists():
        print("", latency_table(json.loads(path.read_text(encoding="utf-8"))), sep="\n")
    elif not lines:
        raise UsageError(f"{results.path} has no run like these: run without --table first")


def parse_settings(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return what the command line asks for; exits with code 2 where it is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.prune", description="Prune trained networks, with this library and with torch-pruning.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--nets", nargs="+", choices=list(NETS), default=list(NETS), help="networks")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of weights, batches, and the split")
    parser.add_argument("--data", choices=("fashion-mnist", "digits"), default="fashion-mnist", help="data set")
    parser.add_argument("--data-dir", type=Path, help="its folder; if not given, as tools.train finds it")
    parser.add_argument("--size", type=positive_int, help="resize images to SIZE x SIZE")
    parser.add_argument("--epochs", type=positive_int, default=3, help="that networks are trained for")
    parser.add_argument("--keep", nargs="+", type=part, default=[0.7, 0.5, 0.3], help="budgets: parts of multiply-adds")
    parser.add_argument("--fine-tune", type=part, default=0.5, help="budget at which results are trained on, an epoch")
    parser.add_argument("--batches", type=positive_int, default=16, help="of 128 images that methods may look at")
    parser.add_argument("--weights", type=Path, default=Path("runs/prune"), help="folder of trained networks")
    parser.add_argument("--jobs", type=positive_int, default=os.cpu_count() or 1, help="runs side by side")
    parser.add_argument("--table", action="store_true", help="measure nothing: print what there is")
    parser.add_argument("--latency", action="store_true", help="only time the pruned networks in onnxruntime")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    given = parser.parse_args(argv)
    if given.fine_tune not in given.keep:
        parser.error(f"--fine-tune {given.fine_tune:g} is none of the budgets of --keep")
    return given


if __name__ == "__main__":
    sys.exit(main())
