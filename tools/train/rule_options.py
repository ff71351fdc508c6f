"""The options of decorrelation: one a setting of a rule, of which a run takes those of its own rule."""

import argparse
from collections.abc import Callable, Mapping
from typing import Any, get_args

from decorr_fx import Rule
from decorr_fx.config import StructureName
from tools.common.rules import RULES, fields_of, make_rule, rules_with

OPTIONS: Mapping[str, tuple[Callable[[str], Any] | None, str]] = {  # type, None for a switch that is on; and what it is
    "rank": (int, "directions of an input that R keeps track of"),
    "damping": (float, "eigenvalue, over the mean one, above which a direction is shrunk"),
    "rate": (float, "at which the running moment follows new rows"),
    "power": (float, "exponent, in [0, 0.5]; 0.5 is whitening"),
    "gain": (float, "exponent of the scalar on R; 0: R only shrinks"),
    "cost_budget": (float, "most FLOP around a step of the optimizer, as a part of the layer's own"),
    "decor_lr": (float, "step size of R"),
    "structure": (str, "shape of R"),
    "kappa": (float, "weight of the variance error against the correlation, in [0, 1]"),
    "sample_fraction": (float, "part of the rows of a forward that is recorded, at most"),
    "max_samples": (int, "rows that each factor of R steps on, at most"),
    "update_every": (int, "R moves at one of n steps"),
    "preserve_function": (None, "let a step of R change the network's function, as published"),
    "share_inputs": (None, "give each of several layers that read the same input an R of its own"),
}


def add_rule_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    group = parser.add_argument_group("decorrelation: see decorr_fx.Power, decorr_fx.Dbp and decorr_fx.Crgd")
    group.add_argument("--rule", choices=tuple(RULES), default="power", help="how R moves")
    for field, (kind, meaning) in OPTIONS.items():
        option = field.replace("_", "-")
        if kind is None:
            group.add_argument(f"--no-{option}", dest=field, action="store_false", default=argparse.SUPPRESS,
                               help=meaning)  # fmt: skip
        else:
            choices = get_args(StructureName) if field == "structure" else None
            group.add_argument(f"--{option}", type=kind, choices=choices, default=argparse.SUPPRESS,
                               help=f"{meaning} ({_defaults(field)})")  # fmt: skip


def take_rule(given: dict[str, Any]) -> Rule:
    """Take the options out of what the command line gave, and return the rule.

    Raises:
        UsageError: an option is one of another rule.
        ConfigError: a value is out of its range.
    """
    name = given.pop("rule")
    return make_rule(name, {field: given.pop(field) for field in OPTIONS if field in given})


def _defaults(field: str) -> str:
    """Return the default of a setting, of all rules that have it."""
    by_value: dict[str, list[str]] = {}
    for name in rules_with(field):
        default = fields_of(name)[field]
        by_value.setdefault("by size" if default is None else str(default), []).append(name)
    told = "; ".join(f"{' and '.join(names)}: {value}" for value, names in by_value.items())
    return f"default of {told}"
