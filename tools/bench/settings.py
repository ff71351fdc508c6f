"""The settings of the benchmark, as the command line gives them."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tools.bench.cases import SUITES, Case
from tools.bench.figures import AXES
from tools.bench.methods import METHODS
from tools.common.arguments import positive, positive_int
from tools.common.results import RESULTS


@dataclass(frozen=True)
class Settings:
    """What the command line asks for."""

    name: str
    cases: tuple[Case, ...]
    sweeps: tuple[str, ...]
    seconds: float
    table: bool
    out: Path


def parse_settings(argv: Sequence[str] | None = None) -> Settings:
    """Return what the command line asks for; exits with code 2 where it is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench",
        description="Time a training step of the plain model and of others, side by side in one process.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_case(parser)
    _add_measuring(parser)
    given = parser.parse_args(argv)
    case = Case(
        given.model, given.batch, given.size, given.dtype, given.channels_last, given.compile, given.device,
        tuple(given.methods),
    )  # fmt: skip
    name = given.suite or ("growth" if given.sweep else given.model)
    cases = SUITES[given.suite] if given.suite else (case,)
    cases = tuple(replace(case, memory=case.memory or given.memory) for case in cases)
    return Settings(name, cases, tuple(given.sweep), given.seconds, given.table, given.out)


def _add_case(parser: argparse.ArgumentParser) -> None:
    default = Case()
    parser.add_argument("--model", default=default.model, help="a torchvision classifier, a timm model, linears, mlp, "
                        "or gpt2")  # fmt: skip
    parser.add_argument("--batch", type=positive_int, default=default.batch, help="examples in a step")
    parser.add_argument("--size", type=positive_int, default=default.size, help="pixels of a side, or tokens")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=default.dtype, help="bfloat16: autocast")
    parser.add_argument("--channels-last", action="store_true", help="memory format of model and images")
    parser.add_argument("--compile", action="store_true", help="run under torch.compile")
    parser.add_argument("--device", default=default.device, help="cpu, cuda, ...")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(default.methods), metavar="METHOD",
                        help=f"to compare with the plain model: {', '.join(METHODS)}")  # fmt: skip


def _add_measuring(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--memory", action="store_true", help="measure peak memory of all cases")
    parser.add_argument("--seconds", type=positive, default=60, help="for the training steps of a case, about")
    several = parser.add_mutually_exclusive_group()
    several.add_argument("--suite", choices=sorted(SUITES), help="measure these cases, beside the bars set for them")
    several.add_argument("--sweep", nargs="+", choices=sorted(AXES), default=(), help="measure growth over these")
    parser.add_argument("--table", action="store_true", help="measure nothing: print the JSON file as Markdown")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file and the picture")
