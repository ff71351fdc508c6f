"""Check whole libraries of models: transform, two training steps, fold, reload and export each, with random weights.

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

from tools.common.command import INTERRUPTED, exit_code
from tools.common.console import Bar, output
from tools.common.errors import UsageError
from tools.zoo.pool import Pool, load_library
from tools.zoo.run import Run
from tools.zoo.settings import Settings, check_names, parse_settings
from tools.zoo.tables import coverage_table, failure_line, results_table, summary_line

WIDTH = 160  # of the table in a file


def main(argv: Sequence[str] | None = None) -> int:
    """Check the models; return 0, 1 where one failed, 2 where that cannot be done, or 130 after Ctrl-C."""
    return exit_code("zoo", lambda: run(parse_settings(argv)))


def run(settings: Settings) -> int:
    """Check what was asked for, tell what came of it, and write the files."""
    if settings.coverage:
        print(coverage_table(settings.out))
        return 0
    runs = prepare(settings)
    if settings.list:
        print("\n".join(f"{r.library.name}:{name}" for r in runs for name in r.chosen))
        return 0
    console = output(WIDTH)
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
    by_library = {run.library.name: run for run in runs}
    tasks = [task for run in runs for task in run.tasks]
    for run in runs:
        run.write()
    with Bar(len(tasks)) as bar:
        for task, record in Pool(settings.jobs).check(tasks):
            by_library[task.library].add(record)
            if record.status == "failed":
                bar.console.print(escape(failure_line(task.library, record)), soft_wrap=True, highlight=False)
            bar.move(f"{task.library}:{record.name}", advance=1)


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
