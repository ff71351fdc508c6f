"""Settings: which rule a layer gets, from the default, `filter_fn` and `overrides`."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from decorr_fx.config import Rule
from decorr_fx.errors import ConfigError
from decorr_fx.passes.match.source import Unmatched

Filter = Callable[[nn.Module, str], bool]
Overrides = Mapping[str, Rule | None]


@dataclass(frozen=True)
class Settings:
    """The rule of each layer: the default, `filter_fn` and `overrides`."""

    rule: Rule
    filter_fn: Filter | None
    overrides: Overrides

    def __post_init__(self) -> None:
        if not isinstance(self.rule, Rule):
            raise ConfigError(f"rule is {self.rule!r}; use decorr_fx.Power(), decorr_fx.Dbp() or decorr_fx.Crgd()")
        if self.filter_fn is not None and not callable(self.filter_fn):
            raise ConfigError(f"filter_fn is {self.filter_fn!r}; use a function of (module, fqn)")
        if not isinstance(self.overrides, Mapping):
            raise ConfigError(f"overrides is {self.overrides!r}; use a dict from names or patterns to rules or None")
        for key, override in self.overrides.items():
            if override is not None and not isinstance(override, Rule):
                raise ConfigError(f"overrides[{key!r}] is {override!r}; use a rule, or None for 'leave alone'")
            if not isinstance(key, str):
                raise ConfigError(f"overrides: {key!r} is not a name or a regular expression")

    def choose(self, module: nn.Module, fqn: str) -> Rule:
        """Return the rule of a layer; raise `Unmatched` where the user leaves it alone."""
        if self.filter_fn is not None and not self.filter_fn(module, fqn):
            raise Unmatched("left alone by filter_fn")
        hits = [fqn] if fqn in self.overrides else [key for key in self.overrides if self._matches(key, fqn)]
        rule = self.overrides[hits[0]] if hits else self.rule
        if rule is None:
            raise Unmatched(f"left alone by overrides[{hits[0]!r}]")
        return rule

    def check_all_match(self, layers: list[str]) -> None:
        """Raise `ConfigError` for the first key that names none of the layers."""
        for key in self.overrides:
            if key not in layers and not any(self._matches(key, fqn) for fqn in layers):
                raise ConfigError(
                    f"overrides: {key!r} matches no layer; it must be or match a whole name, like 'fc' or "
                    f"'layer4\\..*', and the layers are {', '.join(layers[:8])}{', ...' if len(layers) > 8 else ''}"
                )

    @staticmethod
    def _matches(key: str, fqn: str) -> bool:
        """Tell whether a key is the name itself, or a pattern that matches all of it."""
        try:
            return key == fqn or re.fullmatch(key, fqn) is not None
        except re.error as error:
            raise ConfigError(f"overrides: {key!r} is no layer, and no regular expression: {error}") from None
