"""The settings of the zoo, as the command line gives them."""

import argparse
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from tools.common.arguments import positive, positive_int
from tools.common.devices import device_named
from tools.common.errors import UsageError
from tools.common.results import RESULTS

LIBRARIES = ("torchvision", "timm", "transformers")
TOKEN = re.compile(r"\s*(\(|\)|[\w.+-]+)\s*")


@dataclass(frozen=True)
class Limits:
    """What one model may take, and what is checked of it.

    Attributes:
        seconds: after which it is stopped.
        memory: GiB, likewise.
        threads: of its process.
        device: that it runs on.
        onnx: whether it is exported.
        compile: whether graph breaks are counted.
    """

    seconds: float = 600
    memory: float = 16
    threads: int = 1
    device: str = "cpu"
    onnx: bool = True
    compile: bool = False


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run."""

    libraries: tuple[str, ...]
    names: tuple[str, ...]
    expression: str | None
    jobs: int
    limits: Limits
    out: Path
    resume: bool
    coverage: bool
    list: bool

    @property
    def is_partial(self) -> bool:
        """Whether only some models of a library were asked for."""
        return bool(self.names or self.expression)


def parse_settings(argv: Sequence[str] | None = None) -> Settings:
    """Return the settings that the command line asks for; exits with code 2 where it is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.zoo",
        description="Transform, train, fold and export every model of a library, with random weights; each "
        "in a process of its own.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_choice(parser)
    _add_checks(parser)
    given = parser.parse_args(argv)
    device = str(device_named(given.device))
    limits = Limits(given.time_limit, given.memory_limit, _threads(given.jobs), device, given.onnx, given.compile)
    return Settings(
        (given.library,) if given.library else LIBRARIES, tuple(given.names), given.k, given.jobs, limits, given.out,
        given.resume, given.coverage, given.list,
    )  # fmt: skip


def _add_choice(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("which models")
    group.add_argument("names", nargs="*", help="names of models; if none is given, all of the library's list")
    group.add_argument("--library", choices=LIBRARIES, help="whose models; if not given, all three", default=None)
    group.add_argument("-k", metavar="EXPRESSION", help="only names with this in them; and, or, not and brackets work")
    group.add_argument("--list", action="store_true", help="print the names, and check nothing")
    group.add_argument("--resume", action="store_true", help="keep what passed in the JSON file of an earlier run")
    group.add_argument("--coverage", action="store_true", help="print a Markdown table of the JSON files, and check "
                       "nothing")  # fmt: skip


def _add_checks(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how they are checked")
    group.add_argument("--jobs", type=positive_int, default=1, help="models at once")
    group.add_argument("--time-limit", type=positive, default=600, help="seconds for one model")
    group.add_argument("--memory-limit", type=positive, default=16, help="GiB for one model (on Linux)")
    group.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    group.add_argument("--no-onnx", dest="onnx", action="store_false", help="leave the export out: it takes longest")
    group.add_argument("--compile", action="store_true", help="count graph breaks under torch.compile, too")
    group.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON files")


def select(names: Iterable[str], settings: Settings) -> list[str]:
    """Return those of the names that were asked for; raise `UsageError` for an expression that makes no sense."""
    chosen = [name for name in names if not settings.names or name in settings.names]
    return [name for name in chosen if settings.expression is None or matches(name, settings.expression)]


def check_names(names: Sequence[str], settings: Settings) -> None:
    """Raise `UsageError` for a model that no library has."""
    for name in settings.names:
        if name not in names:
            close = get_close_matches(name, names, 3)
            hint = f"did you mean {', '.join(close)}?" if close else "--list prints the names"
            raise UsageError(f"{name}: no such model in {', '.join(settings.libraries)}; {hint}")


def matches(name: str, expression: str) -> bool:
    """Tell whether a name fits an expression like `resnet and not (18 or 34)`; words are looked for in the name."""
    words = TOKEN.findall(expression)
    if "".join(words) != re.sub(r"\s", "", expression):
        raise UsageError(f"-k {expression}: use words, and, or, not and brackets")
    known = {"and", "or", "not", "(", ")"}
    try:
        found = eval(" ".join(word if word in known else str(word.lower() in name.lower()) for word in words))
    except (SyntaxError, TypeError):
        raise UsageError(f"-k {expression}: not an expression; write it like 'resnet and not (18 or 34)'") from None
    return bool(found)


def _threads(jobs: int) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdigit() and int(given) else max(1, cores // jobs)
