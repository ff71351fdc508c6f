"""What a site is, decided once when a model is transformed."""

from dataclasses import dataclass

from decorr_fx.config import DecorrConfig
from decorr_fx.ops.cost import Work
from decorr_fx.ops.layout import Layout
from decorr_fx.ops.rules.step import DEMEANING, REMEMBERING
from decorr_fx.ops.sample import ConvGeometry


@dataclass(frozen=True)
class WeightSpec:
    """One weight that R is applied to.

    Attributes:
        fqn: fully qualified name of the layer; of a part of a packed weight the parameter's, with the rows of the part.
        kind: `linear`, `conv2d`, `conv_transpose1d`, ...
        layout: how the weight is read as rows, and the structure of R.
        centered: the mean is subtracted in the forward and folded into the bias.
    """

    fqn: str
    kind: str
    layout: Layout
    centered: bool


@dataclass(frozen=True)
class SiteSpec:
    """One R: the weights that it is applied to, which all read the same input, and the settings.

    Attributes:
        weights: one, or those of several layers that share their input; their layouts differ in `d_out` and in the
            order in which they are stored, and in nothing else. The first one gives the site its name.
        geometry: where the taps of a convolution fall; None for a linear.
        config: the settings.
        work: what the layers do in a step at the reference batch, by which the structure was chosen.
    """

    weights: tuple[WeightSpec, ...]
    geometry: ConvGeometry | None
    config: DecorrConfig
    work: Work

    @property
    def fqn(self) -> str:
        """Name of the site: that of its first layer."""
        return self.weights[0].fqn

    @property
    def layout(self) -> Layout:
        """How rows of the input are read."""
        return self.weights[0].layout

    @property
    def slots(self) -> int:
        """Samples of the input that are kept for a step of R."""
        return self.layout.slots(self.config.max_samples)

    @property
    def spatial(self) -> int:
        """Number of spatial dimensions of the input; 0 for a linear."""
        return 0 if self.geometry is None else len(self.geometry.kernel)

    @property
    def demeaned(self) -> bool:
        """Whether the rule sees rows with their running mean subtracted."""
        return any(weight.centered for weight in self.weights) or self.config.rule in DEMEANING

    @property
    def remembers(self) -> bool:
        """Whether the rule keeps running moments of the rows."""
        return self.config.rule in REMEMBERING

    @property
    def factor_names(self) -> tuple[str, ...]:
        """Names of the factors of R, or of V: the keys under which they are saved."""
        if self.layout.rank:
            return ("V",)
        if not self.layout.paired:
            return ("R",)
        return ("A", "S") if self.layout.mixes_taps else ("A",)

    @property
    def moment_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of what is remembered of the rows; nothing where the rule does not. See `ops.power`."""
        stacks = self.layout.stacks
        return {"scale": (stacks, self.layout.rank), "trace": (stacks,)} if self.remembers else {}


@dataclass(frozen=True)
class SkippedRecord:
    """One conv or linear layer (or a module that holds some) that is left as it is, and why."""

    fqn: str
    kind: str
    reason: str
