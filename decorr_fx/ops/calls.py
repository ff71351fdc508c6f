"""The calls that are a conv or a linear: which function, which argument is what, and how its weight is stored."""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from decorr_fx.ops.layout import Layout
from decorr_fx.ops.sample import ConvGeometry

_LINEAR = ("input", "weight", "bias")
_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_CONV_TRANSPOSE = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_PRODUCT = ("input", "weight")
_DEFAULTS = {"bias": None, "stride": 1, "padding": 0, "output_padding": 0, "dilation": 1, "groups": 1}


@dataclass(frozen=True)
class Signature:
    """How a function is called that maps rows of its input by a weight.

    Attributes:
        kind: `linear`, `conv2d`, `conv_transpose1d`, ...
        spatial: number of spatial dimensions.
        names: the names of its arguments, in order.
        inputs_first: the weight is stored `[C_in, d_out, *kernel]`.
        product: a product of any two tensors; a layer only where one of them is a weight.
    """

    kind: str
    spatial: int
    names: tuple[str, ...]
    inputs_first: bool = False
    product: bool = False

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of a call by name, defaults included."""
        given = dict(zip(self.names, args, strict=False)) | dict(kwargs)
        return {name: given.get(name, _DEFAULTS.get(name)) for name in {*self.names, *kwargs, *_DEFAULTS}}

    def layout(self, groups: int, shape: Sequence[int]) -> Layout:
        """Return how a weight of this shape is read as rows."""
        taps = prod(shape[2:])
        if self.inputs_first:
            return Layout(groups, shape[1], shape[0] // groups, taps, transposed=True)
        return Layout(groups, shape[0] // groups, shape[1], taps)

    def geometry(self, arguments: Mapping[str, Any], shape: Sequence[int]) -> ConvGeometry | None:
        """Return where the taps of a weight of this shape fall in a call with these arguments; None for a linear."""
        if not self.spatial:
            return None
        kernel = tuple(shape[2:])
        stride, dilation = (one_each(arguments[name], self.spatial) for name in ("stride", "dilation"))
        return ConvGeometry(kernel, stride, _padding(arguments["padding"], kernel, dilation), dilation, self.transposed)

    @property
    def transposed(self) -> bool:
        """Whether it is a transposed convolution."""
        return self.inputs_first and self.spatial > 0


def one_each(value: Any, spatial: int) -> tuple[int, ...]:
    """Return one entry a spatial dimension of a geometry argument that may be a single number."""
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    return values * spatial if len(values) == 1 else values


def _padding(padding: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    if padding == "valid":
        return ((0, 0),) * len(kernel)
    if padding == "same":  # an odd total has its extra zero at the end, as torch puts it
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((p, p) for p in one_each(padding, len(kernel)))


_X_TIMES_W = Signature("linear", 0, _PRODUCT, inputs_first=True, product=True)
CALLS: dict[Any, Signature] = {
    F.linear: Signature("linear", 0, _LINEAR),
    F.conv1d: Signature("conv1d", 1, _CONV),
    F.conv2d: Signature("conv2d", 2, _CONV),
    F.conv3d: Signature("conv3d", 3, _CONV),
    F.conv_transpose1d: Signature("conv_transpose1d", 1, _CONV_TRANSPOSE, inputs_first=True),
    F.conv_transpose2d: Signature("conv_transpose2d", 2, _CONV_TRANSPOSE, inputs_first=True),
    F.conv_transpose3d: Signature("conv_transpose3d", 3, _CONV_TRANSPOSE, inputs_first=True),
    torch.addmm: Signature("linear", 0, ("bias", "input", "weight"), inputs_first=True, product=True),
    **dict.fromkeys((torch.matmul, operator.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm), _X_TIMES_W),
}


def layer_signature(module: nn.Module) -> Signature | None:
    """Return how a layer calls its weight by its type, a linear or a convolution; None of any other module."""
    if isinstance(module, nn.Linear):
        return CALLS[F.linear]
    if not isinstance(module, _ConvNd):
        return None
    return CALLS[getattr(F, f"conv{'_transpose' if module.transposed else ''}{len(module.kernel_size)}d")]


def layer_geometry(module: nn.Module) -> ConvGeometry | None:
    """Return where the taps of a layer fall, as it is now; None of a linear."""
    if not isinstance(module, _ConvNd):
        return None
    signature = layer_signature(module)
    settings = {name: getattr(module, name) for name in ("stride", "padding", "dilation")}
    return None if signature is None else signature.geometry(settings, (0, 0, *module.kernel_size))


METHODS: dict[str, Signature] = {"matmul": _X_TIMES_W, "mm": _X_TIMES_W, "__matmul__": _X_TIMES_W}
# Other products that may hold a weight, by the names of functions and methods: their rows are not written in the call.
OTHER_PRODUCTS = frozenset(
    ["einsum", "bmm", "baddbmm", "tensordot", "bilinear", "grouped_mm", "_grouped_mm", "multi_head_attention_forward"]
)
