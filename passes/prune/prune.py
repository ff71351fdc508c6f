"""Pruning: units are removed from a trained model, and what they told is folded into the layers that read them.

    h = W x        W [o, n] reads n units, of which the kept ones tell the others by least squares:
    h = W' x'      W' = W C[:, kept] C[kept, kept]^-1, x' = x[kept]

Source: subspace node pruning, arXiv 2405.17506; `ops/subspace.py` has the algebra.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from decorr_fx.errors import ConfigError, ModelError
from decorr_fx.inputs import Example, tensors_in
from decorr_fx.ops.prune.cut import Cut, cut_to_budget, total
from decorr_fx.ops.prune.orders import ORDERS, Order
from decorr_fx.ops.prune.subspace import Units, unit_costs
from decorr_fx.passes.base import Pass
from decorr_fx.passes.copies import copy_model
from decorr_fx.passes.match.settings import Filter
from decorr_fx.passes.prune.groups import Group, Slice, UnitGroups
from decorr_fx.passes.prune.moments import Moments, by_unit, collect_moments, estimate_statistics
from decorr_fx.passes.prune.propagate import find_units
from decorr_fx.passes.prune.report import GroupRecord, ModelSize, PruneReport, PruneResult
from decorr_fx.passes.prune.slice import slice_units
from decorr_fx.runtime.site.spec import SkippedRecord
from decorr_fx.runtime.site.state import sites_of

Measure = Literal["macs", "params"]
Weighting = Literal["output", "variance"]


@dataclass(frozen=True, kw_only=True)
class PruneSettings:
    """How much is removed, and by what it is chosen; see `decorr_fx.prune`."""

    keep: float
    measure: Measure
    order: str | Order
    weighting: Weighting
    round_to: int
    min_units: int
    residual_streams: bool
    filter_fn: Filter | None

    def __post_init__(self) -> None:
        if isinstance(self.keep, bool) or not isinstance(self.keep, int | float) or not 0 < self.keep <= 1:
            raise ConfigError(f"keep is {self.keep!r}; use the part of the model that is to stay, above 0, up to 1")
        for name, allowed in (("measure", get_args(Measure)), ("weighting", get_args(Weighting))):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; use one of {', '.join(allowed)}")
        if not callable(self.order) and self.order not in ORDERS:
            raise ConfigError(f"order is {self.order!r}; use one of {', '.join(ORDERS)}, or a function of Units")
        for name in ("round_to", "min_units"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} is {value!r}; use a whole number of at least 1")

    def score(self, units: Units) -> Tensor:
        """Return how much each unit is wanted, `[n]`.

        Raises:
            ConfigError: a function of the user's gives something else.
        """
        order = self.order if callable(self.order) else ORDERS[self.order]
        score = order(units)
        if not isinstance(score, Tensor) or score.shape != units.norms.shape or not score.isfinite().all():
            raise ConfigError(
                f"order gives {score!r} for layer {units.fqn!r}; it must give {len(units.norms)} finite numbers"
            )
        return score


@dataclass(frozen=True)
class PruneUnits(Pass[PruneResult]):
    """Return a smaller copy of a plain model: fewer units in the layers whose readers can make up for them."""

    calibration: Iterable[Any]
    example: Example
    settings: PruneSettings

    def requires(self, model: nn.Module) -> None:
        """The model is plain, and calibration is several batches."""
        if next(sites_of(model), None) is not None:
            raise ModelError(f"{type(model).__name__} is transformed; fold it first: prune(decorr_fx.fold(model), ...)")
        if isinstance(self.calibration, Tensor | Mapping):
            raise ModelError(
                f"calibration is one {type(self.calibration).__name__}; give several batches, or a list of one"
            )

    def call(self, model: nn.Module) -> PruneResult:
        """Find the units that go together, measure, choose, and slice a copy."""
        small = copy_model(model, shared=[])
        with _in_eval_mode(small):
            return PruneResult(small, self._prune(small))

    def _prune(self, model: nn.Module) -> PruneReport:
        """Prune the copy in place, and tell what was done."""
        self.example.run(model, "example_inputs")
        found = find_units(model, self.example, lambda group: self._refuse(model, group))
        if not found.groups:
            reasons = "; ".join(f"{fqn}: {reason}" for fqn, reason in list(found.left.items())[:8])
            raise ModelError(f"{type(model).__name__} has no units that can be removed. {reasons}")
        moments = collect_moments(model, list(found.readers()), self.calibration)
        tensors = model.state_dict()
        units = [self._units(tensors, found, index, moments) for index in range(len(found.groups))]
        orders = [self.settings.score(of_group).argsort(descending=True, stable=True) for of_group in units]
        cut = self._cut(model, found, units, orders)
        report = self._report(model, found, units, orders, cut)
        if any(record.kept < record.units for record in report.groups):
            kept = [order[:count].sort().values for order, count in zip(orders, cut.kept, strict=True)]
            slice_units(model, found.slices, kept, moments)
            estimate_statistics(model, self.calibration)
        return report

    def ensures(self, model: nn.Module, result: PruneResult) -> None:
        """The result gives outputs of the same shapes, and is as small as the report says."""
        expected, got = (_shapes(one, self.example) for one in (model, result.model))
        if got != expected:
            raise self.broken(type(model).__name__, f"outputs have shapes {got}, those of the model {expected}")
        params = sum(p.numel() for p in result.model.parameters())
        if params != result.report.after.params:
            raise self.broken(
                type(model).__name__, f"{params} parameters, where {result.report.after.params} were counted"
            )

    def _refuse(self, model: nn.Module, group: Group) -> str:
        keep = self.settings.filter_fn
        if keep is not None and not all(keep(model.get_submodule(maker), maker) for maker in group.makers):
            return "filter_fn"
        if group.added and not self.settings.residual_streams:
            return "its units are added to those of other layers; residual_streams=True cuts such streams, too"
        return ""

    def _units(
        self, tensors: Mapping[str, Tensor], found: UnitGroups, index: int, moments: Mapping[str, Moments]
    ) -> Units:
        C, W, norms = [], [], torch.zeros(found.groups[index].units, dtype=torch.float64)
        for one in found.slices:
            place = _place(one, index)
            if place is None or one.role == "carries":
                continue
            tensor = tensors[one.tensor]
            if one.role == "reads":
                C.append(moments[one.tensor].mean[place, place].cpu())
                W.append(by_unit(tensor, one.dim, one)[..., place].flatten(0, -2).double().cpu())
            elif tensor.dim() > 1:
                norms += tensor.double().abs().movedim(one.dim, 0).flatten(1).sum(1).cpu()
        return Units(found.groups[index].fqn, C, W, norms)

    def _cut(self, model: nn.Module, found: UnitGroups, units: Sequence[Units], orders: Sequence[Tensor]) -> Cut:
        weighted = self.settings.weighting == "output"
        costs = [unit_costs(of_group, order, weighted) for of_group, order in zip(units, orders, strict=True)]
        priced = found.priced(_tensor_shapes(model), _prices(model, found)[self.settings.measure])
        return cut_to_budget(costs, priced, self.settings.keep, self.settings.round_to, self.settings.min_units)

    def _report(
        self, model: nn.Module, found: UnitGroups, units: Sequence[Units], orders: Sequence[Tensor], cut: Cut
    ) -> PruneReport:
        records = [
            GroupRecord(
                group.fqn, group.makers, group.readers, group.units, kept,
                float(unit_costs(of_group, order, weighted=True)[kept:].sum()),
            )
            for group, of_group, order, kept in zip(found.groups, units, orders, cut.kept, strict=True)
        ]  # fmt: skip
        shapes, prices = _tensor_shapes(model), _prices(model, found)

        def size(kept: Sequence[int]) -> ModelSize:
            return ModelSize(*(total(found.priced(shapes, prices[measure]), kept) for measure in get_args(Measure)))

        skipped = (SkippedRecord(fqn, type(model.get_submodule(fqn)).__name__, why) for fqn, why in found.left.items())
        return PruneReport(
            tuple(records), tuple(skipped), size([g.units for g in found.groups]), size(cut.kept), cut.tau
        )


def _place(one: Slice, group: int) -> slice | None:
    """Return where the units of a group are among those of an axis."""
    before = 0
    for segment in one.axis:
        if segment.group == group:
            return slice(before, before + segment.units)
        before += segment.units
    return None


def _prices(model: nn.Module, found: UnitGroups) -> dict[Measure, Mapping[str, int]]:
    return {"macs": found.works, "params": dict.fromkeys((name for name, _ in model.named_parameters()), 1)}


def _tensor_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _shapes(model: nn.Module, example: Example) -> list[tuple[int, ...]]:
    with _in_eval_mode(model):
        return [tuple(t.shape) for t in tensors_in(example.call(model))]


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Let every module be in eval mode, and then in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
