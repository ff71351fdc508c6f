"""Results in a file of JSON lines, one a run."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from tools.common.files import write_whole

RESULTS = Path(__file__).parents[1] / "results"  # the folder of all tools


class Run(Protocol):
    """What identifies a run."""

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON has it."""


class Results:
    """A file of JSON lines, one a run: what is in it is not run again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines = _read(path)

    def append(self, line: Mapping[str, Any]) -> None:
        """Add a line, on the disk at once."""
        self.lines.append(dict(line))
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def of(self, run: Run) -> dict[str, Any] | None:
        """Return the line of a run, if it was made."""
        wanted = run.as_json()
        return next((line for line in self.lines if line.get("run") == wanted), None)


def _read(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file; one that was cut short, as an interrupted write leaves it, is taken out of it."""
    if not path.exists():
        return []
    kept, cut = [], False
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            kept.append(json.loads(line))
        except json.JSONDecodeError:
            cut = True
    if cut:
        write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))
    return kept
