"""What a site is, decided once when a model is transformed."""

from dataclasses import dataclass

from decorr_fx.config import DecorrConfig
from decorr_fx.ops.record import ConvGeometry
from decorr_fx.ops.rules import RULES
from decorr_fx.ops.structure import Layout


@dataclass(frozen=True)
class SiteSpec:
    """The layer, the reading of its weight, and the settings.

    Attributes:
        fqn: fully qualified name of the layer.
        kind: `linear`, `conv2d`, `conv_transpose1d`, ...
        layout: how the weight is read as rows, and the structure of R.
        geometry: where the taps of a convolution fall; None for a linear.
        config: the settings.
        centered: the mean is subtracted in the forward and folded into the bias.
    """

    fqn: str
    kind: str
    layout: Layout
    geometry: ConvGeometry | None
    config: DecorrConfig
    centered: bool

    @property
    def demeaned(self) -> bool:
        """Whether the rule sees rows with their running mean subtracted."""
        return self.centered or RULES[self.config.rule].demeans

    @property
    def factor_names(self) -> tuple[str, ...]:
        """Names of the factors of R: the keys under which they are saved."""
        return ("A", "S") if self.layout.paired else ("R",)
