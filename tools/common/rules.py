"""The rules of decorrelation by name, with settings by name."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from decorr_fx import Crgd, Dbp, Power, Rule
from tools.common.errors import UsageError

RULES: Mapping[str, type[Rule]] = {"power": Power, "dbp": Dbp, "crgd": Crgd}


def fields_of(name: str) -> dict[str, Any]:
    """Return the settings of a rule, with their defaults."""
    return {field.name: field.default for field in fields(RULES[name])}


def rules_with(field: str) -> list[str]:
    """Return the names of the rules that have a setting."""
    return [name for name in RULES if field in fields_of(name)]


def name_of(rule: Rule) -> str:
    """Return the name of a rule."""
    return next(name for name, kind in RULES.items() if type(rule) is kind)


def make_rule(name: str, settings: Mapping[str, Any]) -> Rule:
    """Return the rule of a name with these settings, and its defaults for all others.

    Raises:
        UsageError: there is no such rule, or it has no such setting.
        ConfigError: a value is out of its range.
    """
    if name not in tuple(RULES):  # a tuple: what is no text need not have a hash
        raise UsageError(f"there is no rule {name!r}; use {', '.join(RULES)}")
    for field in settings:
        if field not in fields_of(name):
            others = rules_with(field)
            advice = f"it is one of {' and '.join(others)}" if others else f"use {', '.join(fields_of(name))}"
            raise UsageError(f"the rule {name} has no setting {field!r}; {advice}")
    return RULES[name](**settings)
