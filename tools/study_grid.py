"""What a study runs, read from a TOML file.

tune = [0]                     # seeds that learning rates are chosen on
seeds = [0, 1, 2]              # seeds of what was chosen
evaluations = 20               # of a run, on the validation split
[methods.power]                # besides "plain"; fields of DecorrConfig,
rule = "power"
calibrate = 8                  # and on how many batches R is set before training
[[grid]]
workloads = ["cnn"]
optimizers = ["adam"]
methods = ["plain", "power"]
lr = [1e-3, 3e-3, 1e-2]
"""

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from study_workloads import WORKLOADS
from train_loop import OPTIMIZERS
from train_settings import UsageError

from decorr_fx import ConfigError, DecorrConfig

PLAIN, CALIBRATE = "plain", "calibrate"


@dataclass(frozen=True)
class Run:
    """One training run: everything that decides its outcome."""

    workload: str
    optimizer: str
    method: str
    lr: float
    seed: int
    evaluations: int
    config: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return what identifies the run in a file."""
        return asdict(self)


@dataclass(frozen=True)
class Block:
    """One `[[grid]]` of the file."""

    workloads: tuple[str, ...]
    optimizers: tuple[str, ...]
    methods: tuple[str, ...]
    lr: tuple[float, ...]

    def races(self) -> Iterator["Block"]:
        """Yield the block's parts of one workload and one optimizer."""
        for workload, optimizer in product(self.workloads, self.optimizers):
            yield replace(self, workloads=(workload,), optimizers=(optimizer,))


@dataclass(frozen=True)
class Study:
    """A whole file."""

    name: str
    tune: tuple[int, ...]
    seeds: tuple[int, ...]
    evaluations: int
    methods: Mapping[str, Mapping[str, Any]]
    blocks: tuple[Block, ...]

    def tuning_runs(self, block: Block) -> list[Run]:
        """Return the runs of a block that learning rates are chosen on."""
        return [
            self.run(workload, optimizer, method, lr, seed)
            for workload, optimizer, lr, method, seed in product(
                block.workloads, block.optimizers, block.lr, block.methods, self.tune
            )
        ]

    def final_runs(self, chosen: Mapping[tuple[str, str, str], Sequence[float]]) -> list[Run]:
        """Return the runs of the other seeds, with the learning rates chosen for (workload, optimizer, method)."""
        seeds = [seed for seed in self.seeds if seed not in self.tune]
        return [self.run(*key, lr, seed) for key, rates in chosen.items() for lr in rates for seed in seeds]

    def timed(self) -> dict[str, list[tuple[str, str]]]:
        """Return of each workload the (optimizer, method) that are timed side by side."""
        found: dict[str, list[tuple[str, str]]] = {}
        for block in self.blocks:
            for workload in block.workloads:
                found.setdefault(workload, []).extend(product(block.optimizers, block.methods))
        return {workload: list(dict.fromkeys(pairs)) for workload, pairs in found.items()}

    def run(self, workload: str, optimizer: str, method: str, lr: float, seed: int) -> Run:
        """Return one run of this study."""
        return Run(workload, optimizer, method, lr, seed, self.evaluations, FrozenConfig(self.methods[method]))


class FrozenConfig(dict[str, Any]):
    """Settings of a method that can be part of a key."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(sorted(self.items())))


def read_study(path: Path) -> Study:
    """Return the study in a file, checked.

    Raises:
        UsageError: the file cannot be read, or names what there is not.
    """
    try:
        whole = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    try:
        return _study(path.stem, whole)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def _study(name: str, whole: Mapping[str, Any]) -> Study:
    _known("key", whole, ("tune", "seeds", "evaluations", "methods", "grid"))
    methods = {PLAIN: {}, **_typed(whole, "methods", dict, {})}
    for method, settings in methods.items():
        try:
            DecorrConfig(**{field: value for field, value in settings.items() if field != CALIBRATE})
        except (ConfigError, TypeError) as error:
            raise UsageError(f"method {method!r}: {error}") from None
        if CALIBRATE in settings:
            _count(settings, CALIBRATE)
    seeds = _numbers({"seeds": whole.get("seeds", [0])}, "seeds", int, None)
    return Study(
        name,
        tuple(_numbers(whole, "tune", int, seeds)),
        tuple(seeds),
        _count({"evaluations": 20, **whole}, "evaluations"),
        methods,
        tuple(_block(block, methods) for block in _typed(whole, "grid", list, [])),
    )


def _block(block: Any, methods: Mapping[str, Any]) -> Block:
    if not isinstance(block, dict):
        raise UsageError("grid is no list of tables: write [[grid]]")
    _known("key of [[grid]]", block, ("workloads", "optimizers", "methods", "lr"))
    _known("workload", _typed(block, "workloads", list), WORKLOADS)
    _known("optimizer", _typed(block, "optimizers", list), OPTIMIZERS)
    _known("method", _typed(block, "methods", list), methods)
    rates = _numbers(block, "lr", float, None)
    if any(lr <= 0 for lr in rates):
        raise UsageError(f"lr has {min(rates)}; use rates above 0")
    return Block(tuple(block["workloads"]), tuple(block["optimizers"]), tuple(block["methods"]), tuple(rates))


def _known(what: str, names: Any, known: Any) -> None:
    for name in names:
        if name not in known:
            raise UsageError(f"there is no {what} {name!r}; use {', '.join(known)}")


def _typed(table: Mapping[str, Any], key: str, kind: type, default: Any = None) -> Any:
    value = table.get(key, default)
    if not isinstance(value, kind) or (default is None and not value):
        raise UsageError(f"{key} is {value!r}; use a {'table' if kind is dict else 'list'}")
    return value


def _numbers(table: Mapping[str, Any], key: str, kind: type, default: Any) -> list[Any]:
    values = _typed(table, key, list, default)
    accepted = (int, float) if kind is float else (int,)
    for value in values:
        if isinstance(value, bool) or not isinstance(value, accepted) or value < 0:
            raise UsageError(f"{key} has {value!r}; use numbers of at least 0")
    return [kind(value) for value in values]


def _count(table: Mapping[str, Any], key: str) -> int:
    (value,) = _numbers({key: [table[key]]}, key, int, None)
    if value == 0:
        raise UsageError(f"{key} is 0; use at least 1")
    return value
