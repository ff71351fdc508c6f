"""Slicing: the removed units leave every tensor that holds them, and the layers say their new sizes."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from decorr_fx.ops.prune.cut import Axis
from decorr_fx.ops.prune.subspace import fold_removed
from decorr_fx.passes.prune.groups import Slice
from decorr_fx.passes.prune.moments import Moments, by_unit

SIZES = {
    "makes": ("out_features", "out_channels", "nf"),
    "reads": ("in_features", "in_channels", "nx"),
    "carries": ("num_features", "num_parameters", "in_channels", "out_channels", "groups"),
}  # attributes in which layers say how many units they make, read, or carry: nf and nx are those of transformers


@torch.no_grad()
def slice_units(
    model: nn.Module, slices: Sequence[Slice], kept: Sequence[Tensor], moments: Mapping[str, Moments]
) -> None:
    """Remove all units but the `kept` ones of each group, in place; readers take over what the others told.

    Args:
        model: the model.
        slices: every dimension that holds units.
        kept: of each group, the indices of the units that stay, in order.
        moments: the second moment of what each reader reads, by the name of its weight.
    """
    by_tensor: dict[str, list[Slice]] = {}
    for one in slices:
        by_tensor.setdefault(one.tensor, []).append(one)
    for name, of_tensor in by_tensor.items():
        layer, _, attribute = name.rpartition(".")
        owner = model.get_submodule(layer)
        tensor: Tensor = getattr(owner, attribute)
        for one in of_tensor:
            cut = _cut(tensor, one, kept, moments)
            _tell(owner, one, tensor.shape[one.dim], cut.shape[one.dim])
            tensor = cut
        _replace(owner, attribute, tensor)


def units_kept(axis: Axis, kept: Sequence[Tensor]) -> Tensor:
    """Return the indices of the units that stay on an axis, of all its units."""
    found, before = [], 0
    for segment in axis:
        found.append(before + (torch.arange(segment.units) if segment.group is None else kept[segment.group]))
        before += segment.units
    return torch.cat(found)


def _cut(tensor: Tensor, one: Slice, kept: Sequence[Tensor], moments: Mapping[str, Moments]) -> Tensor:
    indices = units_kept(one.axis, kept).to(tensor.device)
    if len(indices) == sum(segment.units for segment in one.axis):
        return tensor
    if one.role != "reads":
        return tensor.index_select(one.dim, _entries(one.axis, indices))
    folded = fold_removed(by_unit(tensor, one.dim, one).double(), moments[one.tensor].mean, indices)
    return folded.movedim(-2, -1).flatten(-2).movedim(-1, one.dim).to(tensor.dtype).contiguous()


def _entries(axis: Axis, units: Tensor) -> Tensor:
    """Return the places on the axis of the entries of some of its units."""
    sizes = torch.cat([torch.full((s.units,), s.inner) for s in axis]).to(units.device)
    starts = sizes.cumsum(0) - sizes
    return torch.cat([torch.arange(int(s), int(s) + int(n)) for s, n in zip(starts[units], sizes[units], strict=True)]
                     ).to(units.device)  # fmt: skip


def _replace(owner: nn.Module, attribute: str, tensor: Tensor) -> None:
    old = getattr(owner, attribute)
    if isinstance(old, nn.Parameter):
        tensor = nn.Parameter(tensor.detach().clone(), requires_grad=old.requires_grad)
    setattr(owner, attribute, tensor)


def _tell(owner: nn.Module, one: Slice, before: int, after: int) -> None:
    for attribute in SIZES[one.role]:
        if isinstance(size := getattr(owner, attribute, None), int) and size == before:
            setattr(owner, attribute, after)
