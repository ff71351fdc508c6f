"""Weights: every parameter that some forward uses as the weight of a conv or linear, and all that uses it.

A weight is one *parameter*, or some rows of a packed one, with all calls of it: a layer called twice, or two layers
with tied weights, have one weight.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from torch import Tensor, fx, nn

from decorr_fx.ops.calls import layer_geometry, layer_signature
from decorr_fx.ops.layout import Layout
from decorr_fx.ops.sample import ConvGeometry
from decorr_fx.passes.capture.code import parameters_in_forward
from decorr_fx.passes.capture.trace import Traced, has_own_forward
from decorr_fx.passes.match.calls import (
    Use,
    is_other_product,
    is_unwatched,
    match_call,
    name_of_call,
    parameters_of,
    signature_of,
)
from decorr_fx.passes.match.source import Unmatched
from decorr_fx.runtime.site.spec import SkippedRecord

UNKNOWN_PRODUCT = (
    "it multiplies by a parameter, not as a linear does: give its layer an adapter (decorr_fx.register_layer)"
)


@dataclass(frozen=True)
class FoundWeight:
    """A weight and what is known of its use.

    Attributes:
        piece: the module that calls it, or the layer that it belongs to.
        path: of the parameter, from there.
        parameter: the parameter.
        rows: from where to where, of a packed parameter.
        kind: `linear`, `conv2d`, ...
        layout: how it is read as rows.
        geometry: of its calls; None for a linear, and where it is computed.
        uses: its calls in graphs; none where the forward could not be seen to call it.
        others: modules that make another product of it, or of a part of it, with the path of the parameter from there.
    """

    piece: str
    path: str
    parameter: Tensor
    rows: tuple[int, int] | None
    kind: str
    layout: Layout
    geometry: ConvGeometry | None
    uses: tuple[Use, ...] = ()
    others: tuple[tuple[str, str], ...] = ()

    @property
    def fqn(self) -> str:
        """The name of the layer that a person would give: `fc` for `fc.weight`; of rows `attn.in_proj_weight[0:64]`."""
        parameter = f"{self.piece}.{self.path}" if self.piece else self.path
        layer = re.sub(r"(^|\.)(weight|parametrizations\.weight\..*)$", "", parameter)
        return layer if self.rows is None else f"{layer}[{self.rows[0]}:{self.rows[1]}]"

    @property
    def places(self) -> list[tuple[str, str]]:
        """The modules that call it, each with the path of the parameter from there; first the one that holds it."""
        called = [(use.piece, use.call.source.path) for use in self.uses] or [(self.piece, self.path)]
        return list(dict.fromkeys([*called, *self.others]))


def find_weights(traced: Traced) -> tuple[list[FoundWeight], list[SkippedRecord]]:
    """Return the weights of all graphs, and the calls that have none with the reason."""
    found: dict[tuple[int, object], list[Use]] = {}
    unmatched: list[tuple[SkippedRecord, dict[int, tuple[str, str]]]] = []
    for piece, number, node in _nodes(traced):
        module = traced.scratch.get_submodule(piece)
        signature = signature_of(node, module)
        if signature is None:
            if is_other_product(node, module):
                record = SkippedRecord(piece, name_of_call(node), UNKNOWN_PRODUCT)
                unmatched.append((record, _multiplied(piece, node, module)))
            continue
        try:
            use = Use(piece, number, match_call(node, module))
            found.setdefault((id(use.call.source.parameter), use.call.source.rows), []).append(use)
        except Unmatched as reason:
            record = SkippedRecord(piece, signature.kind, str(reason))
            unmatched.append((record, _multiplied(piece, node, module)))
    weights = _without_overlaps([_of_uses(uses) for uses in found.values()])
    known = {id(weight.parameter) for weight in weights}
    weights += [weight for weight in _of_types(traced) if id(weight.parameter) not in known]
    return _with_others(weights, unmatched, _read_by_code(traced))


def _multiplied(piece: str, node: fx.Node, module: nn.Module) -> dict[int, tuple[str, str]]:
    """Return the parameters that are watched for in a product that is not matched, by their ids."""
    if is_unwatched(node):
        return {}
    known = dict(module.named_parameters(remove_duplicate=False))
    matrices = {str(read.target) for argument in node.all_input_nodes for read in parameters_of(argument, module)}
    return {id(known[path]): (piece, path) for path in matrices if path in known}


def _read_by_code(traced: Traced) -> Iterator[tuple[int, tuple[str, str]]]:
    """Yield what the code names of forwards that could be traced in part only: (id of a parameter, place)."""
    for piece, graphs in traced.graphs.items():
        module = traced.scratch.get_submodule(piece)
        if graphs.reason and has_own_forward(module) and piece not in traced.adapters:
            paths = {id(p): path for path, p in module.named_parameters() if p.dim() > 1}
            named = dict.fromkeys(id(parameter) for parameter in parameters_in_forward(module))
            yield from ((key, (piece, paths[key])) for key in named if key in paths)


def _with_others(
    weights: list[FoundWeight],
    unmatched: list[tuple[SkippedRecord, dict[int, tuple[str, str]]]],
    read: Iterable[tuple[int, tuple[str, str]]],
) -> tuple[list[FoundWeight], list[SkippedRecord]]:
    """Let weights know of products that are not matched, and return what is no product of theirs as skipped."""
    known = {id(weight.parameter) for weight in weights}
    skipped = [record for record, multiplied in unmatched if not multiplied or not known.issuperset(multiplied)]
    others: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for key, place in (*(item for _, multiplied in unmatched for item in multiplied.items()), *read):
        others[key].append(place)
    weights = [replace(weight, others=(*weight.others, *others.get(id(weight.parameter), ()))) for weight in weights]
    return weights, list(dict.fromkeys(skipped))  # the graphs of a module give the same reasons


def _nodes(traced: Traced) -> Iterator[tuple[str, int, fx.Node]]:
    """Yield (piece, number of the graph, node) of every node that is known."""
    for piece, graphs in traced.graphs.items():
        for number, graph in enumerate(graphs.graphs):
            yield from ((piece, number, node) for node in graph.nodes)


def _of_uses(uses: list[Use]) -> FoundWeight:
    uses = sorted(uses, key=lambda use: use.call.source.path.count("."))  # by the layer that holds it first
    first = uses[0].call
    source = first.source
    return FoundWeight(
        uses[0].piece, source.path, source.parameter, source.rows, first.kind, first.layout, first.geometry, tuple(uses)
    )


def _without_overlaps(weights: list[FoundWeight]) -> list[FoundWeight]:
    """Return the weights without those of which rows belong to a longer one: a row has one R."""
    kept: list[FoundWeight] = []
    for weight in sorted(weights, key=lambda weight: -weight.layout.size):
        longer = next((i for i, other in enumerate(kept) if _overlap(weight, other)), None)
        if longer is None:
            kept.append(weight)
        else:
            kept[longer] = replace(kept[longer], others=(*kept[longer].others, *weight.places))
    order = {(id(weight.parameter), weight.rows): number for number, weight in enumerate(weights)}
    return sorted(kept, key=lambda weight: order[id(weight.parameter), weight.rows])


def _overlap(one: FoundWeight, other: FoundWeight) -> bool:
    if one.parameter is not other.parameter or one.rows is None or other.rows is None:
        return one.parameter is other.parameter
    return one.rows[0] < other.rows[1] and other.rows[0] < one.rows[1]


def _of_types(traced: Traced) -> Iterator[FoundWeight]:
    """Yield the weights of conv and linear layers whose forward cannot be seen to call them."""
    for fqn in traced.graphs:
        module = traced.scratch.get_submodule(fqn)
        signature, parameter = layer_signature(module), module._parameters.get("weight")
        if signature is not None and parameter is not None:
            layout = signature.layout(int(getattr(module, "groups", 1)), parameter.shape)
            yield FoundWeight(fqn, "weight", parameter, None, signature.kind, layout, layer_geometry(module))
