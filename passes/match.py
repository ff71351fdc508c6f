"""Matching: find every call of a conv or linear in traced graphs, and the parameter that its weight comes from.

What is matched is the functional call. Its weight is followed back to the one parameter in the weight's own shape: the
parameter itself, or the `v` of a weight norm, the raw weight of a standardised or spectral-normed convolution. R is
applied to that parameter, so folding is exact whatever is computed from it. Matchers return data and change nothing.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.func import functional_call

from decorr_fx.ops.record import ConvGeometry
from decorr_fx.ops.structure import Layout, stack_weight, unstack_weight

LayoutOf = Callable[[torch.Size], Layout]

_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_CONV_TRANSPOSE = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_DEFAULTS = {"bias": None, "stride": 1, "padding": 0, "output_padding": 0, "dilation": 1, "groups": 1}
CALLS: dict[Callable[..., Any], tuple[str, int, tuple[str, ...]]] = {
    F.linear: ("linear", 0, ("input", "weight", "bias")),
    F.conv1d: ("conv1d", 1, _CONV),
    F.conv2d: ("conv2d", 2, _CONV),
    F.conv3d: ("conv3d", 3, _CONV),
    F.conv_transpose1d: ("conv_transpose1d", 1, _CONV_TRANSPOSE),
    F.conv_transpose2d: ("conv_transpose2d", 2, _CONV_TRANSPOSE),
    F.conv_transpose3d: ("conv_transpose3d", 3, _CONV_TRANSPOSE),
}


class Unmatched(Exception):  # noqa: N818 - not an error: the reason why a call cannot be a site
    """Why a call of a conv or linear cannot be decorrelated."""


@dataclass(frozen=True)
class Source:
    """Where a weight comes from: the parameter at `path`, read by `node`, a `get_attr` or the call of a child module.

    `inner` is the parameter's name inside that child module, and empty for a `get_attr`; `between` holds all nodes from
    `node` up to the weight.
    """

    path: str
    node: fx.Node
    inner: str
    between: frozenset[fx.Node]
    parameter: Tensor


@dataclass(frozen=True)
class Call:
    """One call of a conv or linear in a graph, with its arguments by name and its weight's source."""

    node: fx.Node
    kind: str
    arguments: Mapping[str, Any]
    source: Source
    layout: Layout
    geometry: ConvGeometry | None

    @property
    def bias_path(self) -> str | None:
        """Path of the bias if it and the weight are plain attributes, else None: no place to fold a mean into."""
        bias = self.arguments["bias"]
        direct = isinstance(bias, fx.Node) and bias.op == "get_attr" and not self.source.between
        return str(bias.target) if direct else None


@dataclass(frozen=True)
class Use:
    """One call of a site's weight: in the train or eval graph of the layer `piece`."""

    piece: str
    training: bool
    call: Call

    @property
    def parameter_fqn(self) -> str:
        """Name of the parameter in the whole model."""
        return f"{self.piece}.{self.call.source.path}" if self.piece else self.call.source.path


def is_call(node: fx.Node) -> bool:
    """Tell whether the node calls a conv or a linear."""
    return node.op == "call_function" and node.target in CALLS


def named_arguments(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of a call of a conv or linear by name, defaults included."""
    names = CALLS[node.target][2]  # type: ignore[index]
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    return {name: given.get(name, _DEFAULTS.get(name)) for name in names}


def match_call(node: fx.Node, module: nn.Module) -> Call:
    """Read one call in a graph of `module`.

    Raises:
        Unmatched: the call cannot be decorrelated; the message is the reason.
    """
    kind, spatial, _ = CALLS[node.target]  # type: ignore[index]
    arguments = named_arguments(node)
    if isinstance(arguments.get("groups"), fx.Node):
        raise Unmatched("its number of groups is computed in the forward")
    geometry = None
    source = _find_source(arguments["weight"], module, lambda shape: _layout(kind, arguments, shape))
    shape = source.parameter.shape
    if len(shape) != spatial + 2:
        raise Unmatched(f"its weight has {len(shape)} dimensions, a {kind} needs {spatial + 2}")
    if spatial:
        geometry = _geometry(arguments, tuple(shape[2:]), transposed="transpose" in kind)
    return Call(node, kind, arguments, source, _layout(kind, arguments, shape), geometry)


def _layout(kind: str, arguments: Mapping[str, Any], shape: torch.Size) -> Layout:
    groups, taps = arguments.get("groups", 1), prod(shape[2:])
    if "transpose" in kind:
        return Layout(groups, shape[1], shape[0] // groups, taps, transposed=True)
    return Layout(groups, shape[0] // groups, shape[1], taps)


def _geometry(arguments: Mapping[str, Any], kernel: tuple[int, ...], transposed: bool) -> ConvGeometry:
    spatial = len(kernel)
    fixed = {name: arguments[name] for name in ("stride", "padding", "dilation")}
    if any(isinstance(leaf, fx.Node) for value in fixed.values() for leaf in _leaves(value)):
        raise Unmatched("its stride, padding or dilation are computed in the forward")
    stride, dilation = each(fixed["stride"], spatial), each(fixed["dilation"], spatial)
    return ConvGeometry(kernel, stride, _padding(fixed["padding"], kernel, dilation), dilation, transposed)


def _padding(padding: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    if padding == "valid":
        return ((0, 0),) * len(kernel)
    if padding == "same":  # an odd total has its extra zero at the end, as torch puts it
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((p, p) for p in each(padding, len(kernel)))


def each(value: Any, spatial: int) -> tuple[int, ...]:
    """Return one entry a spatial dimension of a geometry argument that may be a single number."""
    values = tuple(_leaves(value))
    return values * spatial if len(values) == 1 else values


def _leaves(value: Any) -> Iterator[Any]:
    return iter(value) if isinstance(value, tuple | list) else iter([value])


def _find_source(weight: Any, module: nn.Module, layout_of: LayoutOf) -> Source:
    if not isinstance(weight, fx.Node):
        raise Unmatched("its weight is not a parameter")
    if weight.op == "get_attr":
        path = str(weight.target)
        return Source(path, weight, "", frozenset(), _require_parameter(module, path))
    return _find_computed_source(weight, module, layout_of)


def _require_parameter(module: nn.Module, path: str) -> nn.Parameter:
    owner, _, name = path.rpartition(".")
    tensor = getattr(module.get_submodule(owner), name)
    if isinstance(tensor, nn.Parameter):
        return tensor
    if f"{name}_g" in dict(module.get_submodule(owner).named_parameters(recurse=False)):
        raise Unmatched("its weight is set by a hook: use torch.nn.utils.parametrizations.weight_norm instead")
    raise Unmatched(f"its weight {path!r} is not a parameter, but a buffer or set by a hook")


def _find_computed_source(weight: fx.Node, module: nn.Module, layout_of: LayoutOf) -> Source:
    """Find the parameter behind a weight that is computed in the graph."""
    ancestors = _ancestors(weight)
    if any(node.op == "placeholder" for node in ancestors):
        raise Unmatched("its weight depends on the input of the layer")
    compute = _weight_module(weight, ancestors, module)
    with torch.no_grad():
        value = compute()
        parameters = dict(compute.named_parameters(remove_duplicate=False))
        alike = [name for name, parameter in parameters.items() if parameter.shape == value.shape]
        if len(alike) != 1:
            raise Unmatched(f"its weight is computed from {len(alike)} parameters of its shape ({sorted(parameters)})")
        (path,) = alike
        if not _keeps_features(compute, path, value, layout_of(value.shape)):
            raise Unmatched(f"its weight is computed from {path!r}, but with the features in other places")
    return _located(path, ancestors, parameters[path])


def _located(path: str, ancestors: list[fx.Node], parameter: Tensor) -> Source:
    """Return the source whose parameter is at `path`, with the node that reads it."""
    for node in ancestors:
        between = frozenset(ancestors) - {node}
        if node.op == "get_attr" and node.target == path:
            return Source(path, node, "", between, parameter)
        if node.op == "call_module" and path.startswith(f"{node.target}."):
            return Source(path, node, path.removeprefix(f"{node.target}."), between | {node}, parameter)
    raise Unmatched(f"its weight is computed from {path!r} in a way that the graph does not show")


def _ancestors(node: fx.Node) -> list[fx.Node]:
    """Return the node and all that it is computed from, in the order of the graph."""
    found, waiting = {node}, [node]
    while waiting:
        new = [n for n in waiting.pop().all_input_nodes if n not in found]
        found.update(new)
        waiting += new
    return [n for n in node.graph.nodes if n in found]


def _weight_module(weight: fx.Node, ancestors: list[fx.Node], module: nn.Module) -> fx.GraphModule:
    """Return a module without inputs that computes the weight, in eval mode."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in ancestors:
        copies[node] = graph.node_copy(node, lambda n: copies[n])
    graph.output(copies[weight])
    return fx.GraphModule(module, graph).eval()


def _keeps_features(compute: nn.Module, path: str, value: Tensor, layout: Layout) -> bool:
    """Tell whether scaling the parameter's input features scales the weight's, as far as a row-wise norm lets it."""
    parameter = compute.get_parameter(path)
    if parameter.is_meta:
        return True
    scales = torch.linspace(0.9, 1.1, layout.d, device=value.device, dtype=value.dtype)
    scaled_parameter = unstack_weight(stack_weight(parameter, layout) * scales, parameter.shape, layout)
    scaled = stack_weight(functional_call(compute, {path: scaled_parameter}, ()), layout)
    rows = stack_weight(value, layout)
    moved, unmoved = (_distance_to_rows(scaled, base) for base in (rows * scales, rows))
    return bool(moved <= 0.5 * unmoved + 1e-5 * scaled.norm())


def _distance_to_rows(rows: Tensor, base: Tensor) -> Tensor:
    """Return how far `rows` are from the lines along the same rows of `base`."""
    rows, base = (t - t.mean(-1, keepdim=True) for t in (rows, base))  # a standardised weight has its mean taken out
    length = (rows * base).sum(-1, keepdim=True) / base.square().sum(-1, keepdim=True).clamp(min=1e-30)
    distance: Tensor = (rows - length * base).norm()
    return distance
