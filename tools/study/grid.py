"""What a study runs, read from a TOML file.

tune = [0]                     # seeds that learning rates are chosen on
seeds = [0, 1, 2]              # seeds of what was chosen
evaluations = 20               # of a run, on the validation split
[methods.dbp]                  # besides "plain": a rule, "power" where none is named,
rule = "dbp"
kappa = 0.2                    # settings of that rule,
[methods.calibrated]
calibrate = 8                  # and on how many batches R is set before training
[[grid]]
workloads = ["cnn"]
optimizers = ["adam"]
methods = ["plain", "dbp", "calibrated"]
lr = [1e-3, 3e-3, 1e-2]
"""

import tomllib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from decorr_fx import ConfigError, Power, Rule
from tools.common.errors import UsageError
from tools.common.optimizers import OPTIMIZERS
from tools.common.rules import make_rule
from tools.study.workloads import WORKLOADS

PLAIN, RULE, CALIBRATE = "plain", "rule", "calibrate"
GOAL = "adam"  # the optimizer by whose best plain accuracy everything on a workload is compared


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
class Race:
    """What is compared: methods, each with the learning rates to try, on one workload and by one optimizer."""

    workload: str
    optimizer: str
    rates: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class Study:
    """A whole file."""

    name: str
    tune: tuple[int, ...]
    seeds: tuple[int, ...]
    evaluations: int
    methods: Mapping[str, Mapping[str, Any]]
    races: tuple[Race, ...]

    def tuning_runs(self, race: Race) -> list[Run]:
        """Return the runs that the learning rates of a race are chosen on."""
        return self._runs(race, race.rates, self.tune)

    def final_runs(self, race: Race, chosen: Mapping[str, Collection[float]]) -> list[Run]:
        """Return the runs of the other seeds, with the learning rates chosen for each method."""
        return self._runs(race, chosen, [seed for seed in self.seeds if seed not in self.tune])

    def run(self, race: Race, method: str, lr: float, seed: int) -> Run:
        """Return one run of this study."""
        return Run(race.workload, race.optimizer, method, lr, seed, self.evaluations, self.methods[method])

    def own(self, lines: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Return the lines of runs that are part of this study as it is now: a file may hold others."""
        seeds, possible = {*self.tune, *self.seeds}, []
        for race in self.races:
            rates = {lr for of_method in race.rates.values() for lr in of_method}
            possible += self._runs(race, dict.fromkeys(race.rates, rates), seeds)
        runs = [run.as_json() for run in possible]
        return [line for line in lines if line.get("run") in runs]

    def _runs(self, race: Race, rates: Mapping[str, Collection[float]], seeds: Collection[int]) -> list[Run]:
        return [self.run(race, method, lr, seed) for method, of in rates.items() for lr in of for seed in seeds]


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
    methods = _typed(whole, "methods", dict, {})
    for method, settings in methods.items():
        _check_method(method, settings)
    methods = {PLAIN: {}, **methods}
    seeds = _numbers({"seeds": whole.get("seeds", [0])}, "seeds", int, None)
    (evaluations,) = _numbers({"evaluations": [whole.get("evaluations", 20)]}, "evaluations", int, None)
    if evaluations < 4:
        raise UsageError(f"evaluations is {evaluations}; use at least 4")
    tune = _numbers(whole, "tune", int, seeds)
    races = _races(_typed(whole, "grid", list, []), methods)
    return Study(name, tuple(tune), tuple(seeds), evaluations, methods, races)


def _check_method(method: str, settings: Any) -> None:
    if method == PLAIN:
        raise UsageError(f"{PLAIN!r} is backpropagation, which has no settings; use another name")
    if not isinstance(settings, dict):
        raise UsageError(f"method {method!r} is {settings!r}; use a table")
    try:
        rule = rule_of(settings)
    except (ConfigError, UsageError) as error:
        raise UsageError(f"method {method!r}: {error}") from None
    if CALIBRATE not in settings:
        return
    if _numbers({CALIBRATE: [settings[CALIBRATE]]}, CALIBRATE, int, None) == [0]:
        raise UsageError(f"method {method!r}: {CALIBRATE} is 0; use at least 1")
    if not isinstance(rule, Power) or not rule.preserve_function:
        raise UsageError(f"method {method!r}: {CALIBRATE} is for the rule power that preserves the function")


def rule_of(settings: Mapping[str, Any]) -> Rule:
    """Return the rule of a method.

    Raises:
        UsageError: there is no such rule, or it has no such setting.
        ConfigError: a value is out of its range.
    """
    own = {name: value for name, value in settings.items() if name not in (RULE, CALIBRATE)}
    return make_rule(settings.get(RULE, "power"), own)


def _races(blocks: list[Any], methods: Mapping[str, Any]) -> tuple[Race, ...]:
    """Return the races of all blocks, those of the goal's optimizer first; what several blocks name is joined."""
    found: dict[tuple[str, str], dict[str, dict[float, None]]] = {}
    for block in blocks:
        _check_block(block, methods)
        for workload, optimizer, method in product(block["workloads"], block["optimizers"], block["methods"]):
            rates = found.setdefault((workload, optimizer), {}).setdefault(method, {})
            rates.update(dict.fromkeys(map(float, block["lr"])))
    races = [Race(*key, {method: tuple(rates) for method, rates in tried.items()}) for key, tried in found.items()]
    return tuple(sorted(races, key=lambda race: race.optimizer != GOAL))


def _check_block(block: Any, methods: Mapping[str, Any]) -> None:
    if not isinstance(block, dict):
        raise UsageError("grid is no list of tables: write [[grid]]")
    _known("key of [[grid]]", block, ("workloads", "optimizers", "methods", "lr"))
    _known("workload", _typed(block, "workloads", list), WORKLOADS)
    _known("optimizer", _typed(block, "optimizers", list), OPTIMIZERS)
    _known("method", _typed(block, "methods", list), methods)
    rates = _numbers(block, "lr", float, None)
    if any(lr <= 0 for lr in rates):
        raise UsageError(f"lr has {min(rates)}; use rates above 0")


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
