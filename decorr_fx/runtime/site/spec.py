"""What a site is, decided once when a model is transformed."""

from dataclasses import dataclass
from functools import cached_property

from decorr_fx.config import Crgd, Power, Rule
from decorr_fx.ops.layout import Layout


@dataclass(frozen=True)
class WeightSpec:
    """One weight that R belongs to.

    Attributes:
        fqn: fully qualified name of the layer; of a part of a packed weight the parameter's, with the rows of the part.
        kind: `linear`, `conv2d`, `conv_transpose1d`, ...
        layout: how the weight is read as rows, and the structure of R.
    """

    fqn: str
    kind: str
    layout: Layout


@dataclass(frozen=True)
class SiteSpec:
    """One R: the weights that it belongs to, which all read the same input, and the settings.

    Attributes:
        weights: one, or those of several layers that share their input; their layouts differ in `d_out` and in the
            order in which they are stored, and in nothing else. The first one gives the site its name.
        rule: the settings.
    """

    weights: tuple[WeightSpec, ...]
    rule: Rule

    @property
    def fqn(self) -> str:
        """Name of the site: that of its first layer."""
        return self.weights[0].fqn

    @cached_property
    def layout(self) -> Layout:
        """How rows of the input are read."""
        return self.weights[0].layout

    @cached_property
    def layouts(self) -> tuple[Layout, ...]:
        """How each of the weights is read."""
        return tuple(weight.layout for weight in self.weights)

    @cached_property
    def slots(self) -> int:
        """Samples of the input that are kept for a step of R."""
        return self.layout.slots(self.rule.max_samples)

    @property
    def demeaned(self) -> bool:
        """Whether the rule sees rows with their running mean subtracted."""
        return isinstance(self.rule, Crgd)

    @cached_property
    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of R and of what is remembered of the rows: the keys under which they are saved."""
        layout = self.layout
        if isinstance(self.rule, Power):
            (U,) = layout.factor_shapes
            return {"U": U, "scale": U[:2], "trace": U[:1], "gain": U[:1]}
        names = ("A", "S") if layout.paired else ("R",)
        mean = {"mean": (layout.stacks, *layout.modes)} if self.demeaned else {}
        return {**dict(zip(names, layout.factor_shapes, strict=True)), **mean}


@dataclass(frozen=True)
class SkippedRecord:
    """One conv or linear layer (or a module that holds some) that is left as it is, and why."""

    fqn: str
    kind: str
    reason: str
