"""Weights: every parameter that some forward uses as the weight of a conv or linear, and all that uses it.

A weight is one *parameter*, or some rows of a packed one, with all calls of it: a layer called twice, or two layers
with tied weights, have one weight.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, fx

from decorr_fx.ops.calls import layer_geometry, layer_signature
from decorr_fx.ops.layout import Layout
from decorr_fx.ops.sample import ConvGeometry
from decorr_fx.passes.capture.trace import Traced
from decorr_fx.passes.match.calls import Use, is_other_product, match_call, name_of_call, signature_of
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
    """

    piece: str
    path: str
    parameter: Tensor
    rows: tuple[int, int] | None
    kind: str
    layout: Layout
    geometry: ConvGeometry | None
    uses: tuple[Use, ...] = ()

    @property
    def fqn(self) -> str:
        """The name of the layer that a person would give: `fc` for `fc.weight`; of rows `attn.in_proj_weight[0:64]`."""
        parameter = f"{self.piece}.{self.path}" if self.piece else self.path
        layer = re.sub(r"(^|\.)(weight|parametrizations\.weight\..*)$", "", parameter)
        return layer if self.rows is None else f"{layer}[{self.rows[0]}:{self.rows[1]}]"

    @property
    def places(self) -> list[tuple[str, str]]:
        """The modules that call it, each with the path of the parameter from there."""
        return list(dict.fromkeys((use.piece, use.call.source.path) for use in self.uses)) or [(self.piece, self.path)]


def find_weights(traced: Traced) -> tuple[list[FoundWeight], list[SkippedRecord]]:
    """Return the weights of all graphs, and the calls that have none with the reason."""
    found: dict[tuple[int, object], list[Use]] = {}
    skipped: list[SkippedRecord] = []
    for piece, number, node in _nodes(traced):
        module = traced.scratch.get_submodule(piece)
        signature = signature_of(node, module)
        if signature is None:
            if is_other_product(node, module):
                skipped.append(SkippedRecord(piece, name_of_call(node), UNKNOWN_PRODUCT))
            continue
        try:
            use = Use(piece, number, match_call(node, module))
            found.setdefault((id(use.call.source.parameter), use.call.source.rows), []).append(use)
        except Unmatched as reason:
            skipped.append(SkippedRecord(piece, signature.kind, str(reason)))
    weights = [_of_uses(uses) for uses in found.values()]
    known = {id(weight.parameter) for weight in weights}
    weights += [weight for weight in _of_types(traced) if id(weight.parameter) not in known]
    return weights, list(dict.fromkeys(skipped))  # the graphs of a module give the same reasons


def _nodes(traced: Traced) -> Iterator[tuple[str, int, fx.Node]]:
    """Yield (piece, number of the graph, node) of every node that is known."""
    for piece, graphs in traced.graphs.items():
        for number, graph in enumerate(graphs.graphs):
            yield from ((piece, number, node) for node in graph.nodes)


def _of_uses(uses: list[Use]) -> FoundWeight:
    first = uses[0].call
    source = first.source
    return FoundWeight(
        uses[0].piece, source.path, source.parameter, source.rows, first.kind, first.layout, first.geometry, tuple(uses)
    )


def _of_types(traced: Traced) -> Iterator[FoundWeight]:
    """Yield the weights of conv and linear layers whose forward cannot be seen to call them."""
    for fqn in traced.graphs:
        module = traced.scratch.get_submodule(fqn)
        signature, parameter = layer_signature(module), module._parameters.get("weight")
        if signature is not None and parameter is not None:
            layout = signature.layout(int(getattr(module, "groups", 1)), parameter.shape)
            yield FoundWeight(fqn, "weight", parameter, None, signature.kind, layout, layer_geometry(module))
