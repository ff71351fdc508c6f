"""Weights: every parameter that some forward uses as the weight of a conv or linear, and all that uses it.

A weight is one *parameter*, or some rows of a packed one, with all calls of it: a layer called twice, or two layers
with tied weights, have one weight.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from decorr_fx.ops.calls import CALLS, Signature
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
class Place:
    """Where a parameter is: its path from the module `piece`."""

    piece: str
    path: str

    @property
    def fqn(self) -> str:
        """Name of the parameter in the whole model."""
        return f"{self.piece}.{self.path}" if self.piece else self.path


@dataclass(frozen=True)
class FoundWeight:
    """A weight and what is known of its use.

    Attributes:
        place: where it is found; the piece is the module that calls it, or the layer that it belongs to.
        parameter: the parameter.
        rows: from where to where, of a packed parameter.
        kind: `linear`, `conv2d`, ...
        layout: how it is read as rows.
        geometry: of its calls; None for a linear.
        uses: its calls in graphs, which are to be rewritten.
        glimpsed: its calls in glimpses, which the forward makes as it is.
    """

    place: Place
    parameter: Tensor
    rows: tuple[int, int] | None
    kind: str
    layout: Layout
    geometry: ConvGeometry | None
    uses: tuple[Use, ...] = ()
    glimpsed: tuple[Use, ...] = ()

    @property
    def fqn(self) -> str:
        """The name of the layer that a person would give: `fc` for `fc.weight`; of rows `attn.in_proj_weight[0:64]`."""
        layer = re.sub(r"(^|\.)(weight|parametrizations\.weight\..*)$", "", self.place.fqn)
        return layer if self.rows is None else f"{layer}[{self.rows[0]}:{self.rows[1]}]"

    @property
    def places(self) -> list[Place]:
        """All places of the parameter at which graphs call it, or the one place where it is."""
        return list(dict.fromkeys(Place(use.piece, use.call.source.path) for use in self.uses)) or [self.place]


def find_weights(traced: Traced) -> tuple[list[FoundWeight], list[SkippedRecord]]:
    """Return the weights of all graphs and glimpses, and the calls that have none with the reason."""
    found: dict[tuple[int, object], list[Use]] = {}
    skipped: list[SkippedRecord] = []
    glimpsed: dict[int, list[Use]] = {}
    for piece, training, node, faithful in _nodes(traced):
        module = traced.scratch.get_submodule(piece)
        signature = signature_of(node, module)
        if signature is None:
            if is_other_product(node, module):
                skipped.append(SkippedRecord(piece, name_of_call(node), UNKNOWN_PRODUCT))
            continue
        try:
            use = Use(piece, training, match_call(node, module))
            if faithful:
                found.setdefault((id(use.call.source.parameter), use.call.source.rows), []).append(use)
            elif use.call.source.rows is None:
                glimpsed.setdefault(id(use.call.source.parameter), []).append(use)
            else:
                raise Unmatched("its weight is packed with others in a forward that cannot be traced")
        except Unmatched as reason:
            skipped.append(SkippedRecord(piece, signature.kind, str(reason)))
    weights = [_of_uses(uses, glimpsed.pop(id(uses[0].call.source.parameter), [])) for uses in found.values()]
    weights += [_of_glimpses(uses) for uses in glimpsed.values()]
    known = {id(weight.parameter) for weight in weights}
    weights += [weight for weight in _of_types(traced) if id(weight.parameter) not in known]
    return weights, list(dict.fromkeys(skipped))  # train and eval graph, and all glimpses, give the same reasons


def _nodes(traced: Traced) -> Iterator[tuple[str, bool, fx.Node, bool]]:
    """Yield (piece, training, node, whether the graph is faithful) of every node that is known."""
    for piece, graphs in traced.graphs.items():
        for training, graph in ((True, graphs.train), (False, graphs.evaluate)):
            yield from ((piece, training, node, True) for node in graph.nodes)
    for piece, glimpse in traced.glimpses.items():
        for graph in glimpse.graphs:
            yield from ((piece, True, node, False) for node in graph.nodes)


def _of_uses(uses: list[Use], glimpsed: list[Use]) -> FoundWeight:
    first = uses[0].call
    place = Place(uses[0].piece, first.source.path)
    return FoundWeight(
        place, first.source.parameter, first.source.rows, first.kind, first.layout, first.geometry,
        tuple(uses), tuple(glimpsed),
    )  # fmt: skip


def _of_glimpses(uses: list[Use]) -> FoundWeight:
    first = uses[0].call
    place = Place(uses[0].piece, first.source.path)
    return FoundWeight(place, first.source.parameter, None, first.kind, first.layout, first.geometry, (), tuple(uses))


def _of_types(traced: Traced) -> Iterator[FoundWeight]:
    """Yield the weights of conv and linear layers whose forward cannot be seen to call them."""
    for fqn in traced.glimpses:
        module = traced.scratch.get_submodule(fqn)
        signature = _signature_of_type(module)
        parameter = module._parameters.get("weight")
        if signature is None or parameter is None:
            continue
        groups = getattr(module, "groups", 1)
        settings = {name: getattr(module, name, None) for name in ("stride", "padding", "dilation")}
        layout, geometry = signature.layout(groups, parameter.shape), signature.geometry(settings, parameter.shape)
        yield FoundWeight(Place(fqn, "weight"), parameter, None, signature.kind, layout, geometry)


def _signature_of_type(module: nn.Module) -> Signature | None:
    if isinstance(module, nn.Linear):
        return CALLS[F.linear]
    if not isinstance(module, _ConvNd):
        return None
    kind = f"conv{'_transpose' if module.transposed else ''}{len(module.kernel_size)}d"
    return CALLS[getattr(F, kind)]
