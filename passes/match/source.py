"""Sources: the parameter that the weight of a call comes from.

A weight is followed back to the one parameter in its own shape: the parameter itself or some of its rows, the `v` of a
weight norm, the raw weight of a standardised or spectral-normed convolution, the transpose of a weight that is stored
with its inputs first. It is the parameter that an optimizer moves, so it is the one that R belongs to.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from decorr_fx.inputs import random_numbers_kept
from decorr_fx.ops.layout import Layout, stack_weight, unstack_weight

LayoutOf = Callable[[torch.Size], Layout]


class Unmatched(Exception):  # noqa: N818 - not an error: the reason why a call cannot be a site
    """Why a call of a conv or linear cannot be decorrelated."""


@dataclass(frozen=True)
class Source:
    """Where a weight comes from: the parameter at `path`, as `node` gives it.

    `node` is a `get_attr`, or the call of a child module whose parameter `inner` it is, or what takes the `rows` (from,
    to) of a packed parameter. `between` holds all other nodes from the parameter to the weight. `layout` is how the
    parameter is stored, where that is not as the weight is.
    """

    path: str
    node: fx.Node
    parameter: Tensor
    layout: Layout
    inner: str = ""
    between: frozenset[fx.Node] = frozenset()
    rows: tuple[int, int] | None = None

    @property
    def shape(self) -> torch.Size:
        """Shape of the parameter, or of the rows of it that are used."""
        shape = self.parameter.shape
        return shape if self.rows is None else torch.Size((self.rows[1] - self.rows[0], *shape[1:]))


def find_source(weight: Any, module: nn.Module, layout_of: LayoutOf) -> Source:
    """Return where a weight in a graph of `module` comes from.

    Raises:
        Unmatched: it comes from no parameter that R could be applied to; the message is the reason.
    """
    if not isinstance(weight, fx.Node):
        raise Unmatched("its weight is not a parameter")
    if weight.op == "get_attr":
        path = str(weight.target)
        parameter = _require_parameter(module, path)
        if parameter.dim() < 2:
            raise Unmatched(f"its weight {path!r} has fewer than two dimensions")
        return Source(path, weight, parameter, layout_of(parameter.shape))
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
    ancestors = ancestors_of(weight)
    if any(node.op == "placeholder" for node in ancestors):
        raise Unmatched("its weight depends on the input of the layer")
    compute = _weight_module(weight, ancestors, module)
    with torch.no_grad():
        value = _computed(compute)
        if value.dim() < 2:
            raise Unmatched("its weight has fewer than two dimensions")
        parameters = dict(compute.named_parameters(remove_duplicate=False))
        layout = layout_of(value.shape)
        part = _rows_of(compute, parameters, value)
        if part is not None:
            path, rows = part
            return Source(path, weight, parameters[path], layout, between=frozenset(ancestors) - {weight}, rows=rows)
        path, stored = _stored(compute, parameters, value, layout)
    return _located(path, ancestors, parameters[path], stored)


def _computed(compute: nn.Module) -> Tensor:
    try:
        value = _run(compute, {})
    except Exception as error:  # whatever the code makes of what a glimpse has seen of it
        raise Unmatched(f"its weight cannot be computed: {type(error).__name__}: {error}".splitlines()[0]) from None
    if not isinstance(value, Tensor):
        raise Unmatched("its weight is no tensor")
    return value


def _run(compute: nn.Module, parameters: Mapping[str, Tensor]) -> Any:
    """Compute the weight with other parameters; what is random, as dropout of a weight, is the same each time."""
    with random_numbers_kept(compute):
        return functional_call(compute, dict(parameters), ())


def _rows_of(compute: nn.Module, parameters: Mapping[str, Tensor], value: Tensor) -> tuple[str, tuple[int, int]] | None:
    """Return the parameter that the weight is some rows of, and from where to where; None if it is no such thing.

    It is tried with the numbers of the rows in the place of their values.
    """
    for path, parameter in parameters.items():
        longer = parameter.shape[1:] == value.shape[1:] and len(parameter) > len(value)
        if not longer:
            continue
        device = torch.device("cpu") if parameter.is_meta else parameter.device
        numbers = torch.arange(len(parameter), device=device, dtype=torch.float64)
        numbers = numbers.reshape(-1, *[1] * (parameter.dim() - 1)).expand(parameter.shape)
        try:
            got = _run(compute, {path: numbers})
        except RuntimeError:  # something else is computed with it, of another type or device: these are no plain rows
            continue
        start = int(got.flatten()[0])
        if torch.equal(got, numbers[start : start + len(value)]):
            return path, (start, start + len(value))
    return None


def _stored(compute: nn.Module, parameters: Mapping[str, Tensor], value: Tensor, layout: Layout) -> tuple[str, Layout]:
    """Return the parameter that holds the features of the weight where `layout` has them, or has them transposed."""
    flipped = replace(layout, transposed=not layout.transposed) if value.dim() == 2 else layout
    shapes = {value.shape: layout} if value.dim() != 2 else {value.shape: layout, value.shape[::-1]: flipped}
    alike = [path for path, parameter in parameters.items() if parameter.shape in shapes]
    if len(alike) != 1:
        raise Unmatched(f"its weight is computed from {len(alike)} parameters of its shape ({sorted(parameters)})")
    (path,) = alike
    shape = parameters[path].shape
    candidates = [layout] if shape == value.shape else []
    candidates += [flipped] if value.dim() == 2 and shape == value.shape[::-1] else []
    for stored in candidates:
        if _keeps_features(compute, path, value, layout, stored):
            return path, stored
    raise Unmatched(f"its weight is computed from {path!r}, but with the features in other places")


def _located(path: str, ancestors: list[fx.Node], parameter: Tensor, layout: Layout) -> Source:
    """Return the source whose parameter is at `path`, with the node that reads it."""
    for node in ancestors:
        between = frozenset(ancestors) - {node}
        if node.op == "get_attr" and node.target == path:
            return Source(path, node, parameter, layout, between=between)
        if node.op == "call_module" and path.startswith(f"{node.target}."):
            return Source(path, node, parameter, layout, path.removeprefix(f"{node.target}."), between | {node})
    raise Unmatched(f"its weight is computed from {path!r} in a way that the graph does not show")


def ancestors_of(node: fx.Node) -> list[fx.Node]:
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
    compute = fx.GraphModule(module, graph)
    for part in compute.modules():
        part.training = False  # past a `train()` that a user wrote
    return compute


def _keeps_features(compute: nn.Module, path: str, value: Tensor, layout: Layout, stored: Layout) -> bool:
    """Tell whether scaling the parameter's input features scales the weight's, as far as a row-wise norm lets it."""
    parameter = compute.get_parameter(path)
    if parameter.is_meta:
        return True
    scales = torch.linspace(0.9, 1.1, layout.d, device=value.device, dtype=value.dtype)
    scaled_parameter = unstack_weight(stack_weight(parameter, stored) * scales, parameter.shape, stored)
    scaled = stack_weight(_run(compute, {path: scaled_parameter}), layout)
    rows = stack_weight(value, layout)
    moved, unmoved = (_distance_to_rows(scaled, base) for base in (rows * scales, rows))
    return bool(moved <= 0.5 * unmoved + 1e-5 * scaled.norm())


def _distance_to_rows(rows: Tensor, base: Tensor) -> Tensor:
    """Return how far `rows` are from the lines along the same rows of `base`."""
    rows, base = (t - t.mean(-1, keepdim=True) for t in (rows, base))  # a standardised weight has its mean taken out
    length = (rows * base).sum(-1, keepdim=True) / base.square().sum(-1, keepdim=True).clamp(min=1e-30)
    distance: Tensor = (rows - length * base).norm()
    return distance
