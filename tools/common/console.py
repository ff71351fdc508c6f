"""The terminal: tables that are as wide in a file, and a progress bar."""

import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def output(width: int, quiet: bool = False) -> Console:
    """Return the standard output: as wide as the terminal, or so wide where it is a file."""
    return Console(width=None if sys.stdout.isatty() else width, quiet=quiet)


class Bar(Progress):
    """The progress of one task, on the standard error where that is a terminal."""

    def __init__(self, total: int, quiet: bool = False) -> None:
        console = Console(stderr=True)
        columns = (
            BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn(),
            TimeRemainingColumn(),
        )  # fmt: skip
        super().__init__(*columns, console=console, disable=quiet or not console.is_terminal)
        self._task = self.add_task("", total=total)

    def move(self, description: str, **how: Any) -> None:
        """Show a description; `advance=1` or `completed=n` tells how far the task is."""
        self.update(self._task, description=description, **how)
