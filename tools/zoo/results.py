"""The JSON file of a library: what it was checked with, and one record a model."""

import json
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tools.common.errors import UsageError
from tools.common.files import write_whole
from tools.zoo.examples import Library
from tools.zoo.record import STAGES, Record
from tools.zoo.settings import Limits


@dataclass(frozen=True)
class LibraryResults:
    """The JSON file of one library: what it was checked with, and one record a model."""

    header: Mapping[str, Any]
    records: Sequence[Record]

    def write(self, folder: Path) -> Path:
        """Write the file, whole or not at all."""
        path = results_path(folder, str(self.header["library"]))
        whole = {**self.header, "models": [_finite(record.as_json()) for record in self.records]}
        write_whole(path, json.dumps(whole, indent=1) + "\n")
        return path

    def with_records(self, records: Iterable[Record], order: Sequence[str]) -> "LibraryResults":
        """Return the results with these records, in the order of the library's list."""
        place = {name: i for i, name in enumerate(order)}
        return LibraryResults(self.header, sorted(records, key=lambda record: place.get(record.name, len(place))))


def results_path(folder: Path, library: str) -> Path:
    """Return where the results of a library are."""
    return folder / f"zoo-{library}.json"


def read_results(path: Path) -> LibraryResults | None:
    """Return the results in a file, or None where there is none; raise `UsageError` where it cannot be read."""
    if not path.exists():
        return None
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
        records = [Record.from_json(record) for record in whole.pop("models")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} cannot be read: {error}; move it away") from None
    return LibraryResults(whole, records)


def header_of(library: Library, limits: Limits) -> dict[str, Any]:
    """Return what a library is checked with: records of another header say nothing about this one."""
    device = torch.cuda.get_device_name(limits.device) if limits.device.startswith("cuda") else limits.device
    asked_for = {"onnx": limits.onnx, "compile": limits.compile}
    return {
        "library": library.name,
        "device": device,
        "machine": platform.machine(),
        "versions": {name: version(name) for name in library.packages},
        "stages": [stage for stage in STAGES if asked_for.get(stage, True)],
    }


def _finite(tree: Any) -> Any:
    """Return the tree with numbers that JSON does not have as text."""
    if isinstance(tree, float) and not math.isfinite(tree):
        return str(tree)
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    return tree
