"""Choosing: which settings a layer gets, from the config, `filter_fn` and `overrides`."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from decorr_fx.config import DecorrConfig
from decorr_fx.errors import ConfigError
from decorr_fx.passes.match.source import Unmatched

Filter = Callable[[nn.Module, str], bool]
Overrides = Mapping[str, DecorrConfig | None]


@dataclass(frozen=True)
class Settings:
    """The settings of each layer: the config, `filter_fn` and `overrides`."""

    config: DecorrConfig
    filter_fn: Filter | None
    overrides: Overrides

    def __post_init__(self) -> None:
        if self.filter_fn is not None and not callable(self.filter_fn):
            raise ConfigError(f"filter_fn is {self.filter_fn!r}; use a function of (module, fqn)")
        if not isinstance(self.overrides, Mapping):
            raise ConfigError(
                f"overrides is {self.overrides!r}; use a dict from regular expressions to configs or None"
            )
        for pattern, override in self.overrides.items():
            if override is not None and not isinstance(override, DecorrConfig):
                raise ConfigError(
                    f"overrides[{pattern!r}] is {override!r}; use a DecorrConfig, or None for 'leave alone'"
                )
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise ConfigError(f"overrides: {pattern!r} is not a regular expression: {error}") from None

    def choose(self, module: nn.Module, fqn: str) -> DecorrConfig:
        """Return the settings of a layer; raise `Unmatched` where the user leaves it alone."""
        if self.filter_fn is not None and not self.filter_fn(module, fqn):
            raise Unmatched("left alone by filter_fn")
        hits = [pattern for pattern in self.overrides if re.fullmatch(pattern, fqn)]
        config = self.overrides[hits[0]] if hits else self.config
        if config is None:
            raise Unmatched(f"left alone by overrides[{hits[0]!r}]")
        return config

    def check_all_match(self, layers: list[str]) -> None:
        """Raise `ConfigError` for the first pattern that names none of the layers."""
        for pattern in self.overrides:
            if not any(re.fullmatch(pattern, fqn) for fqn in layers):
                raise ConfigError(
                    f"overrides: {pattern!r} matches no layer; it must match a whole name, like 'fc' or 'layer4\\..*', "
                    f"and the layers are {', '.join(layers[:8])}{', ...' if len(layers) > 8 else ''}"
                )
