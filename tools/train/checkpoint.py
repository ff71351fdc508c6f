"""The checkpoint of a run: what it needs to go on from its last evaluation, with the same numbers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch

from tools.common.errors import UsageError, first_line
from tools.common.files import replaced
from tools.train.loop import Contender
from tools.train.settings import Settings

# what reading a file raises that is not a checkpoint of ours
READING = (OSError, RuntimeError, EOFError, UnpicklingError, BadZipFile, KeyError, TypeError, ValueError)
WHERE = frozenset({"out", "data_dir", "download", "device", "timeout", "resume"})  # not what is trained


def save_checkpoint(path: Path, settings: Settings, contenders: Sequence[Contender]) -> None:
    """Write the file whole, or leave the one that is there.

    Raises:
        UsageError: it cannot be written.
    """
    whole = {"settings": _trained(settings), "contenders": {one.method: one.state_dict() for one in contenders}}
    try:
        with replaced(path) as temporary:
            torch.save(whole, temporary)
    except (OSError, RuntimeError) as error:  # torch has a RuntimeError for a disk that is full
        advice = "the last one is as it was: make room, and go on with --resume"
        raise UsageError(f"{path} cannot be written: {first_line(error)}; {advice}") from None


def load_checkpoint(path: Path, settings: Settings, contenders: Sequence[Contender]) -> None:
    """Let the contenders be as they were when the file was written.

    Raises:
        UsageError: the file cannot be read, or is of a run with other settings.
    """
    try:
        _check_whole(path)
        whole = torch.load(path, map_location="cpu", weights_only=True)
        before, states = dict(whole["settings"]), dict(whole["contenders"])
        _check(before, _trained(settings), path)
        for contender in contenders:
            contender.load_state_dict(states[contender.method])
    except READING as error:
        raise UsageError(f"--resume: {path} cannot be read: {first_line(error)}") from None


def _check_whole(path: Path) -> None:
    """Raise ValueError where a number is not what was written: torch reads past the checksums of its own files."""
    with ZipFile(path) as file:
        if (damaged := file.testzip()) is not None:
            raise ValueError(f"{damaged} in it is damaged")


def _trained(settings: Settings) -> dict[str, Any]:
    """Return the settings that the numbers of a run depend on, under their names on the command line."""
    return {name: value for name, value in settings.by_option().items() if name not in WHERE}


def _check(before: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    for name in sorted(now.keys() | before.keys(), key=lambda name: name != "rule"):  # which has other settings
        if before.get(name) != now.get(name):
            was, option = before.get(name), f"--{name.replace('_', '-')}"
            raise UsageError(f"--resume: {path} was trained with {option} {was}, not {now.get(name)}; use the same")
