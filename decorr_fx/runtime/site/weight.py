"""The weights of a site, by their places in the model."""

from dataclasses import dataclass, replace

from torch import Tensor, nn

from decorr_fx.errors import DistributedError, LayerError
from decorr_fx.ops.layout import Layout
from decorr_fx.runtime.site.shard import is_sharded, rows_here
from decorr_fx.runtime.site.spec import WeightSpec


@dataclass(frozen=True)
class Slot:
    """A parameter, or some of its rows, by its place: found again after a copy, a load or a move of its module."""

    owner: nn.Module
    name: str
    rows: tuple[int, int] | None = None

    def get(self) -> Tensor:
        """Return the tensor that is there now; of rows a view."""
        tensor: Tensor = getattr(self.owner, self.name)
        return tensor if self.rows is None else tensor[slice(*self.rows)]

    def find(self) -> nn.Parameter | None:
        """Return the whole parameter that is there now, or None where it was removed or replaced."""
        return self.owner._parameters.get(self.name)


@dataclass(frozen=True)
class SiteWeight:
    """A weight that R is applied to, in the module or modules (where it is tied) that hold it, and its layer's bias."""

    spec: WeightSpec
    slots: tuple[Slot, ...]
    bias: Slot | None

    def get(self) -> Tensor:
        """Return the weight as it is now."""
        return self.slots[0].get()

    def held(self) -> tuple[Tensor, Layout]:
        """Return the part of the weight that this rank holds, which is all of it but where it is sharded; a view.

        Raises:
            DistributedError: the weight is sharded in a way in which it cannot follow R.
        """
        parameter, layout = self.find(), self.spec.layout
        if not is_sharded(parameter):
            return self.get(), layout
        here = rows_here(parameter, self.slots[0].rows)
        if here is None or layout.transposed or layout.groups > 1 or self.spec.centered:
            raise DistributedError(
                f"layer {self.spec.fqn!r}: its weight is sharded; only one that is cut along its outputs, of a layer "
                "without groups, not transposed and not centred, can follow R; "
                f"leave it alone with overrides={{{self.spec.fqn!r}: None}}"
            )
        return here, replace(layout, d_out=len(here))

    def find(self) -> nn.Parameter | None:
        """Return the parameter that holds the weight, or None where it was removed or replaced."""
        return self.slots[0].find()

    @property
    def is_parameter(self) -> bool:
        """Whether a parameter is there now, and no tensor that stands in for one, as `torch.func` puts it there."""
        return isinstance(self.find(), nn.Parameter)

    def check_whole(self) -> None:
        """Raise where this rank holds only a part of the weight.

        Raises:
            DistributedError: the weight is sharded.
        """
        if is_sharded(self.find()):
            raise DistributedError(
                f"layer {self.spec.fqn!r}: its weight is sharded over several ranks, and cannot be copied; fold the "
                "model where it is, with decorr_fx.fold_(model) on every rank"
            )

    def check(self) -> None:
        """Raise where the weight is not the one parameter any more that R was made for, or cannot follow R.

        Raises:
            DistributedError: it is sharded in a way in which it cannot follow R.
            LayerError: it was pruned or parametrized after `transform`, or weights that were tied are not tied now.
        """
        parameter = self.find()
        if parameter is None:
            problem = "its weight was pruned or parametrized after transform; undo that, fold, and do it again"
            raise LayerError(self.spec.fqn, problem)
        if any(slot.find() is not parameter for slot in self.slots):
            raise LayerError(self.spec.fqn, "the weights that were tied to it are not any more; tie them again")
        self.held()
