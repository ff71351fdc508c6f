"""Following units through a graph: from the layer that makes them to those that read them.

The graph is that of `torch.export`. What is known of an operation is that it leaves units on one axis of their own; at
any other one the units stay.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn

from decorr_fx.errors import ModelError
from decorr_fx.inputs import Example, tensors_in
from decorr_fx.ops.prune.cut import Axis, Segment
from decorr_fx.passes.prune.aten import Call, order_after, place_after, shape_of
from decorr_fx.passes.prune.groups import Group, Groups, Role, Slice, UnitGroups

POINTWISE = frozenset({
    "relu", "relu6", "hardtanh", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "sigmoid", "tanh",
    "hardswish", "hardsigmoid", "softplus", "pow", "neg", "exp", "erf", "abs", "sqrt", "rsqrt", "square", "clamp",
    "clamp_min", "clamp_max", "dropout", "alpha_dropout", "feature_dropout", "clone", "contiguous", "to", "_to_copy",
    "alias", "detach", "lift_fresh_copy", "_assert_tensor_metadata",
})  # fmt: skip
ADDING = frozenset({"add", "sub", "rsub"})
JOINING = ADDING | {"mul", "div", "maximum", "minimum"}
POOLING = frozenset(
    f"{kind}{dims}d"
    for kind in ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool")
    for dims in (1, 2, 3)
) | {"upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d"}
RESIZING = frozenset({"pad", "constant_pad_nd", "slice"})
CONVOLUTIONS = frozenset(f"conv{transposed}{dims}d" for transposed in ("", "_transpose") for dims in (1, 2, 3))
RESHAPING = frozenset({"view", "reshape", "flatten", "_unsafe_view", "unflatten", "squeeze", "unsqueeze"})
REDUCING = frozenset({"mean", "sum", "amax", "amin"})


@dataclass(frozen=True)
class Carried:
    """Units on one axis of a tensor, counted from the front."""

    dim: int
    axis: Axis


def find_units(model: nn.Module, example: Example, refuse: Callable[[Group], str]) -> UnitGroups:
    """Return which units of a plain model go together, but for groups that `refuse` gives a reason for.

    Raises:
        ModelError: the model cannot be exported as one graph.
    """
    try:
        program = torch.export.export(_TensorsOf(model), example.args, example.kwargs, strict=False)
    except Exception as error:  # whatever the user's code makes of being exported
        problem = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ModelError(
            f"{type(model).__name__} cannot be exported as one graph, in which units are followed: {problem}"
        ) from error
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    follower = _Follower({node: name.removeprefix("model.") for node, name in names.items()}, example.batch_size)
    follower.follow(program.graph)
    follower.groups.fix_shared(_tied(model))
    return follower.groups.found(follower.works, refuse)


class _TensorsOf(nn.Module):
    """A model that gives its output tensors alone: caches of keys and values are of types that cannot be exported."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        return tensors_in(self.model(*args, **kwargs))


def _tied(model: nn.Module) -> set[str]:
    """Return the names of parameters that have more than one."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name for several in names.values() if len(several) > 1 for name in several}


class _Follower:
    """What is known of the units of each tensor, while the graph is walked through once."""

    def __init__(self, names: Mapping[str, str], batch: int) -> None:
        self.groups = Groups()
        self.works: dict[str, int] = {}
        self._names, self._batch = names, batch
        self._carried: dict[fx.Node, Carried] = {}
        self._handlers: dict[str, Callable[[Call], Carried | None]] = {
            "linear": self._linear, "addmm": self._product, "mm": self._product, "batch_norm": self._norm,
            "prelu": self._prelu, "cat": self._concatenation, "transpose": self._permutation,
            "permute": self._permutation,
            **dict.fromkeys(POINTWISE, self._pointwise), **dict.fromkeys(JOINING, self._joint),
            **dict.fromkeys(POOLING, self._pooling), **dict.fromkeys(RESIZING, self._resizing),
            **dict.fromkeys(CONVOLUTIONS, self._convolution), **dict.fromkeys(RESHAPING, self._reshaping),
            **dict.fromkeys(REDUCING, self._reduction),
        }  # fmt: skip

    def follow(self, graph: fx.Graph) -> None:
        """Walk through the graph."""
        for node in graph.nodes:
            if node.op == "output":
                self._fix(node.all_input_nodes, "its units are an output of the model")
            elif node.op == "call_function":
                call = Call.of(node)
                carried = self._handlers.get(call.operation, self._unknown)(call)
                if carried is not None:
                    self._carried[node] = carried

    # layers: they read units, make them, or carry them

    def _convolution(self, call: Call) -> Carried | None:
        x, W, transposed = call["input"], call["weight"], "transpose" in call.operation
        if len(shape_of(x)) != len(shape_of(W)):
            return self._unknown(call)  # an image without a batch
        self._count_work(W, x if transposed else call.node, shape_of(x)[1] if transposed else call.shape[1])
        if call["groups"] == 1:
            return self._layer(x, W, call["bias"], *((0, 1) if transposed else (1, 0)), dim=1)
        carried = self._carried.get(x)
        depthwise = call["groups"] == shape_of(x)[1] == call.shape[1]
        if carried is None or transposed or not depthwise:
            return self._fix(call.inputs, "a grouped convolution reads its units, and cannot make up for removed ones")
        self._hold(W, 0, "carries", carried.axis)
        self._hold(call["bias"], 0, "carries", carried.axis)
        return carried

    def _linear(self, call: Call) -> Carried | None:
        self._count_work(call["weight"], call.node, call.shape[-1])
        return self._layer(call["input"], call["weight"], call["bias"], 1, 0, dim=len(call.shape) - 1)

    def _product(self, call: Call) -> Carried | None:
        """A product of rows with a weight `[inputs, outputs]`."""
        adds = call.operation == "addmm"
        self._count_work(call["mat2"], call.node, call.shape[1])
        return self._layer(call["mat1" if adds else "self"], call["mat2"], call["self"] if adds else None, 0, 1, dim=1)

    def _layer(self, x: fx.Node, W: fx.Node, b: fx.Node | None, reads: int, makes: int, dim: int) -> Carried | None:
        """A layer that reads along dimension `reads` of W, and makes units along `makes`, on `dim` of its output."""
        if W.name not in self._names or (b is not None and b.name not in self._names):
            return self._fix([x, W], "a computed weight reads its units")
        carried = self._carried.get(x)
        features = 1 if len(shape_of(W)) > 2 else len(shape_of(x)) - 1
        if carried is not None and self._readable(carried, features):
            self._hold(W, reads, "reads", carried.axis)
        units = shape_of(W)[makes]
        axis = (Segment(units, self.groups.new(self._names[W.name].rpartition(".")[0], units)),)
        self._hold(W, makes, "makes", axis)
        self._hold(b, 0, "makes", axis)
        return Carried(dim, axis)

    def _readable(self, carried: Carried, features: int) -> bool:
        if carried.dim != features:
            self.groups.fix(carried.axis, "a layer reads its units as positions")
        elif len(carried.axis) > 1 and any(segment.inner > 1 for segment in carried.axis):
            self.groups.fix(carried.axis, "a layer reads its units flattened, beside others")
        else:
            return True
        return False

    def _norm(self, call: Call) -> Carried | None:
        carried = self._carried.get(call["input"])
        if carried is None or carried.dim != 1:
            return self._unknown(call)
        for tensor in ("weight", "bias", "running_mean", "running_var"):
            self._hold(call[tensor], 0, "carries", carried.axis)
        return carried

    def _prelu(self, call: Call) -> Carried | None:
        carried, slopes = self._carried.get(call["self"]), prod(shape_of(call["weight"]))
        if carried is None or (slopes > 1 and carried.dim != 1):
            return self._unknown(call)
        if slopes > 1:
            self._hold(call["weight"], 0, "carries", carried.axis)
        return carried

    # operations that leave units on an axis of their own

    def _pointwise(self, call: Call) -> Carried | None:
        return self._carried.get(call.inputs[0]) if len(call.inputs) == 1 else self._unknown(call)

    def _pooling(self, call: Call) -> Carried | None:
        carried = self._carried.get(call.inputs[0])
        return carried if carried is None or carried.dim == 1 else self._unknown(call)

    def _resizing(self, call: Call) -> Carried | None:
        """A change of other dimensions than that of the units."""
        x = call.inputs[0]
        carried = self._carried.get(x)
        stays = carried is not None and call.shape[carried.dim] == shape_of(x)[carried.dim]
        return carried if stays else self._unknown(call)

    def _permutation(self, call: Call) -> Carried | None:
        carried = self._carried.get(call["self"])
        return None if carried is None else Carried(order_after(call).index(carried.dim), carried.axis)

    def _reshaping(self, call: Call) -> Carried | None:
        x = call.inputs[0]
        carried = self._carried.get(x)
        found = place_after(shape_of(x), carried.dim, call.shape) if carried is not None else None
        if carried is None or found is None:
            return self._unknown(call)
        dim, inner = found
        return Carried(dim, tuple(Segment(s.units, s.group, s.inner * inner) for s in carried.axis))

    def _reduction(self, call: Call) -> Carried | None:
        x = call.inputs[0]
        carried, rank, dims = self._carried.get(x), len(shape_of(x)), call.given.get("dim")
        every = dims if isinstance(dims, Sequence) and dims else range(rank) if not isinstance(dims, int) else [dims]
        reduced = {dim % rank for dim in every}
        if carried is None or carried.dim in reduced:
            return self._unknown(call)
        before = 0 if len(call.shape) == rank else sum(dim < carried.dim for dim in reduced)
        return Carried(carried.dim - before, carried.axis)

    def _joint(self, call: Call) -> Carried | None:
        """A sum or product of two tensors, in which dimensions are counted from the back."""
        first = next((x for x in call.inputs if x in self._carried), None)
        if first is None:
            return None
        carried, rank = self._carried[first], len(call.shape)
        dim = rank - len(shape_of(first)) + carried.dim
        alike = shape_of(first)[carried.dim] == call.shape[dim]
        for other in call.inputs:
            place = dim - rank + len(shape_of(other))
            if other is first or (place < 0 and other not in self._carried):
                continue
            alike = alike and place >= 0 and self._agrees(other, place, carried.axis, call.operation in ADDING)
        return Carried(dim, carried.axis) if alike else self._unknown(call)

    def _agrees(self, other: fx.Node, dim: int, axis: Axis, added: bool) -> bool:
        """Tell whether the other tensor has one number for all units or for each, which are the same ones then."""
        carried = self._carried.get(other)
        if carried is None and shape_of(other)[dim] == 1:
            return True
        if other.name in self._names:
            self._hold(other, dim, "carries", axis)
            return True
        if carried is None or carried.dim != dim or [_size(s) for s in carried.axis] != [_size(s) for s in axis]:
            return False
        for own, its in zip(axis, carried.axis, strict=True):
            if own.group is None or its.group is None:
                self.groups.fix((own, its), "its units are added to what no layer makes")
            else:
                self.groups.join(own.group, its.group, added)
        return True

    def _concatenation(self, call: Call) -> Carried | None:
        dim, tensors = call["dim"] % len(call.shape), call["tensors"]
        found = [carried for tensor in tensors if (carried := self._carried.get(tensor)) is not None]
        if not found or any(carried.dim != dim for carried in found):
            return self._unknown(call)
        axis: list[Segment] = []
        for tensor in tensors:
            axis += self._carried[tensor].axis if tensor in self._carried else (Segment(shape_of(tensor)[dim]),)
        return Carried(dim, tuple(axis))

    def _unknown(self, call: Call) -> Carried | None:
        return self._fix(call.inputs, f"{call.operation} mixes its units, or moves them")

    # what is noted

    def _fix(self, nodes: Iterable[fx.Node], reason: str) -> Carried | None:
        """Let the units of tensors stay; what is made of them has none."""
        for node in nodes:
            if node in self._carried:
                self.groups.fix(self._carried[node].axis, reason)
        return None

    def _hold(self, tensor: fx.Node | None, dim: int, role: Role, axis: Axis) -> None:
        if tensor is None:
            return
        if tensor.name in self._names:
            self.groups.slices.append(Slice(self._names[tensor.name], dim, role, axis))
        else:
            self.groups.fix(axis, "a number for each of its units is computed")

    def _count_work(self, W: fx.Node, over: fx.Node, channels: int) -> None:
        """Note that each number of W is multiplied at every place of the tensor `over`, which has so many channels."""
        if W.name in self._names:
            name = self._names[W.name]
            self.works[name] = self.works.get(name, 0) + prod(shape_of(over)) // channels // self._batch


def _size(segment: Segment) -> tuple[int, int]:
    return segment.units, segment.inner
