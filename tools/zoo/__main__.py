"""Check whole libraries of models: transform, one training step, fold, reload and export each, with random weights.

    python -m tools.zoo --library torchvision --jobs 2      all of its models
    python -m tools.zoo --library timm -k "resnet or vit"   those with one of these words in their name
    python -m tools.zoo --resume                            all three libraries, without what passed before
    python -m tools.zoo --coverage                          a Markdown table of what was checked

Writes zoo-<library>.json into --out: one record a model, on the disk as soon as it is known.
"""

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tools.zoo.examples import Library
from tools.zoo.pool import Pool, Task, load_library
from tools.zoo.record import Record
from tools.zoo.report import (
    Results,
    coverage_table,
    failure_line,
    header_of,
    read_results,
    results_path,
    results_table,
    summary_line,
)
from tools.zoo.settings import Settings, UsageError, check_names, parse_settings, select

INTERRUPTED = 130  # what a shell reports after Ctrl-C
WIDTH = 160  # of the table in a file


class Run:
    """The results of one library, as they come."""

    def __init__(self, library: Library, settings: Settings) -> None:
        self.library = library
        self.settings = settings
        self.order = [*library.models, *library.skipped]
        self.chosen = select(self.order, settings)
        self.records = {record.name: record for record in self._kept()}
        for name in self.chosen:
            if name in library.skipped:
                self.records[name] = Record(name, "skipped", reason=library.skipped[name])
        self.tasks = [Task(library.name, name, settings.limits) for name in self.chosen if name not in self.records]

    def add(self, record: Record) -> None:
        """Note a record, and write the file anew."""
        self.records[record.name] = record
        self.write()

    def write(self) -> None:
        """Write the JSON file."""
        results = Results(header_of(self.library, self.settings.limits), [])
        results.with_records(self.records.values(), self.order).write(self.settings.out)

    def own_records(self) -> list[Record]:
        """Return the records of the models that were asked for, in order."""
        return [self.records[name] for name in self.chosen if name in self.records]

    def _kept(self) -> list[Record]:
        """Return the records of the file that stay: of models that were not asked for, and what passed before."""
        path = results_path(self.settings.out, self.library.name)
        before = read_results(path)
        if before is None or before.header != header_of(self.library, self.settings.limits):
            return []
        resumed = {r.name for r in before.records if self.settings.resume and r.status == "passed"}
        others = set(self.order).difference(self.chosen) if self.settings.is_partial else set()
        return [record for record in before.records if record.name in resumed | others]


def main(argv: Sequence[str] | None = None) -> int:
    """Check the models; return 0, 1 where one failed, 2 where that cannot be done, or 130 after Ctrl-C."""
    try:
        return run(parse_settings(argv))
    except SystemExit as stop:  # argparse has said why
        return int(stop.code or 0)
    except UsageError as error:
        print(f"python -m tools.zoo: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED


def run(settings: Settings) -> int:
    """Check what was asked for, tell what came of it, and write the files."""
    if settings.coverage:
        print(coverage_table(settings.out))
        return 0
    runs = prepare(settings)
    if settings.list:
        print("\n".join(f"{r.library.name}:{name}" for r in runs for name in r.chosen))
        return 0
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    try:
        _check_with_progress(runs, settings)
    except KeyboardInterrupt:
        console.print("interrupted: this is what was checked")
        _tell(runs, console)
        return INTERRUPTED
    return 1 if _tell(runs, console) else 0


def prepare(settings: Settings) -> list[Run]:
    """Load the libraries and choose the models; raise `UsageError` where there is none to check."""
    try:
        settings.out.mkdir(parents=True, exist_ok=True)
        libraries = [load_library(name) for name in settings.libraries]
    except OSError as error:
        raise UsageError(f"--out {settings.out} cannot be written: {error.strerror}") from None
    except ImportError as error:
        hint = "pip install 'decorr_fx[zoo]', or choose a --library"
        raise UsageError(f"{error.name} is not installed; {hint}") from None
    check_names([name for library in libraries for name in (*library.models, *library.skipped)], settings)
    runs = [run for library in libraries if (run := Run(library, settings)).chosen]
    if not runs:
        raise UsageError(f"-k {settings.expression} matches no model of {', '.join(settings.libraries)}")
    return runs


def _check_with_progress(runs: list[Run], settings: Settings) -> None:
    console = Console(stderr=True)
    columns = (
        BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), TimeRemainingColumn()
    )  # fmt: skip
    by_library = {run.library.name: run for run in runs}
    tasks = [task for run in runs for task in run.tasks]
    for run in runs:
        run.write()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=len(tasks))
        for task, record in Pool(settings.jobs).check(tasks):
            by_library[task.library].add(record)
            if record.status == "failed":
                progress.console.print(escape(failure_line(task.library, record)), soft_wrap=True, highlight=False)
            progress.update(bar, advance=1, description=f"{task.library}:{record.name}")


def _tell(runs: list[Run], console: Console) -> int:
    """Print a table for each library, then all failures; return how many there are."""
    for run in runs:
        console.print(results_table(run.library.name, run.own_records()))
    failures = [(run.library.name, r) for run in runs for r in run.own_records() if r.status == "failed"]
    for library, record in failures:
        console.print(escape(failure_line(library, record)), soft_wrap=True, highlight=False)
    for run in runs:
        console.print(summary_line(run.library.name, run.own_records()), highlight=False)
    return len(failures)


if __name__ == "__main__":
    sys.exit(main())
