"""The weights of a site, by their places in the model."""

from dataclasses import dataclass, replace

from torch import Tensor, nn

from decorr_fx.errors import DistributedError, LayerError
from decorr_fx.ops.layout import Layout
from decorr_fx.runtime.site.shard import is_sharded, rows_here
from decorr_fx.runtime.site.spec import WeightSpec

_PLAIN = (Tensor, nn.Parameter)  # a sharded one is of another type


@dataclass(frozen=True)
class SiteWeight:
    """A parameter, or some of its rows, by its place: found again after a copy, a load or a move of its module."""

    spec: WeightSpec
    owner: nn.Module
    name: str
    rows: tuple[int, int] | None = None

    def find(self) -> nn.Parameter | None:
        """Return the whole parameter that is there now, or None where it was removed or replaced."""
        return self.owner._parameters.get(self.name)

    def parameter(self) -> nn.Parameter:
        """Return the whole parameter that is there now.

        Raises:
            LayerError: it was pruned or parametrized after `transform`.
        """
        found = self.owner._parameters.get(self.name)
        if found is None:
            raise LayerError(self.spec.fqn, "its weight was pruned or parametrized after transform; undo that, or fold "
                                            "the model, do it again, and transform the result")  # fmt: skip
        return found

    def parts(self, tensor: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Layout]:
        """Return what this rank holds of the weight's rows, of the parameter and of its gradient: see `part`."""
        if self.rows is None and type(tensor) in _PLAIN:
            return tensor, gradient, self.spec.layout
        held, layout = self.part(tensor)
        return held, self.part(gradient)[0], layout

    def part(self, tensor: Tensor) -> tuple[Tensor, Layout]:
        """Return what this rank holds of the weight's rows, of the parameter or of its gradient: a view.

        Raises:
            DistributedError: the weight is sharded in a way in which rows are not whole.
        """
        layout = self.spec.layout
        if type(tensor) in _PLAIN or not is_sharded(tensor):
            return (tensor if self.rows is None else tensor[slice(*self.rows)]), layout
        here = rows_here(tensor, self.rows)
        if here is None or layout.transposed or layout.groups > 1:
            raise DistributedError(
                f"layer {self.spec.fqn!r}: its weight is sharded; only one that is cut along its outputs, of a layer "
                "without groups and not transposed, can be decorrelated; "
                f"leave it alone with overrides={{{self.spec.fqn!r}: None}}"
            )
        return here, replace(layout, d_out=len(here))
